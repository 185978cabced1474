"""The pose posterior against a double loop, real-space residuals, scipy, and Gaussian blobs with closed-form images."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from scipy.special import logsumexp

from scalecryo.physics.fft import FourierPixels, fourier_pixels, rfft3_centred
from scalecryo.physics.fourier_slice import gridding_correction
from scalecryo.physics.so3_grid import so3_grid
from scalecryo.pose.modes import separated_modes
from scalecryo.pose.search import grid_posterior, shift_grid, templates, turned_grid, with_flips

BOX, SIGMA = 32, 1.6


class Blobs:
    """Gaussians of standard deviation SIGMA px: slices, images and voxels in closed form (continuous transform)."""

    def __init__(self, centre: np.ndarray, amplitude: np.ndarray) -> None:
        self.centre, self.amplitude = centre, amplitude

    @classmethod
    def random(cls, count: int, seed: int) -> "Blobs":
        rng = np.random.default_rng(seed)
        return cls(rng.uniform(-5, 5, (count, 3)), rng.uniform(0.5, 1.5, count))

    def slices(self, rotation: np.ndarray, kx: np.ndarray, ky: np.ndarray, box: int = BOX) -> np.ndarray:
        """F(R (kx, ky, 0)), (..., p); kx and ky in cycles per box."""
        phase = (rotation[..., :, 0, None] * kx + rotation[..., :, 1, None] * ky).swapaxes(-1, -2) @ self.centre.T
        amplitude = (np.exp(-2j * np.pi / box * phase) * self.amplitude).sum(-1)
        return amplitude * (2 * np.pi * SIGMA**2) ** 1.5 * np.exp(-2 * (np.pi * SIGMA / box) ** 2 * (kx**2 + ky**2))

    def voxels(self, box: int = BOX) -> torch.Tensor:
        """Sampled density, [z, y, x], centred at box // 2."""
        line = np.arange(box) - box // 2
        rows = [np.exp(-((line[:, None] - self.centre[:, i]) ** 2) / (2 * SIGMA**2)) for i in (2, 1, 0)]
        return torch.from_numpy(np.einsum("zb,yb,xb,b->zyx", *rows, self.amplitude)).float()


def angles(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Degrees, by scipy."""
    return np.degrees((Rotation.from_matrix(a).inv() * Rotation.from_matrix(b)).magnitude())


def ramp(shift: np.ndarray, kx: np.ndarray, ky: np.ndarray, box: int = BOX) -> np.ndarray:
    """exp(-2 pi i k.t / N), (..., p)."""
    return np.exp(-2j * np.pi / box * (shift[..., :1] * kx + shift[..., 1:] * ky))


def brute_force(data: dict, images: np.ndarray, rotations: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """L (b, t, g) by a double loop in double precision; flips by the projection at their own rotation."""
    kx, ky = data["kx"], data["ky"]
    out = np.empty((len(images), len(shifts), len(rotations)))
    for g, rotation in enumerate(rotations):
        for t, shift in enumerate(shifts):
            for b, image in enumerate(images):
                model = data["blobs"].slices(rotation, kx, ky, data["box"]) * ramp(shift, kx, ky, data["box"])
                model = model if data["ctf"] is None else model * data["ctf"][b]
                cross = (data["weight"] * (model.conj() * image).real).sum()
                out[b, t, g] = cross - 0.5 * (data["weight"] * np.abs(model) ** 2).sum()
    return out


def small_problem(ctf: bool, seed: int = 0) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray]:
    pixels = fourier_pixels(16, 6).to(dtype=torch.float64)
    rng = np.random.default_rng(seed)
    radius = pixels.radius.numpy()
    data = {
        "box": 16,
        "pixels": pixels,
        "kx": pixels.kx.numpy(),
        "ky": pixels.ky.numpy(),
        "blobs": Blobs.random(6, seed),
        "ctf": rng.uniform(-1, 1, (5, len(radius))) if ctf else None,
        "weight": pixels.weight.numpy() * (radius > 0) / (100 + 1500 / (1 + radius)),
    }
    rotations = with_flips(so3_grid(24, torch.float64)).numpy()
    noise = rng.normal(size=(5, len(radius), 2)) @ [1, 1j]
    images = data["blobs"].slices(rotations[rng.integers(48, size=5)], data["kx"], data["ky"], 16) + 5 * noise
    return data, images, rotations, shift_grid(2, 1).double().numpy()


def search(data: dict, images: np.ndarray, rotations: np.ndarray, shifts: np.ndarray, **options):
    bank = data["blobs"].slices(rotations[: len(rotations) // 2], data["kx"], data["ky"], data["box"])
    single = options.pop("dtype", np.float64) == np.float32
    real, complex_ = (np.float32, np.complex64) if single else (np.float64, np.complex128)
    return grid_posterior(
        torch.from_numpy(images.astype(complex_)),
        None if data["ctf"] is None else torch.from_numpy(data["ctf"].astype(real)),
        torch.from_numpy(data["weight"].astype(real)),
        torch.from_numpy(bank.astype(complex_)),
        torch.from_numpy(shifts.astype(real)),
        data["pixels"].to(dtype=torch.float32 if single else torch.float64),
        **options,
    )


# Rounding of sums of 60 terms that reach 100 and add up to some hundreds: 1e-16 or 6e-8 of that each.
@pytest.mark.parametrize("ctf", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-10), (np.float32, 2e-4)])
def test_log_likelihood_and_evidence_are_the_double_loops(ctf, dtype, tolerance):
    data, images, rotations, shifts = small_problem(ctf)
    expected = brute_force(data, images, rotations, shifts)
    assert np.abs(expected).max() < 300
    found = search(data, images, rotations, shifts, keep=expected[0].size, dtype=dtype)
    rows = np.arange(5)[:, None]
    full = np.full_like(expected, np.nan)
    full[rows, found.shift_index.numpy(), found.rotation_index.numpy()] = found.log_likelihood.numpy()
    np.testing.assert_allclose(full, expected, atol=tolerance, rtol=0)
    assert bool((found.log_likelihood.diff(dim=1) <= 0).all())
    np.testing.assert_allclose(
        found.log_evidence.numpy(), logsumexp(expected.reshape(5, -1), axis=1), atol=tolerance, rtol=0
    )


def test_a_prior_of_shifts_is_added_to_the_double_loops():
    data, images, rotations, shifts = small_problem(True, seed=2)
    prior = -0.5 * (shifts / 0.8**2 * shifts).sum(1)
    expected = brute_force(data, images, rotations, shifts) + prior[:, None]
    options = {"keep": expected[0].size, "shift_log_prior": torch.from_numpy(prior), "chunk_elements": 200}
    found = search(data, images, rotations, shifts, **options)
    full = np.full_like(expected, np.nan)
    full[np.arange(5)[:, None], found.shift_index.numpy(), found.rotation_index.numpy()] = found.log_likelihood.numpy()
    np.testing.assert_allclose(full, expected, atol=1e-10, rtol=0)
    np.testing.assert_allclose(found.log_evidence.numpy(), logsumexp(expected.reshape(5, -1), axis=1), atol=1e-10)


@pytest.mark.parametrize("chunk_elements", [1, 37, 1000, 10**6])
def test_best_hypotheses_are_those_of_the_full_tensor_for_any_chunk_size(chunk_elements):
    data, images, rotations, shifts = small_problem(True, seed=1)
    expected = brute_force(data, images, rotations, shifts)
    keep = 20
    found = search(data, images, rotations, shifts, keep=keep, chunk_elements=chunk_elements)
    flat = expected.reshape(5, -1)
    top = np.argpartition(-flat, keep, axis=1)[:, :keep]
    index = found.shift_index.numpy() * len(rotations) + found.rotation_index.numpy()
    np.testing.assert_array_equal(np.sort(index, 1), np.sort(top, 1))
    np.testing.assert_allclose(np.sort(found.log_likelihood.numpy(), 1), np.sort(np.take_along_axis(flat, top, 1), 1))
    np.testing.assert_allclose(found.log_evidence.numpy(), logsumexp(flat, axis=1), rtol=1e-12)


def test_differences_are_those_of_real_space_residuals():
    """White noise of variance s^2 in pixels: log p = -1/2 sum |image - model|^2 / s^2, shell variance N^2 s^2."""
    box, s = BOX, 0.7
    pixels = fourier_pixels(box).to(dtype=torch.float64)
    kx, ky = pixels.kx.numpy(), pixels.ky.numpy()
    blobs = Blobs.random(8, 3)
    rotations = with_flips(so3_grid(8, torch.float64)).numpy()
    # Beyond the last shell the blobs' transform is below exp(-2 (pi 1.6 15 / 32)^2) = 1e-5; both sides leave it out.
    models = np.zeros((len(rotations), box, box // 2 + 1), complex)
    models.reshape(len(rotations), -1)[:, pixels.index.numpy()] = blobs.slices(rotations, kx, ky)
    models[:, 0, 0] = 0
    models = np.fft.irfft2(models, s=(box, box))
    image = models[3] + s * np.random.default_rng(0).normal(size=(box, box))
    residual = -0.5 * ((image - models) ** 2).sum((1, 2)) / s**2
    packed = np.fft.rfft2(image).reshape(1, -1)[:, pixels.index.numpy()]
    weight = pixels.weight.numpy() * (pixels.radius.numpy() > 0) / (box * s) ** 2
    data = {"box": box, "pixels": pixels, "kx": kx, "ky": ky, "blobs": blobs, "ctf": None, "weight": weight}
    found = search(data, packed, rotations, np.zeros((1, 2)), keep=16)
    score = np.empty(16)
    score[found.rotation_index[0].numpy()] = found.log_likelihood[0].numpy()
    np.testing.assert_allclose(score - score[0], residual - residual[0], atol=1e-8)


def test_turning_grid_and_volume_together_changes_nothing():
    data, images, rotations, shifts = small_problem(True, seed=2)
    turned = turned_grid(torch.from_numpy(rotations), torch.Generator().manual_seed(5)).numpy()
    q = turned[0] @ rotations[0].T
    before = search(data, images, rotations, shifts, keep=10)
    turned_blobs = Blobs(data["blobs"].centre @ q.T, data["blobs"].amplitude)
    after = search({**data, "blobs": turned_blobs}, images, turned, shifts, keep=10)
    np.testing.assert_array_equal(before.rotation_index.numpy(), after.rotation_index.numpy())
    np.testing.assert_array_equal(before.shift_index.numpy(), after.shift_index.numpy())
    np.testing.assert_allclose(before.log_likelihood.numpy(), after.log_likelihood.numpy(), rtol=1e-9)


def particles(blobs: Blobs, count: int, shift_px: float, seed: int) -> dict:
    """Noise-free images at random poses with a CTF each, at a noise level (weight) that makes the posterior sharp."""
    pixels = fourier_pixels(BOX, 12)
    kx, ky = pixels.kx.double().numpy(), pixels.ky.double().numpy()
    rng = np.random.default_rng(seed)
    rotation = Rotation.random(count, random_state=seed).as_matrix()
    shift = rng.uniform(-shift_px, shift_px, (count, 2)) / math.sqrt(2)
    # sin(0.1 + c k^2): up to three zeros within radius 12.
    ctf = np.sin(0.1 + rng.uniform(0.02, 0.07, (count, 1)) * (kx**2 + ky**2))
    images = blobs.slices(rotation, kx, ky) * ramp(shift, kx, ky) * ctf
    return {
        "observed": torch.from_numpy(images).to(torch.complex64),
        "ctf": torch.from_numpy(ctf).float(),
        "pixel_weight": pixels.weight * (pixels.radius > 0) / 10,
        "pixels": pixels,
        "rotation": rotation,
        "shift": shift,
    }


def extractor(blobs: Blobs) -> Callable[[torch.Tensor, FourierPixels], torch.Tensor]:
    """Templates as in use: from voxels, padded twice, gridding corrected."""
    volume = rfft3_centred(blobs.voxels() * gridding_correction(BOX, 2), 2 * BOX)
    return lambda rotation, pixels: templates(volume, rotation, pixels, 2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_templates_are_the_closed_form_slices(dtype):
    blobs, half = Blobs.random(14, 7), so3_grid(60, dtype)
    pixels = fourier_pixels(BOX, 12).to(dtype=dtype)
    volume = rfft3_centred((blobs.voxels() * gridding_correction(BOX, 2)).to(dtype), 2 * BOX)
    found = templates(volume, half, pixels, 2.0).numpy()[:, 1:]
    expected = blobs.slices(half.numpy(), pixels.kx.numpy(), pixels.ky.numpy())[:, 1:]
    # Trilinear interpolation at twofold padding costs 0.5 to 1 % between grid points. The origin, left out here and in
    # every score, always falls on one, where the gridding correction is too much.
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)


@pytest.mark.parametrize("shift_px", [0.0, 3.0])
def test_known_poses_are_found_within_the_grid_spacing(shift_px):
    blobs = Blobs.random(14, 7)
    data = particles(blobs, 100, shift_px, 11)
    rotation, shift = data.pop("rotation"), data.pop("shift")
    half = turned_grid(so3_grid(2304), torch.Generator().manual_seed(1))
    grid, shifts = with_flips(half), shift_grid(shift_px, 1.0)
    bank = extractor(blobs)(half, data["pixels"])
    found = grid_posterior(**data, templates=bank, shift_grid_px=shifts, keep=8).candidates(grid, shifts)
    error = np.stack([angles(found.rotation[:, k].double().numpy(), rotation) for k in range(8)], 1)
    off = np.linalg.norm(found.shift.numpy() - shift[:, None], axis=-1)
    # A random rotation is 7.3 degrees from the grid on average, 11.5 at most for 99 % and never above 13.4 (measured
    # with 40,000); shifts are within 0.71 px of their lattice. The spacings are 14.8 degrees and 1 px.
    assert np.median(error[:, 0]) < 9
    assert np.mean((error[:, 0] < 14.8) & (off[:, 0] < 1.05)) > 0.9
    assert error.min(1).max() < 14.8


def test_both_modes_of_a_nearly_two_fold_particle_are_found_and_kept():
    rng = np.random.default_rng(3)
    unit, strength = rng.uniform(1, 6, (7, 3)), rng.uniform(0.5, 1.5, 7)
    two_fold = np.diag([-1.0, -1.0, 1.0])
    # One copy is 5 % stronger than the other: no true symmetry.
    blobs = Blobs(np.concatenate([unit, unit @ two_fold.T]), np.concatenate([1.05 * strength, strength]))
    data = particles(blobs, 40, 0.0, 5)
    rotation = data.pop("rotation")
    data.pop("shift")
    half, shifts = so3_grid(2304), shift_grid(0, 1)
    bank = extractor(blobs)(half, data["pixels"])
    found = grid_posterior(**data, templates=bank, shift_grid_px=shifts, keep=64).candidates(with_flips(half), shifts)
    coarse = separated_modes(found, 4, 25)
    torch.testing.assert_close(coarse.log_weight.exp().sum(1), torch.ones(40), atol=1e-5, rtol=0)
    modes = coarse.rotation.double().numpy()
    # Both are among the modes to within the grid's spacing; the symmetry acts on the volume's side of R.
    for truth in (rotation, two_fold @ rotation):
        assert np.mean(np.min([angles(modes[:, m], truth) for m in range(4)], axis=0) < 14.8) > 0.93
