"""Copies of an image: turned and mirrored in the plane, in real space and on circles, at the poses that are claimed."""

import math

import pytest
import torch
from torch import Tensor

from scalecryo.model.circle_encoder import ANGLES, CircleEncoder, CircleTransform
from scalecryo.model.copies import frames, image_copies
from scalecryo.physics.fft import fourier_pixels, rfft2_centred
from scalecryo.physics.rotation import random_rotations

BOX = 32


def gaussians(position: Tensor, shift: Tensor) -> Tensor:
    """Projections of blobs at (x, y) px from the centre, moved: closed form of an image at any pose."""
    axis = torch.arange(BOX, dtype=torch.float64) - BOX // 2
    x, y = (position[..., i] + shift[..., None, i] for i in (0, 1))
    return torch.exp(-((axis - x[..., None, None]) ** 2 + (axis[:, None] - y[..., None, None]) ** 2) / 8).sum(-3)


@pytest.mark.parametrize("copies", [1, 2, 4, 8])
def test_copies_are_the_images_at_the_poses_that_frames_give(copies: int) -> None:
    # Closed form: a blob at r is seen at (R^T r)_xy + t. A copy's pose (R B^T, B t) must give the copy.
    generator = torch.Generator().manual_seed(0)
    rotation = random_rotations(3, generator).double()
    blobs, shift = torch.randn(5, 3, generator=generator).double() * 2, torch.randn(3, 2, generator=generator).double()
    images = gaussians(torch.einsum("bij,ki->bkj", rotation, blobs)[..., :2], shift)
    made, frame = image_copies(images, copies), frames(copies).double()
    for number in range(copies):
        posed = rotation @ frame[number].T
        moved = shift @ frame[number, :2, :2].T
        wanted = gaussians(torch.einsum("bij,ki->bkj", posed, blobs)[..., :2], moved)
        assert (made[:, number] - wanted).abs().max() < 1e-5  # frames in single precision; tails at the edge


def test_circles_of_a_copy_are_read_from_the_image() -> None:
    images = torch.randn(2, BOX, BOX, generator=torch.Generator().manual_seed(1))
    images *= torch.exp(-((torch.arange(BOX) - BOX // 2) ** 2 / 20.0))[:, None]
    images *= torch.exp(-((torch.arange(BOX) - BOX // 2) ** 2 / 20.0))
    pixels, circles = fourier_pixels(BOX), CircleTransform(6)
    encoder = CircleEncoder(6, 8, 1, 8, parameterisation="s2s2", centred=True)
    seen = circles(pixels.pack(rfft2_centred(images)))
    for number, copy in enumerate(image_copies(images, 8).unbind(1)):
        wanted = circles(pixels.pack(rfft2_centred(copy)))[:, :, : ANGLES // 2]
        assert (
            seen[:, :, encoder.look[number]] - wanted
        ).abs().max() < 1e-5 * seen.abs().max()  # exact but for rounding


def test_circles_hold_the_transform_between_the_pixels() -> None:
    # Closed form: the transform of a Gaussian of width s at p is 2 pi s^2 exp(-2 pi^2 s^2 k^2 / n^2 - 2 pi i k.p / n).
    place, width = torch.tensor([1.3, -0.7], dtype=torch.float64), 2.0
    image = gaussians(place[None, None], torch.zeros(1, 2, dtype=torch.float64))
    found = CircleTransform(6)(fourier_pixels(BOX).pack(rfft2_centred(image.float())))[0].unflatten(0, (2, 6))
    angle = torch.arange(ANGLES) * 2 * math.pi / ANGLES
    k = torch.arange(1.0, 7)[:, None, None] * torch.stack([angle.cos(), angle.sin()], -1)
    phase = -2 * math.pi / BOX * (k * place).sum(-1)
    modulus = 2 * math.pi * width**2 * torch.exp(-2 * math.pi**2 * width**2 * k.square().sum(-1) / BOX**2)
    wanted = torch.stack([modulus * phase.cos(), modulus * phase.sin()])
    # Frequencies past those that are read are 2 % of the last circle's modulus and enter through the box's edges.
    assert (found - wanted).abs().max() < 0.01 * wanted.abs().max()
