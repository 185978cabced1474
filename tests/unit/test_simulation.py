"""The generator against closed forms, RELION's own projections, and a plain double-precision formula of the CTF."""

from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from scalecryo.data.formats.relion import read_particles
from scalecryo.data.particles import ParticleTable
from scalecryo.data.simulation.density import fit_map
from scalecryo.data.simulation.noise import noise_sigma
from scalecryo.data.simulation.particles import draw_particles
from scalecryo.data.simulation.projector import Projector
from scalecryo.data.simulation.settings import Imaging
from scalecryo.errors import InputError

N, SIGMA = 48, 1.8


def blobs(points: np.ndarray, box_size: int, sigma: float, dims: int) -> np.ndarray:
    """Σ of unit Gaussians at points (x, y[, z]) px from the centre: their projection along z is the same in 2-D."""
    axis = np.arange(box_size) - box_size // 2
    lines = [np.exp(-((axis - p[:, None]) ** 2) / (2 * sigma**2)) / np.sqrt(2 * np.pi * sigma**2) for p in points.T]
    return np.einsum("px,py,pz->zyx", *lines) if dims == 3 else np.einsum("px,py->yx", *lines)


@pytest.fixture(scope="module")
def points() -> np.ndarray:
    directions = np.random.default_rng(0).normal(size=(30, 3))
    return 15 * directions / np.linalg.norm(directions, axis=1, keepdims=True).clip(1)


def particle_table(rotation: np.ndarray, pixel_size: float, **columns: np.ndarray) -> ParticleTable:
    count = len(rotation)
    zero = np.zeros(count)
    always = {"stack": zero, "stack_index": np.arange(count), "source_row": np.arange(count)}
    rest = {"optics_group": zero + 1, "half": zero, "rotation": rotation, "shift": np.zeros((count, 2))}
    return ParticleTable(pixel_size, ("s.mrcs",), always | rest | columns)


def test_projections_of_gaussian_blobs(points: np.ndarray) -> None:
    """A point r is seen at (Rᵀ r)_xy; at 20 random rotations and at the identity."""
    rotation = np.concatenate([np.eye(3)[None], Rotation.random(20, random_state=1).as_matrix()])
    projector = Projector(torch.from_numpy(blobs(points, N, SIGMA, 3)).float(), 1.0)
    images = projector.project(torch.from_numpy(rotation)).double().numpy()
    for image, r in zip(images, rotation, strict=True):
        expected = blobs((points @ r)[:, :2], N, SIGMA, 2)
        # Cubic B-splines on a twice padded transform, points to 30 % of the box from the centre: measured 0.1 %.
        assert np.linalg.norm(image - expected) < 3e-3 * np.linalg.norm(expected)


def test_shifts_move_the_content_and_do_not_wrap(points: np.ndarray) -> None:
    rotation = Rotation.random(4, random_state=2).as_matrix()
    shift = np.array([[3.3, -2.1], [-12.0, 7.5], [0.0, 20.0], [0.25, 0.0]])
    pixel_size = 1.5
    projector = Projector(torch.from_numpy(blobs(points, N, SIGMA, 3)).float(), pixel_size)
    table = particle_table(rotation, pixel_size, shift=shift * pixel_size)
    images = projector.images(table, slice(0, 4)).double().numpy()
    for image, r, move in zip(images, rotation, shift, strict=True):
        expected = blobs((points @ r)[:, :2] + move, N, SIGMA, 2)
        assert np.linalg.norm(image - expected) < 5e-3 * np.linalg.norm(expected)


def test_ctf_is_applied_on_the_padded_image(points: np.ndarray) -> None:
    """Against RELION's formula in double precision on the closed-form projection, padded twice."""
    pixel_size, kv, cs, w = 1.2, 300.0, 2.7, 0.1
    rotation = Rotation.random(3, random_state=3).as_matrix()
    optics = {
        "defocus_u": np.array([9000.0, 12000.0, 5000.0]),
        "defocus_v": np.array([8000.0, 12000.0, 4500.0]),
        "astigmatism_angle": np.array([30.0, 0.0, 110.0]),
        "voltage": np.full(3, kv),
        "spherical_aberration": np.full(3, cs),
        "amplitude_contrast": np.full(3, w),
        "phase_shift": np.zeros(3),
    }
    projector = Projector(torch.from_numpy(blobs(points, N, SIGMA, 3)).float(), pixel_size)
    images = projector.images(particle_table(rotation, pixel_size, **optics), slice(0, 3)).double().numpy()
    wavelength = 12.2643247 / np.sqrt(kv * 1e3 * (1 + kv * 1e3 * 0.978466e-6))
    k = np.fft.fftfreq(2 * N, pixel_size)
    squared, angle = k[:, None] ** 2 + k**2, np.arctan2(k[:, None], k)
    for i, image in enumerate(images):
        u, v, axis = (optics[name][i] for name in ("defocus_u", "defocus_v", "astigmatism_angle"))
        defocus = (u + v) / 2 + (u - v) / 2 * np.cos(2 * (angle - np.radians(axis)))
        phase = np.pi * wavelength * defocus * squared - np.pi / 2 * cs * 1e7 * wavelength**3 * squared**2
        ctf = np.sin(phase + np.arctan(w / np.sqrt(1 - w**2)))
        padded = np.pad(blobs((points @ rotation[i])[:, :2], N, SIGMA, 2), N // 2)
        transform = np.fft.fft2(np.fft.ifftshift(padded)) * ctf
        expected = np.fft.fftshift(np.fft.ifft2(transform)).real[N // 2 : -N // 2, N // 2 : -N // 2]
        assert np.linalg.norm(image - expected) < 5e-3 * np.linalg.norm(expected)


def test_images_against_relion(shared_data: Path) -> None:
    """RELION's projections of a point, 24 real poses, shifts and defoci at 200 kV: all conventions at once."""
    folder = shared_data / "projections_relion"
    with mrcfile.open(folder / "pointmass.mrc") as file:
        volume = torch.from_numpy(file.data.astype(np.float32))
    with mrcfile.open(folder / "relion_proj_batch_pfac2.mrcs") as file:
        theirs = file.data.astype(np.float64)
    table = read_particles(str(folder / "relion_proj_batch_pfac2.star"))
    ours = Projector(volume, table.pixel_size).images(table, slice(0, 24)).double().numpy()
    order = table.columns["stack_index"]
    correlation = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(ours, theirs[order], strict=True)]
    # RELION multiplies the CTF on the unpadded box and interpolates linearly, so a wide CTF wraps there: above 0.95.
    assert min(correlation) > 0.95


def test_signal_to_noise_is_a_ratio_of_variances() -> None:
    signal = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(0)) * 3 + 5
    assert noise_sigma(signal, 0.0) == pytest.approx(float(signal.std(correction=0)), rel=1e-5)
    assert noise_sigma(signal, -10.0) == pytest.approx(np.sqrt(10) * noise_sigma(signal, 0.0))


def test_drawn_particles_have_the_spread_that_was_asked_for() -> None:
    count = 4000
    imaging = Imaging(0.8, defocus_um=(0.4, 1.2), astigmatism_um=0.1, shift_a=3.0)
    columns = draw_particles(count, imaging, "s.mrcs", torch.Generator().manual_seed(1)).columns
    mean = (columns["defocus_u"] + columns["defocus_v"]) / 2
    assert 4000 <= mean.min() < 4050
    assert 11950 < mean.max() <= 12000.001
    astigmatism = columns["defocus_u"] - columns["defocus_v"]
    # Uniform from 0 to 1,000 Å: mean 500 ± 4σ = 4·289/√4000.
    assert astigmatism.min() >= 0
    assert astigmatism.max() <= 1000.001
    assert astigmatism.mean() == pytest.approx(500, abs=19)
    # σ of 8,000 numbers is known to 1/√16000 = 0.8 %; four of them.
    assert columns["shift"].std() == pytest.approx(3.0, rel=0.032)
    # Entries of uniform rotations have mean 0, variance 1/3: four standard errors.
    np.testing.assert_allclose(columns["rotation"].mean(0), 0, atol=4 * np.sqrt(1 / 3 / count))
    # Rotation angles have the density (1 − cos θ)/π: their mean is π/2 + 2/π.
    angle = Rotation.from_matrix(columns["rotation"]).magnitude()
    assert angle.mean() == pytest.approx(np.pi / 2 + 2 / np.pi, abs=4 * 0.65 / np.sqrt(count))


@pytest.mark.parametrize(("source_box", "source_pixel"), [(48, 1.0), (40, 1.5), (65, 0.8)])
def test_maps_are_resampled_about_their_centre(source_box: int, source_pixel: float) -> None:
    """Blobs stay where they are in Å, whatever box and pixel size they were sampled in; odd boxes too."""
    points_a = 10 * np.random.default_rng(4).uniform(-1, 1, size=(12, 3))
    source = blobs(points_a / source_pixel, source_box, 2.4 / source_pixel, 3) / source_pixel**3
    found = fit_map(torch.from_numpy(source).float(), source_pixel, 64, 1.0).double().numpy()
    expected = blobs(points_a, 64, 2.4, 3)
    found *= (found * expected).sum() / (found**2).sum()
    # A ratio of pixel sizes that even boxes can only come near to leaves up to 0.1 % of 10 Å: 0.01 Å of 2.4.
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)


def test_settings_that_mean_nothing() -> None:
    for settings, message in (
        ({"pixel_size": 0.0}, "pixel size"),
        ({"pixel_size": 1.0, "defocus_um": (1.2, 0.4)}, "defocus"),
        ({"pixel_size": 1.0, "defocus_um": (-1.0, 0.4)}, "defocus"),
        ({"pixel_size": 1.0, "shift_a": -1.0}, "negative"),
        ({"pixel_size": 1.0, "astigmatism_um": 0.1}, "defocus range"),
    ):
        with pytest.raises(InputError, match=message):
            Imaging(**settings)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least one"):
        draw_particles(0, Imaging(1.0), "s.mrcs", torch.Generator())
