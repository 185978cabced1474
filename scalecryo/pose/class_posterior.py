"""How much each image belongs to each of several maps, over all of its poses.

A look at low frequencies and few rotations shows which classes an image can belong to at all; only these are looked at
in full. Each class by itself: the scores of one fit the cache, those of all do not.
"""

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor

from scalecryo.physics.fft import FourierPixels
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.pose.search import grid_evidence, templates

LOW, FEW = 2 / 3, 4  # radius of the first look, of the full one; one rotation of so many
# Nats, and share of the best class's gain, that a class may be behind the best one at the first look. Eight species at
# -14 dB, maps after one round: with 10 nats alone four of them are kept, and they hold all of the posterior.
MARGIN, MARGIN_SHARE = 10.0, 0.1


class ClassPosterior:
    """Of images over the classes of some maps.

    Attributes:
        banks: slices of each map at the grid's rotations.
    """

    def __init__(
        self,
        transforms: Sequence[Complex[Tensor, "d d d//2+1"]],
        scale: float,
        grid: Float[Tensor, "h 3 3"],
        few: Float[Tensor, "f 3 3"],
        shift_grid_px: Float[Tensor, "t 2"],
        pixels: FourierPixels,
    ) -> None:
        """
        Args:
            transforms: of the maps, padded (`reference_transform`).
            scale: samples per cycle and box.
            grid: rotations, without their flips.
            few: rotations of the first look.
            shift_grid_px: hypotheses of where the content sits from the centre, (x, y).
            pixels: that images are packed by.
        """
        self._shifts, self._pixels = shift_grid_px, pixels
        self._low = pixels.prefix(LOW * pixels.radius_limit)
        self.banks = [templates(transform, grid, pixels, scale) for transform in transforms]
        self._transforms, self._scale, self._few = transforms, scale, few

    @cached_property
    def _first_look(self) -> list[Complex[Tensor, "f p"]]:
        return [templates(transform, self._few, self._low, self._scale) for transform in self._transforms]

    def shares(
        self, images: ParticleImages, pixel_weight: Float[Tensor, " p"], log_prior: Float[Tensor, " k"]
    ) -> Float[Tensor, "b k"]:
        """Posterior of each image over the classes; arguments as in `log_evidence`."""
        likely = self._likely(images, pixel_weight, log_prior)
        several = likely.sum(1) > 1
        found = torch.where(likely, 0.0, -math.inf)
        return self._filled(found, images, pixel_weight, log_prior, likely & several[:, None]).softmax(1)

    def log_evidence(
        self, images: ParticleImages, pixel_weight: Float[Tensor, " p"], log_prior: Float[Tensor, " k"]
    ) -> Float[Tensor, "b k"]:
        """Of each image and class, its prior included, up to the image's constant (see `Posterior`); -inf where the
        class was ruled out.

        Args:
            images: packed by the pixels.
            pixel_weight: Hermitian weight over noise variance, 0 at the origin.
            log_prior: of the classes, up to a constant; -inf: the class is empty.
        """
        likely = self._likely(images, pixel_weight, log_prior)
        found = torch.where(likely, 0.0, -math.inf)
        return self._filled(found, images, pixel_weight, log_prior, likely)

    def _likely(
        self, images: ParticleImages, pixel_weight: Float[Tensor, " p"], log_prior: Float[Tensor, " k"]
    ) -> Bool[Tensor, "b k"]:
        """Classes that an image may belong to, by the first look."""
        low, few = images.within(self._low.radius_limit), len(self._few)
        weight = pixel_weight[: len(self._low)]
        found = torch.stack([self._of_class(low, weight, bank, self._low) for bank in self._first_look], 1)
        best = (found + log_prior.float()).amax(1, keepdim=True)
        gain = found.amax(1, keepdim=True) - math.log(2 * few * len(self._shifts))
        return found + log_prior.float() >= best - MARGIN - MARGIN_SHARE * gain.clamp_min(0)

    def _filled(
        self,
        found: Float[Tensor, "b k"],
        images: ParticleImages,
        pixel_weight: Float[Tensor, " p"],
        log_prior: Float[Tensor, " k"],
        wanted: Bool[Tensor, "b k"],
    ) -> Float[Tensor, "b k"]:
        """`found`, with the evidence of images and classes where it is wanted."""
        for number, bank in enumerate(self.banks):
            rows = wanted[:, number].nonzero()[:, 0]  # host sync
            if len(rows):
                evidence = self._of_class(images.select(rows), pixel_weight, bank, self._pixels)
                found[rows, number] = evidence + log_prior[number].float()
        return found

    def _of_class(
        self, images: ParticleImages, weight: Float[Tensor, " p"], bank: Complex[Tensor, "h p"], pixels: FourierPixels
    ) -> Float[Tensor, " b"]:
        return grid_evidence(images.transforms, images.ctf, weight, bank, self._shifts, pixels)
