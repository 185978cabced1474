"""Poses of a batch in an iteration: against whole halves, or each particle against the other parts of its half.

An image that says little has many poses that compete. It is searched for more modes, over all shifts, and all that
compete enter the maps, each by its share of the probability: what one pose alone gets of the signal falls with how
often it is the right one, and the noise stays.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from scalecryo.data.selection.partition import PARTS
from scalecryo.map.reference import References, ReferenceSet
from scalecryo.physics.fft import FourierPixels
from scalecryo.physics.grouping import rows_by_group
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import FITTING, PoseEstimates
from scalecryo.physics.so3_grid import so3_grid
from scalecryo.pose.candidate_sources import CandidateSource, SearchSource, finer_grid
from scalecryo.pose.estimator import PoseEstimator
from scalecryo.pose.related import RelatedRotations
from scalecryo.train.particle_source import RunContext
from scalecryo.train.stage import Learned
from scalecryo.train.stages.schedule import THIN, THIN_GRID, THIN_SHIFTS, IterationPlan
from scalecryo.train.stages.start_rounds import HALF_GRID

Parts = list[ReferenceSet]  # maps of each half without one of its parts


@dataclass(frozen=True, eq=False)
class PosedBatch:
    """The poses of a batch.

    Attributes:
        found: the likeliest of each particle.
        share: of that pose in the maps; None: 1.
        others: of the particles that say little the next modes: their rows in the batch, and the poses, whose
            confidence is their share.
    """

    found: PoseEstimates
    share: Float[Tensor, " b"] | None = None
    others: list[tuple[Int[Tensor, " _"], PoseEstimates]] = field(default_factory=list)


class BatchPoses:
    """The E-step of an iteration.

    Attributes:
        prepared: the references of whole halves.
        whole: poses against them.
        equivalent: rotations of each class that nothing tells apart; empty: not known.
    """

    def __init__(
        self,
        plan: IterationPlan,
        number: int,
        context: RunContext,
        learned: Learned,
        references: ReferenceSet,
        parts: Parts | None,
        pixels: FourierPixels,
        related: Sequence[RelatedRotations],
    ) -> None:
        """
        Args:
            plan: of the iteration.
            number: of finished iterations.
            context: of the run.
            learned: encoder, and how far shifts reach.
            references: that poses are refined against.
            parts: maps of each half without one of its parts; None: those who are searched are posed against whole
                halves.
            pixels: of the iteration.
            related: poses that each class's symmetry or pseudo-symmetry relates; empty: not known.
        """
        self._plan, self._number, self._context, self._pixels = plan, number, context, pixels
        self._shift_radius = learned.shift_radius or context.shift_radius
        self._shift_sigma = learned.shift_sigma
        self._related, self._group = related, context.point_group
        of_group = () if self._group is None else (self._group.others,) * references.classes
        self.equivalent = tuple(own.equivalent for own in related) or of_group
        self._one_class = references.classes == 1
        sources = [self._search(thin=thin) for thin in (False, True)]
        source: CandidateSource = sources[plan.thin]
        if number < 2 and context.config.recipe == "autoencoder" and learned.encoder is not None:
            source = learned.encoder.source(references)
        self.prepared = self._prepare(references)
        self.whole = self._estimator(self.prepared, source, left_out=plan.searched and parts is None)
        self._thin = self._estimator(self.prepared, sources[1], left_out=False) if plan.doubted else None
        self._parts: list[tuple[PoseEstimator, PoseEstimator]] | None = None
        if parts is not None:
            self._parts = []
            for others in parts:
                prepared = self._prepare(others)
                usual, thin = (self._estimator(prepared, source, left_out=True) for source in sources)
                self._parts.append((usual, thin))

    def estimate(self, batch: ParticleImages, known: PoseEstimates, seen: Bool[Tensor, " b"]) -> PosedBatch:
        """Poses of a batch, known where they are seen."""
        plan = self._plan
        if self._parts is None:
            if plan.thin and self._one_class:
                everyone = torch.arange(len(batch), device=batch.rows.device)
                return _together(known, [(everyone, self.whole.estimate_modes(batch, known, seen))])
            if self._thin is not None and self._one_class:
                return PosedBatch(self._sought_anew(self._thin, batch, known, seen))
            return PosedBatch(self.whole.estimate(batch, known, seen, all_classes=plan.searched and self._number == 0))
        group = 2 * self._context.partition.part(batch.rows) + batch.half - 1
        if self._one_class:
            little = self._says_little(batch, known, seen, rows_by_group(group, 2 * PARTS))
        else:
            little = torch.full_like(seen, plan.thin)
        halves = rows_by_group(group + 2 * PARTS * little, 4 * PARTS)
        found: list[tuple[Tensor, list[PoseEstimates]]] = []
        for own, (usual, thin) in enumerate(self._parts):
            again = own == self._number % PARTS  # each part's turn to look at all classes
            for estimator, place in ((usual, 2 * own), (thin, 2 * (PARTS + own))):
                first, second = halves[place : place + 2]
                at = torch.cat([first, second])
                if not len(at):
                    continue
                images, poses = batch.select_halves(first, second), known.select(at)
                if estimator is thin and self._one_class:
                    found.append((at, estimator.estimate_modes(images, poses, seen[at])))
                else:
                    found.append((at, [estimator.estimate(images, poses, seen[at], all_classes=again)]))
        return _together(known, found)

    def _sought_anew(
        self, thin: PoseEstimator, batch: ParticleImages, known: PoseEstimates, seen: Bool[Tensor, " b"]
    ) -> PoseEstimates:
        """Poses that nothing is sure of are sought anew, in images that say little for more modes and at all shifts."""
        little = seen & (known.particle_probability >= FITTING) & (self.whole.known_gain(batch, known) < THIN)
        usual, few = rows_by_group(little.long(), 2)
        found = known
        for estimator, at in ((self.whole, usual), (thin, few)):
            if len(at):
                found = found.put(at, estimator.estimate(batch.select(at), known.select(at), seen[at]))
        return found

    def _says_little(
        self,
        batch: ParticleImages,
        known: PoseEstimates,
        seen: Bool[Tensor, " b"],
        halves: tuple[Int[Tensor, " _"], ...],
    ) -> Bool[Tensor, " b"]:
        """Which images gain little by the pose that is known; of those that have none, whether images on the whole do.

        A wrong pose gains little as well: it is one that should be sought again. Where the others say much, an image
        that does not seem to show the particle need not be: it is junk.
        """
        assert self._parts is not None, "of parts"
        gain = torch.zeros(len(batch), dtype=torch.float64, device=batch.rows.device)
        for own, (usual, _) in enumerate(self._parts):
            first, second = halves[2 * own : 2 * own + 2]
            at = torch.cat([first, second])
            if len(at):
                gain[at] = usual.known_gain(batch.select_halves(first, second), known.select(at))
        fits = known.particle_probability >= FITTING
        return torch.where(seen, (gain < THIN) & (fits | self._plan.thin), torch.full_like(seen, self._plan.thin))

    def _search(self, *, thin: bool) -> SearchSource:
        plan, context = self._plan, self._context
        finer = finer_grid(self._group) * (THIN_GRID if thin else 1)
        grid, reach, sigma = so3_grid(HALF_GRID * finer).to(context.device), self._shift_radius, None
        if thin and self._shift_sigma is not None:
            sigma = self._shift_sigma
            reach = min(reach, THIN_SHIFTS * sigma)
        return SearchSource(
            grid, plan.search_radius_of(thin), context.shift_grid_px(plan.level, reach),
            plan.modes_of(thin), torch.Generator().manual_seed(context.config.train.seed * 1000 + self._number),
            self._related[0].similar if self._related and self._one_class else None, {}, self._group, everywhere=thin,
            shift_sigma=sigma,
        )  # fmt: skip

    def _prepare(self, references: ReferenceSet) -> References:
        with self._context.world.timer.part("references"):
            return references.at(self._plan.level, self._pixels)

    def _estimator(self, prepared: References, source: CandidateSource, *, left_out: bool) -> PoseEstimator:
        e_step = self._plan.e_step(
            left_out=left_out,
            fit_shift=self._context.fit_shift,
            shift_radius=self._shift_radius,
            shift_sigma=self._shift_sigma,
            equivalent=self.equivalent,
        )
        return PoseEstimator(prepared, e_step, source, self._context.world.timer)


def _together(known: PoseEstimates, found: list[tuple[Tensor, list[PoseEstimates]]]) -> PosedBatch:
    """The poses of a batch from those of its parts: rows, and their one pose or their modes."""
    likeliest, share = known, torch.ones(len(known), device=known.rotation.device)
    others: list[tuple[Tensor, PoseEstimates]] = []
    for rows, (first, *more) in found:
        likeliest = likeliest.put(rows, first)
        if more:
            share = share.index_copy(0, rows, first.confidence)
            others += [(rows, mode) for mode in more]
    return PosedBatch(likeliest, share, others)
