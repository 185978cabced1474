"""Refinement by frequency marching: streamed passes that pose particles, rebuild the half-maps and raise the radius.

Each half has its own reference, made from its own particles only. An iteration reads one pass of particles (or
`guided.iteration_particles` of them) at the smallest level of the store that holds its radius; at its end the halves
are summed over the workers, compared, filtered by their correlation, and the next radius follows from where it falls.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scalecryo.distributed.world import World
from scalecryo.evaluate.align_maps import linear_map
from scalecryo.evaluate.classes import effective_classes
from scalecryo.map.image_groups import ImageGroups
from scalecryo.map.image_signal import ImageSignal
from scalecryo.map.reference import ReferenceSet
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.pose.related import RelatedRotations
from scalecryo.pose.strain import StrainSteps
from scalecryo.pose.view_balance import ViewWeights
from scalecryo.runs.monitor import PassReport
from scalecryo.runs.paused import Pause
from scalecryo.train.particle_source import BatchRequest, RunContext
from scalecryo.train.stage import Learned
from scalecryo.train.stages.batch_poses import Parts
from scalecryo.train.stages.iteration import Iteration
from scalecryo.train.stages.related_offers import RelatedOffer, RelatedOffers
from scalecryo.train.stages.schedule import CLOSING, FIRST_RADIUS, THIN_START, Schedule

logger = logging.getLogger(__name__)
SIGNAL = 0.143  # correlation of the halves that shows signal (Rosenthal & Henderson 2003)
RELATED_ITERATION = 2  # before which it is seen which poses the map's symmetry relates
AFTER_STEP = 4  # iterations that must be left after a step along a strain
WIDER = 1.2  # times the radius of shifts that was searched: worth a word
SAMPLE = 4000  # particles whose poses are looked at after each iteration


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
        learned.groups = learned.groups or ImageGroups(context.store.box_size, context.device)
        searches = settings.search_iterations if settings.start == "nothing" else 0
        self._posed = settings.start == "poses" or context.one_assembly  # well from the first iteration on
        self._most = settings.iterations  # as many more each time that the store has grown
        self._schedule = Schedule(searches, settings.settled_iterations, patient=context.config.train.several)
        self._creep = StrainSteps()
        self._strain: Tensor | None = None  # to be applied to maps and poses of each half
        self._parts: Parts | None = None
        self._related: list[RelatedRotations] = []  # of each class
        self._offers = RelatedOffers()
        self._offer: RelatedOffer | None = None  # of the next iteration
        self._iteration: Iteration | None = None
        self._views: Tensor | None = None  # of each class, along the directions of `ViewCounts`

    def request(self) -> BatchRequest:
        """Plan the next iteration; its batches come from an epoch of its own."""
        context, settings = self._context, self._context.config.guided
        schedule, references = self._schedule, self._learned.references
        assert references is not None, "a start comes before the refinement"
        if not schedule.radius and self._posed:
            # No farther than images are inserted: a radius that is never reached would never be the last.
            reach = min(references.resolution(SIGNAL)[0], max(context.levels) / 2 - 1)
            schedule.radius = max(FIRST_RADIUS, reach)
        if not schedule.number and self._learned.start_gain is not None:
            schedule.thin = self._learned.start_gain < THIN_START
        closing = schedule.number + CLOSING >= self._most
        plan = schedule.plan(context.levels, shifted=context.fit_shift, extent=references.extent(), closing=closing)
        parts = self._parts if plan.searched else None
        # Of several classes in each search: better maps tell more poses apart, and none is offered to them later.
        due = references.classes > 1 or not self._related
        if plan.searched and schedule.number >= RELATED_ITERATION and due:
            self._related = RelatedRotations.of_classes(references, context.point_group)
            if references.classes == 1:
                self._offers.look_at(self._related[0], context.world)
                if told := self._related[0].told(context.point_group):
                    logger.info("%s", told)
        offer = self._offer
        if self._strain is not None:
            references = _strained_maps(references, self._strain)
            if offer is not None:
                offer = replace(offer, references=_strained_maps(offer.references, self._strain))
        self._iteration = Iteration(
            plan, schedule.number, context, self._learned, references, parts, self._strain, self._related,
            self._balance(), offer,
        )  # fmt: skip
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
        after = iteration.finish(world, keep=self._offers.any)
        counts = iteration.counts.tolist()  # host sync
        gain = float(after.fsc_mean() / before.fsc_mean()) if before.level == after.level else None
        velocity = self._velocity(iteration)
        # What the halves share: noise strains each of them in a way of its own.
        creep = float((velocity[0] * velocity[1]).sum().clamp_min(0).sqrt())  # host sync
        even = self._views is not None and self._schedule.balanced and not iteration.weighted
        self._views = iteration.views.counts
        related = _share(*iteration.exchanged.tolist())  # host sync
        self._offers.note(related)
        self._schedule.update(
            iteration.plan, exchanging=self._offers.going_on, creep=creep, weighted=iteration.weighted, even=even,
            reach=after.resolution(SIGNAL)[0], gain=gain, moved=_share(counts[0], counts[2]),
            restless=_share(counts[1], counts[2]), found_again=_share(*iteration.lost.tolist()),
            evidence=counts[3] / max(counts[4], 1),
        )  # fmt: skip
        self._follow(iteration, velocity)
        self._offer = self._next_offer(iteration, after)
        self._parts = iteration.parts_left_out() if self._schedule.searched else None
        assert self._learned.groups is not None, "the refinement brings them"
        world.all_reduce_(*self._learned.groups.tensors())
        self._learned.groups.update()
        if iteration.plan.searched:
            self._reach_out(iteration.shifts.reach())  # host sync
            self._learned.shift_sigma = iteration.shifts.sigma() if self._context.fit_shift else None  # host sync
        self._learned.references, self._iteration = after, None
        self._learned.particles.commit(world)
        return self._report(iteration, after, counts, related)

    def pause(self) -> Pause:
        """Sums and poses of the iteration so far."""
        return Pause() if self._iteration is None else self._iteration.pause()

    def resume_pass(self, pause: Pause) -> BatchRequest:
        """The batches that are left of the iteration."""
        request = self.request()
        assert self._iteration is not None, "request() makes it"
        assert request.batches is not None, "request() says how many"
        done = self._iteration.take_up(pause)
        return replace(request, start=request.start + done, batches=request.batches - done)

    def _next_offer(self, iteration: Iteration, references: ReferenceSet) -> RelatedOffer | None:
        """For particles that are not searched any more. Collective."""
        if self._schedule.searched or self._schedule.ended or references.classes > 1:
            return None
        related = self._offers.at(references, self._schedule.radius, self._context)
        if related is None:
            return None
        maps, asymmetry = iteration.drawn_to_symmetry(references, related)
        self._offers.asymmetry.append(asymmetry)
        return RelatedOffer(related, maps)

    def _balance(self) -> ViewWeights | None:
        """Weights of the views of the last iteration's poses, while they creep."""
        if self._views is None or not self._schedule.balanced:
            return None
        weights = ViewWeights.of(self._views, self._context.point_group)
        if weights is not None and self._schedule.number == 1:
            logger.info("some views are seen often: they count less in the maps until the poses settle")
        return weights

    def _reach_out(self, reach: float) -> None:
        """Search shifts as far out as particles lie."""
        before, most = self._learned.shift_radius or self._context.shift_radius, self._context.most_shift_radius
        self._learned.shift_radius = now = min(max(reach, before), most)
        if now > WIDER * before:
            logger.info(
                "particles lie up to %.0f Å from the centres of their images: shifts are searched up to there", now
            )

    def _velocity(self, iteration: Iteration) -> Tensor:
        """Strain of each half's map that the iteration brought; none where modes were searched."""
        if iteration.plan.searched:
            return torch.zeros(2, 3, 3, dtype=torch.float64)
        velocity, group = iteration.creep.strain(), self._context.point_group
        return velocity if group is None else group.invariant(velocity)

    def _follow(self, iteration: Iteration, velocity: Tensor) -> None:
        """Follow a creep of poses and maps to where it would end.

        It comes from crowded views: where none are, or poses have come to rest, a strain is noise, which no step may
        follow. After a step poses need some iterations to be as good as before.
        """
        self._strain = None
        if iteration.plan.searched:
            self._creep = StrainSteps()
        elif iteration.weighted and self._schedule.balanced and self._schedule.number + AFTER_STEP <= self._most:
            step = self._creep.follow(velocity)
            if bool(step.any()):
                self._strain = step.to(velocity.device, torch.float32).expand(2, 3, 3)

    def done(self) -> bool:
        """Whether all iterations were made, or the last ones brought nothing."""
        return self._schedule.ended or self._schedule.number >= self._most

    def state_dict(self) -> dict[str, Any]:
        """References, the encoder, which parts hold the poses, and where the schedule stands."""
        references, encoder, groups = self._learned.references, self._learned.encoder, self._learned.groups
        assert references is not None, "a start comes before the refinement"
        return {
            "groups": None if groups is None else groups.state_dict(),
            "references": references.state_dict(),
            "steps": self._learned.steps,
            "notes": list(self._learned.notes),
            "signal": None if self._learned.signal is None else self._learned.signal.ratio,
            "half_parts": None if self._parts is None else [part.state_dict() for part in self._parts],
            "encoder": None if encoder is None else encoder.state_dict(),
            "parts": list(self._learned.particles.parts),
            "creep": self._creep.state_dict(),
            "strain": self._strain,
            "views": self._views,
            "shift_radius": self._learned.shift_radius,
            "shift_sigma": self._learned.shift_sigma,
            "related": [(own.similar, own.equivalent) for own in self._related],
            "offers": self._offers.state_dict(self._offer),
            "schedule": self._schedule.state_dict(),
            "count": self._context.store.count,
            "more": self._most - self._context.config.guided.iterations,
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
        if state.get("signal") is not None:  # older checkpoints have none
            learned.signal = ImageSignal(state["signal"].to(device))
        if state["half_parts"] is not None:
            self._parts = [ReferenceSet.from_state_dict(part, device) for part in state["half_parts"]]
        if learned.encoder is not None and state["encoder"] is not None:
            learned.encoder.load_state_dict(state["encoder"])
        learned.particles.load(state["parts"])
        if learned.groups is not None and state.get("groups") is not None:  # older checkpoints have none
            learned.groups.load_state_dict(state["groups"])
        self._creep.load_state_dict(state["creep"])
        self._strain = None if state["strain"] is None else state["strain"].to(device)
        views = state.get("views")  # older checkpoints have none
        self._views = None if views is None else views.to(device)
        learned.shift_radius = state.get("shift_radius")  # older checkpoints have none
        learned.shift_sigma = state.get("shift_sigma")  # older checkpoints have none
        related = state["related"] or []
        if isinstance(related, tuple):  # older checkpoints have that of one class
            related = [related]
        self._related = [RelatedRotations(*(turns.to(device) for turns in own)) for own in related]
        if "offers" in state:  # older checkpoints have none
            self._offer = self._offers.load_state_dict(state["offers"], device)
        self._schedule.load_state_dict(state["schedule"])
        self._most += state.get("more", 0)
        count = self._context.store.count
        if state.get("count", count) < count and self._schedule.number:
            logger.info("%s particles were appended: the refinement goes on", f"{count - state['count']:,}")
            self._schedule.reopen()
            self._most = self._schedule.number + self._context.config.guided.iterations

    def _report(
        self, iteration: Iteration, after: ReferenceSet, counts: list[float], related: float | None
    ) -> PassReport:
        plan, number = iteration.plan, self._schedule.number
        moved, restless = _share(counts[0], counts[2]), _share(counts[1], counts[2])
        shell, angstrom = after.resolution(SIGNAL)
        refined = after.level * after.pixel_size / plan.radius
        rows = torch.arange(self._context.rows)[:: max(1, self._context.rows // SAMPLE)]
        known, seen = self._learned.particles.read(rows)
        scalars: dict[str, float] = {
            "iteration/radius": plan.radius, "iteration/level": plan.level,
            "iteration/modes": plan.modes_of(plan.thin) * plan.searched,
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
            scalars["classes/effective"] = effective = effective_classes(np.array(shares))
            held = " ".join(f"{100 * share:.0f}" for share in shares)
            message += f", classes hold {held} % (effective number {effective:.1f})"
        if related is not None:
            scalars["iteration/related_share"] = related
            message += f", {100 * related:.0f} % of half of them took a related pose"
        if iteration.encoder_loss is not None:
            scalars["encoder_loss"] = float(iteration.encoder_loss)  # host sync
        return PassReport(
            message, iteration.images, self._learned.steps + number, scalars,
            {"poses/confidence": known.confidence[seen]}, after.mean(), after.mask[0],
            {"half-maps": after.fsc[0], "masked": after.fsc_masked[0]},
            rows[seen], known.rotation[seen], pairs=iteration.pairs(), score=float(after.curve().sum()),
            progress=self._schedule.share(self._most),
        )  # fmt: skip


def _strained_maps(references: ReferenceSet, strain: Tensor) -> ReferenceSet:
    """V(S⁻¹ x) of each half's maps."""
    inverse = torch.linalg.inv(torch.eye(3).to(strain) + strain)
    maps = [[linear_map(half, own) for half, own in zip(halves, inverse, strict=True)] for halves in references.maps]
    return replace(references, maps=torch.stack([torch.stack(halves) for halves in maps]))


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
