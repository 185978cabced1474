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
from collections.abc import Mapping, Sequence
from dataclasses import replace
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
from scalecryo.train.stages.start_rounds import FIRST_REFERENCE_RADIUS, RADIUS, REGULARISATION, StartRounds

logger = logging.getLogger(__name__)
VIEWS_DECAY = 0.98  # of the count of views: of 50 batches, for a density that chance does not make
# The start may end where the halves' mean correlation over shells 2 to 6, aligned, is at least so much and a round
# brings less than this factor in likelihood gain. Halves that agree less may share a distortion, which more rounds
# lessen and the refinement may keep: halves of a map sheared by 9°, crowded views, 800 of 2,000 images junk, agreed by
# 0.83 and gained 1.6 % still.
ENDS = ((0.8, 1.01), (0.9, 1.03))
WEAK = 0.5  # below which the structure is said to be weak
STALLED, STALLED_GAIN = 5, 1.01  # rounds in which the likelihood gain grows by less than this factor: no use to go on
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
            pair, agreement, told = self._choose(world)
            self._ended = settled(self._earlier, agreement) or len(self._earlier) == self._most_rounds
            if self._ended:
                if agreement < WEAK:
                    note = f"the first map is weak: {told}: look at the result with care"
                    self._learned.notes += (note,)
                    logger.warning("%s", note)
                self._learned.references = first_references(
                    "start", self._to_centre(pair, pair.mean(0)), self._context, common=True
                )
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

    def _standing(self) -> dict[str, Any]:
        return super()._standing() | {"going": list(self._going)}

    def _take_up(self, standing: Mapping[str, Any]) -> None:
        super()._take_up(standing)
        self._going = [(int(number), int(half)) for number, half in standing["going"]]
        self._learned.start_gain = self._earlier[-1] if self._earlier else None

    def _tensors(self) -> list[Tensor]:
        return [*super()._tensors(), self._views]

    def _learn(self, batch: ParticleImages, world: World) -> None:
        """One step of every start, and of the noise that they share; one reduction over the workers."""
        fresh, residuals = self._begin_step(batch, world)
        views = self._step_views
        views.counts.zero_()
        for slot in self._going:
            images = batch.select(batch.half == slot[1]).within(RADIUS)
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
        self._learned.start_gain = self._earlier[-1]
        told = (
            f"held-out images gain {mean[best]:.2f} ± {error[best]:.2f} in log-likelihood over an empty map, and the "
            f"two halves' maps correlate by {agreement:.2f}"
        )
        self._refuse_noise(float(mean[best]), float(error[best]), told)  # host sync
        check_contrast(pair.mean(0), self._context.config.run.data)
        return pair, agreement, told


def settled(gains: Sequence[float], agreement: float) -> bool:
    """Whether another round would bring nothing: the halves agree and stay, or nothing has moved for long.

    Args:
        gains: likelihood gain of the best map in each round.
        agreement: of the halves after the last one.
    """
    gain, before = gains[-1], [0.0, *gains[:-1]]
    stalled = len(before) > STALLED and gain < STALLED_GAIN * before[-STALLED]
    return stalled or any(agreement >= least and gain < factor * before[-1] for least, factor in ENDS)


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
