"""The noise spectrum from the images' corners: flat where white, right where coloured, each group its own."""

import pytest
import torch
from torch import Tensor

from scalecryo.map.background_noise import BackgroundNoise
from scalecryo.physics.fft import fourier_pixels

BOX, COUNT = 64, 400


def coloured(variance: Tensor, generator: torch.Generator) -> Tensor:
    """Noise whose transform over the box has a given variance in each shell."""
    pixels = fourier_pixels(BOX)
    packed = pixels.pack(torch.fft.rfft2(torch.randn(COUNT, BOX, BOX, generator=generator)))
    return torch.fft.irfft2(pixels.unpack(packed * variance[pixels.shell].sqrt()), s=(BOX, BOX))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def particle() -> Tensor:
    axis = torch.arange(BOX) - BOX // 2
    return 3 * torch.exp(-(axis[:, None] ** 2 + axis**2) / (2 * 6.0**2))


def test_white_noise_is_flat_under_a_particle(generator: torch.Generator) -> None:
    noise = BackgroundNoise(fourier_pixels(BOX), "cpu")
    images = torch.randn(COUNT, BOX, BOX, generator=generator) * 2**0.5 + particle()
    noise.add(images, torch.zeros(COUNT, dtype=torch.long), torch.ones(COUNT))
    # Closed form: 2. 400 images of some 900 independent corner pixels: 5 shells of a dozen and more coefficients each.
    assert noise.variance()[0] == pytest.approx(torch.full((32,), 2.0), rel=0.06)


def test_coloured_noise_keeps_its_spectrum_and_groups_their_own(generator: torch.Generator) -> None:
    shells = torch.arange(33.0)
    fall = [4 / (1 + (shells / 12) ** 2), 1 / (1 + (shells / 20) ** 2)]
    noise = BackgroundNoise(fourier_pixels(BOX), "cpu")
    for group, variance in enumerate(fall):
        images = coloured(variance, generator) + particle()
        noise.add(images, torch.full((COUNT,), group), torch.ones(COUNT))
    found = noise.variance()
    for group, variance in enumerate(fall):
        # Smoothing over five shells and the corners' window bend a spectrum that falls tenfold by some per cent; the
        # prior of 64 images draws each to their mean by 64 / 464.
        mixed = (variance * COUNT + (fall[0] + fall[1]) / 2 * 64) / (COUNT + 64)
        assert found[group, 3:30] == pytest.approx(mixed[3:30], rel=0.12)
    assert found[7, 3:30] == pytest.approx((fall[0] + fall[1])[3:30] / 2, rel=0.12)  # a group without images


def test_images_without_noise_get_a_flat_spectrum() -> None:
    noise = BackgroundNoise(fourier_pixels(BOX), "cpu")
    noise.add(particle().expand(COUNT, -1, -1), torch.zeros(COUNT, dtype=torch.long), torch.ones(COUNT))
    variance = noise.variance()[0]
    assert variance.min() > 0
    assert variance[4:].max() < 1.001 * variance[4:].min()


def test_padding_counts_for_nothing(generator: torch.Generator) -> None:
    images, weight = coloured(torch.ones(33), generator), torch.ones(COUNT)
    alone, padded = (BackgroundNoise(fourier_pixels(BOX), "cpu") for _ in range(2))
    alone.add(images, torch.zeros(COUNT, dtype=torch.long), weight)
    padded.add(
        torch.cat([images, images * 9]), torch.zeros(2 * COUNT, dtype=torch.long), torch.cat([weight, 0 * weight])
    )
    assert torch.equal(alone.variance(), padded.variance())


def test_signal_is_what_images_have_beyond_their_corners() -> None:
    noise = BackgroundNoise(fourier_pixels(128), "cpu")
    shells = torch.arange(len(noise.image_power), dtype=torch.float64)
    noise.count[0] = 100
    noise.power[0] = 100 * 2.0
    noise.image_power += 100 * 2.0 * (1 + 0.01 * shells)
    # A straight line is its own mean over five shells, but at its ends.
    assert noise.signal().ratio[3:-2] == pytest.approx(0.01 * shells[3:-2], rel=1e-5)
