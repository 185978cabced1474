"""Kernels of several widths, of which each place takes what serves it."""

import pytest
import torch
from torch import Tensor

from scalecryo.map.kernel_widths import locally_best

BOX = 64


def _halves(volume: Tensor, noise: float, seed: int) -> Tensor:
    """A map in two halves with noise of their own."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([volume + noise * torch.randn(volume.shape, generator=generator) for _ in (1, 2)])


def _detail(seed: int) -> Tensor:
    """Random density at all frequencies, of unit variance."""
    return torch.randn(BOX, BOX, BOX, generator=torch.Generator().manual_seed(seed))


def test_maps_of_one_width_are_left_as_they_are() -> None:
    halves = _halves(_detail(0), 0.3, 1)
    # The bands add up to one at every frequency; single precision.
    assert locally_best(halves[None]) == pytest.approx(halves, abs=1e-4)


def test_what_stands_still_takes_all_images_and_what_moves_the_near_ones() -> None:
    """The wide kernel has a tenth of the noise, and on one side it shows another density."""
    still, here, elsewhere = _detail(2), _detail(3), _detail(4)
    left = torch.zeros(BOX, BOX, BOX)
    left[:, :, : BOX // 2] = 1.0
    truth, blurred = left * still + (1 - left) * here, left * still + (1 - left) * elsewhere
    narrow, wide = _halves(truth, 0.5, 5), _halves(blurred, 0.05, 6)
    found = locally_best(torch.stack([narrow, wide]))

    def error(maps: Tensor, at: slice) -> float:
        return float((maps - truth)[..., at].square().mean().sqrt())

    # Both borders, the box's end among them, lie 12 px away, a wavelength of all but the lowest band.
    for at, best in ((slice(12, 20), wide), (slice(44, 52), narrow)):
        assert error(found, at) < 1.3 * error(best, at)
    assert error(narrow, slice(12, 20)) > 5 * error(found, slice(12, 20))
    assert error(wide, slice(44, 52)) > 2 * error(found, slice(44, 52))


def test_halves_stay_independent_where_nothing_is_to_choose() -> None:
    """Noise alone, of kernels that hold ever more images: the choice, which both halves share, makes no agreement."""
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(9, 2, BOX, BOX, BOX, generator=generator)
    found = locally_best(torch.stack([noise[:count].mean(0) for count in (1, 3, 9)]))
    # With a ninth of the noise the wide kernel should win everywhere. 64³ voxels: independent noise is 0 ± 0.002;
    # an agreement of 0.02 is a seventh of what ends a resolution.
    assert abs(float(torch.corrcoef(found.flatten(1))[0, 1])) < 0.02
