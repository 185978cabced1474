"""Up the resolution ladder: streamed passes that pose particles, rebuild two half-maps and raise the radius.

Each half has its own reference, made from its own particles only. An iteration reads one pass of particles (or
`iteration_particles` of them) at the smallest level of the store that holds its radius; at its end the halves are
summed over the workers, compared, filtered by their correlation, and the next radius follows from where it falls.
"""

import logging
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.distributed.timer import Timer
from scalecryo.distributed.world import World
from scalecryo.map.halfmaps import HalfMaps, weight_shells
from scalecryo.map.noise import NoiseSpectrum
from scalecryo.physics.fft import FourierPixels, fourier_pixels, fourier_resize_3d
from scalecryo.physics.fsc import resolution
from scalecryo.physics.image_formation import filtered
from scalecryo.physics.mask import mask_from_map
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import PoseCandidates
from scalecryo.physics.rotation import geodesic_angle
from scalecryo.pose.estimator import (
    GridSearch,
    Reference,
    Refined,
    join,
    likelihood_gain,
    predictions,
    refine_candidates,
    scatter,
)
from scalecryo.train.particle_state import PoseMemory
from scalecryo.train.stages.bootstrap import reference_transform
from scalecryo.train.stages.final_pass import EXAMPLES, pictures_of

logger = logging.getLogger(__name__)
PADDING = 2.0
MOVED_DEG = 10.0
FIRST_PASSES, PASSES = 3, 2  # Levenberg-Marquardt: from a grid's modes, and from a pose refined before
CHOICE_RADIUS = 32.0  # Fourier pixels up to which candidates are refined before one is chosen


@dataclass(frozen=True)
class HalfReferences:
    """Where the ladder stands: two half-maps (not filtered), their correlation, the noise, and the radius reached.

    Attributes:
        half_maps: at the level where they were made.
        curve: masked FSC between them, on the shells of that level.
        noise: variance of each shell, in units of unscaled transforms of unit-variance white noise divided by N².
        radius: Fourier pixels up to which poses were refined.
        moved: share of the particles seen before whose rotation moved by more than `MOVED_DEG` in the last iteration.
    """

    half_maps: tuple[Float[Tensor, "n n n"], Float[Tensor, "n n n"]]
    curve: Float[Tensor, " shells"]
    noise: Float[Tensor, " shells"]
    radius: float
    moved: float = 1.0

    @property
    def shared_shell(self) -> float:
        """Shell at which the halves' correlation falls to 0.5."""
        shell, _ = resolution(self.curve, self.half_maps[0].shape[-1], 1.0, 0.5)
        return shell


def references(state: HalfReferences, level: int, pixels: FourierPixels) -> tuple[Reference, Reference]:
    """Both halves' maps, filtered by what they share, at another level.

    A half-map's Wiener filter is the half-map correlation itself: FSC = signal / (signal + noise of one half).
    """
    box = state.half_maps[0].shape[-1]
    mask = mask_from_map((state.half_maps[0] + state.half_maps[1]) / 2, 1.0)
    made = []
    noise = level_noise(state.noise, level, pixels)
    for volume in state.half_maps:
        filtered = weight_shells(volume, state.curve.clamp(0, 1).float()) * mask
        transform = reference_transform(fourier_resize_3d(filtered, level) if box != level else filtered, PADDING)
        made.append(Reference(transform, PADDING, noise, pixels))
    return made[0], made[1]


def level_noise(variance: Float[Tensor, " shells"], level: int, pixels: FourierPixels) -> NoiseSpectrum:
    """The noise spectrum in the units of a level; shells not yet seen are taken as the last one that was."""
    noise = NoiseSpectrum(int(pixels.shell.max()) + 1, variance.device)
    shells = len(noise.power)
    known = variance[:shells]
    noise.power[:] = torch.cat([known, known[-1:].expand(shells - len(known))]) * level**2
    noise.count[:] = 1.0
    return noise


@dataclass(frozen=True)
class IterationPlan:
    """What one iteration does.

    Attributes:
        radius: Fourier pixels that poses are refined with.
        level: box of the store that is read.
        modes: modes that the exhaustive search offers each particle; 0: no search.
        search_radius: Fourier pixels of the search.
        part: 0 or 1 takes only that part of each half's particles; None all. A searching iteration poses one part
        against
            a map of the other: a particle's own share in the map would hold it where it is, right or wrong.
    """

    radius: float
    level: int
    modes: int
    search_radius: float
    part: int | None = None

    @property
    def reach(self) -> float:
        """Radius up to which images are inserted: beyond local refinement, so that the correlation shows what comes
        next."""
        return min(self.level / 2 - 1, 1.4 * self.radius + 6)


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
    """One pass: poses every particle that streams by and rebuilds both half-maps."""

    def __init__(
        self,
        plan: IterationPlan,
        state: HalfReferences,
        pixel_size: float,
        *,
        grid: Float[Tensor, "h 3 3"],
        shift_grid_px: Float[Tensor, "t 2"],
        fit_shift: bool,
        generator: torch.Generator,
        timer: Timer,
    ) -> None:
        self.plan = plan
        self.timer = timer
        self.pixel_size = pixel_size
        self.pixels = fourier_pixels(plan.level, plan.reach).to(grid.device)
        self.references = references(state, plan.level, self.pixels)
        self.halves = HalfMaps(plan.level, PADDING, grid.device)
        self.residuals = NoiseSpectrum(int(self.pixels.shell.max()) + 1, grid.device)
        self.fit_shift = fit_shift
        self._moved = torch.zeros(2, dtype=torch.float64, device=grid.device)  # particles that moved, of how many
        self._gain = torch.zeros(2, dtype=torch.float64, device=grid.device)  # summed, of how many particles
        self._shown: tuple[Tensor, Tensor] | None = None
        self._grid = grid
        self._shifts = shift_grid_px
        self._generator = generator

    def take(self, batch: ParticleImages, memory: PoseMemory) -> list[tuple[ParticleImages, Refined]]:
        """Pose a batch, insert it, note what was found, and return it half by half."""
        taken = []
        if self.plan.part is not None:
            batch = batch.select((batch.rows // 2) % 2 == self.plan.part)
        for half, reference in enumerate(self.references, start=1):
            own = batch.select(batch.half == half)
            if len(own) == 0:
                continue
            refined = self._pose(own, reference, memory)
            with self.timer.part("insert"):
                ones = refined.cost.new_ones(len(own))
                images = filtered(own.images, own.ctf)
                self.halves.halves[half - 1].add(images, refined.rotation, refined.shift_px, ones, self.pixels)
            self._note(own, refined, reference)
            memory.note(own.rows, refined.rotation, refined.shift_px * self.pixel_size, refined.confidence)
            taken.append((own, refined))
        return taken

    def _pose(self, own: ParticleImages, reference: Reference, memory: PoseMemory) -> Refined:
        rotation, shift, confidence, seen = memory.read(own.rows)
        refined = self._refine(own, reference, rotation.clone(), shift, confidence, seen)
        turned = geodesic_angle(rotation, refined.rotation)
        self._moved += torch.stack([((turned > MOVED_DEG) & seen).sum(), seen.sum()])
        return refined

    def _refine(
        self,
        own: ParticleImages,
        reference: Reference,
        rotation: Tensor,
        shift: Tensor,
        confidence: Tensor,
        seen: Tensor,
    ) -> Refined:
        """The likeliest of the remembered pose and, in a searching iteration or where there is none, of the grid's
        modes."""
        shift_px = shift / self.pixel_size
        wanted = (seen.logical_not() | (self.plan.modes > 0)).nonzero()[:, 0]  # host sync
        if len(wanted):
            found = self._search(own.select(wanted), reference, rotation[wanted], shift_px[wanted], seen[wanted])
            rotation[wanted], shift_px[wanted], confidence[wanted] = found.rotation, found.shift_px, found.confidence
        start = PoseCandidates(rotation[:, None], shift_px[:, None], torch.zeros_like(confidence)[:, None])
        steps = [(self.plan.radius, PASSES)]
        with self.timer.part("local_refinement"):
            refined = refine_candidates(own, start, reference, steps, fit_shift=self.fit_shift)
        return replace(refined, confidence=confidence)

    def _search(
        self, own: ParticleImages, reference: Reference, rotation: Tensor, shift_px: Tensor, seen: Tensor
    ) -> Refined:
        """Modes of the grid beside what is remembered, refined up to a middling radius."""
        with self.timer.part("search"):
            modes = self._grid_modes(own, reference, shift_px, seen)
        start = torch.where(seen[:, None, None], rotation, modes.rotation[:, 0])
        start_shift = torch.where(seen[:, None], shift_px, modes.shift_px[:, 0])
        known = PoseCandidates(start[:, None], start_shift[:, None], modes.log_weight[:, :1])
        highest = min(self.plan.radius, CHOICE_RADIUS)
        first = [(16.0, FIRST_PASSES)] if highest > 16.0 else []
        steps = [*first, (highest, PASSES)]
        with self.timer.part("local_refinement"):
            return refine_candidates(own, join(known, modes), reference, steps, fit_shift=self.fit_shift)

    def _grid_modes(self, own: ParticleImages, reference: Reference, shift_px: Tensor, seen: Tensor) -> PoseCandidates:
        """The grid's best modes: at the remembered shift, or over all shifts where none is remembered."""
        count = max(self.plan.modes, 2)
        search = GridSearch(reference, self._grid, self.plan.search_radius, self._generator)
        old, new = seen.nonzero()[:, 0], seen.logical_not().nonzero()[:, 0]  # host sync
        if len(new) == 0:
            return search.modes_near(own, shift_px, count)
        if len(old) == 0:
            return search.modes(own, self._shifts, count)
        near = search.modes_near(own.select(old), shift_px[old], count)
        return scatter(near, old, search.modes(own.select(new), self._shifts, count), new)

    def _note(self, own: ParticleImages, refined: Refined, reference: Reference) -> None:
        """Residuals of a few particles, for the noise spectrum, and what the others tell the monitor."""
        few, predicted = predictions(own, refined, reference, 32)
        self.residuals.add(few.images - predicted, None, self.pixels)
        gain = likelihood_gain(own, refined, reference, self.plan.radius)
        self._gain += torch.stack([gain.sum(), gain.new_tensor(float(len(own)))])
        self._shown = few.images[:EXAMPLES], predicted[:EXAMPLES]

    @property
    def gain(self) -> float:
        """Mean log-likelihood ratio an image over an empty map, at the iteration's radius; of all workers once
        finished."""
        return float(self._gain[0] / self._gain[1].clamp_min(1))

    def pictures(self) -> tuple[Tensor, Tensor] | None:
        """A few images of the last batch and what the map predicts for them, in real space; None before the first."""
        return None if self._shown is None else pictures_of(*self._shown, self.pixels)

    def finish(self, world: World) -> HalfReferences:
        """Sum over the workers, solve, compare the halves. Collective."""
        if world.size > 1:
            self.halves.reduce(world.all_reduce_, self.pixels.radius_limit)
        world.all_reduce_(*self.residuals.tensors(), self._moved, self._gain)
        result = self.halves.solve(self.pixel_size)
        variance = self.residuals.variance() / self.plan.level**2
        moved = float(self._moved[0] / self._moved[1]) if self._moved[1] > 0 else 1.0
        return HalfReferences(result.half_maps, result.fsc_masked.float(), variance, self.plan.radius, moved)


def next_radius(state: HalfReferences, plan: IterationPlan) -> float:
    """Where the next iteration refines to: a little past the shell at which the halves' correlation falls to 0.5."""
    return max(plan.radius, min(state.shared_shell + 3.0, 1.6 * plan.radius, plan.reach))
