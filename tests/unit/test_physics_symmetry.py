"""Point groups: the axioms of a group, RELION's published axes, and the operators that RELION itself prints."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from scalecryo.errors import InputError
from scalecryo.physics.rotation import random_rotations, rotation_from_vector
from scalecryo.physics.so3_grid import so3_grid
from scalecryo.physics.symmetry import PointGroup, generated_group, symmetry_rotations

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


@pytest.mark.parametrize("name", ["C2", "C7", "D2", "D7", "T", "O", "I1"])
def test_an_asymmetric_unit_holds_one_view_of_each_orbit(name: str) -> None:
    """Of the |G| related views exactly one lies inside; a grid's share is 1 / |G|, to its own unevenness."""
    group, grid = PointGroup.of(name), so3_grid(2304)
    inside = torch.stack([group.in_unit(rotation @ grid) for rotation in group.rotations]).sum(0)
    assert float((inside == 1).float().mean()) > 0.995  # but for views within rounding of the border
    assert float(group.in_unit(grid).float().mean()) * len(group) == pytest.approx(1, abs=0.1)
    wider = group.in_unit(grid, 7.5)
    assert bool((wider | ~group.in_unit(grid)).all())
    assert bool(group.in_unit(group.folded(grid), 0.01).all())


def test_the_nearest_copy_and_what_a_group_leaves_of_a_tensor() -> None:
    group, generator = PointGroup.of("D7"), torch.Generator().manual_seed(0)
    pose = random_rotations(50, generator)
    moved = group.rotations[torch.arange(50) % 14] @ rotation_from_vector(torch.full((50, 3), 0.01)) @ pose
    # D7 lets through what is the same along x and y, and nothing off the diagonal.
    tensor = group.invariant(torch.tensor([[1.0, 5.0, 6.0], [5.0, 3.0, 7.0], [6.0, 7.0, -4.0]]))
    assert torch.allclose(tensor, torch.diag(torch.tensor([2.0, 2.0, -4.0])), atol=1e-5)
    near = group.nearest(moved, pose)
    # 0.01 rad about each axis: 0.99° in all.
    assert float(torch.rad2deg(torch.arccos(((near * pose).sum((1, 2)) - 1).clamp(-2, 2) / 2)).max()) < 1.1
    # D14's turns are those of D7 and one more coset.
    rest = group.beyond(PointGroup.of("D14").rotations)
    assert len(rest) == 1


@pytest.mark.parametrize("name", ["C1", "C2", "C5", "C12", "D2", "D3", "D7", "T", "O", "I"])
def test_a_group_is_recognised_about_any_axes(name: str) -> None:
    """From a few of its rotations, wrong by half a degree, about axes of any direction."""
    generator = torch.Generator().manual_seed(len(name))
    frame = random_rotations(1, generator)[0].double()
    rotations = frame @ symmetry_rotations(name)[1:] @ frame.T
    wrong = rotation_from_vector(0.005 * torch.randn(len(rotations), 3, generator=generator).double())
    assert generated_group(list((wrong @ rotations)[:20])) == name


def test_turns_that_never_close_are_no_group() -> None:
    two_fold = torch.diag(torch.tensor([-1.0, -1.0, 1.0]))
    askew = torch.from_numpy(Rotation.from_euler("x", 65, degrees=True).as_matrix()).float()
    assert generated_group([two_fold, askew @ two_fold @ askew.T]) is None
