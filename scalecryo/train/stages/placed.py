"""Particles of another store in the model of variety that a run has learnt: one E-step each, where they were posed."""

import logging
from collections.abc import Mapping
from typing import Any

import torch

from scalecryo.distributed.world import World
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.runs.component_results import States, write_placed
from scalecryo.runs.folder import RunFolder
from scalecryo.runs.monitor import PassReport
from scalecryo.train.component_model import ComponentModel, PosedImages
from scalecryo.train.particle_source import BatchRequest, RunContext
from scalecryo.train.stage import Learned
from scalecryo.train.stages.components import STATE_FILE
from scalecryo.train.stages.coordinates import BATCH, coordinate_table, note_coordinates, pixels_of

logger = logging.getLogger(__name__)


class PlacedParticles:
    """One pass over the particles that a final pass posed; their coordinates and states go into the table it wrote."""

    name = "coordinates"

    def __init__(self, context: RunContext, learned: Learned, out: RunFolder, model: ComponentModel) -> None:
        """
        Args:
            context: of the run, and of the particles.
            learned: gets the poses before this stage begins.
            out: that the final pass writes to.
            model: what the run learnt of variety.
        """
        self._context, self._learned, self._out, self._model = context, learned, out, model
        self._states = States.of_run(context.run)
        self._images, self._done = 0, False

    @classmethod
    def of(cls, context: RunContext, learned: Learned, out: RunFolder) -> "PlacedParticles | None":
        """None, and a warning, where the run has not learnt its components to the end."""
        found = ComponentModel.load(context, STATE_FILE, None)
        if found is None or not found[0].settled:
            logger.warning(
                "components: not all passes of the run were made: no particle is placed; train --resume first"
            )
            return None
        return cls(context, learned, out, found[0])

    def request(self) -> BatchRequest:
        """Every particle in order."""
        context, model = self._context, self._model
        self._pixels = pixels_of(model, context)
        model.begin(self._pixels)
        self._table = coordinate_table(self._out, context.store.count, model.count)
        self._table.begin("coordinates_assigned")
        self._images = 0
        return BatchRequest((self._pixels,), BATCH, shuffled=False, training_rows=False)

    @torch.no_grad()
    def step(self, *images: ParticleImages) -> None:
        """E-step alone, with the components of both halves together."""
        model = self._model
        for posed in PosedImages.of(images[0], self._context, self._learned, model.count):
            note_coordinates(self._table, posed.images.rows, model.expect(posed, "joint").latents)
            self._images += len(posed.images)

    def finish_pass(self, world: World) -> PassReport:
        """Write the coordinates. Collective."""
        self._table.commit(world)
        if world.is_leader:
            found = self._table.columns()
            write_placed(self._out, self._context.store, found["z"], found["sd"], self._states)
            self._table.remove_pass()
        self._done = True
        return PassReport(f"components: {self._images:,} particles placed", self._images, checkpoint=False)

    def done(self) -> bool:
        """Whether the pass was made."""
        return self._done

    def state_dict(self) -> dict[str, Any]:
        """Nothing: it is one pass."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to take up."""
