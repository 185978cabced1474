"""The last pass of the guided method: poses against the references, from memory, encoder or search."""

import copy
import dataclasses

import torch
from torch import Tensor

from scalecryo.data.streaming.stream import Batch
from scalecryo.errors import TrainingError
from scalecryo.evaluate.align import Alignment
from scalecryo.evaluate.align_maps import align_maps, rotational_symmetry
from scalecryo.model.grid_encoder import GridEncoder, GridPrediction, encoder_features
from scalecryo.physics.fft import fourier_pixels
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import PoseCandidates
from scalecryo.physics.so3_grid import so3_grid
from scalecryo.pose.estimator import (
    SEPARATION_DEG,
    GridSearch,
    Reference,
    Refined,
    predictions,
    presence,
    refine_candidates,
)
from scalecryo.pose.modes import separated_modes
from scalecryo.train.particle_source import Particles
from scalecryo.train.particle_state import PoseMemory
from scalecryo.train.posed import Posed
from scalecryo.train.stages.bootstrap import HALF_GRID
from scalecryo.train.stages.final_pass import EXAMPLES, pictures_of
from scalecryo.train.stages.refinement import FIRST_PASSES, PASSES, HalfReferences, level_noise, references

MODES = 6
ENCODER_RADIUS = 12.0  # Fourier pixels that the encoder sees
# Radius and passes of local refinement of a particle never seen, and the passes at the last radius. Measured on G with
# shifts: as accurate as 2 last passes and a tenth of the gain, in half the time.
FIRST_STEPS, LAST_PASSES = ((12.0, FIRST_PASSES), (28.0, 1)), 1
UNSEEN_PRUNE_FRACTION = 0.03  # of the best mode's gain, by which one is left
PRESENCE_RADIUS = 24.0  # Fourier pixels that tell whether an image shows the particle
LEAST_WEIGHT = 0.05  # in the maps, of an image that does not seem to


class GuidedPoser:
    """Poses by local refinement against each half's own reference, from what was remembered, else from a search.

    The second half's frame is laid onto the first's, so that poses and maps agree.
    """

    def __init__(
        self,
        particles: Particles,
        state: HalfReferences,
        memory: PoseMemory | None,
        encoder: GridEncoder | None,
    ) -> None:
        config, store, device = particles.config, particles.store, particles.device
        self.level = state.half_maps[0].shape[-1]
        self.pixel_size = store.level_pixel_size(self.level)
        self._particles = particles
        self._pixels = fourier_pixels(self.level).to(device)
        self._references = references(state, self.level, self._pixels)
        self._radius = min(state.radius, self.level / 2 - 1)
        self._fit_shift = particles.fit_shift
        self._shift_radius_px = config.guided.shift_radius_a / self.pixel_size if self._fit_shift else 0.0
        self._memory = memory
        self._encoder = encoder
        small = min(store.levels)
        self._encoder_pixels = fourier_pixels(small, min(small / 2 - 1, ENCODER_RADIUS)).to(device)
        self._encoder_noise = level_noise(state.noise, small, self._encoder_pixels)
        self._grid = so3_grid(HALF_GRID).to(device)
        self._shifts = particles.shifts(self.level)
        self._seed = config.train.seed
        self._generator = torch.Generator()
        self._onto_first = lay_onto(state.half_maps[1], state.half_maps[0])

    def pose(self, batch: Batch, *, pictures: bool) -> Posed:
        """Remembered poses refined once more; the others searched, then refined at rising radii."""
        # The turned grids of a search depend on the batch alone: a resumed pass finds the same.
        self._generator.manual_seed(self._seed + int(batch.rows[0]))  # host sync
        observed = self._particles.observe(batch, self.level, self._pixels)
        rotation = torch.zeros(len(observed), 3, 3, device=observed.images.device)
        shift, confidence, shows = rotation[:, 0, :2].clone(), rotation[:, 0, 0].clone(), rotation[:, 0, 0].clone()
        shown = None
        for number, reference in enumerate(self._references, start=1):
            at = (observed.half == number).nonzero()[:, 0]
            if len(at) == 0:
                continue
            own = observed.select(at)
            found = self._pose_half(own, reference)
            if pictures and number == 1:
                few, predicted = predictions(own, found, reference, EXAMPLES)
                shown = pictures_of(few.images, predicted, self._pixels)
            turned, moved = found.rotation, found.shift_px
            if number == 2:
                turned = self._onto_first.rotation.to(turned) @ turned
                moved = moved - (turned.mT @ self._onto_first.shift_px.to(turned))[:, :2]
            rotation[at], shift[at] = turned, moved * self.pixel_size
            shows[at] = presence(own, found, reference, min(PRESENCE_RADIUS, self._radius), self._shift_radius_px)
            confidence[at] = found.confidence * shows[at]
        return Posed(rotation, shift, confidence, shows.clamp_min(LEAST_WEIGHT), shown)

    def _pose_half(self, own: ParticleImages, reference: Reference) -> Refined:
        if self._memory is None:
            return self._search(own, reference)
        rotation, shift, confidence, seen = self._memory.read(own.rows)
        shift = shift / self.pixel_size
        if not bool(seen.all()):  # host sync
            new = (~seen).nonzero()[:, 0]
            fresh = self._search(own.select(new), reference)
            rotation[new], shift[new], confidence[new] = fresh.rotation, fresh.shift_px, fresh.confidence
        start = PoseCandidates(rotation[:, None], shift[:, None], torch.zeros_like(confidence)[:, None])
        found = refine_candidates(own, start, reference, [(self._radius, PASSES)], fit_shift=self._fit_shift)
        return Refined(found.rotation, found.shift_px, confidence, found.cost)

    def _search(self, own: ParticleImages, reference: Reference) -> Refined:
        if self._encoder is not None:
            modes = self._encoder_modes(own, self._encoder)
        else:
            low = GridSearch(reference, self._grid, min(12.0, self._radius), self._generator)
            modes = low.modes(own, self._shifts, MODES)
        steps = [(radius, passes) for radius, passes in FIRST_STEPS if radius < self._radius]
        steps.append((self._radius, LAST_PASSES))
        return refine_candidates(
            own, modes, reference, steps, fit_shift=self._fit_shift, prune_fraction=UNSEEN_PRUNE_FRACTION
        )

    def fresh(self, *, encoder: bool = True) -> "GuidedPoser":
        """The same poser as for particles that it has never seen; without the encoder it searches all poses."""
        other = copy.copy(self)
        other._memory = None
        other._encoder = self._encoder if encoder else None
        return other

    def encoder_rotation(self, batch: Batch) -> Tensor:
        """Rotations by the encoder alone, one forward pass and nothing else.

        Raises:
            TrainingError: the run has no encoder.
        """
        if self._encoder is None:
            raise TrainingError("this run has no encoder: train it with guided.encoder_steps >= 1")
        own = self._particles.observe(batch, self.level, self._pixels)
        return self._encoder.own_rotation(self._predict(own, self._encoder))

    def _predict(self, own: ParticleImages, encoder: GridEncoder) -> GridPrediction:
        pixels = self._encoder_pixels
        near = own.prefix(len(pixels))
        weight = self._encoder_noise.pixel_weight(pixels)
        features = encoder_features(near.images * (pixels.box_size / self.level), near.ctf, weight)
        kind = features.device.type
        # Twice as fast where the hardware has it; local refinement makes up for the last bits of the modes.
        brief = kind == "cuda" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        with torch.autocast(kind, torch.bfloat16, enabled=brief):
            logits, shift_px = encoder(features)
        return GridPrediction(logits.float(), shift_px.float())

    def _encoder_modes(self, own: ParticleImages, encoder: GridEncoder) -> PoseCandidates:
        """Separated modes of the encoder's distribution."""
        factor = self._encoder_pixels.box_size / self.level
        prediction = self._predict(own, encoder)
        found = separated_modes(encoder.candidates(prediction, 64), MODES, SEPARATION_DEG)
        return dataclasses.replace(found, shift_px=found.shift_px / factor)


def lay_onto(moving: Tensor, fixed: Tensor) -> Alignment:
    """How one half-map turns and moves onto the other: a little, or by one of its pseudo-symmetries as well."""
    fixed, moving = fixed.cpu(), moving.cpu()
    starts = [Alignment(symmetry, False, torch.zeros(3), 0.0) for symmetry in rotational_symmetry((fixed + moving) / 2)]
    return align_maps(moving, fixed, starts, search=False)
