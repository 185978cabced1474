"""From random poses to a first map: stochastic expectation maximisation at low resolution.

Each step takes a small batch, forms the posterior over a randomly turned grid of rotations (and over shifts where
centring is unknown), and inserts all images at all poses, weighted, into a sum that decays quickly. Several random
starts run side by side on the same batches, each with two independent half-maps. From time to time all of these maps
are judged by the same images, which none of them has learnt from, and the best start of each half goes on until both
are the same structure. The best map is where both halves' refinement begins. Where few images say little, a half may be
too small to be found at all: halves that stay unlike go on from all images, until one of them finds the structure.

Three things make it converge from noise where each image tells little (measured on ten simulated sets, 0 to -18 dB):
the whole posterior, not its best few hypotheses; all of the frequencies from the first step on, since what is first
found at the lowest ones alone is a blob that does not change again; and a short memory, whose noise leads out of local
optima.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.distributed.world import World
from scalecryo.evaluate.align_maps import align_maps, apply_alignment
from scalecryo.map.backprojection import Backprojection
from scalecryo.map.noise import NoiseSpectrum
from scalecryo.map.reference import Reference, ReferenceSet, reference_transform
from scalecryo.physics.fsc import fsc
from scalecryo.physics.image_formation import ctf_weighted
from scalecryo.physics.mask import mask_from_map
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.pose.candidate_sources import GridSearch
from scalecryo.pose.expectation import expected_slices
from scalecryo.pose.search import templates, turned_grid
from scalecryo.pose.view_balance import DIRECTIONS, ViewCounts, ViewWeights
from scalecryo.runs.monitor import PassReport
from scalecryo.train.particle_source import BatchRequest, RunContext
from scalecryo.train.stage import Learned
from scalecryo.train.stages.checks import check_contrast
from scalecryo.train.stages.on_axes import put_on_axes
from scalecryo.train.stages.start_course import KEPT, Choice, StartCourse
from scalecryo.train.stages.start_rounds import FIRST_REFERENCE_RADIUS, RADIUS, REGULARISATION, StartRounds

logger = logging.getLogger(__name__)
VIEWS_DECAY = 0.98  # of the count of views: of 50 batches, for a density that chance does not make
WEAK = 0.5  # below which the structure is said to be weak
ROUNDS_EXPECTED = 3  # of most runs, for the time left
Slot = tuple[int, int]  # start and half


class Bootstrap(StartRounds):
    """Pairs of half-maps from several random starts; the starts stand where classes do."""

    def __init__(self, context: RunContext, learned: Learned) -> None:
        """
        Args:
            context: of the run.
            learned: gets the best start's references.

        Raises:
            TrainingError: too few particles take part.
        """
        settings = context.config.guided
        super().__init__(context, learned, batch=settings.bootstrap_batch, maps=settings.starts)
        self._starts, self._most_rounds = settings.starts, settings.bootstrap_rounds
        self._going = [(number, half) for number in range(self._starts) for half in (1, 2)]
        self._searches: dict[Slot, GridSearch] = {}
        self._gains: dict[Slot, list[float]] = {}
        self._views = torch.zeros(2 * self._starts, DIRECTIONS, device=context.device)  # of each slot
        self._step_views = ViewCounts(2 * self._starts, context.device)
        self._view_weights: ViewWeights | None = None
        self._course = StartCourse()

    def request(self) -> BatchRequest:
        """As every start's; its batches weigh views by how crowded they are by now."""
        self._view_weights = ViewWeights.of(self._views)
        return super().request()

    def finish_pass(self, world: World) -> PassReport:
        """Say how far it is; at the end choose the best map. Collective.

        Raises:
            TrainingError: the maps explain held-out images no better than nothing, or the contrast is inverted.
        """
        here, total = self._here
        message = f"start: {here} of {total} batches from random poses"
        if self._earlier:
            message = f"start, round {len(self._earlier) + 1}: {here} of {total} batches"
        judged = self._judged > 0
        if judged:
            choice = self._choose(world)
            self._go_on(choice)
            if self._ended:
                self._conclude(choice)
            else:
                message += f"; the halves' maps correlate by {choice.agreement:.2f}: on"
            self._judged = 0
        share = 1.0 if self._ended else self._share()
        return PassReport(message, self._images, checkpoint=not judged, progress=share)

    def _go_on(self, choice: Choice) -> None:
        """Learn from all images, from each half's own, or no more."""
        course, before = self._course, self._course.pooled
        course.update(self._earlier, choice)
        self._ended = course.ended or len(self._earlier) == self._most_rounds
        if course.taken_over:
            self._take_over(*self._going)
        if course.pooled and not before:
            logger.info("start: the halves' maps stay unlike: each learns from the images of both")

    def _take_over(self, best: Slot, other: Slot) -> None:
        """Let the other half go on from the best map."""
        (number, half), (to, other_half) = best, other
        for grid in self._sums.tensors():
            grid[to, other_half - 1] = grid[number, half - 1]
        self._views[2 * to + other_half - 1] = self._views[2 * number + half - 1]

    def _conclude(self, choice: Choice) -> None:
        """Hand on what was found."""
        if choice.agreement < WEAK or choice.reach < KEPT:
            note = f"the first map is weak: {choice.told}: look at the result with care"
            self._learned.notes += (note,)
            logger.warning("%s", note)
        maps = self._to_centre(choice.maps, choice.maps.mean(0))
        self._learned.references = first_references("start", maps, self._context, common=True)
        put_on_axes(self._context, self._learned)

    def _share(self) -> float:
        """Share of the steps that are done, of those expected; one of the first round learns for every start."""
        more = (self._starts - 1) * self._steps
        rounds = max(ROUNDS_EXPECTED, len(self._earlier) + 1)
        done = self._step + min(more, self._step * (self._starts - 1))
        return done / (rounds * self._steps + more)

    def _standing(self) -> dict[str, Any]:
        return super()._standing() | {"going": list(self._going), "course": asdict(self._course)}

    def _take_up(self, standing: Mapping[str, Any]) -> None:
        super()._take_up(standing)
        self._going = [(int(number), int(half)) for number, half in standing["going"]]
        self._course = StartCourse(**standing["course"])
        self._learned.start_gain = self._earlier[-1] if self._earlier else None

    def _tensors(self) -> list[Tensor]:
        return [*super()._tensors(), self._views]

    def _learn(self, batch: ParticleImages, world: World) -> None:
        """One step of every start, and of the noise that they share; one reduction over the workers."""
        fresh, residuals = self._begin_step(batch, world)
        views = self._step_views
        views.counts.zero_()
        for slot in self._going:
            images = (batch if self._course.pooled else batch.select(batch.half == slot[1])).within(RADIUS)
            if len(images):  # a worker that holds none of a half still takes part in the reduction
                self._insert(images, slot, fresh, residuals, views)
        self._end_step(world, fresh, residuals, views.counts)
        self._views = VIEWS_DECAY * self._views + views.counts

    def _insert(
        self, images: ParticleImages, slot: Slot, fresh: Backprojection, residuals: NoiseSpectrum, views: ViewCounts
    ) -> None:
        """One step of one half-map on this worker: all of its images at all poses, by their posterior.

        Views that most images share count less: they would draw the map out along themselves (`view_balance`).
        """
        (number, half), count, near = slot, len(images), self._near
        if self._step == 0:
            rotation, shift = self._random_poses(count, number)
            weighted, ones = ctf_weighted(images.transforms, images.ctf), rotation.new_ones(count)
            fresh.insert(weighted, rotation, shift, ones, near, class_index=number, half=half)
            return
        reference = self._reference(slot)
        grid = turned_grid(self._grid, self._generator(slot, self._step))
        bank = templates(reference.transform, grid, near, reference.scale)
        weight = reference.noise.pixel_weight(near)
        found = expected_slices(images.transforms, images.ctf, weight, bank, self._shifts, near)
        centred, weights = grid.new_zeros(len(grid), 2), grid.new_ones(len(grid))
        of_slot = torch.full((len(grid),), 2 * number + half - 1, device=grid.device)
        views.add(grid, of_slot, found.mass.sum(0))
        if self._view_weights is not None:
            weights = self._view_weights(grid, of_slot)
        fresh.insert(found.slices, grid, centred, weights, near, class_index=number, half=half)
        residuals.add_power(found.residual, count, near)

    def _reference(self, slot: Slot) -> Reference:
        """The present map of a start's half."""
        solved = self._sums.solve_one(*slot, REGULARISATION)
        return Reference(reference_transform(solved, self._sums.scale), self._sums.scale, self._noise)

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

    def _choose(self, world: World) -> Choice:
        """The map that held-out particles like best, and the other half's best laid onto it. These two go on, if any.

        Raises:
            TrainingError: see `finish_pass`.
        """
        slots = self._going
        gains = torch.tensor([self._gains.get(slot, []) for slot in slots], dtype=torch.float64)
        every = torch.cat([gains, torch.ones(1, gains.shape[1], dtype=torch.float64)])
        products = (every @ every.T).to(self._context.device)  # NCCL reduces no tensor of the CPU
        world.all_reduce_(products)
        mean = products[-1, :-1] / products[-1, -1]
        best = int(mean.argmax())  # host sync
        half = slots[best][1]
        other = max((n for n, slot in enumerate(slots) if slot[1] != half), key=lambda n: float(mean[n]))
        error, lead = standing_errors(products, best, other)
        self._gains.clear()
        self._going = [slots[best], slots[other]]
        logger.info("start: held-out log-likelihood gain per image of each random start and half: %s",
                    ", ".join(f"{gain:.2f}" for gain in mean.tolist()))  # fmt: skip
        maps = [self._sums.solve_one(*slots[number], REGULARISATION) for number in (best, other)]
        pair = _laid_onto_first(torch.stack(maps), world)
        agreement = float(fsc(pair[0], pair[1])[2:7].mean())
        self._earlier.append(float(mean[best]))
        self._learned.start_gain = self._earlier[-1]
        told = (
            f"held-out images gain {mean[best]:.2f} ± {error:.2f} in log-likelihood over an empty map, and the "
            f"two halves' maps correlate by {agreement:.2f}"
        )
        self._refuse_noise(float(mean[best]), error, told)  # host sync
        check_contrast(pair.mean(0), self._context.config.run.data)
        reach, _ = of_halves(pair, self._context).resolution(0.5)
        return Choice(pair, agreement, reach / self._near.radius_limit, lead, told)


def standing_errors(products: Float[Tensor, "k k"], best: int, other: int) -> tuple[float, float]:
    """Standard error of the best map's mean gain, and the other's distance in those of their difference. Host sync.

    Args:
        products: of the gains of all maps, and of ones in the last place, summed over images.
        best, other: places of the maps.
    """
    count = products[-1, -1]
    mean = products[-1] / count
    second = products / count
    variance = (second[best, best] - mean[best].square()).clamp_min(0)
    apart = mean[best] - mean[other]
    spread = (second[best, best] - 2 * second[best, other] + second[other, other] - apart.square()).clamp_min(0)
    tiny = torch.finfo(products.dtype).tiny
    return float((variance / count).sqrt()), float(apart / (spread / count).sqrt().clamp_min(tiny))


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
    found = of_halves(maps, context)
    shell, angstrom = found.resolution(0.5)
    logger.info("%s: half-maps agree (FSC 0.5) to shell %.1f, %.1f Å", what, shell, angstrom)
    return replace(found, maps=maps[:1].expand(2, -1, -1, -1)[None].clone()) if common else found


def of_halves(maps: Float[Tensor, "2 n n n"], context: RunContext) -> ReferenceSet:
    """Two half-maps of one class that no iteration made."""
    pixel_size = context.store.level_pixel_size(maps.shape[-1])
    mask = mask_from_map(maps.mean(0), pixel_size)
    noise = torch.ones(maps.shape[-1] // 2 + 1, device=maps.device)
    return ReferenceSet.of_maps(
        maps[None], pixel_size, noise=noise, radius=FIRST_REFERENCE_RADIUS, mask=mask[None], solvent=context.solvent
    )
