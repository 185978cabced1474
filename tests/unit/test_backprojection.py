"""What workers send each other of their sums: all that is not zero, and little else."""

import math

import pytest
import torch

from scalecryo.map.backprojection import Backprojection
from scalecryo.physics import fft
from scalecryo.physics.fft import fourier_pixels, irfft3_centred
from scalecryo.physics.fourier_slice import add_friedel_pairs, gridding_correction
from scalecryo.physics.fsc import shell_index_3d
from scalecryo.physics.image_formation import ctf_weighted
from scalecryo.physics.mask import soft_sphere
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


def test_maps_solved_in_slabs_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of the shells to the bit, and maps to the rounding of another order of axes."""
    generator = torch.Generator().manual_seed(4)
    pixels = fourier_pixels(16, 7.0)
    images = ctf_weighted(torch.randn(30, len(pixels), dtype=torch.complex64, generator=generator), None)
    sums = Backprojection(16)
    half = 1 + torch.arange(30) % 2
    sums.add(images, random_rotations(30, generator), torch.zeros(30, 2), torch.ones(30), half, pixels)
    whole = sums.solve()
    monkeypatch.setattr(fft, "SLAB", 1000)
    assert torch.equal(sums.solve(), whole)
    monkeypatch.setattr(fft, "LARGE_BOX", 0)
    # Single precision of two transforms.
    torch.testing.assert_close(sums.solve(), whole, rtol=0, atol=2e-6 * float(whole.abs().max()))


def test_a_solved_map_is_the_numerator_over_its_regularised_weight() -> None:
    """By the formula in double precision, written out on the full grid: Friedel pairs, shells, floor, sphere."""
    generator = torch.Generator().manual_seed(5)
    pixels, count = fourier_pixels(16, 7.0), 40
    images = ctf_weighted(torch.randn(count, len(pixels), dtype=torch.complex64, generator=generator), None)
    sums = Backprojection(16)
    pose = random_rotations(count, generator), torch.zeros(count, 2), torch.ones(count)
    sums.add(images, *pose, torch.ones(count, dtype=torch.long), pixels)
    numerator, weight = (grid[0, 0].clone().to(kind) for grid, kind in
                         zip(sums.tensors(), (torch.complex128, torch.float64), strict=True))  # fmt: skip
    numerator, weight = add_friedel_pairs(numerator), add_friedel_pairs(weight)
    shells = shell_index_3d(32)
    floor = torch.zeros_like(weight)
    for shell in shells.unique():
        at = shells == shell
        floor[at] = 0.01 * weight[at].mean()
    largest = max(float(weight[shells == shell].sum()) for shell in shells.unique())
    density = irfft3_centred(numerator / (weight + floor + 1e-6 * largest / weight.numel()), 16)
    density = density * soft_sphere(16, 6, edge_px=2) * gridding_correction(16, 2.0)
    torch.testing.assert_close(sums.solve_one(regularisation=0.01).double(), density, rtol=0,
                               atol=1e-5 * float(density.abs().max()))  # fmt: skip
