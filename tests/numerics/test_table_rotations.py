"""Rotations of tables in NumPy against roma, scipy and the PyTorch code that training uses."""

import subprocess
import sys

import numpy as np
import pytest
import roma
import torch
from scipy.spatial.transform import Rotation

from scalecryo.data.formats import rotations
from scalecryo.data.formats.rotations import euler_to_matrix, matrix_to_euler, matrix_to_vector, vector_to_matrix
from scalecryo.physics import rotation as torch_rotation

RANDOM = np.random.default_rng(0)
EULER = np.concatenate([
    RANDOM.uniform((-180, 0, -180), 180, (20_000, 3)),
    RANDOM.uniform(-720, 720, (1000, 3)),
    [[rot, tilt, psi] for rot in (-180, -90, 0, 33, 180) for tilt in (0, 90, 180) for psi in (-180, 0, 45, 180)],
])  # fmt: skip
VECTORS = np.concatenate([RANDOM.normal(size=(20_000, 3)), 1e-9 * RANDOM.normal(size=(100, 3)), np.zeros((1, 3)),
                          np.pi * np.eye(3), -np.pi * np.eye(3)])  # fmt: skip


def test_matrices_of_angles_and_vectors() -> None:
    expected = Rotation.from_euler("ZYZ", EULER, degrees=True).as_matrix()
    assert np.abs(euler_to_matrix(EULER) - expected).max() < 1e-12
    assert (
        np.abs(
            euler_to_matrix(EULER) - roma.euler_to_rotmat("ZYZ", torch.from_numpy(EULER), degrees=True).numpy()
        ).max()
        < 1e-12
    )
    assert np.abs(vector_to_matrix(VECTORS) - Rotation.from_rotvec(VECTORS).as_matrix()).max() < 1e-12
    assert np.abs(vector_to_matrix(VECTORS) - roma.rotvec_to_rotmat(torch.from_numpy(VECTORS)).numpy()).max() < 1e-12


@pytest.mark.parametrize("stored", [np.float64, np.float32])
def test_angles_and_vectors_of_matrices(stored: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotations, "_AT_ONCE", 997)  # in many parts
    matrices = np.concatenate([euler_to_matrix(EULER), vector_to_matrix(VECTORS)]).astype(stored)
    tensor = torch.from_numpy(matrices.astype(np.float64))
    turned = np.abs(matrix_to_euler(matrices) - torch_rotation.rotation_to_euler(tensor).numpy())
    assert np.minimum(turned, 360 - turned).max() < 1e-12  # -180 and 180 are one angle
    assert (turned < 1e-12).mean() > 0.999
    ours, theirs = matrix_to_vector(matrices), roma.rotmat_to_rotvec(tensor).numpy()
    assert np.abs(ours - theirs).max() < 1e-12
    assert np.array_equal(ours.astype(np.float32), theirs.astype(np.float32))
    back = 1e-6 if stored is np.float32 else 1e-12
    assert np.abs(vector_to_matrix(ours) - matrices).max() < back
    back = max(back, 2e-7)  # nearer to tilt 0 or 180 it is set so
    assert np.abs(euler_to_matrix(matrix_to_euler(matrices)) - matrices).max() < back


def test_what_is_stored_is_as_before() -> None:
    angles = EULER[:21_000]  # without what is zero but for rounding
    expected = torch_rotation.euler_to_rotation(torch.from_numpy(angles)).numpy()
    assert np.array_equal(euler_to_matrix(angles).astype(np.float32), expected.astype(np.float32))


def test_formats_are_read_without_torch() -> None:
    code = ("import sys; from scalecryo.data.formats import cryodrgn, cryosparc, mrc, relion, structure; "
            "sys.exit('torch' in sys.modules or 'roma' in sys.modules)")  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
