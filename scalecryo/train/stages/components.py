"""Continuous variety: a low-rank linear model learnt from the particles at their final poses (`train.components`).

Passes of expectation maximisation for probabilistic PCA (`map.components`), each half with its own mean and components:
first at a low level of the store, then at the one that the mean is resolved at. A random sketch of the residuals is
where they begin. Between passes both halves are turned into one frame, and their correlation says how much each shell
of a component is trusted in the next one.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch

from scalecryo.distributed.world import World
from scalecryo.map.backprojection import PADDING, Backprojection
from scalecryo.map.component_frame import common_frame, scaled, without_mean
from scalecryo.map.components import ComponentSums
from scalecryo.map.reference import ReferenceSet
from scalecryo.physics.fsc import weight_shells
from scalecryo.physics.image_formation import CtfWeightedImages
from scalecryo.physics.mask import density_radius, soft_sphere
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.runs.monitor import PassReport
from scalecryo.train.component_model import ComponentModel, mean_of
from scalecryo.train.owned_sums import OwnedSums, solve_components
from scalecryo.train.particle_source import BatchRequest, RunContext
from scalecryo.train.posed_images import PosedImages
from scalecryo.train.stage import Learned
from scalecryo.train.stages.component_stage import posed_parts

logger = logging.getLogger(__name__)
BATCH = 256
LOW_LEVEL, MOST_LEVEL = 32, 128  # boxes of the first passes, and at most of the last ones
LOW_PASSES, PASSES = 8, 18  # at most, at the low level and in all
MORE_PASSES = 4  # after poses were refined with the components
FREE_PASSES = 4  # whose ridge does not follow the halves' correlation: a start that says little must be able to grow
SETTLED = 0.01  # change of the halves' correlation that is none
MOST_PARTICLES = 200_000  # that a pass reads
SIGNAL = 0.143
NOISE_SHARE, NOISE_DRAW = 4, 1000  # one image of so many, whose residuals give the noise spectrum; number of the draw
SKETCH_SHARE = 0.1  # of the mean's power, in each component of the start
WIDER = 1.3  # radius of the mask, over that which holds the mean's density
STATE_FILE = "components/state.npz"


class Components:
    """Mean, sketch, expectation maximisation; then what is learnt of every particle follows (`Latents`)."""

    def __init__(self, context: RunContext, learned: Learned, rounds: int = 0) -> None:
        """
        Args:
            context: of the run.
            learned: poses of all particles, from the final pass; gets the model.
            rounds: how often the poses were refined with the components before: past 0 they are what it begins with.
        """
        self._context, self._learned, self._rounds = context, learned, rounds
        self.name = "components" if rounds == 0 else f"components, round {rounds}"
        self._count = context.config.train.components
        self._model: ComponentModel | None = None
        self._before: ComponentModel | None = None
        self._pass, self._images, self._resumed = 0, 0, False
        self._means: Backprojection | None = None
        self._sums: ComponentSums | None = None

    def request(self) -> BatchRequest:
        """The same particles in every pass."""
        context = self._context
        level, radius = self._place()
        self._images, self._pixels = 0, context.pixels(level, radius)
        if self._model is None:
            self._means = Backprojection(level, device=context.device)
            self._told_memory(level)
        elif not self._model.has_components:
            self._sketch = Backprojection(level, device=context.device, classes=self._count)
            self._model.begin(self._pixels)
        else:
            self._sums = ComponentSums(level, self._count, context.device)
            self._model.begin(self._pixels)
        order = context.order(level, BATCH)
        batches = min(order.steps_per_epoch, -(-MOST_PARTICLES // BATCH))
        return BatchRequest((self._pixels,), BATCH, start=self._pass * order.steps_per_epoch, batches=batches)

    @torch.no_grad()
    def step(self, *images: ParticleImages) -> None:
        """One batch: into the means, into the sketch, or E-step and sums."""
        for posed in self._posed(images[0]):
            self._images += len(posed.images)
            if self._model is None:
                assert self._means is not None, "request() comes first"
                weighted = CtfWeightedImages(posed.centred * posed.ctf, posed.ctf.square())
                shift = torch.zeros_like(posed.poses.shift)
                self._means.add(weighted, posed.rotation, shift, posed.weight, posed.half, self._pixels)
            elif not self._model.has_components:
                self._into_sketch(posed)
            else:
                self._expect(posed)

    def finish_pass(self, world: World) -> PassReport:
        """Sum over the workers and solve: the means, the start, or the next components. Collective."""
        radius, self._pass = self._pixels.radius_limit, self._pass + 1
        if self._model is None:
            message = self._finish_means(world, radius)
        elif not self._model.has_components:
            message = self._finish_sketch(world, radius)
        else:
            message = self._finish_expectation(world, radius)
        assert self._model is not None, "the first pass makes it"
        if world.is_leader:
            self._context.run.write(STATE_FILE, self._model.to_bytes(self._identity(), self._pass))
        self._learned.components = self._model
        told, share = f"components: pass {self._pass}, {message}", min(self._pass / PASSES, 0.95)
        return PassReport(told, self._images, checkpoint=False, progress=share)

    def done(self) -> bool:
        """Whether all passes were made, by a run that was killed too."""
        if not self._resumed:
            self._resumed = True
            self._take_up()
        model = self._model
        return model is not None and (model.settled or model.rounds > self._rounds)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: each pass leaves the model in a file of the run."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to take up: `request` does."""

    def _identity(self) -> str:
        return f"{self._learned.identity}-{self._count}"

    def _take_up(self) -> None:
        """Go on where a run that was killed stood, or behind the round before."""
        known = self._learned.components
        if known is not None and known.rounds < self._rounds:
            if known.pose_rounds < self._rounds:  # they had come to rest: nothing is new
                self._model = known
            else:
                self._before = known
            return
        found = ComponentModel.load(self._context, STATE_FILE, self._identity())
        if found is not None:
            self._model, self._pass = found
            self._learned.components = self._model
            logger.info("components: %d passes were made before", self._pass)

    def _place(self) -> tuple[int, float]:
        """Level and radius of this pass."""
        levels = [level for level in self._context.levels if level <= MOST_LEVEL] or [min(self._context.levels)]
        high = max(levels)
        if self._model is None:
            return high, high / 2 - 1
        reach = min(max(8.0, self._model.resolution), high / 2 - 1)
        last = min(level for level in levels if level / 2 - 1 >= reach)
        low = [level for level in levels if LOW_LEVEL <= level < last]
        if low and self._model.has_components and not self._model.at_last_level:
            return min(low), min(reach, min(low) / 2 - 1)
        self._model.at_last_level = self._model.has_components
        return last, reach

    def _told_memory(self, level: int) -> None:
        box = int(PADDING * level)
        channels = 2 * self._count + self._count * (self._count + 1) // 2
        voxels = box * box * (box // 2 + 1)
        size = voxels * (2 * 4 * channels + 2 * 8 * (self._count + 1)) / 2**30
        logger.info("components: %d directions at up to %d px take about %.2f GiB a worker", self._count, level, size)

    def _posed(self, images: ParticleImages) -> list[PosedImages]:
        """The batch at its poses, in parts that keep memory the same at every box and number of components."""
        return posed_parts(images, self._context, self._learned, self._count)

    def _into_sketch(self, posed: PosedImages) -> None:
        """Residuals with random signs, one for each component; and their power, for the noise."""
        assert self._model is not None, "the means come first"
        residual, _ = self._model.residual(posed)
        self._model.residuals.add(residual, posed.weight, self._pixels)
        weighted = CtfWeightedImages(residual * posed.ctf, posed.ctf.square())
        shift = torch.zeros_like(posed.poses.shift)
        for number in range(self._count):
            sign = 2.0 * self._context.partition.label(posed.images.rows, number, 2) - 1
            own = CtfWeightedImages(weighted.values * sign[:, None], weighted.power)
            index = torch.full_like(posed.half, number)
            self._sketch.add(own, posed.rotation, shift, posed.weight, posed.half, self._pixels, index)

    def _expect(self, posed: PosedImages) -> None:
        """E-step, sums, what is left of a few images."""
        assert self._model is not None, "the means come first"
        assert self._sums is not None, "request() comes first"
        found = self._model.expect(posed)
        self._model.note(found, posed.weight, posed.half)
        variance = self._model.variance[self._pixels.shell]
        data = found.residual * (posed.ctf * found.contrast[:, None] / variance)
        power = (posed.ctf * found.contrast[:, None]).square() / variance
        self._sums.add(data, power, found.latents, posed.rotation, posed.weight, posed.half, self._pixels)
        chosen = self._context.partition.label(posed.images.rows, NOISE_DRAW, NOISE_SHARE) == 0
        some = chosen.nonzero()[:, 0]  # host sync
        self._model.residuals.add(found.unexplained(some), posed.weight[some], self._pixels)

    def _finish_means(self, world: World, radius: float) -> str:
        context, means = self._context, self._means
        assert means is not None, "request() comes first"
        owned = OwnedSums(means, world)
        owned.reduce_(radius)
        maps = owned.solve()
        pixel_size = context.store.level_pixel_size(means.box_size)
        noise = torch.ones(means.box_size // 2 + 1, device=context.device)
        found = ReferenceSet.of_maps(maps, pixel_size, noise=noise, radius=radius, solvent=context.solvent)
        own = None if context.solvent is None else context.solvent.of_map(means.box_size, context.device)
        if own is None:
            extent = WIDER * density_radius(found.mean() * found.mask[0])
            own = soft_sphere(means.box_size, min(extent, means.box_size / 2 - 4), device=context.device)
        self._model = mean_of(found, own, self._count)
        if self._before is not None:
            self._model.go_on_from(self._before)
        self._means = None
        shell, angstrom = found.resolution(SIGNAL)
        self._model.resolution = shell
        return f"mean of both halves to {angstrom:.1f} Å"

    def _finish_sketch(self, world: World, radius: float) -> str:
        """Directions that the residuals scatter in, at low frequencies."""
        model = self._model
        assert model is not None, "the means come first"
        owned = OwnedSums(self._sketch, world)
        owned.reduce_(radius)
        model.update_noise(world)
        solved = owned.solve(regularisation=0.1).transpose(0, 1)
        self._sketch.release()
        low = torch.arange(solved.shape[-1] // 2 + 1, device=solved.device)
        filtered = torch.exp(-0.5 * (low / (LOW_LEVEL / 4)).square())
        halves = []
        for half, mean in zip(solved, model.means, strict=True):
            own = torch.stack([weight_shells(volume, filtered) * model.mask for volume in half])
            own = without_mean(own, mean, model.mask)
            basis = torch.linalg.qr(own.flatten(1).T)[0].T.reshape(own.shape)
            halves.append(basis * (SKETCH_SHARE**0.5 * mean.norm()))
        model.components = torch.stack(halves)
        model.begin_moments()
        return "random sketch of the residuals"

    def _finish_expectation(self, world: World, radius: float) -> str:
        """M-step, the halves' common frame, noise and contrast."""
        model, sums = self._model, self._sums
        assert model is not None, "the means come first"
        assert sums is not None, "request() comes first"
        moments = model.update_moments(world)
        free = self._rounds == 0 and self._pass <= FREE_PASSES + 2
        model.release()
        solved = solve_components(sums, world, radius, None if free else model.curves)
        self._sums = sums = None
        level, halves = solved.shape[-1], []
        mask, means = model.mask_at(level), model.means_at(level)
        for half, mean, moment in zip(solved, means, moments, strict=True):
            halves.append(without_mean(scaled(half * mask, moment), mean, mask))
        frame, before = common_frame(torch.stack(halves)), model.agreement
        model.take(frame)
        model.update_noise(world)
        settled = False
        if before is not None and not free:
            settled = float((frame.agreement - before).abs().amax()) < SETTLED  # host sync
        if model.at_last_level:
            # At other poses the halves' correlation says nothing yet of whether components have come to rest.
            model.settled = self._pass >= 1 + MORE_PASSES if self._rounds else settled or self._pass >= PASSES
        elif settled or self._pass >= LOW_PASSES + 2:
            model.at_last_level, model.agreement = True, None
        agreement = " ".join(f"{value:.2f}" for value in frame.agreement.tolist())
        return f"{level} px, the halves' components correlate by {agreement}"
