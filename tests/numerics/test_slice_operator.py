"""The slice operator: independent interpolators, exact gradients, exact adjoint."""

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch import Tensor
from torch_fourier_slice import extract_central_slices_rfft_3d

from scalecryo.physics.ctf import CtfParameters, contrast_transfer
from scalecryo.physics.fft import fourier_pixels, rfft3_centred
from scalecryo.physics.fourier_slice import (
    add_friedel_pairs,
    extract_slices,
    gridding_correction,
    insert_slices,
    padded_box,
)
from scalecryo.physics.image_formation import form_images
from scalecryo.physics.rotation import random_rotations, rotation_from_vector


def random_volume(box: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(box, box, box, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rotations(count: int, seed: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return random_rotations(count, torch.Generator().manual_seed(seed), dtype=dtype)


def frequencies(box: int, radius: float | None = None, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    pixels = fourier_pixels(box, radius).to(dtype=dtype)
    return pixels.kx, pixels.ky


def test_matches_torch_fourier_slice():
    box = 32
    volume, rotation = random_volume(box, 0, torch.float32), rotations(20, dtype=torch.float32)
    pixels, transform = fourier_pixels(box), rfft3_centred(volume)
    ours = extract_slices(transform, rotation, pixels.kx, pixels.ky, 1.0)
    theirs = extract_central_slices_rfft_3d(torch.fft.fftshift(transform, dim=(0, 1)), rotation, rot_tolerance=None)
    theirs = pixels.pack(torch.fft.ifftshift(theirs, dim=-2))
    # Two single precision implementations of one formula; theirs normalises coordinates to [-1, 1] on the way.
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize(("box", "padding"), [(16, 1.0), (16, 1.5), (12, 2.0)])
def test_matches_scipy_interpolation_of_the_full_transform(box: int, padding: float):
    volume, rotation = random_volume(box, 1), rotations(10)
    d, (kx, ky) = padded_box(box, padding), frequencies(box)
    ours = extract_slices(rfft3_centred(volume, d), rotation, kx, ky, d / box)
    half = d // 2
    pad = [(half - box // 2, half - box // 2)] * 3
    full = np.fft.fftshift(np.fft.fftn(np.fft.ifftshift(np.pad(volume.numpy(), pad))))
    x, y, z = d / box * np.einsum("bij,jp->ibp", rotation.numpy()[:, :, :2], np.stack([kx.numpy(), ky.numpy()]))
    theirs = map_coordinates(full, np.stack([z, y, x]) + half, order=1)
    # Both double precision.
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-11 * np.abs(theirs).max())


def test_zero_beyond_the_last_whole_shell():
    kx = torch.tensor([7.0, 7.1, 0.0, 0.0])
    ky = torch.tensor([0.0, 0.0, -7.0, -7.5])
    ones = torch.ones(16, 16, 9, dtype=torch.complex64)
    assert extract_slices(ones, torch.eye(3)[None], kx, ky, 1.0).abs().round().tolist() == [[1, 0, 1, 0]]


def test_gradcheck_of_slice_ctf_and_shift():
    box, padding = 8, 1.5
    d = padded_box(box, padding)
    (kx, ky), correction = frequencies(box), gridding_correction(box, padding, dtype=torch.float64)
    values = (12000.0, 11000.0, 20.0, 300.0, 2.7, 0.1, 0.0)
    parameters = CtfParameters(*(torch.tensor([value, 1.1 * value], dtype=torch.float64) for value in values))
    ctf = contrast_transfer(parameters, kx, ky, box, 1.5)

    def images(volume: Tensor, vector: Tensor, shift: Tensor) -> Tensor:
        slices = extract_slices(rfft3_centred(volume * correction, d), rotation_from_vector(vector), kx, ky, d / box)
        return torch.view_as_real(form_images(slices, ctf, shift, kx, ky, box))

    volume = random_volume(box, 2).requires_grad_()
    generator = torch.Generator().manual_seed(3)
    vector = torch.randn(2, 3, generator=generator, dtype=torch.float64).requires_grad_()
    shift = torch.randn(2, 2, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(images, (volume, vector, shift), eps=1e-7, atol=1e-5)


def test_gradcheck_of_the_free_rotation_matrix():
    # Any matrix, not only along the group: columns 0 and 1 get the interpolant's slope, column 2 gets zero.
    kx, ky = frequencies(8, radius=2)
    transform = rfft3_centred(random_volume(8, 4)).requires_grad_()
    rotation = rotations(2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, r: torch.view_as_real(extract_slices(v, r, kx, ky, 1.0)), (transform, rotation), eps=1e-7, atol=1e-5
    )


def test_pose_gradient_at_the_identity_is_finite_and_not_zero():
    kx, ky = frequencies(16)
    transform = rfft3_centred(random_volume(16, 6), 32)
    vector = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    target = extract_slices(transform, rotation_from_vector(torch.full((1, 3), 0.1).double()), kx, ky, 2.0)
    loss = (extract_slices(transform, rotation_from_vector(vector), kx, ky, 2.0) - target).abs().square().sum()
    (gradient,) = torch.autograd.grad(loss, vector)
    # Zeroing matrix entries that are exactly 0 would lose all three; it is a known fault of another library.
    assert bool(gradient.isfinite().all())
    assert bool((gradient != 0).all())


@pytest.mark.parametrize("scale", [1.0, 1.5, 2.0])
def test_insert_is_the_adjoint_of_extract(scale: float):
    box = 16
    d, (kx, ky) = int(box * scale), frequencies(box)
    generator = torch.Generator().manual_seed(7)
    volume = torch.randn(d, d, d // 2 + 1, generator=generator, dtype=torch.complex128)
    rotation = torch.cat([torch.eye(3, dtype=torch.float64)[None], rotations(10)])
    values = torch.randn(11, len(kx), generator=generator, dtype=torch.complex128)
    left = torch.vdot(extract_slices(volume, rotation, kx, ky, scale).flatten(), values.flatten()).real
    inserted = insert_slices(values, rotation, kx, ky, scale, d)
    right = torch.vdot(volume.flatten(), inserted.flatten()).real
    # The same products in another order, in double precision.
    assert abs(left - right) < 1e-10 * abs(left)


def test_insert_with_friedel_partners_is_the_sum_over_the_full_grid():
    box, scale = 12, 1.5
    d, pixels = int(box * scale), fourier_pixels(box).to(dtype=torch.float64)
    rotation = rotations(6)
    images = torch.randn(6, box, box, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    transform = torch.fft.rfft2(images)
    packed = pixels.pack(transform)
    ours = insert_slices(packed * pixels.weight / 2, rotation, pixels.kx, pixels.ky, scale, d)
    weights = (pixels.weight / 2).expand(6, -1)
    weight = insert_slices(weights, rotation, pixels.kx, pixels.ky, scale, d)
    add_friedel_pairs(ours)
    add_friedel_pairs(weight)

    # Reference: every pixel of the full transform, onto the full grid, one corner at a time.
    full = np.fft.fft2(images.numpy())
    ky, kx = np.meshgrid(np.fft.fftfreq(box, 1 / box), np.fft.fftfreq(box, 1 / box), indexing="ij")
    disc = np.hypot(kx, ky) <= box // 2 - 1
    q = scale * np.einsum("bij,jp->bpi", rotation.numpy()[:, :, :2], np.stack([kx[disc], ky[disc]]))
    base = np.floor(q).astype(int)
    grid, count = np.zeros((d, d, d), complex), np.zeros((d, d, d))
    for corner in np.ndindex(2, 2, 2):
        share = np.prod(np.where(np.array(corner), q - base, 1 - (q - base)), axis=-1)
        x, y, z = np.moveaxis((base + corner) % d, -1, 0)
        np.add.at(grid, (z, y, x), share * full[:, disc])
        np.add.at(count, (z, y, x), share)
    half = d // 2
    # The Nyquist plane of the half grid only ever gets rounding; the reference holds the same samples.
    np.testing.assert_allclose(ours[..., :half].numpy(), grid[..., :half], atol=1e-11)
    np.testing.assert_allclose(weight[..., :half].numpy(), count[..., :half], atol=1e-11)


def test_insert_adds_to_the_given_grid():
    kx, ky = frequencies(8)
    values = torch.ones(2, len(kx), dtype=torch.float64)
    grid = torch.ones(8, 8, 5, dtype=torch.float64)
    result = insert_slices(values, rotations(2), kx, ky, 1.0, 8, out=grid)
    assert result is grid
    # Trilinear shares add up to one for each sample.
    assert grid.sum().item() == pytest.approx(8 * 8 * 5 + values.numel(), abs=1e-9)


def test_transform_gradient_is_the_adjoint():
    generator = torch.Generator().manual_seed(9)
    for box, d in ((8, 8), (8, 12), (6, 16)):
        volume = torch.randn(box, box, box, generator=generator, dtype=torch.float64, requires_grad=True)
        values = torch.randn(d, d, d // 2 + 1, generator=generator, dtype=torch.complex128)
        (ours,) = torch.autograd.grad(rfft3_centred(volume, d), volume, values)
        gap = (d - box) // 2
        padded = torch.nn.functional.pad(volume, [gap] * 6)
        (reference,) = torch.autograd.grad(torch.fft.rfftn(torch.fft.ifftshift(padded)), volume, values)
        # torch's own gradient of the plain composition, double precision.
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12 * d**3)
