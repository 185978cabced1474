"""Refinement by frequency marching: streamed passes that pose particles, rebuild the half-maps and raise the radius.

Each half has its own reference, made from its own particles only. An iteration reads one pass of particles (or
`guided.iteration_particles` of them) at the smallest level of the store that holds its radius; at its end the halves
are summed over the workers, compared, filtered by their correlation, and the next radius follows from where it falls.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scalecryo.distributed.world import World
from scalecryo.map.backprojection import Backprojection
from scalecryo.map.noise import NoiseSpectrum
from scalecryo.map.reference import Reference, ReferenceSet
from scalecryo.physics.image_formation import ctf_weighted
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import PoseEstimates
from scalecryo.physics.rotation import geodesic_angle
from scalecryo.physics.so3_grid import so3_grid
from scalecryo.pose.candidate_sources import CandidateSource, SearchSource
from scalecryo.pose.estimator import EStepPlan, PoseEstimator
from scalecryo.runs.monitor import PassReport
from scalecryo.runs.pictures import EXAMPLES, Pairs, pictures_of
from scalecryo.train.encoder_training import PoseLearner, TrainingBatch
from scalecryo.train.particle_source import BatchRequest, RunContext
from scalecryo.train.stage import Learned
from scalecryo.train.stages.bootstrap import HALF_GRID

FIRST_RADIUS = 14.0
FIRST_ENCODER_ITERATION = 2  # the first iterations' maps and poses are too coarse to learn from
STILL = 0.02  # the search ends when fewer particles than this moved far in an iteration
MOVED_DEG = 10.0
FIRST_PASSES, PASSES = 3, 2  # Levenberg-Marquardt: from a grid's modes, and from a pose refined before
FIRST_STEP_RADIUS = 16.0  # Fourier pixels of a candidate's first local refinement
CHOICE_RADIUS = 32.0  # Fourier pixels up to which candidates are refined before one is chosen
NOISE_IMAGES = 32  # of each half and batch, whose residuals give the noise spectrum
SETTLED = 1.005  # gain in mean FSC below which an iteration at the same level brought no progress
SAMPLE = 4000  # particles whose poses are looked at after each iteration


@dataclass(frozen=True)
class IterationPlan:
    """What one iteration does.

    Attributes:
        radius: Fourier pixels that poses are refined with.
        level: box of the store that is read.
        modes: modes that the exhaustive search offers each particle; 0: no search.
        search_radius: Fourier pixels of the search.
        part: 0 or 1 takes only that part of each half's particles; None all. A searching iteration poses one part
            against a map of the other: a particle's own share in the map would hold it where it is, right or wrong.
    """

    radius: float
    level: int
    modes: int
    search_radius: float
    part: int | None = None

    @property
    def insertion_radius(self) -> float:
        """Up to which images are inserted: beyond local refinement, so that the FSC shows what comes next."""
        return min(self.level / 2 - 1, 1.4 * self.radius + 6)

    def e_step(self, *, fit_shift: bool) -> EStepPlan:
        """Candidates refined up to a middling radius; the choice, or the remembered pose, at the iteration's."""
        highest = min(self.radius, CHOICE_RADIUS)
        first = ((FIRST_STEP_RADIUS, FIRST_PASSES),) if highest > FIRST_STEP_RADIUS else ()
        return EStepPlan(self.radius, PASSES, self.modes > 0, (*first, (highest, PASSES)), fit_shift=fit_shift)


def plan_iteration(
    radius: float, levels: tuple[int, ...], number: int, *, search: bool, shifted: bool
) -> IterationPlan:
    """The iteration at a radius: the smallest level that holds it with room to see beyond, if there is one.

    Where shifts are unknown the search stays at a low radius: another mode may have another shift, and must still be
    seen at the remembered one.
    """
    fits = [level for level in sorted(levels) if level / 2 - 1 >= 1.15 * radius + 1]
    level = fits[0] if fits else max(levels)
    radius = min(radius, level / 2 - 1)
    modes = 3 if number == 0 or shifted else 2
    search_radius = min(radius, 12.0 if number == 0 or shifted else 24.0)
    return IterationPlan(radius, level, modes if search else 0, search_radius, part=number % 2 if search else None)


class Iteration:
    """One pass: poses every particle that streams by and rebuilds the half-maps."""

    def __init__(self, plan: IterationPlan, number: int, context: RunContext, learned: Learned) -> None:
        """
        Args:
            plan: what to do.
            number: of finished iterations.
            context: of the run.
            learned: references, remembered poses and encoder.
        """
        references = learned.references
        assert references is not None, "a start comes before the refinement"
        self.plan, self._context, self._learned = plan, context, learned
        self.pixels = context.pixels(plan.level, plan.insertion_radius)
        self.sums = Backprojection(plan.level, device=context.device, classes=references.classes)
        self.residuals = NoiseSpectrum(int(self.pixels.shell.max()) + 1, context.device)
        self.counts = torch.zeros(4, dtype=torch.float64, device=context.device)
        """Particles that moved far, of how many seen before; summed likelihood gain, of how many."""
        self.images = 0
        self._shown: tuple[Tensor, Tensor] | None = None
        self.encoder_loss: Tensor | None = None
        seed = context.config.train.seed * 1000 + number
        source: CandidateSource
        if number < 2 and context.config.recipe == "autoencoder" and learned.encoder is not None:
            source = learned.encoder.source(references)
        else:
            source = SearchSource(
                so3_grid(HALF_GRID).to(context.device), plan.search_radius, context.shift_grid_px(plan.level),
                max(plan.modes, 2), torch.Generator().manual_seed(seed),
            )  # fmt: skip
        e_step = plan.e_step(fit_shift=context.fit_shift)
        self._estimator = PoseEstimator(references.at(plan.level, self.pixels), e_step, source, context.world.timer)
        self._encoder, self._encoder_reference = learned.encoder, None
        if self._encoder is not None:
            self._encoder.begin(number)
            if number >= FIRST_ENCODER_ITERATION:
                self._encoder_reference = references.mean_at(self._encoder.pixels.box_size, self._encoder.pixels)
        learned.particles.begin(f"iteration_{number + 1:04d}")

    def step(self, batch: ParticleImages) -> None:
        """E-step, sums, and what is learnt from the batch."""
        if self.plan.part is not None:
            batch = batch.select(self._context.partition.part(batch.rows) == self.plan.part)
        self.images += len(batch)
        timer = self._context.world.timer
        if len(batch):
            known, seen = self._learned.particles.read(batch.rows)
            found = self._estimator.estimate(batch, known, seen)
            with timer.part("insert"):
                weighted, ones = ctf_weighted(batch.transforms, batch.ctf), torch.ones_like(found.confidence)
                shift_px = found.shift_px(batch.pixel_size)
                self.sums.add(weighted, found.rotation, shift_px, ones, batch.half, self.pixels, found.class_index)
            self._measure(batch, found, known, seen)
            self._learned.particles.note(batch.rows, found, batch.half)
        if self._encoder is not None and self._encoder_reference is not None and self._everywhere(len(batch) > 0):
            with timer.part("encoder"):
                self._train_encoder(self._encoder, self._encoder_reference, batch, found)

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
        gain = self._estimator.likelihood_gain(batch, found)
        counts = ((turned > MOVED_DEG) & seen).sum(), seen.sum(), gain.sum(), gain.new_tensor(float(len(batch)))
        self.counts += torch.stack([value.double() for value in counts])
        for half in (1, 2):
            few, predicted = self._estimator.predictions(batch, found, NOISE_IMAGES, half)
            if len(few):
                self.residuals.add(few.transforms - predicted, None, self.pixels)
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
            self.sums.all_reduce_(world.all_reduce_, self.pixels.radius_limit)
        world.all_reduce_(*self.residuals.tensors(), self.counts)
        noise = self.residuals.variance() / self.plan.level**2
        pixel_size = self._context.store.level_pixel_size(self.plan.level)
        return ReferenceSet.of_maps(self.sums.solve(), pixel_size, noise=noise, radius=self.plan.radius)


class Refinement:
    """Iterations until nothing gets better."""

    name = "refinement"

    def __init__(self, context: RunContext, learned: Learned) -> None:
        """
        Args:
            context: of the run.
            learned: references to start from; gets better ones, poses and the encoder.
        """
        self._context, self._learned = context, learned
        self._number = 0  # finished iterations
        self._settled = 0  # iterations in a row that brought no progress
        self._radius = 0.0  # of the next one; 0: the first
        self._moved: float | None = None  # share of the particles seen before that moved far in the last one
        self._iteration: Iteration | None = None

    def request(self) -> BatchRequest:
        """Plan the next iteration; its batches come from an epoch of its own."""
        context, settings = self._context, self._context.config.guided
        plan = self._plan()
        self._iteration = Iteration(plan, self._number, context, self._learned)
        epoch = context.order(plan.level, settings.batch_size).steps_per_epoch
        batches = min(epoch, -(-settings.iteration_particles // settings.batch_size))
        return BatchRequest((self._iteration.pixels,), settings.batch_size, start=self._number * epoch, batches=batches)

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
        plan, moved = iteration.plan, iteration.counts.tolist()  # host sync
        self._moved = moved[0] / moved[1] if moved[1] else None
        still = plan.modes == 0 and _is_settled(before, after)
        self._settled = self._settled + 1 if still else 0
        self._number += 1
        self._radius = _next_radius(after, plan)
        self._learned.references, self._iteration = after, None
        self._learned.particles.commit(world)
        return self._report(iteration, after, moved)

    def done(self) -> bool:
        """Whether all iterations were made, or the last ones brought nothing."""
        settings = self._context.config.guided
        return self._number >= settings.iterations or self._settled >= settings.settled_iterations

    def state_dict(self) -> dict[str, Any]:
        """References, the encoder, and which parts hold the poses."""
        references, encoder = self._learned.references, self._learned.encoder
        assert references is not None, "a start comes before the refinement"
        return {
            "references": references.state_dict(),
            "encoder": None if encoder is None else encoder.state_dict(),
            "parts": list(self._learned.particles.parts),
            "number": self._number,
            "settled": self._settled,
            "radius": self._radius,
            "moved": self._moved,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after so many iterations.

        Raises:
            CheckpointError: a part that holds poses is missing or damaged.
        """
        learned = self._learned
        learned.references = ReferenceSet.from_state_dict(state["references"], self._context.device)
        if learned.encoder is not None and state["encoder"] is not None:
            learned.encoder.load_state_dict(state["encoder"])
        learned.particles.load(state["parts"])
        self._number, self._settled = int(state["number"]), int(state["settled"])
        self._radius, self._moved = float(state["radius"]), state["moved"]

    def _plan(self) -> IterationPlan:
        """The next iteration; it searches while particles still jump, unless they came with poses."""
        context, references = self._context, self._learned.references
        assert references is not None, "a start comes before the refinement"
        settings, number, imported = context.config.guided, self._number, context.config.guided.start == "poses"
        if not self._radius:
            self._radius = max(FIRST_RADIUS, references.resolution(0.5)[0]) if imported else FIRST_RADIUS
        jumping = number < 2 or self._moved is None or self._moved > STILL
        searching = not imported and number < settings.search_iterations and jumping
        radius = min(self._radius, max(context.levels) / 2 - 2.0)  # just inside the largest level's Nyquist
        return plan_iteration(radius, context.levels, number, search=searching, shifted=context.fit_shift)

    def _report(self, iteration: Iteration, after: ReferenceSet, counts: list[float]) -> PassReport:
        plan, number = iteration.plan, self._number
        shell, angstrom = after.resolution(0.143)
        refined = after.level * after.pixel_size / plan.radius
        rows = torch.arange(self._context.rows)[:: max(1, self._context.rows // SAMPLE)]
        known, seen = self._learned.particles.read(rows)
        scalars: dict[str, float] = {
            "iteration/radius": plan.radius, "iteration/level": plan.level, "iteration/modes": plan.modes,
            "halves/fsc_0.143_shell": shell, "halves/resolution_angstrom": angstrom,
            "halves/fsc_mean": float(after.curve().mean()),
            "likelihood_gain_per_image": counts[2] / max(counts[3], 1),
        }  # fmt: skip
        message = (
            f"iteration {number}: poses refined to {refined:.1f} Å, half-maps agree (FSC 0.143) to {angstrom:.2f} Å"
        )
        if self._moved is not None:  # nobody was seen before the second visit
            scalars["iteration/moved_share"] = self._moved
            message += f", {100 * self._moved:.0f} % of the particles still move"
        if iteration.encoder_loss is not None:
            scalars["encoder_loss"] = float(iteration.encoder_loss)  # host sync
        return PassReport(
            message, iteration.images, self._learned.steps + number, scalars,
            {"poses/confidence": known.confidence[seen]}, after.mean(),
            rows[seen], known.rotation[seen], pairs=iteration.pairs(), score=float(after.curve().sum()),
        )  # fmt: skip


def _next_radius(after: ReferenceSet, plan: IterationPlan) -> float:
    """Where the next iteration refines to: a little past the shell at which the halves' correlation falls to 0.5."""
    return max(plan.radius, min(after.resolution(0.5)[0] + 3.0, 1.6 * plan.radius, plan.insertion_radius))


def _is_settled(before: ReferenceSet, after: ReferenceSet) -> bool:
    """Whether an iteration at the same level brought the halves no closer."""
    return before.level == after.level and float(after.curve().mean()) < SETTLED * float(before.curve().mean())
