"""How far shifts reach, told from those within a disc: against the spread that they were drawn with."""

import math

import pytest
import torch
from torch import Tensor

from scalecryo.pose.shift_spread import ShiftSpread

CPU = torch.device("cpu")


def reach(shift: Tensor, radius: float, use: Tensor | None = None) -> float:
    spread = ShiftSpread(radius, CPU)
    spread.add(shift, torch.ones(len(shift), dtype=torch.bool) if use is None else use)
    return spread.reach()


def anywhere(count: int, radius: float, generator: torch.Generator) -> Tensor:
    """In a disc, all places alike."""
    distance = radius * torch.rand(count, generator=generator).sqrt()
    angle = 2 * math.pi * torch.rand(count, generator=generator)
    return torch.stack([distance * angle.cos(), distance * angle.sin()], 1)


@pytest.mark.parametrize("sigma", [6.0, 12.0, 18.0])
def test_spread_is_found_from_the_disc_alone(sigma: float) -> None:
    # Drawn from a Gaussian of 20,000: the mean of r²/R² has an error of 0.3/sqrt(n); at sigma = R that is 5 % of sigma.
    shift = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(1)) * sigma
    assert reach(shift, 20.0) == pytest.approx(4 * sigma, rel=0.06)


def test_the_disc_is_the_least_and_a_flat_spread_has_an_end() -> None:
    generator = torch.Generator().manual_seed(2)
    assert reach(torch.randn(5000, 2, generator=generator) * 2.0, 20.0) == 20.0
    flat = anywhere(20_000, 20.0, generator)
    # Decay of 1/2 over the disc is the least: sigma = R, so 4 R.
    assert reach(flat, 20.0) == pytest.approx(80.0)


def test_few_and_those_that_are_not_to_be_used_tell_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    wide = torch.randn(4000, 2, generator=generator) * 12.0
    assert reach(wide[:90], 20.0) == 20.0
    assert reach(wide, 20.0, torch.zeros(4000, dtype=torch.bool)) == 20.0
    # What lies outside the disc, right or wrong, changes nothing.
    far = torch.full((4000, 2), 40.0)
    assert reach(torch.cat([wide, far]), 20.0) == reach(wide, 20.0)


def sigma(shift: Tensor, radius: float) -> float | None:
    spread = ShiftSpread(radius, CPU)
    spread.add(shift, torch.ones(len(shift), dtype=torch.bool))
    return spread.sigma()


@pytest.mark.parametrize("wrong", [0, 10_000, 20_000])
def test_sigma_is_that_of_the_particles_posed_rightly(wrong: int) -> None:
    # Drawn: 10,000 with 4 Å, the others anywhere in the disc. A standard deviation of 10,000 pairs is known to
    # 1/(2 sqrt(10,000)), 0.5 %; twice as many others make that some 3 %. The plain decay would say 6.0 and 7.1 Å.
    generator = torch.Generator().manual_seed(4)
    right = torch.randn(10_000, 2, generator=generator) * 4.0
    assert sigma(torch.cat([right, anywhere(wrong, 16.0, generator)]), 16.0) == pytest.approx(4.0, rel=0.05)


def test_sigma_is_not_told_of_few_of_flat_ones_or_of_a_wide_gaussian() -> None:
    generator = torch.Generator().manual_seed(5)
    assert sigma(torch.randn(90, 2, generator=generator), 16.0) is None
    assert sigma(anywhere(5000, 16.0, generator), 16.0) is None
    assert sigma(torch.randn(20_000, 2, generator=generator) * 14.0, 16.0) is None
