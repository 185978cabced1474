"""Alignment: algebra against matrices built by scipy, maps against atoms moved before the map is made."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from scalecryo.data.formats.mrc import read_map
from scalecryo.data.formats.structure import Atoms, potential_map, read_structure
from scalecryo.errors import InputError
from scalecryo.evaluate.align import Alignment, align_poses, origin_offset
from scalecryo.evaluate.align_maps import align_maps, apply_alignment, mirror, rotational_symmetry
from scalecryo.evaluate.compare import compare_maps
from scalecryo.evaluate.metrics import map_errors, shift_errors

F = np.diag([1.0, 1.0, -1.0])
BOX, PIXEL_SIZE = 64, 1.6


def angle_deg(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.degrees(Rotation.from_matrix(a.T @ b).magnitude()))


def estimate_of(truth: np.ndarray, q: np.ndarray, mirrored: bool) -> np.ndarray:
    """R_est from R_true = Q R', R' = R_est or F R_est F."""
    own = q.T @ truth
    return F @ own @ F if mirrored else own


@pytest.mark.parametrize("mirrored", [False, True])
def test_poses_are_aligned_whatever_the_noise_and_the_outliers(mirrored: bool) -> None:
    generator = np.random.default_rng(3)
    truth = Rotation.random(3000, random_state=generator).as_matrix()
    q = Rotation.random(random_state=generator).as_matrix()
    noise = Rotation.from_rotvec(np.radians(5) * generator.normal(size=(3000, 3))).as_matrix()
    estimate = estimate_of(truth @ noise, q, mirrored)
    # Two in three are random: only a vote finds the others.
    estimate[1000:] = Rotation.random(2000, random_state=generator).as_matrix()
    found = align_poses(torch.from_numpy(estimate), torch.from_numpy(truth))
    assert found.mirrored == mirrored
    # 5° an axis over a thousand particles: 5°·√3/√1000 = 0.27° expected; the outliers within 30° add a little.
    assert angle_deg(found.rotation.numpy(), q) < 0.7
    # The share of right ones times 1 − ⟨θ⟩/30°, ⟨θ⟩ = 8° for a Maxwell distribution of 5° an axis.
    assert found.score == pytest.approx(0.25, abs=0.03)


def test_aligned_rotations_are_the_true_ones() -> None:
    truth = Rotation.random(50, random_state=1).as_matrix()
    q = Rotation.random(random_state=2).as_matrix()
    for mirrored in (False, True):
        estimate = torch.from_numpy(estimate_of(truth, q, mirrored))
        found = align_poses(estimate, torch.from_numpy(truth))
        # Double precision; the chord of the L1 mean leaves 1e-9.
        np.testing.assert_allclose(found.rotations(estimate).numpy(), truth, atol=1e-7)
        assert found.score == pytest.approx(1, abs=1e-4)


def test_particles_in_two_symmetry_related_poses_are_aligned_on_the_larger_half() -> None:
    truth = Rotation.random(400, random_state=4).as_matrix()
    symmetry = Rotation.from_rotvec([0, 0, np.pi]).as_matrix()
    estimate = truth.copy()
    estimate[:180] = symmetry @ truth[:180]
    found = align_poses(torch.from_numpy(estimate), torch.from_numpy(truth))
    assert angle_deg(found.rotation.numpy(), np.eye(3)) < 1e-3


def test_rotations_that_agree_in_nothing_give_a_low_score() -> None:
    first, second = (torch.from_numpy(Rotation.random(2000, random_state=seed).as_matrix()) for seed in (5, 6))
    # A ball of 30° holds (θ − sin θ)/π = 0.75 % of SO(3), closeness averages 1/4 there.
    assert align_poses(first, second).score < 0.02


def test_rows_must_correspond() -> None:
    with pytest.raises(InputError, match="3 rotations with 2"):
        align_poses(torch.eye(3).expand(3, 3, 3), torch.eye(3).expand(2, 3, 3))


def test_origin_offset_is_what_moves_the_shifts() -> None:
    """A point p of the true map is seen at (Rᵀ p)_xy + s; the estimate has it at p − u, so its shift is larger."""
    generator = np.random.default_rng(0)
    rotation = Rotation.random(300, random_state=generator).as_matrix()
    shift = generator.normal(size=(300, 2))
    u = np.array([2.0, -3.0, 5.0])
    p = np.array([7.0, 1.0, -4.0])
    seen = np.einsum("nji,j->ni", rotation, p)[:, :2] + shift
    estimate = seen - np.einsum("nji,j->ni", rotation, p - u)[:, :2]
    # A fifth of the particles is lost.
    estimate[:60] += generator.normal(scale=30, size=(60, 2))
    tensors = [torch.from_numpy(values) for values in (estimate, shift, rotation)]
    found = origin_offset(*tensors)
    # The second round drops most of the lost ones.
    np.testing.assert_allclose(found.numpy(), u, atol=1e-6)
    errors = shift_errors(*tensors, found)
    assert float(errors[60:].max()) < 1e-5
    assert float(errors[:60].median()) > 10


def moved_map(atoms: Atoms, q: np.ndarray, u_px: np.ndarray, mirrored: bool) -> torch.Tensor:
    """V_est with V_true(y) = V'(Qᵀ(y − u)): every atom p goes to Qᵀ(p − u), then to its mirror image."""
    positions = (atoms.positions - atoms.centre_of_mass - u_px * PIXEL_SIZE) @ q
    moved = Atoms(positions @ F if mirrored else positions, atoms.elements, atoms.b_factor)
    return torch.from_numpy(potential_map(moved, BOX, PIXEL_SIZE, centre=np.zeros(3)))


@pytest.fixture(scope="module")
def adenylate_kinase(shared_data: Path) -> Atoms:
    return read_structure(str(shared_data / "structures" / "4ake.pdb"))


@pytest.mark.parametrize("mirrored", [False, True])
def test_maps_are_aligned_from_nothing(adenylate_kinase: Atoms, mirrored: bool) -> None:
    q = Rotation.random(random_state=11).as_matrix()
    u = np.array([1.5, -2.0, 1.0])
    truth = torch.from_numpy(potential_map(adenylate_kinase, BOX, PIXEL_SIZE))
    estimate = moved_map(adenylate_kinase, q, u, mirrored)
    # Noise of the density's own σ: the FSC falls to 0.5 about half way to Nyquist.
    estimate += float(estimate.std()) * torch.randn(estimate.shape, generator=torch.Generator().manual_seed(0))
    found = align_maps(estimate, truth)
    assert found.mirrored == mirrored
    # Far below a voxel at the rim of the particle (27 px · 0.2° = 0.1 px), though the noise is heavy.
    assert angle_deg(found.rotation.double().numpy(), q) < 0.2
    np.testing.assert_allclose(found.shift_px.numpy(), u, atol=0.05)


def test_alignment_keeps_fine_detail(adenylate_kinase: Atoms) -> None:
    """The alignment is exact here, so what the FSC loses is lost by resampling."""
    q = Rotation.random(random_state=12).as_matrix()
    u = np.array([0.5, 1.25, -2.0])
    truth = torch.from_numpy(potential_map(adenylate_kinase, BOX, PIXEL_SIZE))
    for mirrored in (False, True):
        estimate = moved_map(adenylate_kinase, q, u, mirrored)
        known = Alignment(torch.from_numpy(q), mirrored, torch.from_numpy(u), 1.0)
        errors = map_errors(apply_alignment(estimate, known), truth, PIXEL_SIZE)
        # Trilinear on a twice padded transform: 3 % of the amplitude is wrong, which costs 0.05 %.
        assert float(errors.curve[1 : BOX // 2 - 1].min()) > 0.998
        wrong = Alignment(torch.from_numpy(q.T.copy()), mirrored, torch.from_numpy(u), 1.0)
        assert map_errors(apply_alignment(estimate, wrong), truth, PIXEL_SIZE).mean < 0.5


def test_alignment_starts_from_poses_and_ends_on_the_map(adenylate_kinase: Atoms) -> None:
    q = Rotation.random(random_state=13).as_matrix()
    truth = torch.from_numpy(potential_map(adenylate_kinase, BOX, PIXEL_SIZE))
    estimate = moved_map(adenylate_kinase, q, np.array([2.0, 0.0, -1.0]), True)
    off = Rotation.from_rotvec(np.radians([4, -3, 2])).as_matrix() @ q
    start = Alignment(torch.from_numpy(off), True, torch.zeros(3), 0.5)
    found = align_maps(estimate, truth, [start], search=False)
    assert found.mirrored
    assert angle_deg(found.rotation.double().numpy(), q) < 0.05


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_map_far_from_the_truths_place_is_found_from_its_poses(shared_data: Path, mirrored: bool) -> None:
    """Classes are centred by themselves: the true map of one may lie many voxels from where its own map does."""
    chain = read_structure(str(shared_data / "structures" / "1ake_chainA.pdb"))
    q, u = Rotation.random(random_state=17).as_matrix(), np.array([1.0, 4.5, 8.5])
    truth = torch.from_numpy(potential_map(chain, BOX, PIXEL_SIZE))
    poses = Alignment(torch.from_numpy(q), mirrored, torch.zeros(3), 0.9)
    estimate = moved_map(chain, q, u, mirrored)
    found = compare_maps(estimate, truth, BOX * PIXEL_SIZE, poses, torch.eye(3)[None])
    np.testing.assert_allclose(found.alignment.shift_px.numpy(), u, atol=0.05)
    assert found.errors.mean > 0.9


def test_maps_without_anything_in_common() -> None:
    """A poor result is still compared: noise and an empty map give a finite, low score."""
    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(32, 32, 32, generator=generator)
    for estimate in (torch.randn(32, 32, 32, generator=generator), torch.zeros(32, 32, 32)):
        found = align_maps(estimate, truth)
        assert found.score < 0.3
        errors = map_errors(apply_alignment(estimate, found), truth, 3.0)
        assert bool(torch.isfinite(errors.curve).all())
        assert errors.mean < 0.3


def test_boxes_must_be_equal_and_a_start_is_needed() -> None:
    with pytest.raises(InputError, match="resize"):
        align_maps(torch.zeros(32, 32, 32), torch.zeros(16, 16, 16))
    with pytest.raises(InputError, match="search"):
        align_maps(torch.zeros(16, 16, 16), torch.zeros(16, 16, 16), search=False)


def test_mirror_is_about_the_centre() -> None:
    volume = torch.zeros(8, 8, 8)
    volume[6, 3, 4] = 1
    assert mirror(volume)[2, 3, 4] == 1


def test_symmetry_of_known_molecules(shared_data: Path, adenylate_kinase: Atoms) -> None:
    """β-galactosidase is D2, ubiquitin has none, 4AKE's two chains are related by a nearly exact two-fold."""
    galactosidase, _, _ = read_map(str(shared_data / "maps" / "betagal_100.mrc"))
    found = rotational_symmetry(torch.from_numpy(galactosidase)).double().numpy()
    assert len(found) == 4
    axes = [Rotation.from_matrix(rotation).as_rotvec() for rotation in found[1:]]
    # Three half turns about perpendicular axes; found on voxels of 7 Å to better than a degree.
    np.testing.assert_allclose([np.linalg.norm(axis) for axis in axes], np.pi, atol=0.02)
    products = [abs(np.dot(axes[i], axes[j])) / np.pi**2 for i, j in ((0, 1), (0, 2), (1, 2))]
    np.testing.assert_allclose(products, 0, atol=0.02)

    ubiquitin = read_structure(str(shared_data / "structures" / "1ubi.pdb"))
    assert len(rotational_symmetry(torch.from_numpy(potential_map(ubiquitin, 48, 1.5)))) == 1

    found = rotational_symmetry(torch.from_numpy(potential_map(adenylate_kinase, BOX, PIXEL_SIZE))).double().numpy()
    assert len(found) == 2
    # The rotation that superposes the chains, atom on atom (Kabsch); they are not rigid copies, so a few degrees.
    first, second = (half - half.mean(0) for half in np.split(adenylate_kinase.positions, 2))
    superposed = Rotation.align_vectors(first, second)[0].as_matrix()
    assert min(angle_deg(superposed, found[1]), angle_deg(superposed, found[1].T)) < 4
