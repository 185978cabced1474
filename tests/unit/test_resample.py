"""Another grid for a map, against Gaussian blobs, whose values are known everywhere."""

import math

import pytest
import torch

from scalecryo.errors import InputError
from scalecryo.physics.resample import density_centre, resample

SIGMA = 4.0  # Å


def blob(shape: tuple[int, int, int], pixel_size: float, place: tuple[float, float, float]) -> torch.Tensor:
    """exp(-r²/2σ²) on a grid [z, y, x] about a place (x, y, z), index."""
    axes = [torch.arange(length, dtype=torch.float64) for length in shape]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    squared = (x - place[0]) ** 2 + (y - place[1]) ** 2 + (z - place[2]) ** 2
    return torch.exp(-squared * pixel_size**2 / (2 * SIGMA**2)).float()


@pytest.mark.parametrize(("box_size", "pixel_size"), [(48, 1.3), (30, 2.0), (64, 0.9)])
def test_values_on_another_grid_are_those_of_the_blob(box_size: int, pixel_size: float) -> None:
    """From an odd, oblong grid of 1.5 Å onto a cube, with a point of the map at the cube's middle."""
    centre = (19.25, 22.0, 17.5)
    source = blob((37, 45, 40), 1.5, (20.0, 21.5, 18.0))
    found = resample(source, 1.5, box_size, pixel_size, centre)
    middle = tuple(
        box_size // 2 + (at - c) * 1.5 / pixel_size for at, c in zip((20.0, 21.5, 18.0), centre, strict=True)
    )
    expected = blob((box_size,) * 3, pixel_size, middle)
    # Cut at the coarsest Nyquist, 1/4 Å⁻¹, where its transform is exp(-2π²σ²/16) = 3e-9 of the largest.
    assert float((found - expected).abs().max()) < 1e-4


def test_the_same_grid_gives_the_same_map() -> None:
    source = blob((32, 32, 32), 2.0, (15.0, 16.0, 17.5))
    assert torch.allclose(resample(source, 2.0, 32, 2.0), source, atol=1e-5)


def test_beyond_the_map_is_its_background() -> None:
    source = blob((20, 20, 20), 2.0, (10.0, 10.0, 10.0)) + 5
    found = resample(source, 2.0, 40, 2.0)
    assert float(found[0, 0, 0]) == pytest.approx(float(source.median()))
    assert float(found[20, 20, 20]) == pytest.approx(6.0, abs=1e-3)


def test_detail_beyond_the_new_nyquist_is_cut() -> None:
    line = torch.cos(2 * math.pi * 9 * torch.arange(32) / 32)
    wave = line.expand(32, 32, 32).contiguous()
    # 9 cycles in 32 px of 1 Å are 0.28 Å⁻¹; 2 Å pixels hold 0.25.
    assert float(resample(wave, 1.0, 16, 2.0).std()) < 1e-4
    assert float(resample(wave, 1.0, 20, 1.6).std()) == pytest.approx(0.5**0.5, rel=0.05)


def test_centre_of_what_stands_out() -> None:
    assert density_centre(blob((40, 44, 48), 2.0, (30.0, 12.0, 18.0))) == pytest.approx([30.0, 12.0, 18.0], abs=0.05)
    assert density_centre(torch.zeros(8, 8, 8)) == [4, 4, 4]


def test_odd_cube_is_refused() -> None:
    with pytest.raises(InputError, match="even"):
        resample(torch.zeros(8, 8, 8), 1.0, 9, 1.0)
