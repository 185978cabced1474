"""Particles of another store in the model of variety that a run has learnt: one E-step each, where they were posed."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from scalecryo.distributed.world import World
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.runs.component_results import States, write_placed
from scalecryo.runs.folder import RunFolder
from scalecryo.runs.monitor import PassReport
from scalecryo.train.component_model import ComponentModel
from scalecryo.train.latent_training import agreement, encoded, load_encoder, moments
from scalecryo.train.particle_coordinates import coordinate_table, note_coordinates
from scalecryo.train.particle_source import BatchRequest, RunContext
from scalecryo.train.posed_images import PosedImages
from scalecryo.train.stage import Learned
from scalecryo.train.stages.component_stage import posed_parts
from scalecryo.train.stages.components import STATE_FILE
from scalecryo.train.stages.coordinates import BATCH, pixels_of
from scalecryo.train.state_poses import refine_with_states

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
        self._encoder = load_encoder(context.run, context.device)
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
        assert self._learned.posed is not None, "the final pass comes first"
        self._learned.posed.begin("poses_assigned")
        self._compared = torch.zeros(2, 6, model.count, dtype=torch.float64, device=context.device)
        self._images = 0
        return BatchRequest((self._pixels,), BATCH, shuffled=False, training_rows=False)

    @torch.no_grad()
    def step(self, *images: ParticleImages) -> None:
        """E-step alone, with the components of both halves together."""
        model = self._model
        kept = self._learned.posed
        assert kept is not None, "the final pass comes first"
        for posed in posed_parts(images[0], self._context, self._learned, model.count):
            if model.rounds:  # as those were that the model learnt from
                posed, _ = refine_with_states(model, posed, fit_shift=self._context.fit_shift, which="joint")
                kept.note(posed.images.rows, posed.poses, posed.half)
            found = model.expect(posed, "joint").latents
            note_coordinates(self._table, posed.images.rows, found)
            self._compare(posed, found.mean)
            self._images += len(posed.images)

    def finish_pass(self, world: World) -> PassReport:
        """Write the coordinates. Collective."""
        world.all_reduce_(self._compared)
        self._table.commit(world)
        kept, refined = self._learned.posed, self._model.rounds > 0
        assert kept is not None, "the final pass comes first"
        kept.commit(world)
        if world.is_leader:
            found, poses = self._table.columns(), kept.all()[0] if refined else None
            write_placed(self._out, self._context.store, found["z"], found["sd"], self._states, poses)
            self._table.remove_pass()
            if refined:
                kept.remove_pass()
        self._done = True
        told = f"components: {self._images:,} particles placed{self._told()}"
        return PassReport(told, self._images, checkpoint=False)

    def done(self) -> bool:
        """Whether the pass was made."""
        return self._done

    def state_dict(self) -> dict[str, Any]:
        """Nothing: it is one pass."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to take up."""

    def _compare(self, posed: PosedImages, exact: Tensor) -> None:
        """What the latent encoder says at the pose found, and at the pose encoder's own: one forward pass, no map."""
        encoder, learned = self._encoder, self._learned
        if encoder is None:
            return
        self._compared[0] += moments(posed.weight, encoded(encoder, posed, self._model)[0], exact)
        if learned.encoder is not None and learned.references is not None:
            own = learned.encoder.own_poses(posed.images, learned.references)
            alone = encoded(encoder, posed.at(own.rotation, own.shift), self._model)[0]
            self._compared[1] += moments(posed.weight, alone, exact)

    def _told(self) -> str:
        """How the encoder's coordinates correlate with the exact ones."""
        told, passing = "", max(self._states.passing, 1)
        for sums, where in zip(self._compared, ("at these poses", "at its own ones"), strict=True):
            if bool(sums[0].amax() > 0):  # host sync
                correlation = " ".join(f"{value:.2f}" for value in agreement(sums)[0][:passing].tolist())
                told += f"{', and' if told else '; the encoder gives coordinates that correlate with these'} by "
                told += f"{correlation} {where}"
        return told
