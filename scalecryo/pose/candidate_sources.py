"""Where candidate poses come from: an exhaustive search of a reference, or the encoder."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from scalecryo.map.noise import NoiseSpectrum
from scalecryo.map.reference import Reference
from scalecryo.model.grid_encoder import GridEncoder, GridPrediction, encoder_features
from scalecryo.physics.fft import FourierPixels
from scalecryo.physics.grouping import rows_by_group
from scalecryo.physics.image_formation import shift_ramp
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import PoseCandidates, Poses, concatenated
from scalecryo.physics.symmetry import PointGroup
from scalecryo.pose.modes import separated_modes
from scalecryo.pose.search import Posterior, grid_posterior, templates, turned_grid, with_flips
from scalecryo.pose.shift_spread import shift_log_prior

SEPARATION_DEG = 25.0
MARGIN_DEG = 7.5  # half a step of the grid, by which a search goes beyond the asymmetric unit
GRID = 2304  # rotations of a grid, without their flips, that these angles are for
MOST_FINER = 8
KEEP, KEEP_EACH = 64, 20  # hypotheses of a search, or of the encoder, that modes are made of; at least so many each


class CandidateSource(Protocol):
    """Candidate poses of a batch."""

    def candidates(
        self, images: ParticleImages, reference: Reference, known: Poses, seen: Bool[Tensor, " b"]
    ) -> PoseCandidates:
        """As many for every image; those of images seen before may use the known pose."""


def finer_grid(group: PointGroup | None) -> int:
    """How many times as many rotations a grid has that a point group is searched with.

    A small asymmetric unit costs little, and its separate modes lie closer: with I, one in fifty images was lost on the
    grid that does for C1.
    """
    return 1 if group is None else min(MOST_FINER, max(1, len(group) // 6))


class GridSearch:
    """Exhaustive search of a reference at one radius, over a grid of rotations that is turned at random."""

    def __init__(
        self,
        reference: Reference,
        grid: Float[Tensor, "h 3 3"],
        pixels: FourierPixels,
        generator: torch.Generator,
        *,
        keep: int = KEEP,
        group: PointGroup | None = None,
    ) -> None:
        """
        Args:
            reference: that is searched.
            grid: rotations; their in-plane flips are searched too.
            pixels: that are compared, of the reference's level.
            generator: of the turn.
            keep: hypotheses kept for each image.
            group: of whose related poses only one is searched; None: C1.
        """
        self.pixels, self._group = pixels, group
        self._weight = reference.noise.pixel_weight(pixels)
        half = turned_grid(grid, generator)
        step = (GRID / len(grid)) ** (1 / 3)  # of the grid, as a share of the usual one
        self._separation = SEPARATION_DEG * step
        half = half if group is None else half[group.in_unit(half, MARGIN_DEG * step)]  # host sync: once a search
        self._keep = min(keep, 2 * len(half))
        self.rotations = with_flips(half)
        self._bank = templates(reference.transform, half, pixels, reference.scale)

    def posterior(
        self, images: ParticleImages, shift_grid_px: Float[Tensor, "t 2"], shift_sigma: float | None = None
    ) -> Posterior:
        """The best hypotheses of every image; where shifts are a Gaussian, given by its standard deviation in Å, with
        that prior."""
        near, prior = images.within(self.pixels.radius_limit), None
        if shift_sigma is not None:
            prior = shift_log_prior(shift_grid_px, images.pixel_size, shift_sigma)
        return grid_posterior(
            near.transforms, near.ctf, self._weight, self._bank, shift_grid_px, self.pixels, keep=self._keep,
            shift_log_prior=prior,
        )  # fmt: skip

    def modes(
        self,
        images: ParticleImages,
        shift_grid_px: Float[Tensor, "t 2"],
        count: int,
        shift_sigma: float | None = None,
    ) -> PoseCandidates:
        """The `count` best separated modes of each particle, over a grid of shifts as well; prior as in `posterior`."""
        posterior = self.posterior(images, shift_grid_px, shift_sigma)
        found = posterior.candidates(self.rotations, shift_grid_px * images.pixel_size)
        return separated_modes(found, count, self._separation, self._group)

    def modes_near(self, images: ParticleImages, shift: Float[Tensor, "b 2"], count: int) -> PoseCandidates:
        """The same at each particle's own shift, Å: the images are brought to the centre first."""
        near, pixels = images.within(self.pixels.radius_limit), self.pixels
        back = shift_ramp(-shift / images.pixel_size, pixels.kx, pixels.ky, pixels.box_size)
        found = self.modes(near.with_transforms(near.transforms * back), shift.new_zeros(1, 2), count)
        return replace(found, shift=found.shift + shift[:, None])


@dataclass(frozen=True, eq=False)
class SearchSource:
    """Modes of an exhaustive search: at the known shift where a pose is known, beside that pose; else over all shifts.

    Attributes:
        grid: rotations, without their in-plane flips.
        radius: Fourier pixels that are compared.
        shift_grid_px: hypotheses for an unknown shift, px of the level.
        count: modes per image.
        generator: of the turns of the grid, one for each call.
        related: rotations S whose poses S R are tried as well, R being the known pose; None: none.
        made: searches made so far, by reference, all with one turn of the grid; None: each call makes its own.
        group: see `GridSearch`.
        everywhere: whether those with a known pose are searched over all shifts too.
        shift_sigma: of a Gaussian prior of shifts, Å, where they are searched over all; None: all are equally likely.
    """

    grid: Float[Tensor, "h 3 3"]
    radius: float
    shift_grid_px: Float[Tensor, "t 2"]
    count: int
    generator: torch.Generator
    related: Float[Tensor, "s 3 3"] | None = None
    made: dict[int, GridSearch] | None = None
    group: PointGroup | None = None
    everywhere: bool = False
    shift_sigma: float | None = None

    def candidates(
        self, images: ParticleImages, reference: Reference, known: Poses, seen: Bool[Tensor, " b"]
    ) -> PoseCandidates:
        """See `CandidateSource`."""
        search = self._search(reference, images)
        new, old = rows_by_group(seen.long(), 2)
        if len(old) == 0:
            return search.modes(images, self.shift_grid_px, self.count, self.shift_sigma)
        if self.everywhere:
            modes = search.modes(images, self.shift_grid_px, self.count, self.shift_sigma)
        elif len(new) == 0:
            modes = search.modes_near(images, known.shift, self.count)
        else:
            near = search.modes_near(images.select(old), known.shift[old], self.count)
            far = search.modes(images.select(new), self.shift_grid_px, self.count, self.shift_sigma)
            modes = _in_order([near, far], torch.cat([old, new]))
        # An image without a known pose gets its best mode twice: every image has as many candidates.
        rotation = torch.where(seen[:, None, None], known.rotation, modes.rotation[:, 0])
        shift = torch.where(seen[:, None], known.shift, modes.shift[:, 0])
        first = PoseCandidates(rotation[:, None], shift[:, None], modes.log_weight[:, :1])
        related = () if self.related is None else self.related
        turned = [self._turned(first, turn) for turn in related]
        return concatenated([first, *turned, modes], 1)

    @property
    def _keep(self) -> int:
        """Hypotheses that make so many modes."""
        return max(KEEP, KEEP_EACH * self.count)

    def _search(self, reference: Reference, images: ParticleImages) -> GridSearch:
        """Of a reference, which outlives this source."""
        pixels, made = images.pixels.prefix(self.radius), self.made
        if made is None:
            return GridSearch(reference, self.grid, pixels, self.generator, keep=self._keep, group=self.group)
        if id(reference) not in made:
            turn = torch.Generator().manual_seed(self.generator.initial_seed())
            made[id(reference)] = GridSearch(reference, self.grid, pixels, turn, keep=self._keep, group=self.group)
        return made[id(reference)]

    @staticmethod
    def _turned(poses: PoseCandidates, turn: Float[Tensor, "3 3"]) -> PoseCandidates:
        return replace(poses, rotation=turn @ poses.rotation)


def _in_order(parts: Sequence[PoseCandidates], rows: Tensor) -> PoseCandidates:
    """Candidates of several groups of particles, in the order of the rows that they belong to."""
    joined, order = concatenated(parts, 0), rows.argsort()
    return PoseCandidates(joined.rotation[order], joined.shift[order], joined.log_weight[order])


@dataclass(frozen=True, eq=False)
class EncoderSource:
    """Separated modes of the encoder's distribution; the known pose is not looked at.

    Attributes:
        encoder: at its own level.
        pixels: that it sees, of that level.
        pixel_size: Å, of that level.
        noise: in the units of that level.
        count: modes per image.
        group: whose related poses are one; None: C1.
    """

    encoder: GridEncoder
    pixels: FourierPixels
    pixel_size: float
    noise: NoiseSpectrum
    count: int
    group: PointGroup | None = None

    def candidates(
        self, images: ParticleImages, reference: Reference, known: Poses, seen: Bool[Tensor, " b"]
    ) -> PoseCandidates:
        """See `CandidateSource`."""
        found = self.encoder.candidates(self.predict(images), KEEP, self.pixel_size)
        separation = SEPARATION_DEG * finer_grid(self.group) ** (-1 / 3)
        return separated_modes(found, self.count, separation, self.group)

    def predict(self, images: ParticleImages) -> GridPrediction:
        """The encoder's distribution: one forward pass.

        The transforms of two levels differ by the ratio of the boxes (levels keep the noise), and both are packed by
        rising radius: the encoder's pixels are the first ones of the images'.
        """
        near = images.within(self.pixels.radius_limit)
        weight = self.noise.pixel_weight(self.pixels)
        scaled = near.transforms * (self.pixels.box_size / images.box_size)
        features = encoder_features(scaled, near.ctf, weight)
        kind = features.device.type
        # Twice as fast where the hardware has it; local refinement makes up for the last bits of the modes.
        brief = kind == "cuda" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        with torch.autocast(kind, torch.bfloat16, enabled=brief):
            logits, shift_px = self.encoder(features)
        return GridPrediction(logits.float(), shift_px.float())
