"""Slices and projections of Gaussian blobs, whose transforms and projections have closed forms."""

import math

import pytest
import torch
from torch import Tensor

from scalecryo.physics.fft import fourier_pixels, irfft2_centred, rfft3_centred
from scalecryo.physics.fourier_slice import extract_slices, gridding_correction, padded_box
from scalecryo.physics.rotation import random_rotations

BOX = 64
SIGMA = 1.5  # px: at Nyquist the transform has fallen to 1.5e-5, so sampling adds nothing


class Blobs:
    """300 blobs, centres in a ball about the box centre, random weights."""

    def __init__(self, radius_px: float):
        generator = torch.Generator().manual_seed(1)
        direction = torch.nn.functional.normalize(torch.randn(300, 3, generator=generator), dim=1)
        self.centre = direction * radius_px * torch.rand(300, 1, generator=generator) ** (1 / 3)
        self.weight = 0.5 + torch.rand(300, generator=generator)

    def volume(self) -> Tensor:
        axis = torch.arange(BOX) - BOX // 2
        x, y, z = (torch.exp(-((axis - c[:, None]) ** 2) / (2 * SIGMA**2)) for c in self.centre.T)
        return torch.einsum("m,mz,my,mx->zyx", self.weight, z, y, x)

    def slices(self, rotation: Tensor, kx: Tensor, ky: Tensor) -> Tensor:
        plane = self.centre @ rotation[:, :, :2]  # (R^T c)_xy of each blob: b, m, 2
        phase = -2 * math.pi / BOX * (plane[..., :1] * kx + plane[..., 1:] * ky)
        envelope = (2 * math.pi * SIGMA**2) ** 1.5 * torch.exp(-2 * (math.pi * SIGMA / BOX) ** 2 * (kx**2 + ky**2))
        return torch.einsum("m,bmp->bp", self.weight + 0j, torch.polar(torch.ones_like(phase), phase)) * envelope

    def projections(self, rotation: Tensor) -> Tensor:
        plane = self.centre @ rotation[:, :, :2]
        axis = torch.arange(BOX) - BOX // 2
        x, y = (torch.exp(-((axis - plane[..., i, None]) ** 2) / (2 * SIGMA**2)) for i in (0, 1))
        return math.sqrt(2 * math.pi) * SIGMA * torch.einsum("m,bmy,bmx->byx", self.weight, y, x)


def sliced(volume: Tensor, rotation: Tensor, padding: float, correct: bool = True) -> Tensor:
    pixels, box = fourier_pixels(BOX), padded_box(BOX, padding)
    density = volume * gridding_correction(BOX, padding) if correct else volume
    return extract_slices(rfft3_centred(density, box), rotation, pixels.kx, pixels.ky, box / BOX)


# Errors of trilinear interpolation measured independently for this kind of map in the shells 0.2 to 0.3 cycles/px (300
# blobs, three implementations that agree to 6e-6), with a margin of a quarter for other blobs and another box.
@pytest.mark.parametrize(
    ("padding", "extent", "error"),
    [(1, 0.2, 0.036), (1, 0.3, 0.084), (1.5, 0.2, 0.015), (1.5, 0.3, 0.032), (2, 0.2, 0.008), (2, 0.3, 0.018)],
)
def test_slices(padding: float, extent: float, error: float):
    blobs, rotation = Blobs(extent * BOX), random_rotations(20, torch.Generator().manual_seed(2))
    pixels = fourier_pixels(BOX)
    exact = blobs.slices(rotation, pixels.kx, pixels.ky)
    shells = (pixels.radius >= 0.2 * BOX) & (pixels.radius <= 0.3 * BOX)

    def relative_error(correct: bool) -> float:
        difference = sliced(blobs.volume(), rotation, padding, correct) - exact
        return float(difference[:, shells].norm() / exact[:, shells].norm())

    assert relative_error(correct=True) < 1.25 * error
    assert relative_error(correct=False) > 1.5 * relative_error(correct=True)


@pytest.mark.parametrize(("padding", "error"), [(1, 0.045), (2, 0.01), (3, 0.005)])
def test_projections(padding: float, error: float):
    blobs, rotation = Blobs(0.2 * BOX), random_rotations(20, torch.Generator().manual_seed(3))
    images = irfft2_centred(fourier_pixels(BOX).unpack(sliced(blobs.volume(), rotation, padding)), BOX)
    exact = blobs.projections(rotation)
    # The bound of the slices above at paddings 1 and 2; it falls with the square of the padding.
    assert (images - exact).norm() / exact.norm() < error


def test_grid_aligned_slice_is_the_exact_projection():
    volume = Blobs(0.3 * BOX).volume()
    images = irfft2_centred(fourier_pixels(BOX).unpack(sliced(volume, torch.eye(3)[None], 1, correct=False)), BOX)
    # Every sample falls on a voxel of the transform, so the slice theorem holds without interpolation; what is missing
    # beyond N/2 - 1 is 1.5e-5 of the blobs' amplitude.
    torch.testing.assert_close(images[0], volume.sum(0), rtol=0, atol=3e-5 * float(volume.sum(0).max()))
