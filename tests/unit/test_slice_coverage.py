"""How evenly slices cover Fourier space: closed forms of views that are spread in known ways."""

import math

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.evaluate.slice_coverage import HALF_WIDTH, slice_coverage
from scalecryo.physics.rotation import random_rotations


def seen_along(azimuth: Float[Tensor, " n"], height: Float[Tensor, " n"]) -> Float[Tensor, "n 3 3"]:
    """Rotations of which only the third column, the view, is looked at."""
    rotation = torch.zeros(len(azimuth), 3, 3)
    ring = (1 - height.square()).sqrt()
    rotation[:, :, 2] = torch.stack([ring * azimuth.cos(), ring * azimuth.sin(), height], -1)
    return rotation


def test_even_views_lose_nothing() -> None:
    rotation = random_rotations(20_000, torch.Generator().manual_seed(0))
    # 600 slices pass a direction, so that chance alone makes the harmonic mean 1/600 smaller.
    assert slice_coverage(rotation) == pytest.approx(1 - 1 / 600, abs=2e-3)


def test_views_round_one_axis() -> None:
    # Slices with normals round z pass a direction at θ from it with a density of 2/(π sin θ); the mean of its
    # reciprocal is π²/8 (0.81: Baldwin & Lyumkis 2020). Near z the slices' width blurs that by less than 1 %.
    azimuth = 2 * math.pi * torch.arange(20_000) / 20_000
    assert slice_coverage(seen_along(azimuth, torch.zeros(20_000))) == pytest.approx(8 / math.pi**2, rel=0.01)


def test_images_without_weight_are_not_there() -> None:
    rotation = torch.cat([torch.eye(3).expand(5_000, 3, 3), random_rotations(5_000, torch.Generator().manual_seed(2))])
    weight = torch.cat([torch.zeros(5_000), torch.ones(5_000)])
    assert slice_coverage(rotation, weight) == pytest.approx(slice_coverage(rotation[5_000:]), rel=1e-5)


def test_directions_that_no_slice_passes_count_neither_as_noise_nor_as_signal() -> None:
    # All in one plane: where they are they are as much denser as they leave bare.
    assert slice_coverage(torch.eye(3).expand(1000, 3, 3)) == pytest.approx(1 / HALF_WIDTH, rel=1e-3)


def test_without_slices_nothing_is_uneven() -> None:
    assert slice_coverage(torch.zeros(0, 3, 3)) == 1
