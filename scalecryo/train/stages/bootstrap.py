"""From random poses to a first map: stochastic expectation maximisation at low resolution.

Each step takes a batch, forms the posterior over a randomly turned grid of rotations (and over shifts where centring
is unknown), and inserts every image at its likeliest poses, weighted, into a map that forgets. The radius marches
from `FIRST_RADIUS` to `LAST_RADIUS` Fourier pixels. Several seeds run side by side on the same batches, each with two
independent half-maps; held-out likelihood picks the best.
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.distributed.world import World
from scalecryo.map.backprojection import MapAccumulator
from scalecryo.map.noise import NoiseSpectrum
from scalecryo.physics.fft import FourierPixels, rfft3_centred
from scalecryo.physics.fourier_slice import gridding_correction
from scalecryo.physics.image_formation import filtered, form_images
from scalecryo.physics.mask import soft_sphere
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.rotation import random_rotations
from scalecryo.physics.so3_grid import so3_grid
from scalecryo.pose.search import Posterior, grid_posterior, templates, turned_grid, with_flips

logger = logging.getLogger(__name__)
FIRST_RADIUS, LAST_RADIUS, MARCH_SHARE = 4.0, 12.0, 0.7
HALF_GRID = 2304
KEEP = 40
DECAY = 0.9
REGULARISATION = 0.05
LEAST_SHARE = 1e-2  # candidates with less posterior mass are not inserted
PADDING = 2.0


@dataclass
class RandomStart:
    """One half-map of one seed while it grows."""

    seed: int
    half: int
    accumulator: MapAccumulator
    evidence: list[float] = field(default_factory=list)

    def transform(self) -> Tensor:
        """Padded transform of the present map, ready to be sliced."""
        return reference_transform(self.accumulator.solve(REGULARISATION), PADDING)


@dataclass(frozen=True)
class FirstMaps:
    """What the bootstrap found: a map a half, at the box it worked in, and how much better than nothing it explains.

    Attributes:
        half_maps: independent maps, not yet aligned with each other.
        gain: mean held-out log-likelihood ratio an image against an empty map, by half.
        gain_error: its standard error.
        all_gains: of every seed, by half.
    """

    half_maps: tuple[Float[Tensor, "n n n"], Float[Tensor, "n n n"]]
    gain: tuple[float, float]
    gain_error: tuple[float, float]
    all_gains: tuple[tuple[float, ...], tuple[float, ...]]


def reference_transform(volume: Float[Tensor, "n n n"], padding: float) -> Tensor:
    """Padded transform of a map inside its sphere, corrected for the slices' trilinear interpolation."""
    box_size = volume.shape[-1]
    window = soft_sphere(box_size, box_size / 2 - 2, edge_px=2, device=volume.device)
    correction = gridding_correction(box_size, padding, volume.device)
    return rfft3_centred(volume * window * correction, int(box_size * padding))


class Bootstrap:
    """Grows `seeds` pairs of half-maps from random poses. Between two steps it can be saved, and taken up again."""

    def __init__(
        self,
        pixels: FourierPixels,
        shift_grid_px: Float[Tensor, "t 2"],
        world: World,
        *,
        seeds: int,
        steps: int,
        seed: int,
    ) -> None:
        """
        Args:
            pixels: that the batches are packed by.
            shift_grid_px: hypotheses for the shift, px of this level.
            world: the workers among whom a batch is split.
            seeds: independent starts.
            steps: batches to learn from; a fifth as many more are read to judge.
            seed: of the first start.
        """
        device = pixels.kx.device
        self.step = 0
        self._pixels, self._shifts, self._world, self._steps = pixels, shift_grid_px, world, steps
        self._grid = so3_grid(HALF_GRID).to(device)
        self._noise = NoiseSpectrum(int(pixels.shell.max()) + 1, device)
        self._starts = [
            RandomStart(seed + number, half, MapAccumulator(pixels.box_size, PADDING, device))
            for number in range(seeds)
            for half in (1, 2)
        ]

    def tensors(self) -> list[Tensor]:
        """What the steps so far have come to; the same on every worker."""
        return [*self._noise.tensors(), *(t for s in self._starts for t in s.accumulator.tensors())]

    def load(self, step: int, tensors: list[Tensor]) -> None:
        """Go on after so many steps."""
        self.step = step
        for own, saved in zip(self.tensors(), tensors, strict=True):
            own.copy_(saved)

    def run(self, batches: Iterator[ParticleImages], after_step: Callable[[], None] = lambda: None) -> FirstMaps:
        """The remaining steps; the best map of each half. Collective.

        Args:
            batches: endless, this worker's share of each global batch, from step `step` on.
            after_step: called after each step.
        """
        while self.step < self._steps:
            self._learn(_learning(next(batches)))
            self.step += 1
            after_step()
        near = self._pixels.prefix(LAST_RADIUS)
        for number in range(max(1, self._steps // 5)):
            self._judge(next(batches), near, self._steps + number)
        return _choose(self._starts, self._world)

    def _learn(self, batch: ParticleImages) -> None:
        """One step of every start, and of the noise that they share; one reduction over the workers."""
        noise = self._noise
        radius = FIRST_RADIUS + (LAST_RADIUS - FIRST_RADIUS) * min(1.0, self.step / (MARCH_SHARE * self._steps))
        near = self._pixels.prefix(radius)
        if self.step == 0:
            noise.add(batch.images, None, self._pixels)
            self._world.all_reduce_(*noise.tensors())
        noise.decay(DECAY)
        residuals = NoiseSpectrum(len(noise.power), near.kx.device)
        # A worker that holds none of a half still takes part in the reduction.
        grown = [self._grow(start, batch, near, residuals) for start in self._starts]
        parts = [*residuals.tensors(), *(part for fresh in grown for part in fresh.within(radius))]
        self._world.all_reduce_(*parts)
        noise.power += parts[0]
        noise.count += parts[1]
        for number, (start, fresh) in enumerate(zip(self._starts, grown, strict=True)):
            fresh.put_within(radius, parts[2 + 2 * number], parts[3 + 2 * number])
            start.accumulator.decay(DECAY)
            start.accumulator.numerator += fresh.numerator
            start.accumulator.denominator += fresh.denominator

    def _grow(
        self, start: RandomStart, batch: ParticleImages, near: FourierPixels, residuals: NoiseSpectrum
    ) -> MapAccumulator:
        """One step of one half-map on this worker: posterior of its images, insertion into a new accumulator."""
        fresh = MapAccumulator(near.box_size, PADDING, near.kx.device)
        images = batch.select(batch.half == start.half).prefix(len(near))
        count = len(images)
        if count and self.step == 0:
            # Other poses on every worker; the turned grids of later steps are the same on all.
            generator = torch.Generator().manual_seed(start.seed + 1009 * self._world.rank)
            rotation = random_rotations(count, generator).to(near.kx.device)
            shift = self._shifts[torch.randint(len(self._shifts), (count,), generator=generator)]
            ones = torch.ones(count, device=near.kx.device)
            fresh.add(filtered(images.images, images.ctf), rotation, shift, ones, near)
        elif count:
            turned, posterior, transform = self._search(start, images, near, self.step)
            mass = (posterior.log_likelihood - posterior.log_likelihood[:, :1]).exp()
            mass = mass / mass.sum(1, keepdim=True)
            rotation, shift = turned[posterior.rotation_index], self._shifts[posterior.shift_index]
            image, candidate = (mass > LEAST_SHARE).nonzero(as_tuple=True)  # host sync: how many are inserted
            chosen = rotation[image, candidate], shift[image, candidate]
            fresh.add(filtered(images.images, images.ctf).select(image), *chosen, mass[image, candidate], near)
            predicted = templates(transform, rotation[:, 0], near, fresh.scale)
            predicted = form_images(predicted, images.ctf, shift[:, 0], near.kx, near.ky, near.box_size)
            residuals.add(images.images - predicted, None, near)
        return fresh

    def _search(
        self, start: RandomStart, images: ParticleImages, near: FourierPixels, step: int
    ) -> tuple[Float[Tensor, "g 3 3"], Posterior, Tensor]:
        """The turned grid, the posterior of a half's images over it, and the transform that it was formed with."""
        # Of the step alone: a run that was taken up again turns its grids alike.
        generator = torch.Generator().manual_seed(1_000_003 * start.seed + 2 * step + start.half)
        half_grid = turned_grid(self._grid, generator)
        transform = start.transform()
        bank = templates(transform, half_grid, near, start.accumulator.scale)
        weight = self._noise.pixel_weight(near)
        posterior = grid_posterior(images.images, images.ctf, weight, bank, self._shifts, near, keep=KEEP)
        return with_flips(half_grid), posterior, transform

    def _judge(self, batch: ParticleImages, near: FourierPixels, step: int) -> None:
        """Note how much better than an empty map each start explains a batch's held-out particles."""
        batch = batch.select(_held_out(batch))
        hypotheses = math.log(2 * len(self._grid) * len(self._shifts))
        for start in self._starts:
            images = batch.select(batch.half == start.half).prefix(len(near))
            if len(images):
                _, posterior, _ = self._search(start, images, near, step)
                start.evidence += (posterior.log_evidence - hypotheses).tolist()


def _held_out(batch: ParticleImages) -> Tensor:
    """A tenth of each half's particles, never learnt from, however often the stream comes round."""
    return (batch.rows // 2) % 10 == 9


def _learning(batch: ParticleImages) -> ParticleImages:
    return batch.select(~_held_out(batch))


def _choose(starts: list[RandomStart], world: World) -> FirstMaps:
    """The seed with the best held-out likelihood, for each half on its own."""
    maps, gains, errors, table = [], [], [], []
    for half in (1, 2):
        own = [s for s in starts if s.half == half]
        sums = torch.tensor([[sum(s.evidence), sum(e * e for e in s.evidence), len(s.evidence)] for s in own],
                            dtype=torch.float64)  # fmt: skip
        world.all_reduce_(sums)
        mean = sums[:, 0] / sums[:, 2]
        spread = (sums[:, 1] / sums[:, 2] - mean.square()).clamp_min(0).sqrt() / sums[:, 2].sqrt()
        best = int(mean.argmax())
        maps.append(own[best].accumulator.solve(REGULARISATION))
        gains.append(float(mean[best]))
        errors.append(float(spread[best]))
        table.append(tuple(mean.tolist()))
        logger.info("bootstrap, half %d: log-likelihood gain an image by seed %s",
                    half, ", ".join(f"{gain:.2f}" for gain in mean.tolist()))  # fmt: skip
    return FirstMaps((maps[0], maps[1]), (gains[0], gains[1]), (errors[0], errors[1]), (table[0], table[1]))
