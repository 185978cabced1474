"""The end of a run as the writers of files and of the report see it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from scalecryo.config import Config
from scalecryo.data.storage.store import ParticleStore
from scalecryo.evaluate.cones import ConicalFsc
from scalecryo.evaluate.report.surface import GRID, Surface
from scalecryo.evaluate.slice_coverage import slice_coverage
from scalecryo.map.image_signal import ImageSignal
from scalecryo.map.postprocess import FinalMap
from scalecryo.map.reference import ReferenceSet
from scalecryo.physics.fsc import resolution
from scalecryo.physics.mask import density_radius
from scalecryo.physics.poses import PoseEstimates
from scalecryo.runs.class_results import ClassSummary
from scalecryo.runs.folder import RunFolder
from scalecryo.runs.pictures import Examples

SIGNAL, HALF = 0.143, 0.5
INDEPENDENT = ("guided", "poses", "autoencoder")  # recipes that pose each half against its own map
SHOWN = 0.5  # probability that an image shows the particle, from which it counts as kept


@dataclass(frozen=True)
class FinalParticles:
    """Every particle, by row of the store.

    Attributes:
        poses: that the final pass found.
        half: 1 or 2.
        examples: the surest and the least sure images and their predictions.
        notes: what a person should know of the halves and of the start.
        signal: of the images; None: not known.
    """

    poses: PoseEstimates
    half: Int[Tensor, " n"]
    examples: Examples
    notes: tuple[str, ...] = ()
    signal: ImageSignal | None = None

    @property
    def confidence(self) -> Float[Tensor, " n"]:
        """Probability that the image shows the particle, in this pose and not in another mode."""
        return self.poses.confidence * self.poses.particle_probability

    @property
    def classes(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Class of each, from 1, and its probability."""
        return as_numpy(self.poses.class_index) + 1, as_numpy(self.poses.class_probability)


@dataclass(frozen=True, eq=False)
class FinalResults:
    """All that a report tells of.

    Attributes:
        config: of the run.
        store: that it read.
        run: where the results go.
        particles: all of them.
        maps: half-maps of every class, the largest first.
        finals: the finished map of each class.
        cones: correlation of the first class's half-maps by direction.
        classes: what each class is; empty for a run of one.
    """

    config: Config
    store: ParticleStore
    run: RunFolder
    particles: FinalParticles
    maps: ReferenceSet
    finals: Sequence[FinalMap]
    cones: ConicalFsc
    classes: Sequence[ClassSummary] = ()

    @property
    def final(self) -> FinalMap:
        """Of the largest class."""
        return self.finals[0]

    @property
    def pixel_size(self) -> float:
        """Of the maps, Å."""
        return self.maps.pixel_size

    def angstrom(self, threshold: float = SIGNAL) -> float:
        """Resolution of the masked, corrected correlation, Å."""
        return resolution(self.final.fsc_corrected, self.maps.level, self.pixel_size, threshold)[1]

    @cached_property
    def coherent_share(self) -> float | None:
        """Of the signal that right poses of even views would add up, by `ImageSignal`; None: not known."""
        signal = self.particles.signal
        return None if signal is None else signal.coherent_share(self.maps.fsc[0], len(self.particles.poses))

    @cached_property
    def coverage(self) -> float:
        """What the views leave of that signal, by `slice_coverage`; the halves' noises add. 1 where it is not known."""
        if self.particles.signal is None:
            return 1.0
        poses = self.particles.poses
        loss = [1 / slice_coverage(poses.rotation[own], poses.particle_probability[own])
                for own in (self.particles.half == 1, self.particles.half == 2)]  # fmt: skip
        return 2 / sum(loss)

    @cached_property
    def diameter(self) -> float:
        """Of the density within the mask, Å."""
        return 2 * density_radius(self.maps.mean() * self.maps.mask[0]) * self.pixel_size

    @cached_property
    def surface(self) -> Surface:
        """The largest class's map within its mask."""
        return self.class_surface(0, GRID)

    def class_surface(self, number: int, size: int) -> Surface:
        """A class's map within its mask, so many voxels across."""
        return Surface.of_map(self.finals[number].map, self.maps.mask[number], self.pixel_size, size, self.angstrom())

    @cached_property
    def kept(self) -> int:
        """Particles whose image shows the particle more probably than not."""
        return int((self.particles.poses.particle_probability >= SHOWN).sum())  # host sync

    @property
    def has_probability(self) -> bool:
        """Whether the recipe tells how probable a pose is; a model's confidence is a correlation."""
        return self.config.recipe in INDEPENDENT

    @property
    def junk(self) -> float:
        """Share of the images that seem to show no particle; 0 where the recipe does not tell."""
        if not self.has_probability:
            return 0.0
        return 1 - self.kept / max(len(self.particles.poses), 1)

    @property
    def mean_confidence(self) -> float:
        """Mean probability that the image shows the particle in the pose given for it."""
        return float(self.particles.confidence.mean())  # host sync


def as_numpy(tensor: Tensor) -> NDArray:
    """On the host."""
    return tensor.detach().cpu().numpy()
