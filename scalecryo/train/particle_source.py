"""The training particles as one worker of the guided method reads them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.config import Config
from scalecryo.data.selection.subset import Subset, choose
from scalecryo.data.storage.store import ParticleStore
from scalecryo.data.streaming.stream import Batch, ParticleStream
from scalecryo.distributed.world import World
from scalecryo.physics.fft import FourierPixels
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.pose.search import shift_grid
from scalecryo.train.batches import order_of, stream_of
from scalecryo.train.observed import observe


@dataclass(frozen=True)
class Particles:
    """Where the particles are, which of them take part, and who this worker is."""

    config: Config
    store: ParticleStore
    subset: Subset | None
    world: World
    device: torch.device

    @classmethod
    def of(cls, config: Config, store: ParticleStore, world: World, device: torch.device) -> "Particles":
        """Those of a store that the configuration chooses.

        Raises:
            ConfigError: it chooses none, or by something that cannot be read.
        """
        return cls(config, store, choose(config.train, store), world, device)

    @property
    def rows(self) -> int:
        """The first so many rows of the store may take part."""
        return min(self.config.train.rows or self.store.count, self.store.count)

    @property
    def count(self) -> int:
        """Number of particles that take part."""
        return self.rows if self.subset is None else self.subset.count

    @property
    def levels(self) -> tuple[int, ...]:
        """The store's levels up to train.box."""
        box = self.config.train.box
        return tuple(level for level in self.store.levels if not box or level <= box)

    @property
    def largest_radius(self) -> float:
        """Fourier pixels that are ever refined: just inside the largest level's Nyquist."""
        return max(self.levels) / 2 - 2.0

    @property
    def fit_shift(self) -> bool:
        """Whether shifts are unknown."""
        return not self.config.pose.centred

    def shifts(self, level: int) -> Float[Tensor, "t 2"]:
        """Shift hypotheses in px of a level: none where particles are centred, else a disc, about 1.5 px apart."""
        if not self.fit_shift:
            return torch.zeros(1, 2, device=self.device)
        radius = self.config.guided.shift_radius_a / self.store.level_pixel_size(level)
        return shift_grid(radius, min(1.5, max(radius / 2, 0.5))).to(self.device)

    def stream(self, level: int, batch_size: int, *, epoch: int, skip: int = 0) -> ParticleStream:
        """Batches at a level, over all workers of `batch_size`, from the start of an epoch or `skip` batches later."""
        order = order_of(self.config, self.store, level, batch_size, self.subset)
        start = epoch * order.steps_per_epoch + skip
        return stream_of(self.config, self.store, level, order, self.world, start, self.device)

    def iteration_steps(self, level: int) -> int:
        """Batches of an iteration: one pass, or as many as hold `guided.iteration_particles`."""
        size = self.config.guided.batch_size
        steps = order_of(self.config, self.store, level, size, self.subset).steps_per_epoch
        return min(steps, -(-self.config.guided.iteration_particles // size))

    def observe(self, batch: Batch, level: int, pixels: FourierPixels) -> ParticleImages:
        """A batch as transforms at some Fourier pixels."""
        return observe(batch, self.store, level, pixels, new_halves=self.config.train.half > 0)

    def observed(self, stream: ParticleStream, level: int, pixels: FourierPixels) -> Iterator[ParticleImages]:
        """A stream's batches, endless."""
        for batch in stream:
            yield self.observe(batch, level, pixels)
