"""Masks against the geometry that they were asked for."""

import math
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from scipy import ndimage

from scalecryo.errors import InputError
from scalecryo.evaluate.align_maps import linear_map
from scalecryo.physics.mask import centre_of_mass, mask_from_map, soft_sphere


def test_sphere_profile():
    mask = soft_sphere(32, 8, 4)[16, 16]
    distance = (torch.arange(32) - 16).abs()
    assert bool((mask[distance <= 8] == 1).all())
    assert bool((mask[distance >= 12] == 0).all())
    # Half way down the raised cosine.
    assert mask[26].item() == pytest.approx(0.5)
    assert soft_sphere(32, 10, 0).sum().item() == pytest.approx(4 / 3 * math.pi * 10**3, rel=0.02)


def test_sphere_refuses_nonsense():
    with pytest.raises(InputError, match="not be negative"):
        soft_sphere(16, -1)
    with pytest.raises(InputError, match="even"):
        soft_sphere(15, 4)


def ball(box: int, radius: float) -> torch.Tensor:
    return soft_sphere(box, radius, 0)


def test_mask_of_a_ball_is_the_ball_grown():
    # A ball of radius 10 px low-passed at 6 px keeps its half level at 10 px, and falls to 15 % about 1.4 px further.
    mask = mask_from_map(ball(48, 10), 1.0, low_pass=6.0, threshold=0.5, dilate_px=3, edge_px=4)
    line = mask[24, 24, 24:]
    assert bool((line[:13] == 1).all())
    assert bool((line[19:] == 0).all())
    assert bool((line.diff() <= 0).all())
    assert 0 < line[15] < 1


def test_noise_outside_raises_the_threshold():
    noise = 0.3 * torch.randn(48, 48, 48, generator=torch.Generator().manual_seed(0))
    mask = mask_from_map(ball(48, 10) + noise, 1.0, low_pass=6.0)
    assert mask[24, 24, 24] == 1
    # Background beyond the box's sphere stays out but for a few 3 sigma voxels.
    assert mask[:6, :6, :6].mean() < 0.05


def test_real_map(shared_data: Path):
    with mrcfile.open(shared_data / "maps" / "betagal_100.mrc") as mrc:
        volume = torch.from_numpy(np.array(mrc.data, dtype=np.float32))
    mask = mask_from_map(volume, 3.54)
    assert 0 <= mask.min() <= mask.max() <= 1
    # beta-galactosidase: 465 kDa at 1.21 Å^3/Da is 12,700 voxels of 3.54 Å; a loose mask holds two to eight times that.
    assert 2 * 12700 < mask.sum() < 8 * 12700
    # One body that keeps nearly all of the positive density.
    assert ndimage.label(mask.numpy() > 0.5)[1] == 1
    positive = volume.clamp_min(volume.std())
    assert ((positive - volume.std()) * mask).sum() > 0.97 * (positive - volume.std()).sum()


def test_flat_map_is_refused():
    with pytest.raises(InputError, match="positive contrast"):
        mask_from_map(torch.zeros(16, 16, 16), 1.0)


def test_centre_of_mass_is_scipys_and_moving_by_it_centres_the_map() -> None:
    line = torch.arange(32.0) - 16
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    blob = torch.exp(-((x - 4) ** 2 + (y + 3) ** 2 + (z - 1.5) ** 2) / 8)
    blob += 0.5 * torch.exp(-((x - 1) ** 2 + (y + 5) ** 2 + z**2) / 8)
    ones = torch.ones_like(blob)
    found = centre_of_mass(blob, ones)
    expected = [at - 16 for at in ndimage.center_of_mass(blob.numpy())][::-1]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)  # scipy sums in single precision
    moved = linear_map(blob, torch.eye(3), -found)
    # Interpolation in Fourier space leaves ripples, whose positive part counts: a twentieth of a pixel.
    assert float(centre_of_mass(moved, ones).norm()) < 0.05
    assert centre_of_mass(-ones, ones).tolist() == [0, 0, 0]
