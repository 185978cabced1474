"""Grids, ranking, bad input and modes of the pose search, against numpy, scipy and geometry."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from scalecryo.errors import InputError
from scalecryo.map.noise import NoiseSpectrum
from scalecryo.map.reference import Reference, reference_transform
from scalecryo.physics.fft import fourier_pixels
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import PoseCandidates
from scalecryo.physics.rotation import geodesic_angle, random_rotations, rotation_from_vector
from scalecryo.physics.so3_grid import so3_grid
from scalecryo.physics.symmetry import PointGroup
from scalecryo.pose import search
from scalecryo.pose.candidate_sources import GRID, GridSearch, finer_grid
from scalecryo.pose.modes import separated_modes, soft_labels
from scalecryo.pose.search import Posterior, grid_posterior, largest, shift_grid, templates, turned_grid, with_flips


def angles(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Degrees between rotations, by scipy."""
    return np.degrees((Rotation.from_matrix(a).inv() * Rotation.from_matrix(b)).magnitude())


def test_flips_follow_their_rotations():
    grid = so3_grid(20, torch.float64)
    both = with_flips(grid).numpy()
    expected = (Rotation.from_matrix(grid.numpy()) * Rotation.from_euler("Z", 180, degrees=True)).as_matrix()
    # Exact but for scipy's sin(pi) and its normalisation of matrices.
    np.testing.assert_allclose(both[20:], expected, atol=1e-12)
    np.testing.assert_array_equal(both[:20], grid.numpy())


def test_grid_with_flips_covers_rotations_as_its_docstring_says():
    samples = Rotation.random(4000, random_state=0).as_matrix().reshape(-1, 9)
    mean = {}
    for name, grid in (("plain", so3_grid(4608)), ("flips", with_flips(so3_grid(2304)))):
        trace = (samples @ grid.double().numpy().reshape(-1, 9).T).max(1)
        mean[name] = np.degrees(np.arccos(np.clip((trace - 1) / 2, -1, 1))).mean()
    # 4,000 samples of spread 2.3 degrees: the means are known to 0.04.
    assert mean["flips"] == pytest.approx(7.30, abs=0.12)
    assert mean["plain"] == pytest.approx(7.44, abs=0.12)


def test_turned_grid_is_the_grid_in_another_frame_of_the_volume():
    grid = with_flips(so3_grid(50, torch.float64))
    turned = turned_grid(grid, torch.Generator().manual_seed(3))
    assert not torch.allclose(turned, turned_grid(grid, torch.Generator().manual_seed(4)))
    torch.testing.assert_close(turned, turned_grid(grid, torch.Generator().manual_seed(3)))
    common = turned @ grid.mT
    torch.testing.assert_close(common, common[:1].expand_as(common), atol=1e-12, rtol=0)
    torch.testing.assert_close(turned[50:], with_flips(turned[:50])[50:], atol=1e-12, rtol=0)


@pytest.mark.parametrize(("radius", "step", "count"), [(0, 1, 1), (1, 1, 5), (3, 1, 29), (2, 0.5, 49), (7.5, 2.5, 29)])
def test_shift_grid_counts_lattice_points_of_the_disc(radius, step, count):
    # Gauss circle problem: 1, 5, 13, 29, 49 points at radii 0..4.
    grid = shift_grid(radius, step)
    assert grid.shape == (count, 2)
    assert grid[0].tolist() == [0, 0]
    distance = grid.norm(dim=1)
    assert distance.max() <= radius + 1e-4
    assert bool((distance.diff() >= -1e-6).all())


@pytest.mark.parametrize(("radius", "step"), [(-1, 1), (2, 0), (2, -1)])
def test_shift_grid_refuses_nonsense(radius, step):
    with pytest.raises(InputError, match="step > 0"):
        shift_grid(radius, step)


@pytest.mark.parametrize("length", [1, 7, 64, 1000, 4608, 20011])
@pytest.mark.parametrize("count", [1, 8, 40])
def test_largest_is_topk(length, count):
    count = min(count, length)
    values = torch.randn(5, length, generator=torch.Generator().manual_seed(length))
    found, index = largest(values, count)
    order = np.argsort(-values.numpy(), axis=1)[:, :count]
    np.testing.assert_array_equal(index.numpy(), order)
    np.testing.assert_array_equal(found.numpy(), np.take_along_axis(values.numpy(), order, 1))


def packed(images: int, radius: float = 5) -> dict:
    pixels = fourier_pixels(16, radius)
    generator = torch.Generator().manual_seed(0)
    return {
        "observed": torch.randn(images, len(pixels), dtype=torch.complex64, generator=generator),
        "ctf": torch.rand(images, len(pixels), generator=generator),
        "pixel_weight": pixels.weight * (pixels.radius > 0),
        "pixels": pixels,
    }


@pytest.mark.usefixtures("wrong_shapes")
def test_posterior_refuses_what_does_not_fit():
    data = packed(3)
    templates = torch.randn(4, len(data["pixels"]), dtype=torch.complex64)
    shifts = shift_grid(1, 1)
    with pytest.raises(InputError, match="keep 41 of 40"):
        grid_posterior(**data, templates=templates, shift_grid_px=shifts, keep=41)
    with pytest.raises(InputError, match="chunk_elements 0"):
        grid_posterior(**data, templates=templates, shift_grid_px=shifts, keep=1, chunk_elements=0)
    with pytest.raises(InputError, match="templates holds"):
        grid_posterior(**data, templates=templates[:, :-1], shift_grid_px=shifts, keep=1)
    with pytest.raises(InputError, match="ctf holds"):
        grid_posterior(**{**data, "ctf": data["ctf"][:, 1:]}, templates=templates, shift_grid_px=shifts, keep=1)
    with pytest.raises(InputError, match="observed is empty"):
        grid_posterior(**{**data, "observed": data["observed"][:0]}, templates=templates, shift_grid_px=shifts, keep=1)


def test_candidates_of_a_posterior_carry_its_mass():
    rotations, shifts = so3_grid(4), shift_grid(1, 1)
    score = torch.tensor([[3.0, 1.0]])
    found = Posterior(torch.tensor([[2, 0]]), torch.tensor([[0, 4]]), score, torch.tensor([3.5])).candidates(
        rotations, shifts
    )
    assert torch.equal(found.rotation[0], rotations[[2, 0]])
    assert torch.equal(found.shift[0], shifts[[0, 4]])
    torch.testing.assert_close(found.log_weight, score - 3.5)


def cluster(centre: Rotation, tilts: list[float]) -> np.ndarray:
    return np.stack([(centre * Rotation.from_euler("X", tilt, degrees=True)).as_matrix() for tilt in tilts])


def test_modes_absorb_their_neighbours():
    here, there, elsewhere = Rotation.random(3, random_state=1)
    # The modes are further apart than their widths: 5 degrees within each.
    assert min(angles(a.as_matrix(), b.as_matrix()) for a, b in ((here, there), (here, elsewhere))) > 30
    poses = np.concatenate([cluster(here, [0, 5, 10]), cluster(there, [0, 5]), cluster(elsewhere, [0])])
    score = np.array([-1.0, -2.0, -3.0, -1.5, -1.6, -9.0])
    order = np.random.default_rng(0).permutation(6)
    shift = np.arange(12.0).reshape(6, 2)
    candidates = PoseCandidates(
        torch.from_numpy(poses[order])[None], torch.from_numpy(shift[order])[None], torch.from_numpy(score[order])[None]
    )
    modes = separated_modes(candidates, 2, 20)
    np.testing.assert_allclose(modes.rotation[0].numpy(), poses[[0, 3]])
    np.testing.assert_allclose(modes.shift[0].numpy(), shift[[0, 3]])
    mass = np.array([np.exp(score[:3]).sum(), np.exp(score[3:5]).sum()])
    # The second mode is the heavier one; the third is forgotten.
    np.testing.assert_allclose(modes.log_weight[0].exp().numpy(), mass / mass.sum(), rtol=1e-12)
    narrow = separated_modes(candidates, 6, 2)
    np.testing.assert_allclose(np.sort(narrow.log_weight[0].numpy()), np.sort(score - np.log(np.exp(score).sum())))


def test_images_with_fewer_modes_are_filled_up():
    grid = with_flips(so3_grid(500))
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(1000, (3, 9), generator=generator)
    rotation = grid[index]
    rotation[0] = rotation[0, :1]
    score = torch.randn(3, 9, generator=generator)
    score[1, 3:] = -torch.inf
    score[1, 1] = 9
    modes = separated_modes(PoseCandidates(rotation, torch.zeros(3, 9, 2), score), 5, 25)
    torch.testing.assert_close(modes.log_weight.exp().sum(1), torch.ones(3), atol=1e-6, rtol=0)
    assert torch.isinf(modes.log_weight[0, 1:]).all()
    assert torch.isinf(modes.log_weight[1, 3:]).all()
    assert torch.equal(modes.rotation[0], rotation[0, :5])
    assert torch.equal(modes.rotation[1, 3:], rotation[1, 1].expand(2, 3, 3))
    for image in range(3):
        finite = modes.rotation[image][torch.isfinite(modes.log_weight[image])].double().numpy()
        apart = [angles(finite[i], finite[j]) for i in range(len(finite)) for j in range(i)]
        # Single precision resolves an angle of 25 degrees to far better than 0.01.
        assert min(apart, default=180) > 24.99


def test_modes_refuse_nonsense():
    one = PoseCandidates(torch.eye(3).expand(1, 1, 3, 3), torch.zeros(1, 1, 2), torch.zeros(1, 1))
    with pytest.raises(InputError, match="at least 1"):
        separated_modes(one, 0, 20)
    with pytest.raises(InputError, match="outside 0"):
        separated_modes(one, 1, 200)
    with pytest.raises(InputError, match="not positive"):
        soft_labels(one, so3_grid(10), width_deg=0, nearest=1)
    with pytest.raises(InputError, match="11 nearest"):
        soft_labels(one, so3_grid(10), width_deg=10, nearest=11)


def test_labels_are_the_kernel_at_the_nearest_grid_points():
    grid = so3_grid(4608, torch.float64)
    truth = Rotation.random(6, random_state=2).as_matrix().reshape(3, 2, 3, 3)
    weight = np.array([[0.7, 0.3], [0.5, 0.5], [1.0, 0.0]])
    with np.errstate(divide="ignore"):
        candidates = PoseCandidates(torch.from_numpy(truth), torch.zeros(3, 2, 2), torch.from_numpy(np.log(weight)) + 5)
    index, value = soft_labels(candidates, grid, width_deg=12, nearest=8)
    assert index.shape == value.shape == (3, 16)
    dense = torch.zeros(3, 4608, dtype=torch.float64).scatter_add_(1, index, value).numpy()
    expected = np.zeros((3, 4608))
    for image in range(3):
        for k in range(2):
            angle = angles(truth[image, k][None], grid.numpy())
            near = np.argsort(angle)[:8]
            kernel = np.exp((np.cos(np.radians(angle[near])) - 1) / np.radians(12) ** 2)
            expected[image, near] += weight[image, k] * kernel / kernel.sum()
    np.testing.assert_allclose(dense, expected, atol=1e-12)
    np.testing.assert_allclose(dense.sum(1), 1, rtol=1e-12)
    best = dense.argmax(1)[[0, 2]]
    np.testing.assert_array_equal(best, [angles(truth[i, 0][None], grid.numpy()).argmin() for i in (0, 2)])


def test_labels_keep_their_sum_in_single_precision():
    candidates = PoseCandidates(so3_grid(256 * 4).view(256, 4, 3, 3), torch.zeros(256, 4, 2), torch.zeros(256, 4))
    index, value = soft_labels(candidates, so3_grid(4608), width_deg=12, nearest=8)
    # Sums of 32 numbers in single precision.
    torch.testing.assert_close(value.sum(1), torch.ones(256), atol=1e-6, rtol=0)
    assert index.max() < 4608


def test_tf32_is_on_for_the_products_of_the_search_alone(monkeypatch: pytest.MonkeyPatch):
    seen = []
    products = search.pair_products

    def watched(*arguments):
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        return products(*arguments)

    monkeypatch.setattr(search, "pair_products", watched)
    pixels = fourier_pixels(16, 5.0)
    bank = torch.randn(7, len(pixels), dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    grid_posterior(bank[:2], None, pixels.weight, bank, torch.zeros(1, 2), pixels, keep=1)
    assert seen
    assert all(seen)
    assert not torch.backends.cuda.matmul.allow_tf32


def test_modes_are_counted_modulo_a_group():
    """Closed form: a pose, two of its copies under C4 ten degrees off, and one 45° about the axis: two modes."""
    group, pose = PointGroup.of("C4"), random_rotations(1, torch.Generator().manual_seed(8))[0]
    about = [rotation_from_vector(torch.tensor([0.0, 0.0, math.radians(angle)])) for angle in (0, 100, 180, 45)]
    rotation = torch.stack([turn @ pose for turn in about])[None]
    candidates = PoseCandidates(rotation, torch.zeros(1, 4, 2), torch.tensor([[0.0, -1.0, -2.0, -3.0]]))
    found = separated_modes(candidates, 3, 25.0, group)
    assert torch.equal(found.rotation[0, :2], rotation[0, [0, 3]])
    assert found.log_weight[0, 2] == -math.inf
    mass = torch.tensor([0.0, -1.0, -2.0]).exp().sum()
    expected = torch.log(torch.stack([mass, torch.tensor(-3.0).exp()]) / (mass + math.exp(-3)))
    assert found.log_weight[0, :2] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["C2", "D7", "I"])
def test_a_search_of_one_unit_finds_what_a_whole_one_does(name):
    """Noise-free slices of a symmetric map, by the part of the grid that lies in one asymmetric unit."""
    group, generator, pixels = PointGroup.of(name), torch.Generator().manual_seed(9), fourier_pixels(32, 8.0)
    place = 10 * (2 * torch.rand(6, 3, generator=generator) - 1)
    line = torch.arange(32) - 16
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    copies = (place @ group.rotations.mT).flatten(0, 1)
    density = sum((-(torch.stack([x, y, z], -1) - at).square().sum(-1) / 4).exp() for at in copies)
    noise = NoiseSpectrum(int(pixels.shell.max()) + 1, "cpu")
    noise.power[:], noise.count[:] = 1.0, 1.0
    reference = Reference(reference_transform(density, 2.0), 2.0, noise)
    true = random_rotations(60, generator)
    images = templates(reference.transform, true, pixels, 2.0)
    grid = so3_grid(GRID * finer_grid(group))
    made = GridSearch(reference, grid, pixels, generator, group=group)
    # All but the share on the unit's rim.
    assert len(made.rotations) < 2 * len(grid) * (2.5 / len(group) + 0.03)
    batch = ParticleImages(
        rows=torch.arange(60), half=torch.ones(60, dtype=torch.long), weight=torch.ones(60),
        optics_group=torch.zeros(60, dtype=torch.long), pixels=pixels, pixel_size=1.0,
    ).with_transforms(images)  # fmt: skip
    found = made.modes(batch, torch.zeros(1, 2), 1).rotation[:, 0]
    error = geodesic_angle(group.nearest(found, true), true)
    # No pose is lost at the unit's rim: as near, on average and at worst, as the whole grid's nearest point is to it.
    step = torch.stack([geodesic_angle(with_flips(grid), one.expand(2 * len(grid), 3, 3)).min() for one in true])
    assert float(error.mean()) < 1.15 * float(step.mean())
    assert float(error.max()) < 1.3 * float(step.max())
