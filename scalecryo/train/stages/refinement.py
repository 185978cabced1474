"""Refinement by frequency marching: streamed passes that pose particles, rebuild the half-maps and raise the radius.

Each half has its own reference, made from its own particles only. An iteration reads one pass of particles (or
`guided.iteration_particles` of them) at the smallest level of the store that holds its radius; at its end the halves
are summed over the workers, compared, filtered by their correlation, and the next radius follows from where it falls.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scalecryo.data.selection.partition import PARTS
from scalecryo.distributed.world import World
from scalecryo.evaluate.align_maps import linear_map
from scalecryo.map.backprojection import Backprojection
from scalecryo.map.image_groups import ImageGroups
from scalecryo.map.noise import NoiseSpectrum
from scalecryo.map.reference import Reference, ReferenceSet
from scalecryo.physics.image_formation import ctf_weighted
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import PoseEstimates
from scalecryo.physics.rotation import geodesic_angle
from scalecryo.physics.so3_grid import so3_grid
from scalecryo.pose.candidate_sources import CandidateSource, SearchSource, finer_grid
from scalecryo.pose.estimator import SAME, PoseEstimator, map_weight
from scalecryo.pose.related import RelatedRotations
from scalecryo.pose.strain import StrainFit, StrainSteps, strained_poses
from scalecryo.runs.monitor import PassReport
from scalecryo.runs.pictures import EXAMPLES, Pairs, pictures_of
from scalecryo.train.encoder_training import PoseLearner, TrainingBatch
from scalecryo.train.particle_source import BatchRequest, RunContext
from scalecryo.train.stage import Learned
from scalecryo.train.stages.bootstrap import HALF_GRID
from scalecryo.train.stages.schedule import FIRST_RADIUS, IterationPlan, Schedule

logger = logging.getLogger(__name__)
SIGNAL = 0.143  # correlation of the halves that shows signal (Rosenthal & Henderson 2003)
FIRST_ENCODER_ITERATION = 2  # the first iterations' maps and poses are too coarse to learn from
MOVED_DEG = 10.0
RELATED_ITERATION = 2  # before which it is seen which poses the map's symmetry relates
NOISE_IMAGES = 32  # of each half and batch, whose residuals give the noise spectrum
SCALE_RADIUS = 24.0  # Fourier pixels that tell the scale of a micrograph's signal
SAMPLE = 4000  # particles whose poses are looked at after each iteration
Parts = list[ReferenceSet]  # maps of each half without one of its parts


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
        related: RelatedRotations | None,
    ) -> None:
        """
        Args:
            plan: what to do.
            number: of finished iterations.
            context: of the run.
            learned: remembered poses and encoder.
            references: that poses are refined against.
            strain: of each half's map since its poses were found, or None.
            related: poses that the map's symmetry or pseudo-symmetry relates; None: not known.
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
        """Particles that changed their mode, that turned visibly, seen before; summed likelihood gain, of how many."""
        self.class_counts = torch.zeros(references.classes, dtype=torch.float64, device=context.device)
        self.creep = StrainFit(context.device)
        self._strain = strain
        self.images = 0
        self._shown: tuple[Tensor, Tensor] | None = None
        self.encoder_loss: Tensor | None = None
        self._group = group = context.point_group
        self._equivalent = None if group is None else group.others
        if related is not None:
            self._equivalent = related.equivalent
        self._source: CandidateSource
        if number < 2 and context.config.recipe == "autoencoder" and learned.encoder is not None:
            self._source = learned.encoder.source(references)
        else:
            grid = so3_grid(HALF_GRID * finer_grid(group)).to(context.device)
            self._source = SearchSource(
                grid, plan.search_radius, context.shift_grid_px(plan.level),
                plan.modes, torch.Generator().manual_seed(context.config.train.seed * 1000 + number),
                None if related is None else related.similar, {}, group,
            )  # fmt: skip
        self._whole = self._estimator(references, left_out=plan.searched and parts is None)
        self._parts = None if parts is None else [self._estimator(others, left_out=True) for others in parts]
        self._encoder, self._encoder_reference = learned.encoder, None
        if self._encoder is not None:
            self._encoder.begin(number)
            if number >= FIRST_ENCODER_ITERATION:
                self._encoder_reference = references.mean_at(self._encoder.pixels.box_size, self._encoder.pixels)
        learned.particles.begin(f"iteration_{learned.steps + number + 1:04d}")

    def _estimator(self, references: ReferenceSet, *, left_out: bool) -> PoseEstimator:
        context, plan = self._context, self.plan
        e_step = plan.e_step(
            left_out=left_out,
            fit_shift=context.fit_shift,
            shift_radius=context.shift_radius,
            equivalent=self._equivalent,
        )
        return PoseEstimator(references.at(plan.level, self.pixels), e_step, self._source, context.world.timer)

    def step(self, batch: ParticleImages) -> None:
        """E-step, sums, and what is learnt from the batch."""
        self.images += len(batch)
        timer = self._context.world.timer
        assert self._learned.groups is not None, "the refinement brings them"
        batch = self._learned.groups.corrected(batch)
        if len(batch):
            known, seen = self._learned.particles.read(batch.rows)
            known = self._strained(known, batch.half)
            found = self._estimate(batch, known, seen)
            if self._group is not None:  # of the poses that show the same, the one that is remembered
                near = self._group.nearest(found.rotation, known.rotation)
                found = replace(found, rotation=torch.where(seen[:, None, None], near, found.rotation))
            with timer.part("insert"):
                self._insert(batch, found)
            self._measure(batch, found, known, seen)
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

    def _estimate(self, batch: ParticleImages, known: PoseEstimates, seen: Tensor) -> PoseEstimates:
        """Against whole halves, or each against the other parts of its half."""
        if self._parts is None:
            return self._whole.estimate(batch, known, seen, all_classes=self.plan.searched and self._number == 0)
        found, part = known, self._context.partition.part(batch.rows)
        for own, others in enumerate(self._parts):
            at = (part == own).nonzero()[:, 0]  # host sync
            if len(at):
                again = own == self._number % PARTS  # each part's turn to look at all classes
                posed = others.estimate(batch.select(at), known.select(at), seen[at], all_classes=again)
                found = found.put(at, posed)
        return found

    def _insert(self, batch: ParticleImages, found: PoseEstimates) -> None:
        weighted = ctf_weighted(batch.transforms, batch.ctf)
        index = found.class_index
        if self.plan.searched:
            index = PARTS * index + self._context.partition.part(batch.rows)
        shift_px = found.shift_px(batch.pixel_size)
        self._sums.add(weighted, found.rotation, shift_px, map_weight(found), batch.half, self.pixels, index)

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
        gain = self._whole.likelihood_gain(batch, found)
        restless = (turned > SAME / self.plan.radius) & seen
        jumped = (turned > MOVED_DEG) & seen
        if len(self.class_counts) == 1:  # classes share no frame
            self.creep.add(known.rotation, found.rotation, seen, batch.half)
        self.class_counts += torch.bincount(found.class_index, minlength=len(self.class_counts))
        counts = jumped.sum(), restless.sum(), seen.sum(), gain.sum(), gain.new_tensor(float(len(batch)))
        self.counts += torch.stack([value.double() for value in counts])
        groups = self._learned.groups
        assert groups is not None, "the refinement brings them"
        near = batch.within(min(self.plan.radius, SCALE_RADIUS))
        for half in (1, 2):
            few, predicted = self._whole.predictions(batch, found, NOISE_IMAGES, half)
            if len(few):
                self._residuals.add(few.transforms - predicted, None, self.pixels)
                groups.add_residuals(few.transforms - predicted, few)
                every, seen_by = self._whole.predictions(near, found, len(near), half)
                groups.add_products(seen_by, every, self._whole.pixel_weight(near.pixels))
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

    def finish(self, world: World) -> ReferenceSet:
        """Sum over the workers, solve, compare the halves. Collective."""
        if world.size > 1:
            self._sums.all_reduce_(world.all_reduce_, self.pixels.radius_limit)
        world.all_reduce_(*self._residuals.tensors(), *self.creep.tensors(), self.counts, self.class_counts)
        if self._group is not None:
            with world.timer.part("symmetrise"):
                self._sums.symmetrise(self._group.others, self.pixels.radius_limit)
        return self._compared(self._sums.merged(PARTS) if self.plan.searched else self._sums)

    def parts_left_out(self) -> Parts:
        """The same of each half without one of its parts, which an iteration that searches sums apart."""
        return [self._compared(self._sums.merged(PARTS, without=part)) for part in range(PARTS)]

    def _compared(self, sums: Backprojection) -> ReferenceSet:
        noise = self._residuals.variance() / self.plan.level**2
        pixel_size = self._context.store.level_pixel_size(self.plan.level)
        return ReferenceSet.of_maps(
            sums.solve(), pixel_size, noise=noise, radius=self.plan.radius, solvent=self._context.solvent
        )


class Refinement:
    """Iterations until nothing gets better."""

    name = "refinement"

    def __init__(self, context: RunContext, learned: Learned) -> None:
        """
        Args:
            context: of the run.
            learned: references to start from; gets better ones, poses and the encoder.
        """
        settings = context.config.guided
        self._context, self._learned = context, learned
        learned.groups = ImageGroups(context.store.box_size, context.device)
        searches = settings.search_iterations if settings.start == "nothing" else 0
        docked = context.config.train.classes > 1 and context.config.train.class_mode == "docked"
        self._posed = settings.start == "poses" or docked  # well from the first iteration on
        self._schedule = Schedule(searches, settings.settled_iterations, patient=context.config.train.classes > 1)
        self._creep = StrainSteps()
        self._strain: Tensor | None = None  # to be applied to maps and poses of each half
        self._parts: Parts | None = None
        self._related: RelatedRotations | None = None
        self._iteration: Iteration | None = None

    def request(self) -> BatchRequest:
        """Plan the next iteration; its batches come from an epoch of its own."""
        context, settings = self._context, self._context.config.guided
        schedule, references = self._schedule, self._learned.references
        assert references is not None, "a start comes before the refinement"
        if not schedule.radius and self._posed:
            # No farther than images are inserted: a radius that is never reached would never be the last.
            reach = min(references.resolution(SIGNAL)[0], max(context.levels) / 2 - 1)
            schedule.radius = max(FIRST_RADIUS, reach)
        plan = schedule.plan(context.levels, shifted=context.fit_shift, extent=references.extent())
        parts = self._parts if plan.searched else None
        if plan.searched and schedule.number == RELATED_ITERATION and references.classes == 1:
            self._related = RelatedRotations.of(references, group=context.point_group)
            if told := self._related.told(context.point_group):
                logger.info("%s", told)
        if self._strain is not None:
            references = _strained_maps(references, self._strain)
        self._iteration = Iteration(
            plan, schedule.number, context, self._learned, references, parts, self._strain, self._related
        )
        epoch = context.order(plan.level, settings.batch_size).steps_per_epoch
        batches = min(epoch, -(-settings.iteration_particles // settings.batch_size))
        return BatchRequest(
            (self._iteration.pixels,), settings.batch_size, start=schedule.number * epoch, batches=batches
        )

    def step(self, *images: ParticleImages) -> None:
        """One batch of the iteration."""
        assert self._iteration is not None, "request() comes first"
        self._iteration.step(images[0])

    def finish_pass(self, world: World) -> PassReport:
        """The iteration's maps, the next radius, and what to tell of it. Collective."""
        iteration, before = self._iteration, self._learned.references
        assert iteration is not None, "request() comes first"
        assert before is not None, "a start comes before the refinement"
        after = iteration.finish(world)
        counts = iteration.counts.tolist()  # host sync
        gain = float(after.fsc_mean() / before.fsc_mean()) if before.level == after.level else None
        creep = self._creep_on(iteration)
        self._schedule.update(
            iteration.plan, creep=creep, reach=after.resolution(SIGNAL)[0], gain=gain,
            moved=_share(counts[0], counts[2]), restless=_share(counts[1], counts[2]),
        )  # fmt: skip
        self._parts = iteration.parts_left_out() if self._schedule.searched else None
        assert self._learned.groups is not None, "the refinement brings them"
        world.all_reduce_(*self._learned.groups.tensors())
        self._learned.groups.update()
        self._learned.references, self._iteration = after, None
        self._learned.particles.commit(world)
        return self._report(iteration, after, counts)

    def _creep_on(self, iteration: Iteration) -> float:
        """Follow a creep of poses and maps to where it would end; returns the iteration's strain."""
        self._strain = None
        if iteration.plan.searched:
            self._creep = StrainSteps()
            return 0.0
        velocity, group = iteration.creep.strain(), self._context.point_group
        velocity = velocity if group is None else group.invariant(velocity)
        steps = self._creep.follow(velocity)
        if bool(steps.any()):
            self._strain = steps.to(velocity.device, torch.float32)
        return float(velocity.flatten(1).norm(dim=1).max())

    def done(self) -> bool:
        """Whether all iterations were made, or the last ones brought nothing."""
        return self._schedule.ended or self._schedule.number >= self._context.config.guided.iterations

    def state_dict(self) -> dict[str, Any]:
        """References, the encoder, which parts hold the poses, and where the schedule stands."""
        references, encoder, groups = self._learned.references, self._learned.encoder, self._learned.groups
        assert references is not None, "a start comes before the refinement"
        return {
            "groups": None if groups is None else groups.state_dict(),
            "references": references.state_dict(),
            "steps": self._learned.steps,
            "notes": list(self._learned.notes),
            "half_parts": None if self._parts is None else [part.state_dict() for part in self._parts],
            "encoder": None if encoder is None else encoder.state_dict(),
            "parts": list(self._learned.particles.parts),
            "creep": self._creep.state_dict(),
            "strain": self._strain,
            "related": None if self._related is None else (self._related.similar, self._related.equivalent),
            "schedule": self._schedule.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after so many iterations.

        Raises:
            CheckpointError: a part that holds poses is missing or damaged.
        """
        learned, device = self._learned, self._context.device
        learned.references = ReferenceSet.from_state_dict(state["references"], device)
        learned.steps = state["steps"]
        learned.notes = tuple(state["notes"])
        if state["half_parts"] is not None:
            self._parts = [ReferenceSet.from_state_dict(part, device) for part in state["half_parts"]]
        if learned.encoder is not None and state["encoder"] is not None:
            learned.encoder.load_state_dict(state["encoder"])
        learned.particles.load(state["parts"])
        if learned.groups is not None and state.get("groups") is not None:  # older checkpoints have none
            learned.groups.load_state_dict(state["groups"])
        self._creep.load_state_dict(state["creep"])
        self._strain = None if state["strain"] is None else state["strain"].to(device)
        if state["related"] is not None:
            self._related = RelatedRotations(*(turns.to(device) for turns in state["related"]))
        self._schedule.load_state_dict(state["schedule"])

    def _report(self, iteration: Iteration, after: ReferenceSet, counts: list[float]) -> PassReport:
        plan, number = iteration.plan, self._schedule.number
        moved, restless = _share(counts[0], counts[2]), _share(counts[1], counts[2])
        shell, angstrom = after.resolution(SIGNAL)
        refined = after.level * after.pixel_size / plan.radius
        rows = torch.arange(self._context.rows)[:: max(1, self._context.rows // SAMPLE)]
        known, seen = self._learned.particles.read(rows)
        scalars: dict[str, float] = {
            "iteration/radius": plan.radius, "iteration/level": plan.level,
            "iteration/modes": plan.modes * plan.searched,
            "halves/fsc_0.143_shell": shell, "halves/resolution_angstrom": angstrom,
            "halves/fsc_mean": float(after.fsc_mean()),
            "likelihood_gain_per_image": counts[3] / max(counts[4], 1),
        }  # fmt: skip
        message = (
            f"iteration {number}: poses refined to {refined:.1f} Å, half-maps agree (FSC 0.143) to {angstrom:.2f} Å"
        )
        if moved is not None and restless is not None:  # nobody was seen before the first
            scalars["iteration/moved_share"] = moved
            message += f", {100 * moved:.0f} % of the particles found another mode"
            scalars["iteration/restless_share"] = restless
            message += f", {100 * restless:.0f} % still turn"
        if after.classes > 1:
            shares = (iteration.class_counts / iteration.class_counts.sum()).tolist()  # host sync
            scalars |= {f"classes/share_{number}": share for number, share in enumerate(shares, 1)}
            message += f", classes hold {' '.join(f'{100 * share:.0f}' for share in shares)} %"
        if iteration.encoder_loss is not None:
            scalars["encoder_loss"] = float(iteration.encoder_loss)  # host sync
        return PassReport(
            message, iteration.images, self._learned.steps + number, scalars,
            {"poses/confidence": known.confidence[seen]}, after.mean(),
            rows[seen], known.rotation[seen], pairs=iteration.pairs(), score=float(after.curve().sum()),
        )  # fmt: skip


def _strained_maps(references: ReferenceSet, strain: Tensor) -> ReferenceSet:
    """V(S⁻¹ x) of each half's maps."""
    inverse = torch.linalg.inv(torch.eye(3).to(strain) + strain)
    maps = [[linear_map(half, own) for half, own in zip(halves, inverse, strict=True)] for halves in references.maps]
    return replace(references, maps=torch.stack([torch.stack(halves) for halves in maps]))


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
