"""The share of signal of half-maps that were made of images with white noise, at poses of which some are wrong."""

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.evaluate.slice_coverage import slice_coverage
from scalecryo.map.background_noise import BackgroundNoise
from scalecryo.map.backprojection import Backprojection
from scalecryo.physics.fft import fourier_pixels, irfft2_centred, rfft2_centred, rfft3_centred
from scalecryo.physics.fourier_slice import fourier_slice, gridding_correction
from scalecryo.physics.fsc import fsc
from scalecryo.physics.image_formation import CtfWeightedImages
from scalecryo.physics.mask import soft_sphere
from scalecryo.physics.rotation import random_rotations

BOX, COUNT, SIGNAL = 32, 3_000, 0.3  # of the images' standard deviation over the noise's
# Maps are cut to a sphere that ends one pixel before the box.
CUT = (BOX / (BOX - 2)) ** 3


def poses(uneven: bool, generator: torch.Generator) -> Float[Tensor, "b 3 3"]:
    """Random; uneven: with a density of views that falls from z to nothing at the equator."""
    rotation = random_rotations(4 * COUNT, generator)
    kept = torch.rand(len(rotation), generator=generator) < rotation[:, 2, 2].abs()
    return (rotation[kept] if uneven else rotation)[:COUNT]


def images_of(rotation: Float[Tensor, "b 3 3"], generator: torch.Generator) -> Float[Tensor, "b n n"]:
    """Of a ball of white density, in white noise."""
    volume = torch.randn(BOX, BOX, BOX, generator=generator) * soft_sphere(BOX, 7.0, 2.0)
    pixels = fourier_pixels(BOX)
    transform = rfft3_centred(volume * gridding_correction(BOX, 2.0), 2 * BOX)
    slices = fourier_slice(transform, rotation, None, None, pixels.kx, pixels.ky, 2.0, BOX)
    images = irfft2_centred(pixels.unpack(slices), BOX)
    return SIGNAL * images / images.std() + torch.randn(images.shape, generator=generator)


@pytest.mark.parametrize(("right", "uneven"), [(1.0, False), (0.5, False), (1.0, True)])
def test_share_is_that_of_the_right_poses_squared(right: float, uneven: bool) -> None:
    generator, pixels = torch.Generator().manual_seed(0), fourier_pixels(BOX)
    rotation = poses(uneven, generator)
    images = images_of(rotation, generator)
    half, one = torch.arange(COUNT) % 2 + 1, torch.ones(COUNT)
    noise = BackgroundNoise(pixels, "cpu")
    noise.add(images, torch.zeros(COUNT, dtype=torch.long), one)
    wrong = torch.rand(COUNT, generator=generator) >= right
    found = torch.where(wrong[:, None, None], random_rotations(COUNT, generator), rotation)
    sums = Backprojection(BOX)
    packed = CtfWeightedImages(pixels.pack(rfft2_centred(images)), None)
    sums.add(packed, found, torch.zeros(COUNT, 2), one, half, pixels)
    first, second = sums.solve()[0]
    share = noise.signal().coherent_share(fsc(first, second), COUNT)
    # Closed form: of signal S and noise 1 in a coefficient right² S is added up, and S (1 − right²) is more noise.
    expected = right**2 / (1 + float(noise.signal().ratio[8:].mean()) * (1 - right**2)) * CUT
    # A tenth: 3,000 images tell the noise to 1 %, which is a tenth of the signal.
    assert share == pytest.approx(expected * slice_coverage(found), rel=0.1)
