"""From random poses to a first map: stochastic expectation maximisation at low resolution.

Each step takes a small batch, forms the posterior over a randomly turned grid of rotations (and over shifts where
centring is unknown), and inserts all images at all poses, weighted, into a sum that decays quickly. Several random
starts run side by side on the same batches, each with two independent half-maps. From time to time all of these maps
are judged by the same images, which none of them has learnt from, and the best start of each half goes on until both
are the same structure. The best map is where both halves' refinement begins.

Three things make it converge from noise where each image tells little (measured on ten simulated sets, 0 to -18 dB):
the whole posterior, not its best few hypotheses; all of the frequencies from the first step on, since what is first
found at the lowest ones alone is a blob that does not change again; and a short memory, whose noise leads out of local
optima.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.distributed.world import World
from scalecryo.errors import TrainingError
from scalecryo.evaluate.align_maps import align_maps, apply_alignment, linear_map
from scalecryo.map.backprojection import Backprojection
from scalecryo.map.noise import NoiseSpectrum
from scalecryo.map.reference import Reference, ReferenceSet, reference_transform
from scalecryo.physics.fsc import fsc
from scalecryo.physics.image_formation import ctf_weighted
from scalecryo.physics.mask import centre_of_mass, mask_from_map
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.rotation import random_rotations
from scalecryo.physics.so3_grid import so3_grid
from scalecryo.pose.candidate_sources import GridSearch
from scalecryo.pose.expectation import expected_slices
from scalecryo.pose.search import templates, turned_grid
from scalecryo.runs.monitor import PassReport
from scalecryo.train.particle_source import BatchRequest, RunContext
from scalecryo.train.stage import Learned
from scalecryo.train.stages.checks import check_contrast, check_count, check_images
from scalecryo.train.stages.on_axes import put_on_axes

logger = logging.getLogger(__name__)
RADIUS = 12.0  # Fourier pixels that are compared
READ_RADIUS = 14.0  # Fourier pixels that are read: the noise is estimated a little beyond what is compared
HALF_GRID = 2304
DECAY = 0.9
REGULARISATION = 0.05
SAVE_EVERY = 20
JUDGED = 8000  # particles that are read to judge; a tenth of them is held out
NO_SIGNAL_ERRORS = 3.0  # a gain within so many standard errors of nothing is no structure
AGREEMENT = 0.8  # mean correlation of the halves over shells 2 to 6, aligned, from which on the start may end
SETTLED = 1.03  # factor in likelihood gain that a round must bring to go on nevertheless
WEAK = 0.5  # below which the structure is said to be weak
STALLED, STALLED_GAIN = 5, 1.01  # rounds in which the likelihood gain grows by less than this factor: no use to go on
ROUNDS_EXPECTED = 3  # of most runs, for the time left
FIRST_REFERENCE_RADIUS = 12.0
Slot = tuple[int, int]  # start and half


class Bootstrap:
    """Pairs of half-maps from several random starts; the starts stand where classes do."""

    name = "start"

    def __init__(self, context: RunContext, learned: Learned) -> None:
        """
        Args:
            context: of the run.
            learned: gets the best start's references.

        Raises:
            TrainingError: too few particles take part.
        """
        check_count(context.count, context.config.run.data)
        self._context, self._learned = context, learned
        settings, level = context.config.guided, min(context.store.levels)
        self._starts, self._steps = settings.starts, settings.bootstrap_steps
        self._batch, self._most_rounds = settings.bootstrap_batch, settings.bootstrap_rounds
        self._judging = max(1, min(JUDGED, context.count) // self._batch)
        self._pixels = context.pixels(level, min(level / 2 - 1, READ_RADIUS))
        self._near = self._pixels.prefix(RADIUS)
        self._shifts = context.shift_grid_px(level)
        self._grid = so3_grid(HALF_GRID).to(context.device)
        self._noise = NoiseSpectrum(int(self._pixels.shell.max()) + 1, context.device)
        self._sums = Backprojection(level, device=context.device, classes=self._starts)
        self._going = [(number, half) for number in range(self._starts) for half in (1, 2)]
        self._searches: dict[Slot, GridSearch] = {}
        self._gains: dict[Slot, list[float]] = {}
        self._ended = False
        self._step = 0  # batches learnt from
        self._earlier: list[float] = []  # likelihood gain of each round's best map
        self._judged = 0
        self._images = 0

    def request(self) -> BatchRequest:
        """Some steps until the next checkpoint, or all batches that judge."""
        left = self._end_of_round - self._step
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
        if self._step < self._end_of_round:
            self._learn(batch.select(~held_out), self._context.world)
            self._step += 1
        else:
            self._judge(batch.select(held_out))
            self._judged += 1

    def finish_pass(self, world: World) -> PassReport:
        """Say how far it is; at the end choose the best map. Collective.

        Raises:
            TrainingError: the maps explain held-out images no better than nothing, or the contrast is inverted.
        """
        total = self._steps + self._judging
        here = self._steps - (self._end_of_round - self._step) + self._judged
        message = f"start: {here} of {total} batches from random poses"
        if self._earlier:
            message = f"start, round {len(self._earlier) + 1}: {here} of {total} batches"
        judged = self._judged > 0
        if judged:
            pair, agreement, told = self._choose(world)
            self._ended = self._settled(agreement)
            if self._ended:
                if agreement < WEAK:
                    note = f"the first map is weak: {told}: look at the result with care"
                    self._learned.notes += (note,)
                    logger.warning("%s", note)
                self._learned.references = first_references("start", self._centred(pair), self._context, common=True)
                put_on_axes(self._context, self._learned)
            else:
                message += f"; the halves' maps correlate by {agreement:.2f}: on"
            self._judged = 0
        share = 1.0 if self._ended else self._share()
        return PassReport(message, self._images, checkpoint=not judged, progress=share)

    def _share(self) -> float:
        """Share of the steps that are done, of those expected; one of the first round learns for every start."""
        more = (self._starts - 1) * self._steps
        rounds = max(ROUNDS_EXPECTED, len(self._earlier) + 1)
        done = self._step + min(more, self._step * (self._starts - 1))
        return done / (rounds * self._steps + more)

    @property
    def _end_of_round(self) -> int:
        """Step at which the present round ends and is judged."""
        return (len(self._earlier) + 1) * self._steps

    def _centred(self, pair: Float[Tensor, "2 n n n"]) -> Float[Tensor, "2 n n n"]:
        """Both maps moved so that their mean has its centre of mass at the box centre; shifts are searched about it.

        Where particles are known to be centred, so is their map.
        """
        if not self._context.fit_shift:
            return pair
        mean = pair.mean(0)
        off = centre_of_mass(mean, mask_from_map(mean, self._context.store.level_pixel_size(mean.shape[-1])))
        still = torch.eye(3, device=pair.device)
        return torch.stack([linear_map(one, still, -off) for one in pair])

    def _settled(self, agreement: float) -> bool:
        """Whether another round would bring nothing: the halves agree and stay, or nothing has moved for long."""
        gain, before = self._earlier[-1], [0.0, *self._earlier[:-1]]
        stalled = len(before) > STALLED and gain < STALLED_GAIN * before[-STALLED]
        return (
            (agreement >= AGREEMENT and gain < SETTLED * before[-1])
            or stalled
            or len(self._earlier) == self._most_rounds
        )

    def done(self) -> bool:
        """Whether a start was chosen."""
        return self._ended

    def state_dict(self) -> dict[str, Any]:
        """Sums and noise; the same on every worker."""
        tensors = [tensor.cpu() for tensor in self._tensors()]
        standing = {"step": self._step, "going": list(self._going), "earlier": list(self._earlier)}
        return {"standing": standing, "settings": self._settings(), "tensors": tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after so many steps; under other settings, from the beginning."""
        if state["settings"] != self._settings():
            return
        self._step = int(state["standing"]["step"])
        self._going = [(int(number), int(half)) for number, half in state["standing"]["going"]]
        self._earlier = list(state["standing"]["earlier"])
        for own, saved in zip(self._tensors(), state["tensors"], strict=True):
            own.copy_(saved)

    def _settings(self) -> str:
        """What the random starts depend on."""
        config = self._context.config
        return f"{config.train.rows} {config.train.seed} {config.guided} {config.pose.centred}"

    def _tensors(self) -> list[Tensor]:
        return [*self._noise.tensors(), *self._sums.tensors()]

    def _learn(self, batch: ParticleImages, world: World) -> None:
        """One step of every start, and of the noise that they share; one reduction over the workers."""
        noise, near = self._noise, self._near
        if self._step == 0:
            noise.add(batch.transforms, None, self._pixels)
            world.all_reduce_(*noise.tensors())
        noise.decay(DECAY)
        residuals = NoiseSpectrum(len(noise.power), near.kx.device)
        fresh = Backprojection(near.box_size, device=near.kx.device, classes=self._starts)
        for slot in self._going:
            images = batch.select(batch.half == slot[1]).within(RADIUS)
            if len(images):  # a worker that holds none of a half still takes part in the reduction
                self._insert(images, slot, fresh, residuals)
        # All sums on every worker, not each on its owner: in every step every worker slices every map, and worker 0
        # saves all sums. Up to this radius they are half a megabyte a map.
        parts = fresh.within(RADIUS)
        world.all_reduce_(*residuals.tensors(), *parts)
        noise.power += residuals.power
        noise.count += residuals.count
        fresh.put_within(RADIUS, *parts)
        self._sums.decay(DECAY)
        self._sums.numerator += fresh.numerator
        self._sums.denominator += fresh.denominator

    def _insert(self, images: ParticleImages, slot: Slot, fresh: Backprojection, residuals: NoiseSpectrum) -> None:
        """One step of one half-map on this worker: all of its images at all poses, by their posterior."""
        (number, half), count, near, device = slot, len(images), self._near, self._grid.device
        if self._step == 0:
            # Other poses on every worker; the turned grids of later steps are the same on all.
            generator = torch.Generator().manual_seed(self._seed(number) + 1009 * self._context.world.rank)
            rotation = random_rotations(count, generator).to(device)
            shift = self._shifts[torch.randint(len(self._shifts), (count,), generator=generator)]
            weighted, ones = ctf_weighted(images.transforms, images.ctf), torch.ones(count, device=device)
            fresh.insert(weighted, rotation, shift, ones, near, class_index=number, half=half)
            return
        reference = self._reference(slot)
        grid = turned_grid(self._grid, self._generator(slot, self._step))
        bank = templates(reference.transform, grid, near, reference.scale)
        weight = reference.noise.pixel_weight(near)
        found = expected_slices(images.transforms, images.ctf, weight, bank, self._shifts, near)
        centred, ones = grid.new_zeros(len(grid), 2), grid.new_ones(len(grid))
        fresh.insert(found.slices, grid, centred, ones, near, class_index=number, half=half)
        residuals.add_power(found.residual, count, near)

    def _reference(self, slot: Slot) -> Reference:
        """The present map of a start's half."""
        solved = self._sums.solve_one(*slot, REGULARISATION)
        return Reference(reference_transform(solved, self._sums.scale), self._sums.scale, self._noise)

    def _seed(self, number: int) -> int:
        return self._context.config.train.seed + number

    def _generator(self, slot: Slot, step: int) -> torch.Generator:
        """Of the step alone: a run that was taken up again turns its grids alike."""
        return torch.Generator().manual_seed(1_000_003 * self._seed(slot[0]) + 2 * step + slot[1])

    def _judge(self, batch: ParticleImages) -> None:
        """Note how much better than an empty map each map explains held-out particles, of either half."""
        hypotheses = math.log(2 * len(self._grid) * len(self._shifts))
        for slot in self._going:
            if self._judged == 0:
                generator = self._generator(slot, self._step)
                self._searches[slot] = GridSearch(self._reference(slot), self._grid, self._near, generator, keep=1)
            if len(batch):
                gain = self._searches[slot].posterior(batch, self._shifts).log_evidence - hypotheses
                self._gains.setdefault(slot, []).extend(gain.tolist())  # host sync

    def _choose(self, world: World) -> tuple[Float[Tensor, "2 n n n"], float, str]:
        """The map that held-out particles like best, the other half's best laid onto it, and how well they agree.

        Third, both in words. These two go on, if any.

        Raises:
            TrainingError: see `finish_pass`.
        """
        slots = self._going
        gains = [torch.tensor(self._gains.get(slot, []), dtype=torch.float64) for slot in slots]
        sums = torch.stack([torch.stack([v.sum(), v.square().sum(), v.new_tensor(len(v))]) for v in gains])
        sums = sums.to(self._context.device)  # NCCL reduces no tensor of the CPU
        world.all_reduce_(sums)
        mean = sums[:, 0] / sums[:, 2]
        error = (sums[:, 1] / sums[:, 2] - mean.square()).clamp_min(0).sqrt() / sums[:, 2].sqrt()
        best = int(mean.argmax())  # host sync
        half = slots[best][1]
        other = max((n for n, slot in enumerate(slots) if slot[1] != half), key=lambda n: float(mean[n]))
        self._gains.clear()
        self._going = [slots[best], slots[other]]
        logger.info("start: held-out log-likelihood gain per image of each random start and half: %s",
                    ", ".join(f"{gain:.2f}" for gain in mean.tolist()))  # fmt: skip
        maps = [self._sums.solve_one(*slots[number], REGULARISATION) for number in (best, other)]
        pair = _laid_onto_first(torch.stack(maps), world)
        agreement = float(fsc(pair[0], pair[1])[2:7].mean())
        self._earlier.append(float(mean[best]))
        told = (
            f"held-out images gain {mean[best]:.2f} ± {error[best]:.2f} in log-likelihood over an empty map, and the "
            f"two halves' maps correlate by {agreement:.2f}"
        )
        if mean[best] < NO_SIGNAL_ERRORS * error[best]:  # host sync
            raise TrainingError(
                f"{self._context.config.run.data}: the start found no structure: {told}: check contrast sign, pixel "
                "size and box, use more particles, or raise guided.bootstrap_steps and guided.starts"
            )
        check_contrast(pair.mean(0), self._context.config.run.data)
        return pair, agreement, told


def _laid_onto_first(maps: Float[Tensor, "2 n n n"], world: World) -> Float[Tensor, "2 n n n"]:
    """The second half-map turned, moved and where needed mirrored onto the first, by worker 0. Collective."""
    if world.is_leader:
        alignment = align_maps(maps[1].cpu(), maps[0].cpu())  # of either hand
        maps[1] = apply_alignment(maps[1].cpu(), alignment).to(maps)
    else:
        maps.zero_()
    world.all_reduce_(maps)  # worker 0's, to all
    return maps


def first_references(
    what: str, maps: Float[Tensor, "2 n n n"], context: RunContext, *, common: bool = False
) -> ReferenceSet:
    """References before the first iteration, from two half-maps of one class.

    Args:
        what: they come from.
        maps: laid onto each other.
        context: of the run.
        common: whether both halves begin at the first map. What they share ends where its signal does, and the FSC
            beyond is theirs.
    """
    pixel_size = context.store.level_pixel_size(maps.shape[-1])
    mask = mask_from_map(maps.mean(0), pixel_size)
    noise = torch.ones(maps.shape[-1] // 2 + 1, device=maps.device)
    found = ReferenceSet.of_maps(
        maps[None], pixel_size, noise=noise, radius=FIRST_REFERENCE_RADIUS, mask=mask[None], solvent=context.solvent
    )
    shell, angstrom = found.resolution(0.5)
    logger.info("%s: half-maps agree (FSC 0.5) to shell %.1f, %.1f Å", what, shell, angstrom)
    return replace(found, maps=maps[:1].expand(2, -1, -1, -1)[None].clone()) if common else found
