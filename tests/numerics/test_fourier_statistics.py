"""Parseval, shell correlations, noise levels under resizing: numpy's full transforms and closed forms as reference."""

import numpy as np
import pytest
import torch
from torch import Tensor

from scalecryo.physics import fsc as shells
from scalecryo.physics.fft import (
    fourier_crop_2d,
    fourier_pixels,
    fourier_resize_3d,
    irfft2_centred,
    rfft2_centred,
    rfft3_centred,
)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def numpy_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Shell correlation by a loop over shells of numpy's full transforms."""
    n = a.shape[0]
    axes = np.meshgrid(*[np.fft.fftfreq(n, 1 / n)] * a.ndim)
    shell = np.rint(np.sqrt(sum(axis**2 for axis in axes)))
    fa, fb = np.fft.fftn(a), np.fft.fftn(b)
    curve = []
    for s in range(n // 2 + 1):
        x, y = fa[shell == s], fb[shell == s]
        curve.append(np.vdot(x, y).real / np.sqrt(np.vdot(x, x).real * np.vdot(y, y).real))
    return np.array(curve)


def test_parseval_with_hermitian_weights():
    pixels = fourier_pixels(32).to(dtype=torch.float64)
    packed = pixels.pack(rfft2_centred(noise(3, 32, 32)))
    images = irfft2_centred(pixels.unpack(packed), 32)
    spectral = (pixels.weight * packed.abs().square()).sum(1) / 32**2
    torch.testing.assert_close(spectral, images.square().sum((1, 2)), rtol=1e-12, atol=0)


def test_fsc_matches_full_transforms():
    a = noise(24, 24, 24)
    b = a + noise(24, 24, 24, seed=1)
    np.testing.assert_allclose(shells.fsc(a, b), numpy_correlation(a.numpy(), b.numpy()), atol=1e-12)


def test_fsc_closed_forms():
    a, b = noise(32, 32, 32), noise(32, 32, 32, seed=2)
    ones = torch.ones(17, dtype=torch.float64)
    torch.testing.assert_close(shells.fsc(a, 3 * a), ones, rtol=0, atol=1e-12)
    torch.testing.assert_close(shells.fsc(a, -a), -ones, rtol=0, atol=1e-12)
    # Signal and noise of equal variance in both halves: FSC = 1/2, error about sqrt(2 / coefficients of the shell).
    curve = shells.fsc(a + b, a + noise(32, 32, 32, seed=3))
    assert (curve[6:] - 0.5).abs().max() < 0.12
    assert shells.fsc(a, torch.zeros_like(a)).abs().max() == 0


def test_resolution_interpolates():
    assert shells.resolution([1, 1, 0.9, 0.7, 0.3, 0.1], 100, 1.5, 0.5) == pytest.approx((3.5, 100 * 1.5 / 3.5))
    assert shells.resolution(torch.tensor([1, 0.2, 0.9]), 100, 1.5, 0.5) == (1.0, 150.0)
    assert shells.resolution([1, 1, 1], 4, 2.0, 0.143) == (2.0, 4.0)


def test_power_spectrum_of_white_noise_is_flat():
    spectrum = shells.power_spectrum(noise(48, 48, 48)) / 48**3
    # Relative error of a shell's mean power is sqrt(2 / coefficients): 2.5 % at shell 16 (3,200), 4 sigma.
    assert (spectrum[16:] - 1).abs().max() < 0.1


def test_phase_randomise_keeps_moduli_and_low_shells():
    volume = noise(32, 32, 32)
    random = shells.phase_randomise(volume, 8, torch.Generator().manual_seed(4))
    torch.testing.assert_close(rfft3_centred(random).abs(), rfft3_centred(volume).abs(), rtol=1e-9, atol=1e-9)
    curve = shells.fsc(volume, random)
    torch.testing.assert_close(curve[:8], torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-9)
    # Random phases: standard deviation sqrt(2 / coefficients) = 0.05 at shell 8, 0.03 on average; 4 sigma.
    assert curve[8:].abs().max() < 0.2


@pytest.mark.parametrize(("full", "small"), [(64, 32), (48, 20)])
def test_crop_keeps_white_noise(full: int, small: int):
    images = noise(400, full, full)
    cropped = fourier_crop_2d(images, small)
    pixels = fourier_pixels(small)
    power = pixels.pack(rfft2_centred(cropped)).abs().square() / small**2
    # Every coefficient keeps unit variance: 400 images x hundreds of pixels, relative error < 0.5 %.
    assert power.mean().item() == pytest.approx(1, abs=0.02)
    # Nyquist row and column are empty, so the variance of the pixels is ((n - 1)/n)^2.
    assert cropped.var().item() == pytest.approx(((small - 1) / small) ** 2, abs=0.02)


def test_crop_of_a_wave_is_the_wave():
    full, small, kx, ky = 60, 24, 5, -7

    def wave(n: int) -> Tensor:
        axis = (torch.arange(n, dtype=torch.float64) - n // 2) / n
        return torch.cos(2 * torch.pi * (kx * axis[None, :] + ky * axis[:, None]) + 0.3)

    cropped = fourier_crop_2d(wave(full), small)
    # The unscaled transform goes with n/N, pixel values with N/n.
    torch.testing.assert_close(cropped, wave(small) * full / small, rtol=0, atol=1e-12)


def test_resized_volume_projects_to_cropped_images():
    volume = noise(32, 32, 32)
    small = fourier_resize_3d(volume, 20)
    # Sums along z are exact projections at the identity.
    torch.testing.assert_close(small.sum(0), fourier_crop_2d(volume.sum(0), 20), rtol=0, atol=1e-10)


def test_resize_up_and_down_again():
    volume = fourier_resize_3d(noise(16, 16, 16), 12)
    back = fourier_resize_3d(fourier_resize_3d(volume, 20), 12)
    torch.testing.assert_close(back, volume, rtol=0, atol=1e-12)
