"""Running half-maps: the density that was projected comes back, at every level, and sums of workers add up."""

import math

import pytest
import torch
from torch import Tensor

from scalecryo.map.running_maps import RunningMaps
from scalecryo.physics.fft import fourier_pixels
from scalecryo.physics.fourier_slice import extract_slices
from scalecryo.physics.image_formation import CtfWeightedImages
from scalecryo.physics.rotation import random_rotations

LEVEL, COUNT = 32, 600
BLOBS = torch.tensor([[4.0, -2.0, 1.0], [-3.0, 3.0, -4.0], [0.0, -4.0, 3.0], [2.0, 5.0, 2.0]])
WIDTH = 2.0  # px


def slices(rotation: Tensor, level: int, radius: float | None = None) -> Tensor:
    """Transforms over the box of projections of Gaussian blobs: closed form, the same at every level."""
    pixels, size = fourier_pixels(level, radius), level / LEVEL
    k = torch.stack([pixels.kx, pixels.ky], -1)
    seen = torch.einsum("bij,ki->bkj", rotation, BLOBS)[..., :2] * size
    phase = torch.einsum("pj,bkj->bkp", k, seen) * (-2 * math.pi / level)
    fall = torch.exp(-2 * (math.pi * WIDTH / LEVEL) ** 2 * k.square().sum(-1))
    return (torch.polar(torch.ones_like(phase), phase).sum(1) * fall).to(torch.complex64)


def inserted(maps: RunningMaps, rotation: Tensor, keep: float = 1.0) -> RunningMaps:
    pixels = fourier_pixels(maps.level)
    half, zero = torch.arange(len(rotation)) % 2 + 1, torch.zeros(len(rotation), 2)
    images = CtfWeightedImages(slices(rotation, maps.level), torch.ones(len(rotation), len(pixels)))
    maps.insert(images, rotation, zero, torch.ones(len(rotation)), half, pixels, keep=keep)
    return maps


def rotations(seed: int, count: int = COUNT) -> Tensor:
    return random_rotations(count, torch.Generator().manual_seed(seed))


def error(maps: RunningMaps, transform: Tensor, radius: float) -> float:
    pixels, some = fourier_pixels(maps.level, radius), rotations(9, 20)
    found = extract_slices(transform, some, pixels.kx, pixels.ky, maps.scale)
    wanted = slices(some, maps.level, radius)
    return float((found - wanted).abs().square().sum().sqrt() / wanted.abs().square().sum().sqrt())


@pytest.mark.parametrize("padding", [1.0, 2.0])
def test_slices_of_the_maps_are_the_images(padding: float) -> None:
    maps = inserted(RunningMaps(LEVEL, padding, "cpu"), rotations(0))
    maps.refresh(None, joined_radius=6.0)
    for transform in maps.transforms:
        # The regularisation takes off 5 % of the mean weight's, more where images lie thinly; the rest is trilinear
        # interpolation, on a grid without padding and with it.
        assert error(maps, transform, 10.0) < 0.09


def test_halves_are_joined_at_low_frequencies_and_apart_beyond() -> None:
    maps = RunningMaps(LEVEL, 2.0, "cpu")
    pixels, few = fourier_pixels(LEVEL), rotations(1, 8)
    noise = torch.randn(8, len(pixels), 2, generator=torch.Generator().manual_seed(0))
    images = CtfWeightedImages(torch.view_as_complex(noise), torch.ones(8, len(pixels)))
    maps.insert(images, few, torch.zeros(8, 2), torch.ones(8), torch.ones(8, dtype=torch.long), pixels, keep=1.0)
    maps.refresh(None, joined_radius=8.0)
    first, second = maps.transforms
    low, high = fourier_pixels(LEVEL, 3.0), fourier_pixels(LEVEL)
    seen = [extract_slices(transform, few, p.kx, p.ky, 2.0) for transform in (first, second) for p in (low, high)]
    outer = high.radius > 12
    # The window in real space couples neighbouring shells: its transform falls off like that of a ball.
    assert (seen[2] - seen[0]).norm() < 0.1 * seen[0].norm()
    assert seen[3][:, outer].norm() < 0.1 * seen[1][:, outer].norm()
    maps.refresh(None, joined_radius=100.0)
    assert maps.transforms[0] is maps.transforms[1]


def test_maps_are_those_of_a_reconstruction() -> None:
    # The sum of Gaussians in real space, in density units: projections integrate it along z.
    maps = inserted(RunningMaps(LEVEL, 2.0, "cpu"), rotations(2))
    maps.refresh(None, joined_radius=6.0)
    axis = torch.arange(LEVEL) - LEVEL // 2
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    squared = [(x - b[0]) ** 2 + (y - b[1]) ** 2 + (z - b[2]) ** 2 for b in BLOBS]
    density = torch.stack([torch.exp(-s / (2 * WIDTH**2)) for s in squared]).sum(0)
    density = density * LEVEL / (2 * math.pi * WIDTH**2) ** 1.5  # transforms over the box: their sums are 1 at k = 0
    for found in maps.maps():
        assert (found - density).norm() < 0.1 * density.norm()


def test_sums_move_to_a_larger_level() -> None:
    small = inserted(RunningMaps(LEVEL, 1.0, "cpu"), rotations(3))
    small.refresh(None, 6.0)
    large = small.grown(2 * LEVEL)
    large.refresh(None, 6.0)
    assert error(large, large.transforms[0], 8.0) < 0.09
    inserted(large, rotations(4))
    large.refresh(None, 6.0)
    assert error(large, large.transforms[0], 8.0) < 0.09


def test_earlier_images_decay() -> None:
    # Two equal batches, the first worth 0.5² of the second one: inserted in one refreshing or in two.
    at_once, in_two = RunningMaps(LEVEL, 1.0, "cpu"), RunningMaps(LEVEL, 1.0, "cpu")
    for maps, between in ((at_once, False), (in_two, True)):
        inserted(maps, rotations(5, 10), keep=0.5)
        inserted(maps, rotations(6, 10), keep=0.5)
        if between:
            maps.refresh(None, 6.0)
        inserted(maps, rotations(7, 10), keep=0.5)
        maps.refresh(None, 6.0)
    alone = [inserted(RunningMaps(LEVEL, 1.0, "cpu"), rotations(seed, 10)) for seed in (5, 6, 7)]
    for maps in alone:
        maps.refresh(None, 6.0)
    wanted = sum(share * maps.sums.denominator for share, maps in zip((0.25, 0.5, 1.0), alone, strict=True))
    for maps in (at_once, in_two):
        assert torch.allclose(maps.sums.denominator, wanted, rtol=1e-5, atol=1e-5)
