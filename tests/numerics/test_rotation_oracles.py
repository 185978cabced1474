"""Rotations against scipy, RELION's Euler matrix in closed form, and exact distributions."""

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial import KDTree
from scipy.spatial.transform import Rotation

from scalecryo.physics import rotation as rotations
from scalecryo.physics.so3_grid import so3_grid


def random_angles(count: int = 200) -> np.ndarray:
    return np.random.default_rng(0).uniform([-180, 0, -180], [180, 180, 180], (count, 3))


def relion_matrix(rot: float, tilt: float, psi: float) -> np.ndarray:
    """A of RELION's documentation of Euler angles (Heymann et al. 2005), written out."""
    a, b, g = np.radians([rot, tilt, psi])
    ca, cb, cg, sa, sb, sg = np.cos(a), np.cos(b), np.cos(g), np.sin(a), np.sin(b), np.sin(g)
    return np.array(
        [
            [cg * cb * ca - sg * sa, cg * cb * sa + sg * ca, -cg * sb],
            [-sg * cb * ca - cg * sa, -sg * cb * sa + cg * ca, sg * sb],
            [sb * ca, sb * sa, cb],
        ]
    )


def test_euler_matches_scipy_and_relion():
    angles = random_angles()
    ours = rotations.euler_to_rotation(torch.from_numpy(angles)).numpy()
    np.testing.assert_allclose(ours, Rotation.from_euler("ZYZ", angles, degrees=True).as_matrix(), atol=1e-14)
    relion = np.stack([relion_matrix(*row) for row in angles])
    np.testing.assert_allclose(ours, relion.transpose(0, 2, 1), atol=1e-14)


def test_euler_round_trip():
    angles = random_angles()
    back = rotations.rotation_to_euler(rotations.euler_to_rotation(torch.from_numpy(angles))).numpy()
    # 1e-16 of a matrix entry over the smallest sin(tilt) here, in degrees.
    np.testing.assert_allclose(back, angles, atol=1e-10)


@pytest.mark.parametrize("tilt", [0.0, 180.0, 1e-5, 179.99999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_euler_round_trip_where_rot_and_psi_merge(tilt: float, dtype: torch.dtype):
    angles = torch.from_numpy(random_angles(50)).to(dtype)
    angles[:, 1] = tilt
    matrix = rotations.euler_to_rotation(angles)
    back = rotations.rotation_to_euler(matrix)
    assert bool(back.isfinite().all())
    assert bool(((back[:, 1] >= 0) & (back[:, 1] <= 180)).all())
    assert bool((back[:, [0, 2]].abs() <= 180).all())
    # Rounding of the degrees, times a few operations.
    tolerance = 1e-6 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(rotations.euler_to_rotation(back), matrix, rtol=0, atol=tolerance)


def test_rotation_from_vector_matches_scipy():
    vectors = np.random.default_rng(1).normal(0, 1.5, (100, 3))
    vectors[0], vectors[1] = 0, [1e-9, 0, -2e-9]
    ours = rotations.rotation_from_vector(torch.from_numpy(vectors)).numpy()
    np.testing.assert_allclose(ours, Rotation.from_rotvec(vectors).as_matrix(), atol=1e-12)


def test_geodesic_angle_matches_scipy():
    a, b = (Rotation.random(100, rng=np.random.default_rng(seed)) for seed in (2, 3))
    ours = rotations.geodesic_angle(torch.from_numpy(a.as_matrix()), torch.from_numpy(b.as_matrix()))
    np.testing.assert_allclose(ours.numpy(), np.degrees((a.inv() * b).magnitude()), atol=1e-9)


def test_geodesic_angle_of_a_small_turn_in_single_precision():
    turn = torch.tensor([[0.0, 0.0, 1e-3]])
    angle = rotations.geodesic_angle(torch.eye(3)[None], rotations.rotation_from_vector(turn))
    # acos of the trace would be off by 30 %; the chord keeps single precision.
    assert angle.item() == pytest.approx(np.degrees(1e-3), rel=1e-4)


def test_random_rotations_are_uniform():
    matrices = rotations.random_rotations(4000, torch.Generator().manual_seed(4), dtype=torch.float64)
    angle = Rotation.from_matrix(matrices.numpy()).magnitude()
    # Haar measure: the rotation angle has density (1 - cos t)/pi, each matrix entry is uniform on [-1, 1].
    assert stats.kstest(angle, lambda t: (t - np.sin(t)) / np.pi).pvalue > 0.01
    for entry in matrices.flatten(1).T:
        assert stats.kstest(entry.numpy(), stats.uniform(-1, 2).cdf).pvalue > 0.001


def test_quaternion_head_is_uniform_for_shoemakes_variates():
    u, b, c = torch.rand(3, 4000, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    numbers = torch.stack([u.sqrt().asin(), 2 * np.pi * b, 2 * np.pi * c], dim=-1)
    angle = Rotation.from_matrix(rotations.quaternion_to_rotation(numbers).numpy()).magnitude()
    assert stats.kstest(angle, lambda t: (t - np.sin(t)) / np.pi).pvalue > 0.01


def test_s2s2_columns_are_the_gram_schmidt_basis():
    vectors = np.random.default_rng(6).normal(size=(50, 6))
    ours = rotations.s2s2_to_rotation(torch.from_numpy(vectors)).numpy()
    for row, matrix in zip(vectors.reshape(-1, 2, 3), ours, strict=True):
        q, r = np.linalg.qr(row.T)
        basis = q * np.sign(np.diag(r))
        np.testing.assert_allclose(matrix, np.column_stack([basis, np.cross(*basis.T)]), atol=1e-12)


@pytest.mark.parametrize("count", [576, 4608, 36864])
def test_so3_grid_covers(count: int):
    # Distance on SO(3) from distance between quaternions of either sign: angle = 4 asin(chord / 2).
    grid = Rotation.from_matrix(so3_grid(count, torch.float64).numpy()).as_quat()
    probe = Rotation.random(20000, rng=np.random.default_rng(7)).as_quat()
    chord, _ = KDTree(np.concatenate([grid, -grid])).query(probe)
    cell_edge = (8 * np.pi**2 / count) ** (1 / 3)  # SO(3)'s volume is 8 pi^2 where distance is the rotation angle
    angle = 4 * np.arcsin(chord / 2) / cell_edge
    # In units of the cubic cell's edge a cubic lattice has mean distance 0.480 and covering radius sqrt(3)/2 = 0.866,
    # random rotations (a Poisson process) mean 0.554 and no bound. Nearer to the lattice, and 10 % from its covering.
    assert angle.mean() < (0.480 + 0.554) / 2
    assert angle.max() < 1.1 * 0.866
