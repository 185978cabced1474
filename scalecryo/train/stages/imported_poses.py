"""Half-maps at the poses that came with the particles: where their refinement starts."""

from collections.abc import Mapping
from typing import Any

from scalecryo.distributed.world import World
from scalecryo.map.backprojection import Backprojection
from scalecryo.physics.image_formation import ctf_weighted
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.runs.monitor import PassReport
from scalecryo.train.owned_sums import OwnedSums
from scalecryo.train.particle_source import BatchRequest, RunContext
from scalecryo.train.stage import Learned
from scalecryo.train.stages.bootstrap import first_references
from scalecryo.train.stages.checks import check_contrast
from scalecryo.train.stages.on_axes import put_on_axes, symmetric_where_on_axes

LEVEL = 64  # smallest box at which imported poses are put together, where the store has it
BATCH = 1024


class ImportedPoses:
    """One pass that inserts every training particle at the pose that it came with."""

    name = "imported poses"

    def __init__(self, context: RunContext, learned: Learned) -> None:
        """
        Args:
            context: of the run.
            learned: gets the references, and the table's poses as what is known of every particle.
        """
        self._context, self._learned = context, learned
        learned.particles.load_table(context.store)
        fits = [level for level in context.store.levels if level >= LEVEL]
        self._pixels = context.pixels(min(fits) if fits else max(context.store.levels))
        self._sums = Backprojection(self._pixels.box_size, device=context.device)
        self._images = 0

    def request(self) -> BatchRequest:
        """The training particles in their order."""
        return BatchRequest((self._pixels,), BATCH, shuffled=False)

    def step(self, *images: ParticleImages) -> None:
        """Insert a batch."""
        (batch,) = images
        known, _ = self._learned.particles.read(batch.rows)
        shift_px, weight = known.shift_px(batch.pixel_size), self._context.chosen(batch.rows)
        weighted = ctf_weighted(batch.transforms, batch.ctf)
        self._sums.add(weighted, known.rotation, shift_px, weight, batch.half, batch.pixels)
        self._images += len(batch)

    def finish_pass(self, world: World) -> PassReport:
        """Solve both halves. Collective.

        Raises:
            TrainingError: the contrast is inverted.
        """
        # Under a point group each half's images are compared with the other half's map: one worker needs both.
        owned = OwnedSums(self._sums, world, joined=self._context.point_group is not None)
        owned.reduce_(self._pixels.radius_limit)
        maps = owned.solve()[0]
        check_contrast(maps.mean(0), self._context.store.url)
        self._learned.references = first_references("imported poses", maps, self._context)
        if symmetric_where_on_axes(owned, self._context, self._learned.references):
            self._learned.references = first_references("imported poses", owned.solve()[0], self._context)
        else:
            put_on_axes(self._context, self._learned)
        return PassReport("imported poses: first maps", self._images, checkpoint=False)

    def done(self) -> bool:
        """Whether there are references."""
        return self._learned.references is not None

    def state_dict(self) -> dict[str, Any]:
        """Nothing: it is one pass."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to take up."""
