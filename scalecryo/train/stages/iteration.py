"""One iteration of the refinement: a streamed pass that poses particles and sums up the next half-maps."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scalecryo.data.selection.partition import PARTS
from scalecryo.distributed.world import World
from scalecryo.map.backprojection import Backprojection
from scalecryo.map.noise import NoiseSpectrum
from scalecryo.map.reference import Reference, ReferenceSet
from scalecryo.physics.fsc import resolution
from scalecryo.physics.image_formation import CtfWeightedImages, ctf_weighted
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import FITTING, PoseEstimates
from scalecryo.physics.rotation import geodesic_angle
from scalecryo.pose.candidate_refinement import SAME
from scalecryo.pose.estimator import map_weight
from scalecryo.pose.exchange import MOST, RelatedExchange
from scalecryo.pose.related import RelatedPoses, RelatedRotations, angle_modulo
from scalecryo.pose.shift_spread import ShiftSpread
from scalecryo.pose.strain import StrainFit, strained_poses
from scalecryo.pose.view_balance import ViewCounts, ViewWeights
from scalecryo.runs.paused import Pause
from scalecryo.runs.pictures import EXAMPLES, Pairs, pictures_of
from scalecryo.train.encoder_training import PoseLearner, TrainingBatch
from scalecryo.train.owned_sums import OwnedSums
from scalecryo.train.particle_source import RunContext
from scalecryo.train.stage import Learned
from scalecryo.train.stages.batch_poses import BatchPoses, Parts, PosedBatch
from scalecryo.train.stages.related_offers import RelatedOffer
from scalecryo.train.stages.schedule import IterationPlan

FIRST_ENCODER_ITERATION = 2  # the first iterations' maps and poses are too coarse to learn from
MOVED_DEG = 10.0
SURE = 0.5  # correlation of the halves, up to which one judges the related poses of the other
CHANCES = 1 << 20  # of a random draw
NOISE_IMAGES = 32  # of each half and batch, whose residuals give the noise spectrum
SCALE_RADIUS = 24.0  # Fourier pixels that tell the scale of a micrograph's signal


class Iteration:
    """One pass: poses every particle that streams by and rebuilds the half-maps."""

    def __init__(
        self,
        plan: IterationPlan,
        number: int,
        context: RunContext,
        learned: Learned,
        references: ReferenceSet,
        parts: Parts | None,
        strain: Tensor | None,
        related: Sequence[RelatedRotations],
        balance: ViewWeights | None,
        offer: RelatedOffer | None,
    ) -> None:
        """
        Args:
            plan: what to do.
            number: of finished iterations.
            context: of the run.
            learned: remembered poses and encoder.
            references: that poses are refined against.
            strain: of each half's map since its poses were found, or None.
            related: poses that each class's symmetry or pseudo-symmetry relates; empty: not known.
            balance: weights of crowded views in the sums; None: all views weigh alike.
            offer: poses that particles of one half are offered before they are refined; None: none.
            parts: maps of each half without one of its parts; None: those who are searched are posed against whole
                halves.
        """
        self.plan, self._context, self._learned = plan, context, learned
        self._number = number
        self.pixels = context.pixels(plan.level, plan.insertion_radius)
        self._sums = Backprojection(
            plan.level, device=context.device, classes=references.classes * (PARTS if plan.searched else 1)
        )
        self._residuals = NoiseSpectrum(int(self.pixels.shell.max()) + 1, context.device)
        self.counts = torch.zeros(5, dtype=torch.float64, device=context.device)
        """Of the images that fit: those that changed their mode, that turned visibly, seen before; summed likelihood
        gain of all images, and how many."""
        self.exchanged = torch.zeros(2, dtype=torch.float64, device=context.device)
        """Particles that took a related pose, that were offered one."""
        self.lost = torch.zeros(2, dtype=torch.float64, device=context.device)
        """Particles that fitted nowhere: found again, searched."""
        self.class_counts = torch.zeros(references.classes, dtype=torch.float64, device=context.device)
        self.creep = StrainFit(context.device)
        self.views = ViewCounts(references.classes, context.device)
        self.shifts = ShiftSpread(context.shift_radius, context.device)
        self._balance, self.weighted = balance, balance is not None
        self._strain = strain
        self.images, self._batches = 0, 0
        self._shown: tuple[Tensor, Tensor] | None = None
        self.encoder_loss: Tensor | None = None
        self._group = context.point_group
        self._poses: BatchPoses | None = BatchPoses(
            plan, number, context, learned, references, parts, self.pixels, related
        )
        self._exchange = None if offer is None or plan.searched else self._exchange_of(offer, references)
        self._encoder, self._encoder_reference = learned.encoder, None
        if self._encoder is not None:
            self._encoder.begin(number)
            if number >= FIRST_ENCODER_ITERATION:
                self._encoder_reference = references.mean_at(self._encoder.pixels.box_size, self._encoder.pixels)
        learned.particles.begin(f"iteration_{learned.steps + number + 1:04d}")

    def _exchange_of(self, offer: RelatedOffer, references: ReferenceSet) -> RelatedExchange:
        """Noise must not choose: images chosen by the other half's noise would agree with it. So up to where the halves
        agree by themselves: a mask spreads a shell's correlation over the next ones."""
        sure, _ = resolution(references.fsc[0], references.level, references.pixel_size, SURE)  # host sync
        radius, prepared = min(self.plan.radius, sure), offer.references.at(self.plan.level, self.pixels)
        return RelatedExchange(prepared, offer.poses, radius, self._context.fit_shift)

    @property
    def _posing(self) -> BatchPoses:
        assert self._poses is not None, "not finished"
        return self._poses

    def step(self, batch: ParticleImages) -> None:
        """E-step, sums, and what is learnt from the batch."""
        self.images += len(batch)
        self._batches += 1
        timer = self._context.world.timer
        assert self._learned.groups is not None, "the refinement brings them"
        batch = self._learned.groups.corrected(batch)
        if len(batch):
            known, seen = self._learned.particles.read(batch.rows)
            known, taken = self._exchanged(batch, self._strained(known, batch.half), seen)
            lost = seen & (known.particle_probability < FITTING) & self.plan.lost_searched
            posed = self._posing.estimate(batch, known, seen & ~lost)
            found = posed.found
            if self._group is not None:  # of the poses that show the same, the one that is remembered
                near = self._group.nearest(found.rotation, known.rotation)
                found = replace(found, rotation=torch.where(seen[:, None, None], near, found.rotation))
            with timer.part("insert"):
                self._insert(batch, replace(posed, found=found))
            # A related pose is only as exact as the relation: how it turns tells nothing of a creep.
            self._measure(batch, found, known, seen & ~taken)
            again = lost & (found.particle_probability >= FITTING)
            self.lost += torch.stack([again.sum(), lost.sum()])
            self._learned.particles.note(batch.rows, found, batch.half)
        if self._encoder is not None and self._encoder_reference is not None and self._everywhere(len(batch) > 0):
            with timer.part("encoder"):
                self._train_encoder(self._encoder, self._encoder_reference, batch, found)

    def _strained(self, known: PoseEstimates, half: Tensor) -> PoseEstimates:
        """Remembered poses as the strained maps have them."""
        if self._strain is None:
            return known
        first, second = (strained_poses(known.rotation, own) for own in self._strain)
        return replace(known, rotation=torch.where((half == 1)[:, None, None], first, second))

    def _exchanged(self, batch: ParticleImages, known: PoseEstimates, seen: Tensor) -> tuple[PoseEstimates, Tensor]:
        """Known poses, or the related ones that were taken for them; and which these are.

        One half an iteration: where the halves prefer different ones, both would change over, and back.
        """
        changed, half = torch.zeros_like(seen), 1 + self._number % 2
        if self._exchange is None:
            return known, changed
        at = batch.rows_by_half[half - 1]
        if not len(at):
            return known, changed
        draw, rows, own, there = self._context.partition.label, batch.rows[at], known.select(at), seen[at]
        # Which have a pose is known to the device alone: the others are offered one beside the identity, and left.
        begun = torch.where(there[:, None, None], own.rotation, torch.eye(3, device=rows.device))
        first, count = (2 + MOST) * self._number, 2 + self._exchange.offers
        chance = torch.stack([draw(rows, first + number, CHANCES) / CHANCES for number in range(count)], 1)
        with self._context.world.timer.part("related_poses"):
            taken, offered = self._exchange.accepted(batch.select(at), half, replace(own, rotation=begun), chance)
        taken = taken & there
        self.exchanged += torch.stack([taken.sum(), there.sum()])
        changed[at] = taken
        rotation = torch.where(taken[:, None, None], offered.rotation, own.rotation)
        shift = torch.where(taken[:, None], offered.shift, own.shift)
        return known.put(at, replace(own, rotation=rotation, shift=shift)), changed

    def _insert(self, batch: ParticleImages, posed: PosedBatch) -> None:
        weighted, weight = ctf_weighted(batch.transforms, batch.ctf), map_weight(posed.found)
        self.views.add(posed.found.rotation, posed.found.class_index, weight)
        self._insert_at(weighted, batch, posed.found, weight if posed.share is None else weight * posed.share)
        for rows, mode in posed.others:
            share = weight[rows] * mode.confidence
            self._insert_at(weighted.select(rows), batch.select(rows), mode, share)

    def _insert_at(
        self, weighted: CtfWeightedImages, batch: ParticleImages, poses: PoseEstimates, weight: Tensor
    ) -> None:
        index = poses.class_index
        if self.plan.searched:
            index = PARTS * index + self._context.partition.part(batch.rows)
        if self._balance is not None:
            weight = weight * self._balance(poses.rotation, poses.class_index)
        self._sums.add(
            weighted, poses.rotation, poses.shift_px(batch.pixel_size), weight, batch.half, self.pixels, index
        )

    def _train_encoder(
        self, encoder: PoseLearner, reference: Reference, batch: ParticleImages, found: PoseEstimates
    ) -> None:
        settings = self._context.config.guided
        size = max(1, settings.encoder_batch // self._context.world.size)
        for number in range(settings.encoder_steps):
            self.encoder_loss = encoder.train_step(
                TrainingBatch.of(batch, found, encoder.pixels, size, number), reference
            )

    def _measure(self, batch: ParticleImages, found: PoseEstimates, known: PoseEstimates, seen: Tensor) -> None:
        """Residuals of a few particles, for the noise spectrum, and what the others tell the monitor."""
        turned = geodesic_angle(known.rotation, found.rotation)
        for number, own in enumerate(self._posing.equivalent):  # nothing tells these poses apart
            modulo = angle_modulo(known.rotation, found.rotation, own)
            turned = torch.where(found.class_index == number, modulo, turned)
        gain = self._posing.whole.likelihood_gain(batch, found)
        seen = seen & (found.particle_probability >= FITTING)  # junk jumps for ever
        restless = (turned > SAME / self.plan.radius) & seen
        jumped = (turned > MOVED_DEG) & seen
        if len(self.class_counts) == 1:  # classes share no frame
            self.creep.add(known.rotation, found.rotation, seen, batch.half)
        self.shifts.add(found.shift, found.particle_probability >= FITTING)
        self.class_counts += torch.bincount(found.class_index, minlength=len(self.class_counts))
        counts = jumped.sum(), restless.sum(), seen.sum(), gain.sum(), gain.new_tensor(float(len(batch)))
        self.counts += torch.stack([value.double() for value in counts])
        groups = self._learned.groups
        assert groups is not None, "the refinement brings them"
        for half in (1, 2):
            few, predicted = self._posing.whole.predictions(batch, found, NOISE_IMAGES, half)
            near = batch.within(min(self.plan.radius, SCALE_RADIUS))  # now that the batch knows its halves
            if len(few):
                self._residuals.add(few.transforms - predicted, None, self.pixels)
                groups.add_residuals(few.transforms - predicted, few)
                every, seen_by = self._posing.whole.predictions(near, found, len(near), half)
                groups.add_products(seen_by, every, self._posing.whole.pixel_weight(near.pixels))
                self._shown = few.transforms[:EXAMPLES], predicted[:EXAMPLES]

    def pairs(self) -> Pairs | None:
        """A few images of the last batch and what the map predicts for them; None before the first."""
        return None if self._shown is None else pictures_of(*self._shown, self.pixels)

    def _everywhere(self, true: bool) -> bool:
        """Whether something holds on every worker: a step that all take together needs all. Collective."""
        world = self._context.world
        if world.size == 1:
            return true
        count = torch.tensor(float(true), device=self._context.device)
        world.all_reduce_(count)
        return int(count) == world.size  # host sync

    def pause(self) -> Pause:
        """What the batches so far came to."""
        encoder = {} if self._encoder is None else dict(self._encoder.state_dict())
        own: dict[str, Any] = {
            "maps": [part.cpu() for part in self._sums.within(self.pixels.radius_limit)],
            "sums": [tensor.cpu() for tensor in self._small_sums()],
            "parts": self._learned.particles.noted(),
            "loss": None if self.encoder_loss is None else self.encoder_loss.cpu(),
            "generator": encoder.pop("generator", None),
        }
        return Pause({"batches": self._batches, "encoder": encoder}, own)

    def take_up(self, pause: Pause) -> int:
        """Go on after so many batches, whose number is returned."""
        own, device = pause.own, self._context.device
        self._sums.put_within(self.pixels.radius_limit, *(part.to(device) for part in own["maps"]))
        for tensor, saved in zip(self._small_sums(), own["sums"], strict=True):
            tensor.copy_(saved)
        self._learned.particles.note_parts(own["parts"])
        self.encoder_loss = own["loss"]
        if self._encoder is not None:
            generator = {} if own["generator"] is None else {"generator": own["generator"]}
            self._encoder.load_state_dict(pause.common["encoder"] | generator)
        self._batches = int(pause.common["batches"])
        return self._batches

    def _small_sums(self) -> tuple[Tensor, ...]:
        """All sums but those of the maps, of this worker."""
        groups = self._learned.groups
        assert groups is not None, "the refinement brings them"
        return (*self._common_sums(), *groups.tensors())

    def _common_sums(self) -> tuple[Tensor, ...]:
        """What is added up over the workers at the end, but for the maps."""
        counts = self.counts, self.class_counts, self.views.counts, self.shifts.sums, self.lost, self.exchanged
        return (*self._residuals.tensors(), *self.creep.tensors(), *counts)

    def finish(self, world: World, *, keep: bool = False) -> ReferenceSet:
        """Sum over the workers, solve, compare the halves; nothing is posed after it. Collective.

        Args:
            world: all workers.
            keep: whether `drawn_to_symmetry` comes after it.
        """
        self._poses = self._exchange = None  # their transforms take more memory than the sums
        self._owned = OwnedSums(self._sums, world, parts=PARTS if self.plan.searched else 1)
        self._owned.reduce_(self.pixels.radius_limit)
        world.all_reduce_(*self._common_sums())
        if self._group is not None:
            with world.timer.part("symmetrise"):
                self._owned.symmetrise(self._group.others, self.pixels.radius_limit)
        self._keep = keep or self.plan.searched
        return self._compared()

    def drawn_to_symmetry(self, references: ReferenceSet, related: RelatedPoses) -> tuple[ReferenceSet, float]:
        """The maps for telling related poses apart, and how asymmetric they are. Collective.

        Args:
            references: of `finish`, of one class.
            related: poses that show almost the same.
        """
        with self._context.world.timer.part("symmetrise"):
            maps, share = self._owned.drawn_to_symmetry(
                references.maps[0], related, self.pixels.radius_limit, references.mask[0]
            )
        return replace(references, maps=maps[None]), float(share)  # host sync

    def parts_left_out(self) -> Parts:
        """The same of each half without one of its parts, which an iteration that searches sums apart. Collective."""
        return [self._compared(without=part) for part in range(PARTS)]

    def _compared(self, without: int | None = None) -> ReferenceSet:
        noise = self._residuals.variance() / self.plan.level**2
        shares = None
        with self._context.world.timer.part("solve"):
            if self._context.one_assembly:
                own = (self.class_counts / self.class_counts.sum().clamp_min(1)).float()
                solved, tied = self._owned.solve_tied(own[None], without=without)
                shares = tied[0]
            else:
                solved = self._owned.solve(without=without)
        if not self._keep:  # for `parts_left_out` or `drawn_to_symmetry`
            self._sums.release()
        pixel_size = self._context.store.level_pixel_size(self.plan.level)
        return ReferenceSet.of_maps(
            solved, pixel_size, noise=noise, radius=self.plan.radius, solvent=self._context.solvent, shares=shares
        )
