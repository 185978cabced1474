"""Shift, CTF columns, padding arithmetic and the forward model's parts."""

import pytest
import torch

from scalecryo.errors import InputError
from scalecryo.physics.ctf import CtfParameters, contrast_transfer
from scalecryo.physics.fft import fourier_pixels, irfft2_centred, rfft2_centred
from scalecryo.physics.fourier_slice import extract_slices, gridding_correction, padded_box
from scalecryo.physics.image_formation import form_images, shift_ramp


def parameters(count: int) -> CtfParameters:
    values = (15000.0, 14000.0, 30.0, 300.0, 2.7, 0.1, 0.0)
    return CtfParameters(*(torch.full((count,), value) for value in values))


def test_whole_pixel_shift_rolls_the_image():
    pixels = fourier_pixels(16)
    image = irfft2_centred(pixels.unpack(pixels.pack(rfft2_centred(torch.randn(16, 16)))), 16)
    ramp = shift_ramp(torch.tensor([[3.0, -2.0]]), pixels.kx, pixels.ky, 16)
    shifted = irfft2_centred(pixels.unpack(pixels.pack(rfft2_centred(image[None])) * ramp), 16)
    # +x is the last axis, +y the one before.
    torch.testing.assert_close(shifted[0], image.roll((-2, 3), (0, 1)), rtol=0, atol=1e-5)


def test_form_images_multiplies_what_it_is_given():
    pixels = fourier_pixels(8)
    slices = torch.randn(2, len(pixels), dtype=torch.complex64)
    ctf, shift = torch.randn(2, len(pixels)), torch.randn(2, 2)
    ramp = shift_ramp(shift, pixels.kx, pixels.ky, 8)
    assert form_images(slices, None, None, pixels.kx, pixels.ky, 8) is slices
    torch.testing.assert_close(form_images(slices, ctf, None, pixels.kx, pixels.ky, 8), slices * ctf)
    torch.testing.assert_close(form_images(slices, ctf, shift, pixels.kx, pixels.ky, 8), slices * ctf * ramp)


def test_ctf_parameters_select_and_move():
    p = CtfParameters(*(torch.arange(5.0) + i for i in range(7)))
    assert len(p) == 5
    assert p.select(torch.tensor([3, 1])).phase_shift.tolist() == [9.0, 7.0]
    assert len(p.select(slice(1, 3)).to("cpu")) == 2


def test_ctf_of_a_padded_box_is_the_same_curve():
    fine, coarse = (torch.arange(8.0) * step for step in (2, 1))
    zero = torch.zeros(8)
    a = contrast_transfer(parameters(1), coarse, zero, 32, 1.5)
    b = contrast_transfer(parameters(1), fine, zero, 64, 1.5)
    torch.testing.assert_close(a, b)


def test_ctf_gradient_is_finite():
    p = parameters(2)
    p.defocus_u.requires_grad_()
    p.astigmatism_angle.requires_grad_()
    pixels = fourier_pixels(16)
    gradients = torch.autograd.grad(
        contrast_transfer(p, pixels.kx, pixels.ky, 16, 1.5).square().sum(), (p.defocus_u, p.astigmatism_angle)
    )
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_padded_box():
    assert [padded_box(32, padding) for padding in (1, 1.5, 2, 3)] == [32, 48, 64, 96]
    assert padded_box(30, 1.25) == 38
    assert padded_box(30, 0.5) == 30
    with pytest.raises(InputError, match="even"):
        padded_box(33, 2)


def test_gridding_correction_is_one_at_the_centre_and_grows():
    correction = gridding_correction(16, 2)
    assert correction[8, 8, 8] == 1
    # sinc(1/4)^-2 per axis at the face of the box, padding 2.
    assert correction[8, 8, 0].item() == pytest.approx((torch.pi / 4 / 2**-0.5) ** 2, rel=1e-6)
    torch.testing.assert_close(correction, correction.permute(2, 1, 0))


def test_rotation_that_is_not_one_stays_in_the_array():
    # A diverged pose must show as NaN, not as a read outside the volume.
    for box in (8, 10):
        pixels = fourier_pixels(box)
        volume = torch.ones(box, box, box // 2 + 1, dtype=torch.complex64)
        for value in (1e6, -1e30, float("inf"), float("nan")):
            slices = extract_slices(volume, torch.full((1, 3, 3), value), pixels.kx, pixels.ky, 1.0)
            assert slices.shape == (1, len(pixels))
        assert bool(slices.isnan().all())
