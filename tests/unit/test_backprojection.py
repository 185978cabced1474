"""What workers send each other of their sums: all that is not zero, and little else."""

import math

import pytest
import torch

from scalecryo.map.backprojection import Backprojection
from scalecryo.physics.fft import fourier_pixels
from scalecryo.physics.image_formation import ctf_weighted
from scalecryo.physics.rotation import random_rotations


@pytest.mark.parametrize("radius", [4.0, 9.3, 15.0])
def test_nothing_lies_outside_of_what_is_sent(radius: float) -> None:
    """Images inserted up to a radius and taken out within it add up to the sums themselves."""
    generator = torch.Generator().manual_seed(1)
    pixels = fourier_pixels(32, radius)
    images = torch.randn(40, len(pixels), dtype=torch.complex64, generator=generator)
    whole, copy = Backprojection(32), Backprojection(32)
    half = 1 + torch.arange(40) % 2
    pose = random_rotations(40, generator), torch.zeros(40, 2), torch.ones(40)
    whole.add(ctf_weighted(images, None), *pose, half, pixels)
    numerator, denominator = whole.within(pixels.radius_limit)
    copy.put_within(pixels.radius_limit, numerator, denominator)
    assert torch.equal(copy.numerator, whole.numerator)
    assert torch.equal(copy.denominator, whole.denominator)
    assert float(whole.denominator.sum()) > 0
    # Half a ball of 2 radius + 2 samples; the plane x = 0 belongs to it whole.
    reach = 2 * radius + 2
    assert denominator.shape[-1] == pytest.approx(2 / 3 * math.pi * reach**3 + math.pi / 2 * reach**2, rel=0.05)


def test_every_class_and_half_is_a_map_of_its_own() -> None:
    """Four sums fed from one stream equal four that are fed with their own particles alone."""
    generator = torch.Generator().manual_seed(2)
    pixels, count = fourier_pixels(16, 6.0), 60
    images = ctf_weighted(torch.randn(count, len(pixels), dtype=torch.complex64, generator=generator), None)
    rotation, shift, weight = random_rotations(count, generator), torch.zeros(count, 2), torch.rand(count)
    half, class_index = 1 + torch.arange(count) % 2, torch.arange(count) // 2 % 2
    together = Backprojection(16, classes=2)
    together.add(images, rotation, shift, weight, half, pixels, class_index)
    for number in (0, 1):
        for which in (1, 2):
            own = ((half == which) & (class_index == number)).nonzero()[:, 0]
            alone = Backprojection(16)
            alone.insert(images.select(own), rotation[own], shift[own], weight[own], pixels, half=1)
            assert torch.equal(together.numerator[number, which - 1], alone.numerator[0, 0])
            assert torch.equal(together.solve()[number, which - 1], alone.solve_one())
