"""Poses that a symmetry relates: closed form, a two-fold whose axis misses the box's centre."""

import pytest
import torch

from scalecryo.map.reference import ReferenceSet
from scalecryo.physics.fft import fourier_pixels, rfft3_centred
from scalecryo.physics.fourier_slice import fourier_slice, gridding_correction, padded_box
from scalecryo.physics.rotation import random_rotations
from scalecryo.pose.related import RelatedPoses, RelatedRotations
from scalecryo.train.stages.final_poses import lay_onto

BOX, CENTRE = 48, torch.tensor([3.0, -2.0, 0.0])  # px, (x, y, z): where the two-fold about z has its axis
TWO_FOLD = torch.diag(torch.tensor([-1.0, -1.0, 1.0]))


def _dimer() -> torch.Tensor:
    """Twelve Gaussians and their partners: x → S (x − c) + c."""
    generator = torch.Generator().manual_seed(3)
    place = 20 * (torch.rand(12, 3, generator=generator) - 0.5) + CENTRE
    return _gaussians(torch.cat([place, _turned(place)]))


def _turned(place: torch.Tensor) -> torch.Tensor:
    """About the two-fold axis."""
    return (place - CENTRE) @ TWO_FOLD.T + CENTRE


def _gaussians(place: torch.Tensor) -> torch.Tensor:
    line = torch.arange(BOX) - BOX // 2
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    voxel = torch.stack([x, y, z], -1).float()
    return sum((-(voxel - at).square().sum(-1) / 8).exp() for at in place)


def test_the_offset_is_where_the_axis_lies() -> None:
    found = RelatedPoses.of(_dimer(), 4, centred=False)
    assert len(found) == 2
    assert torch.allclose(found.rotation[1], TWO_FOLD, atol=0.01)
    # V(S (x − u)) = V(x) = V(S x − S c + c): u = c − S c, for S is its own inverse.
    assert torch.allclose(found.offset[1] * BOX, CENTRE - TWO_FOLD @ CENTRE, atol=0.1)
    assert not RelatedPoses.of(_dimer(), 4, centred=True).offset.any()


def test_halves_agree_under_an_axis_beside_the_centre() -> None:
    """To shell 15, where the offset of 7 px is two cycles: the comparison begins where the axis lies."""
    generator = torch.Generator().manual_seed(5)
    halves = torch.stack([_dimer() + 0.002 * torch.randn(BOX, BOX, BOX, generator=generator) for _ in (1, 2)])
    references = ReferenceSet.of_maps(halves[None], 2.0, noise=torch.ones(BOX // 2 + 1), radius=float(BOX // 2))
    assert references.resolution(0.143)[0] > 15
    related = RelatedRotations.of(references)
    assert len(related.similar) == 1
    assert torch.allclose(related.equivalent[0], TWO_FOLD, atol=0.01)
    assert related.agreement > 0.99
    assert related.told(None).endswith("try --symmetry C2")


def test_one_half_is_laid_onto_the_other_by_a_turn_about_an_axis_beside_the_centre() -> None:
    """One of the dimer's chains has a part that the other lacks, and the halves took different chains for it."""
    part = torch.tensor([[9.0, 3.0, 5.0]])
    fixed, moving = (_dimer() + _gaussians(place) for place in (part, _turned(part)))
    references = ReferenceSet.of_maps(
        torch.stack([fixed, moving])[None], 2.0, noise=torch.ones(BOX // 2 + 1), radius=float(BOX // 2)
    )
    found = lay_onto(moving, fixed, RelatedRotations.of(references).moves, None)
    assert torch.allclose(found.rotation, TWO_FOLD, atol=0.01)
    # V(S (x − u)) is turned about the axis: u = c − S c.
    assert torch.allclose(found.shift_px, CENTRE - TWO_FOLD @ CENTRE, atol=0.1)


def test_images_at_related_poses_are_the_same() -> None:
    volume, padded = _dimer(), padded_box(BOX, 2.0)
    transform = rfft3_centred(volume * gridding_correction(BOX, 2.0), padded)
    related = RelatedPoses(torch.stack([torch.eye(3), TWO_FOLD]), torch.stack([torch.zeros(3), 2 * CENTRE]) / BOX)
    rotation, shift = random_rotations(8, torch.Generator().manual_seed(0)), torch.randn(8, 2) / BOX
    pixels = fourier_pixels(BOX).prefix(16.0)

    def images(turned: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
        return fourier_slice(transform, turned, moved * BOX, None, pixels.kx, pixels.ky, padded / BOX, BOX)

    own = images(rotation, shift)
    mates = images(*related.at(torch.ones(8, dtype=torch.long), rotation, shift))
    # Trilinear interpolation on a grid of twice the box.
    assert float((own - mates).norm() / own.norm()) < 0.02
    assert float((own - images(TWO_FOLD @ rotation, shift)).norm() / own.norm()) > 0.5
    every_rotation, every_shift = related.all(rotation, shift)
    assert torch.equal(every_rotation[0], rotation)
    assert every_shift[1] == pytest.approx(related.at(torch.ones(8, dtype=torch.long), rotation, shift)[1], abs=1e-6)
