"""From random poses to K first maps: stochastic expectation maximisation over class and pose together.

As the start of one map (`bootstrap`), but the posterior of each image spreads over the poses of K maps. Both halves
learn the same K maps, so that classes need not be matched between them; their sums are kept apart, and what they share
tells how far each first map is to be believed. Each half then goes on by itself from there.

A map that is a little better than the others draws all images and becomes better still: with the evidence of tens of
nats that an image has for its pose, all but one class would be lost within the first steps, before any of them is a
structure. So for the first rounds every class gets the same share of the particles, by a prior that follows their
shares; then the prior is the share itself, and a class that explains nothing may become empty.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from scalecryo.distributed.world import World
from scalecryo.errors import TrainingError
from scalecryo.evaluate.align_maps import linear_map
from scalecryo.map.backprojection import Backprojection
from scalecryo.map.noise import NoiseSpectrum
from scalecryo.map.reference import ReferenceSet, reference_transform
from scalecryo.physics.image_formation import ctf_weighted
from scalecryo.physics.mask import centre_of_mass, mask_from_map
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.rotation import random_rotations
from scalecryo.physics.so3_grid import so3_grid
from scalecryo.pose.expectation import Expectation, expected_slices
from scalecryo.pose.search import templates, turned_grid
from scalecryo.runs.monitor import PassReport
from scalecryo.train.particle_source import BatchRequest, RunContext
from scalecryo.train.stage import Learned
from scalecryo.train.stages.bootstrap import (
    DECAY,
    FIRST_REFERENCE_RADIUS,
    HALF_GRID,
    JUDGED,
    NO_SIGNAL_ERRORS,
    RADIUS,
    READ_RADIUS,
    REGULARISATION,
    SAVE_EVERY,
)
from scalecryo.train.stages.checks import check_contrast, check_count, check_images
from scalecryo.train.stages.class_shares import Balance, alike

logger = logging.getLogger(__name__)
ROUNDS_EXPECTED = 8  # of most runs, for the time left
SETTLED = 1.02  # factor in likelihood gain over the last two rounds below which the start ends


class ClassStart:
    """K maps from each of several random starts; the held-out likelihood of the mixtures tells which goes on."""

    name = "start"
    rounds = 4, 12  # at least and at most, each of `guided.bootstrap_steps`
    _begins_with_maps = False
    balanced_rounds = 2  # in which every class gets the same share

    def __init__(self, context: RunContext, learned: Learned, *, starts: int = 0) -> None:
        """
        Args:
            context: of the run.
            learned: gets the best start's references.
            starts: random starts; 0: as many as the settings say.

        Raises:
            TrainingError: too few particles take part.
        """
        check_count(context.count, context.config.run.data)
        self._context, self._learned = context, learned
        settings, level = context.config.guided, min(context.store.levels)
        starts = starts or settings.starts
        self._classes, self._steps = context.config.train.classes, settings.bootstrap_steps
        # Both halves serve one map: half as many particles for each class as where each half has its own.
        self._batch = max(settings.bootstrap_batch, settings.bootstrap_batch * self._classes // 2)
        self._judging = max(1, min(JUDGED, context.count) // self._batch)
        self._pixels = context.pixels(level, min(level / 2 - 1, READ_RADIUS))
        self._near = self._pixels.prefix(RADIUS)
        self._shifts = context.shift_grid_px(level)
        self._grid = so3_grid(HALF_GRID).to(context.device)
        self._noise = NoiseSpectrum(int(self._pixels.shell.max()) + 1, context.device)
        self._sums = Backprojection(level, device=context.device, classes=starts * self._classes)
        self._balance = Balance(starts, self._classes, context.device)
        self._going = list(range(starts))
        self._banks: dict[int, Complex[Tensor, "h p"]] = {}
        self._gains = torch.zeros(starts, 3, dtype=torch.float64, device=context.device)
        """Of each start's held-out particles: sum of the likelihood gains, of their squares, number."""
        self._earlier: list[float] = []  # mean gain of the best start in each round
        self._round, self._step, self._judged, self._images = 1, 0, 0, 0
        self._ended = self._joined = False

    def request(self) -> BatchRequest:
        """Some steps until the next checkpoint, or all batches that judge."""
        left = self._round * self._steps - self._step
        self._images = 0
        if not left:
            return BatchRequest((self._pixels,), self._batch, start=0, batches=self._judging)
        batches = min(SAVE_EVERY - self._step % SAVE_EVERY, left)
        return BatchRequest((self._pixels,), self._batch, start=self._step, batches=batches)

    def step(self, *images: ParticleImages) -> None:
        """Learn from a batch, or judge by its held-out particles."""
        (batch,) = images
        self._images += len(batch)
        held_out = self._context.partition.held_out(batch.rows)
        if self._step == 0:
            check_images(batch, self._context.config.run.data)
        if self._step < self._round * self._steps:
            self._learn(batch.select(~held_out), self._context.world)
            self._step += 1
        else:
            self._judge(batch.select(held_out))
            self._judged += 1

    def finish_pass(self, world: World) -> PassReport:
        """Say how far it is; after a round choose the best start, and end where nothing gets better. Collective.

        Raises:
            TrainingError: the maps explain held-out images no better than nothing, or the contrast is inverted.
        """
        total = self._steps + self._judging
        here = self._step - (self._round - 1) * self._steps + self._judged
        message = f"start of {self._classes} classes, round {self._round}: {here} of {total} batches"
        judged = self._judged > 0
        if judged:
            message += f"; {self._choose(world)}"
            settled = self._joined or self._settled()
            # A class that shows what another shows goes; the other has a round to take over its particles.
            self._ended = settled and (self._joined or not self._join_alike(world))
            self._joined = settled
            if self._ended:
                self._learned.references = self._first_references()
            self._round += 1
            self._judged = 0
        rounds = self._round - 1 + here / total * (not judged)
        share = 1.0 if self._ended else rounds / max(ROUNDS_EXPECTED, self._round)
        return PassReport(message, self._images, checkpoint=not judged, progress=share)

    def done(self) -> bool:
        """Whether a start was chosen."""
        return self._ended

    def state_dict(self) -> dict[str, Any]:
        """Sums, noise and shares; the same on every worker."""
        standing = {"step": self._step, "round": self._round, "going": self._going, "earlier": self._earlier,
                    "joined": self._joined}  # fmt: skip
        tensors = [tensor.cpu() for tensor in self._tensors()]
        return {"standing": standing, "settings": self._settings(), "tensors": tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after so many steps; under other settings, from the beginning."""
        if state["settings"] != self._settings():
            return
        standing = state["standing"]
        self._step, self._round, self._joined = standing["step"], standing["round"], standing["joined"]
        self._going, self._earlier = list(standing["going"]), list(standing["earlier"])
        for own, saved in zip(self._tensors(), state["tensors"], strict=True):
            own.copy_(saved)

    def _settings(self) -> str:
        """What the random starts depend on."""
        config = self._context.config
        return f"{config.train.rows} {config.train.seed} {config.train.classes} {config.guided} {config.pose.centred}"

    def _tensors(self) -> list[Tensor]:
        return [*self._noise.tensors(), *self._sums.tensors(), *self._balance.tensors()]

    def _learn(self, batch: ParticleImages, world: World) -> None:
        """One step of every start, and of the noise that they share; one reduction over the workers."""
        noise, near = self._noise, self._near
        if self._step == 0:
            self._begin(batch, world)
        noise.decay(DECAY)
        residuals = NoiseSpectrum(len(noise.power), near.kx.device)
        fresh = Backprojection(near.box_size, device=near.kx.device, classes=self._sums.classes)
        mass = self._gains.new_zeros(len(self._gains), self._classes)
        for start in self._going:
            mass[start] = self._insert(batch, start, fresh, residuals)
        parts = fresh.within(RADIUS)  # all on every worker: see `Bootstrap._learn`
        world.all_reduce_(*residuals.tensors(), mass, *parts)
        noise.power += residuals.power
        noise.count += residuals.count
        fresh.put_within(RADIUS, *parts)
        self._sums.decay(DECAY)
        self._sums.numerator += fresh.numerator
        self._sums.denominator += fresh.denominator
        self._balance.add(mass, DECAY, even=self._round <= self.balanced_rounds)

    def _begin(self, batch: ParticleImages, world: World) -> None:
        """The noise before the first step: the power of the images. Collective."""
        self._noise.add(batch.transforms, None, self._pixels)
        world.all_reduce_(*self._noise.tensors())

    def _insert(
        self, batch: ParticleImages, start: int, fresh: Backprojection, residuals: NoiseSpectrum
    ) -> Float[Tensor, " classes"]:
        """One step of one start on this worker: all images at all poses of all classes; the classes' posterior mass."""
        near, first = self._near, start * self._classes
        mass = self._gains.new_zeros(self._classes)
        if self._step == 0 and not self._begins_with_maps:
            self._insert_at_random(batch.within(RADIUS), start, fresh)
            return mass + len(batch) / self._classes
        grid = turned_grid(self._grid, self._generator(start))
        bank = self._bank(start, grid)
        centred, ones = grid.new_zeros(len(grid), 2), grid.new_ones(len(grid))
        for half in (1, 2):
            images = batch.select(batch.half == half).within(RADIUS)
            if len(images):  # a worker that holds none of a half still takes part in the reduction
                found = self._expected(images, start, bank)
                for number in range(self._classes):
                    slices = found.slices.select(torch.arange(number * len(grid), (number + 1) * len(grid)))
                    fresh.insert(slices, grid, centred, ones, near, class_index=first + number, half=half)
                mass += found.mass.sum(0).view(self._classes, -1).sum(1)
                residuals.add_power(found.residual, len(images), near)
        return mass

    def _insert_at_random(self, images: ParticleImages, start: int, fresh: Backprojection) -> None:
        """The first step: classes in turn, random poses, others on every worker."""
        count, device = len(images), images.rows.device
        generator = torch.Generator().manual_seed(self._seed(start) + 1009 * self._context.world.rank)
        rotation = random_rotations(count, generator).to(device)
        shift = self._shifts[torch.randint(len(self._shifts), (count,), generator=generator)]
        index = start * self._classes + torch.arange(count, device=device) % self._classes
        weighted, ones = ctf_weighted(images.transforms, images.ctf), torch.ones(count, device=device)
        fresh.add(weighted, rotation, shift, ones, images.half, self._near, index)

    def _expected(self, images: ParticleImages, start: int, bank: Complex[Tensor, "h p"]) -> Expectation:
        """The E-step over the poses of all classes."""
        weight = self._noise.pixel_weight(self._near)
        prior = self._balance.log_prior[start].repeat_interleave(len(self._grid)).float()
        return expected_slices(
            images.transforms, images.ctf, weight, bank, self._shifts, self._near, log_prior=prior
        )  # fmt: skip

    def _bank(self, start: int, grid: Float[Tensor, "h 3 3"]) -> Complex[Tensor, "k p"]:
        """Slices of a start's present maps, one class after the other."""
        scale = self._sums.scale
        transforms = [reference_transform(solved, scale) for solved in self._solved(start)]
        return torch.cat([templates(transform, grid, self._near, scale) for transform in transforms])

    def _solved(self, start: int) -> list[Float[Tensor, "n n n"]]:
        """The present maps of a start's classes, from both halves."""
        joined, first = self._sums.joined(), start * self._classes
        return [joined.solve_one(first + number, 1, REGULARISATION) for number in range(self._classes)]

    def _seed(self, number: int) -> int:
        return self._context.config.train.seed + number

    def _generator(self, start: int) -> torch.Generator:
        """Of the step alone: a run that was taken up again turns its grids alike."""
        return torch.Generator().manual_seed(1_000_003 * self._seed(start) + 2 * self._step)

    def _judge(self, batch: ParticleImages) -> None:
        """Note how much better than an empty map each mixture explains held-out particles."""
        hypotheses = math.log(2 * len(self._grid) * len(self._shifts))
        for start in self._going:
            if self._judged == 0:
                self._banks[start] = self._bank(start, turned_grid(self._grid, self._generator(start)))
            if len(batch):
                gain = self._expected(batch.within(RADIUS), start, self._banks[start]).log_evidence.double()
                gain = gain - hypotheses - self._balance.log_prior[start].logsumexp(0)
                self._gains[start] += torch.stack([gain.sum(), gain.square().sum(), gain.new_tensor(len(gain))])

    def _choose(self, world: World) -> str:
        """The start that held-out particles like best goes on alone; how it stands, in words.

        Raises:
            TrainingError: see `finish_pass`.
        """
        world.all_reduce_(self._gains)
        total, squares, count = self._gains[self._going].T
        mean = total / count
        error = ((squares / count - mean.square()).clamp_min(0) / count).sqrt()
        self._gains.zero_()
        self._banks.clear()
        best = int(mean.argmax())  # host sync
        self._earlier.append(float(mean[best]))
        logger.info("start: held-out log-likelihood gain per image of each random start: %s",
                    ", ".join(f"{gain:.2f}" for gain in mean.tolist()))  # fmt: skip
        told = f"held-out images gain {mean[best]:.2f} ± {error[best]:.2f} in log-likelihood over an empty map"
        if mean[best] < NO_SIGNAL_ERRORS * error[best]:
            raise TrainingError(
                f"{self._context.config.run.data}: the start found no structure: {told}: check contrast sign, pixel "
                "size and box, use more particles, or raise guided.bootstrap_steps and guided.starts"
            )
        self._going = [self._going[best]]
        shares = " ".join(f"{100 * share:.0f}" for share in self._balance.share[self._going[0]].tolist())
        return f"{told}; classes hold {shares} %"

    def _settled(self) -> bool:
        """Whether two more rounds brought next to nothing."""
        least, most = self.rounds
        if self._round < least:
            return False
        return self._earlier[-1] < SETTLED * self._earlier[-3:][0] or self._round == most

    def _join_alike(self, world: World) -> bool:
        """Empty the classes whose map is another, larger class's, in whatever frame and hand. Collective."""
        start, device = self._going[0], self._grid.device
        gone = torch.zeros(self._classes, device=device)
        if world.is_leader:
            maps = [volume.cpu() for volume in self._solved(start)]
            gone += torch.tensor(alike(maps, self._balance.share[start].tolist()), device=device)
        world.all_reduce_(gone)
        at = gone.nonzero()[:, 0]  # host sync
        for tensor in self._sums.tensors():
            tensor[start * self._classes + at] = 0
        self._balance.mass[start, at] = 0
        if len(at):
            note = (
                f"{len(at)} of {self._classes} classes showed the same structure as another one and were given up: "
                "for compositions or conformations of one assembly choose train.class_mode = docked"
            )
            self._learned.notes += (note,)
            logger.warning("%s", note)
        return len(at) > 0

    def _first_references(self) -> ReferenceSet:
        """The classes' maps, the same for both halves, filtered by what the halves' own sums share."""
        start, context = self._going[0], self._context
        pixel_size = context.store.level_pixel_size(self._sums.box_size)
        joint, first = self._solved(start), start * self._classes
        check_contrast(joint[int(self._balance.share[start].argmax())], context.config.run.data)
        maps = []
        for number, volume in enumerate(joint):
            halves = [self._sums.solve_one(first + number, half, REGULARISATION) for half in (1, 2)]
            maps.append(torch.stack([volume, *halves]))
            if context.fit_shift and float(volume.amax()) > 0:  # shifts are searched about the centre of mass
                off = centre_of_mass(volume, mask_from_map(volume, pixel_size))
                still = torch.eye(3, device=volume.device)
                maps[-1] = torch.stack([linear_map(one, still, -off) for one in maps[-1]])
        all_maps, noise = torch.stack(maps), torch.ones(self._sums.box_size // 2 + 1, device=self._grid.device)
        found = ReferenceSet.of_maps(
            all_maps[:, 1:], pixel_size, noise=noise, radius=FIRST_REFERENCE_RADIUS, solvent=context.solvent
        )
        return replace(found, maps=all_maps[:, :1].expand(-1, 2, -1, -1, -1).clone())
