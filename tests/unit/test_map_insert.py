"""What workers send each other of their sums: all that is not zero, and little else."""

import math

import pytest
import torch

from scalecryo.map.backprojection import MapAccumulator
from scalecryo.physics.fft import fourier_pixels
from scalecryo.physics.image_formation import filtered
from scalecryo.physics.rotation import random_rotations


@pytest.mark.parametrize("radius", [4.0, 9.3, 15.0])
def test_nothing_lies_outside_of_what_is_sent(radius: float) -> None:
    """Images inserted up to a radius and taken out within it add up to the accumulator itself."""
    generator = torch.Generator().manual_seed(1)
    pixels = fourier_pixels(32, radius)
    images = torch.randn(40, len(pixels), dtype=torch.complex64, generator=generator)
    whole, copy = MapAccumulator(32), MapAccumulator(32)
    whole.add(filtered(images, None), random_rotations(40, generator), torch.zeros(40, 2), torch.ones(40), pixels)
    numerator, denominator = whole.within(pixels.radius_limit)
    copy.put_within(pixels.radius_limit, numerator, denominator)
    assert torch.equal(copy.numerator, whole.numerator)
    assert torch.equal(copy.denominator, whole.denominator)
    assert float(whole.denominator.sum()) > 0
    # Half a ball of 2 radius + 2 samples; the plane x = 0 belongs to it whole.
    reach = 2 * radius + 2
    assert len(denominator) == pytest.approx(2 / 3 * math.pi * reach**3 + math.pi / 2 * reach**2, rel=0.05)
