"""A point group's axes in a map: closed forms, blobs about axes that are known."""

import pytest
import torch

from scalecryo.evaluate.align import Alignment, align_poses
from scalecryo.evaluate.align_maps import apply_alignment
from scalecryo.evaluate.symmetry_axes import on_the_axes, symmetrised_map, symmetry_axes
from scalecryo.physics.fsc import fsc
from scalecryo.physics.rotation import geodesic_angle, random_rotations, rotation_from_vector
from scalecryo.physics.symmetry import PointGroup, symmetry_rotations

BOX = 40
CENTRE = torch.tensor([1.5, -0.8, 0.6])  # px, (x, y, z)


def _blobs(group: PointGroup, turn: torch.Tensor, centre: torch.Tensor, noise: float = 0.0) -> torch.Tensor:
    """Blobs about RELION's axes, turned by Qᵀ and moved to a centre."""
    generator = torch.Generator().manual_seed(11)
    place = 11 * (2 * torch.rand(8, 3, generator=generator) - 1)
    copies = (place @ group.rotations.mT).flatten(0, 1) @ turn + centre
    line = torch.arange(BOX) - BOX // 2
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    voxel = torch.stack([x, y, z], -1).float()
    density = sum((-(voxel - at).square().sum(-1) / 5).exp() for at in copies)
    return density + noise * density.std() * torch.randn(density.shape, generator=generator)


def _off(found: torch.Tensor, true: torch.Tensor) -> float:
    """Largest angle from a rotation of one group to the nearest of the other."""
    return max(float(geodesic_angle(true, one.expand_as(true)).min()) for one in found)


@pytest.mark.parametrize("name", ["C3", "D7", "I"])
def test_the_axes_are_found_to_a_fifth_of_a_degree(name: str) -> None:
    group, turn = PointGroup.of(name), random_rotations(1, torch.Generator().manual_seed(5))[0]
    volume = _blobs(group, turn, CENTRE, noise=0.1)
    found = symmetry_axes(volume, group, 14.0, torch.zeros(3))
    true = turn.double().T @ group.rotations.double() @ turn.double()
    # A frame wrong by δ turns a rotation by up to 2 δ.
    assert _off(found.rotations(group), true) < 0.4
    assert found.agreement > 0.6
    laid = apply_alignment(volume, found.alignment)
    # On RELION's axes through the box's centre: symmetrising changes nothing but the noise.
    assert float(fsc(laid, symmetrised_map(laid, group))[1:8].min()) > 0.95
    centre = -found.alignment.rotation.T @ found.alignment.shift_px
    off = centre - CENTRE
    axis = found.alignment.rotation[2]
    off = off - (off @ axis) * axis if name.startswith("C") else off
    assert float(off.norm()) < 0.15  # px


def test_other_groups_agree_less() -> None:
    group = PointGroup.of("C3")
    volume = _blobs(group, torch.eye(3), torch.zeros(3))
    agreements = {
        name: symmetry_axes(volume, PointGroup.of(name), 12.0, torch.zeros(3)).agreement for name in ("C3", "C4")
    }
    assert agreements.pop("C3") > 0.99
    assert max(agreements.values()) < 0.6


def test_a_map_that_lies_on_its_axes_is_left_there() -> None:
    for name in ("C5", "D3"):
        group = PointGroup.of(name)
        found = symmetry_axes(_blobs(group, torch.eye(3), torch.zeros(3)), group, 12.0, torch.zeros(3)).alignment
        assert float(found.shift_px.norm()) < 0.1
        # D3 lies so in another way as well, turned by 180° about z, which takes the group to itself.
        turns = PointGroup.of("D6").rotations if name == "D3" else torch.eye(3)[None]
        assert float(geodesic_angle(turns, found.rotation.expand_as(turns)).min()) < 0.1, name


def test_what_keeps_the_axes() -> None:
    little = Alignment(rotation_from_vector(torch.tensor([0.01, 0.0, 0.05])), False, torch.tensor([0.3, 0.2, 0.1]), 1.0)
    kept = on_the_axes(little, PointGroup.of("C3"))
    assert torch.allclose(kept.rotation, rotation_from_vector(torch.tensor([0.0, 0.0, 0.05])), atol=1e-3)
    assert kept.shift_px.tolist() == pytest.approx([0, 0, 0.1])
    assert torch.equal(on_the_axes(little, PointGroup.of("D3")).rotation, torch.eye(3))
    far = Alignment(rotation_from_vector(torch.tensor([3.0, 0.0, 0.0])), False, torch.zeros(3), 1.0)
    assert on_the_axes(far, PointGroup.of("C3")) is far


@pytest.mark.parametrize("name", ["D7", "I"])
def test_poses_in_any_copies_are_aligned_modulo_the_group(name: str) -> None:
    generator = torch.Generator().manual_seed(2)
    group, frame = symmetry_rotations(name), random_rotations(1, generator)[0].double()
    truth = random_rotations(400, generator).double()
    inside = frame.T @ group @ frame  # about the axes in the true map
    copies = inside[torch.randint(len(group), (400,), generator=generator)] @ truth
    wrong = rotation_from_vector(0.02 * torch.randn(400, 3, generator=generator).double())
    found = align_poses(frame @ wrong @ copies, truth, inside)
    aligned = found.rotations(frame @ wrong @ copies)
    related = torch.einsum("gij,njk->ngik", inside, truth)
    angle = geodesic_angle(aligned[:, None].expand_as(related), related).amin(1)
    # 0.02 rad about each axis: 1.8° in the median.
    assert float(angle.median()) == pytest.approx(1.8, abs=0.4)
    assert found.score > 0.9
