"""Point groups: the axioms of a group, RELION's published axes, and the operators that RELION itself prints."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from scalecryo.errors import InputError
from scalecryo.physics.symmetry import symmetry_rotations

ORDERS = {"C1": 1, "C2": 2, "C7": 7, "C12": 12, "D1": 2, "D2": 4, "D7": 14, "T": 12, "O": 24, "I": 60, "I1": 60,
          "I2": 60, "I3": 60, "I4": 60}  # fmt: skip
# RELION 3.1 symmetries.cpp: the order and direction of axes of each group, to six digits.
AXES = {
    "C7": [(7, (0, 0, 1))],
    "D7": [(7, (0, 0, 1)), (2, (1, 0, 0))],
    "T": [(3, (0, 0, 1)), (2, (0, 0.816496, 0.577350))],
    "O": [(4, (0, 0, 1)), (3, (0.577350, 0.577350, 0.577350))],
    "I": [(2, (0, 0, 1)), (5, (0.525731, 0, 0.850651)), (3, (0, 0.356822, 0.934172))],
    "I1": [(2, (1, 0, 0)), (5, (0.850651, 0, -0.525731)), (3, (0.934172, 0.356822, 0))],
    "I3": [(5, (0, 0, 1)), (2, (-0.525731, 0, 0.850651))],
    "I4": [(5, (0.894427, 0, 0.447214)), (2, (0.525731, 0, 0.850651))],
}


def members(some: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Largest difference of an element of each of `some` from the nearest of `group`."""
    return np.abs(some[:, None] - group[None]).max(axis=(2, 3)).min(axis=1)


@pytest.mark.parametrize(("name", "order"), ORDERS.items())
def test_it_is_a_group_of_rotations(name: str, order: int) -> None:
    group = symmetry_rotations(name).numpy()
    assert group.shape == (order, 3, 3)
    # Products of a few rotations in double precision.
    np.testing.assert_allclose(group[0], np.eye(3), atol=1e-12)
    np.testing.assert_allclose(group @ group.transpose(0, 2, 1), np.broadcast_to(np.eye(3), group.shape), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(group), 1, atol=1e-12)
    products = np.einsum("aij,bjk->abik", group, group).reshape(-1, 3, 3)
    assert members(products, group).max() < 1e-12
    assert members(group.transpose(0, 2, 1), group).max() < 1e-12
    assert len(np.unique(group.reshape(order, 9).round(6) + 0.0, axis=0)) == order


@pytest.mark.parametrize("name", AXES)
def test_axes_lie_where_relion_has_them(name: str) -> None:
    group = symmetry_rotations(name).numpy()
    for fold, axis in AXES[name]:
        turn = Rotation.from_rotvec(2 * np.pi / fold * np.array(axis) / np.linalg.norm(axis)).as_matrix()
        # Axes in six digits.
        assert members(turn[None], group).max() < 3e-6


@pytest.mark.skipif(shutil.which("relion_refine") is None, reason="RELION is not installed: apt-get install relion")
@pytest.mark.parametrize("name", [name for name in ORDERS if name not in ("C1", "D1")])
def test_relion_prints_the_same_operators(name: str, tmp_path: Path) -> None:
    command = ["relion_refine", "--sym", name, "--print_symmetry_ops", "--i", "none", "--o", "none"]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout
    theirs = np.array([
        [[float(value) for value in line.split()] for line in block.splitlines()[1:4]]
        for block in printed.split("R(")[1:]
    ])  # fmt: skip
    ours = symmetry_rotations(name).numpy()
    assert theirs.shape == ours.shape
    # RELION prints five significant digits.
    assert members(theirs, ours).max() < 1e-5
    assert members(ours, theirs).max() < 1e-5


def test_small_letters_will_do_and_others_are_refused() -> None:
    assert len(symmetry_rotations(" d3 ")) == 6
    for name in ("", "C", "C0", "D0", "C-2", "I5", "X", "C2.5", "Td"):
        with pytest.raises(InputError, match="point group"):
            symmetry_rotations(name)
