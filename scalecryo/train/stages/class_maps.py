"""Maps of the classes of one assembly, freed of the poses that they were told apart at (`class_mode = docked`).

A conformation that is far from the common map had wrong poses there: its own first map is smeared, and a refinement
from it stays so. Rounds of the start, in which all poses of all classes are looked at, begin with the classes' maps.
"""

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from scalecryo.distributed.world import World
from scalecryo.map.reference import c_ref, weight_shells
from scalecryo.physics.fft import fourier_resize_3d
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.runs.monitor import PassReport
from scalecryo.train.particle_source import RunContext
from scalecryo.train.stage import Learned
from scalecryo.train.stages.class_start import ClassStart


class ClassMaps(ClassStart):
    """Rounds of a start whose first maps are known."""

    name = "class maps"
    least_rounds, most_rounds = 2, 6
    balanced_rounds = 0
    _begins_with_maps = True

    def __init__(self, context: RunContext, learned: Learned) -> None:
        """
        Args:
            context: of the run.
            learned: the classes' maps; gets better ones.
        """
        super().__init__(context, learned, starts=1)

    def finish_pass(self, world: World) -> PassReport:
        """See `ClassStart`. Nothing is saved: a run that was killed begins again after the common map. Collective."""
        return replace(super().finish_pass(world), checkpoint=False)

    def _begin(self, batch: ParticleImages, world: World) -> None:
        """The noise of the refinement before."""
        assert self._learned.references is not None, "the classes' maps come first"
        found = self._learned.references.level_noise(self._sums.box_size, self._pixels)
        for own, other in zip(self._noise.tensors(), found.tensors(), strict=True):
            own.copy_(other)

    def _solved(self, start: int) -> list[Float[Tensor, "n n n"]]:
        """At first the given maps."""
        references = self._learned.references
        if self._step or references is None:
            return super()._solved(start)
        maps = [weight_shells(references.mean(k), c_ref(references.curve(k))) for k in range(references.classes)]
        return [fourier_resize_3d(volume, self._sums.box_size) for volume in maps]

    def _join_alike(self, world: World) -> bool:
        """None: compositions of one assembly are alike."""
        return False
