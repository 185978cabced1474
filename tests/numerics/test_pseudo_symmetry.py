"""Maps that tell related poses apart: filled where no particle was seen, symmetric only where nothing says otherwise.

Judged against the densities that the particles were projected from.
"""

import pytest
import torch
from torch import Tensor

from scalecryo.distributed.world import World
from scalecryo.evaluate.align_maps import linear_map
from scalecryo.map.backprojection import Backprojection
from scalecryo.map.pseudo_symmetry import symmetry_centre
from scalecryo.map.reference import reference_transform
from scalecryo.physics.fft import fourier_pixels, rfft3_centred
from scalecryo.physics.fsc import fsc
from scalecryo.physics.image_formation import CtfWeightedImages
from scalecryo.physics.rotation import random_rotations
from scalecryo.physics.symmetry import PointGroup
from scalecryo.pose.related import RelatedPoses
from scalecryo.pose.search import templates
from scalecryo.train.owned_sums import OwnedSums

BOX, COUNT, SHELLS, HOLE_DEG = 32, 3000, slice(2, 11), 40.0
PIXELS = fourier_pixels(BOX)
CENTRE = torch.tensor([1.5, -1.0, 0.5])  # px, through which the axes go


def density(group: PointGroup, difference: float) -> Tensor:
    """Blobs and their copies under a group about `CENTRE`; those of the first copy are brighter by `difference`."""
    line = torch.arange(BOX) - BOX // 2
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    volume = torch.zeros(BOX, BOX, BOX)
    for place in torch.randn((12, 3), generator=torch.Generator().manual_seed(0)) * BOX / 9:
        for number, turn in enumerate(group.rotations):
            at = turn @ place + CENTRE
            squared = (x - at[0]) ** 2 + (y - at[1]) ** 2 + (z - at[2]) ** 2
            volume += (1 + difference * (number == 0)) * torch.exp(-squared / (2 * 1.2**2))
    return volume


def related_of(group: PointGroup) -> RelatedPoses:
    """V(S (x - u)) = V(x) with u = (1 - Sᵀ) c."""
    offset = (torch.eye(3) - group.rotations.mT) @ CENTRE / BOX
    return RelatedPoses(group.rotations, offset)


def sums_of(volume: Tensor, sigma: float, hole_deg: float) -> Backprojection:
    """Of noisy slices, in halves; no view lies within so much of the plane z = 0: a cone about z is bare."""
    sums, generator = Backprojection(BOX), torch.Generator().manual_seed(1)
    rotation = random_rotations(COUNT, generator)
    rotation = rotation[rotation[:, 2, 2].abs().arcsin() > torch.deg2rad(torch.tensor(hole_deg))]
    slices = templates(reference_transform(volume, 2.0), rotation, PIXELS, 2.0)
    noise = torch.randn(slices.shape, dtype=torch.complex64, generator=generator) * BOX * sigma
    count = len(rotation)
    sums.add(CtfWeightedImages(slices + noise, None), rotation, torch.zeros(count, 2), torch.ones(count),
             torch.arange(count) % 2 + 1, PIXELS)  # fmt: skip
    return sums


def drawn(sums: Backprojection, related: RelatedPoses) -> Tensor:
    """The first half-map."""
    owned, mask = OwnedSums(sums, World()), torch.ones(BOX, BOX, BOX)
    return owned.drawn_to_symmetry(owned.solve()[0], related, BOX / 2 - 1, mask)[0][0]


def cone_agreement(volume: Tensor, truth: Tensor, half_angle_deg: float = 20.0) -> float:
    """Correlation with the truth within a cone about z."""
    kz, ky, kx = torch.meshgrid(torch.fft.fftfreq(BOX), torch.fft.fftfreq(BOX), torch.arange(BOX // 2 + 1) / BOX,
                                indexing="ij")  # fmt: skip
    length = (kz**2 + ky**2 + kx**2).sqrt()
    inside = (
        (kz.abs() > length * torch.tensor(half_angle_deg).deg2rad().cos()) & (length > 3 / BOX) & (length < 10 / BOX)
    )
    first, second = (rfft3_centred(one)[inside] for one in (volume, truth))
    return float((first * second.conj()).real.sum() / (first.abs().square().sum() * second.abs().square().sum()).sqrt())


@pytest.mark.parametrize("name", ["C2", "D3"])
def test_the_centre_of_a_group_is_found(name: str) -> None:
    related = related_of(PointGroup.of(name))
    centre = symmetry_centre(related.rotation, related.offset) * BOX
    # Along the axis z of C2 nothing tells it.
    assert torch.allclose(centre[: 2 if name == "C2" else 3], CENTRE[: 2 if name == "C2" else 3], atol=1e-4)


def test_sums_are_moved_as_maps_are() -> None:
    volume = density(PointGroup.of("C2"), 0.0)
    sums = sums_of(volume, 0.0, 0.0)
    before = sums.solve_one()
    sums.moved(CENTRE / BOX)
    moved = linear_map(sums.solve_one(), torch.eye(3), CENTRE)
    assert fsc(moved, before)[SHELLS].min() > 0.999  # the rest: what the sphere around the box cuts


def test_copies_of_copies_are_those_of_the_whole_group() -> None:
    # D2 at once, and as the two-fold z, then x: the scale of every part of the map as well.
    whole = sums_of(density(PointGroup.of("D2"), 0.5), 0.1, 0.0)
    parts = sums_of(density(PointGroup.of("D2"), 0.5), 0.1, 0.0)
    whole.symmetrise(PointGroup.of("D2").others, BOX / 2 - 1)
    half_turn = torch.diag(torch.tensor([1.0, -1.0, -1.0]))
    parts.symmetrise(PointGroup.of("C2").others, BOX / 2 - 1)
    parts.symmetrise(half_turn[None], BOX / 2 - 1)
    expected, found = whole.solve_one(), parts.solve_one()
    assert fsc(found, expected)[SHELLS].min() > 0.9999
    assert float((found - expected).abs().max()) < 0.01 * float(expected.abs().max())


def test_a_symmetric_map_is_filled_where_no_particle_was_seen() -> None:
    # D3 about y: turned copies of a cone about z lie where particles were seen.
    group = PointGroup("D3", torch.stack([_Y @ one @ _Y.T for one in PointGroup.of("D3").rotations]))
    volume, related = density(group, 0.0), related_of(group)
    sums = sums_of(volume, 0.3, HOLE_DEG)
    assert cone_agreement(sums.solve_one(), volume) < 0.5
    assert cone_agreement(drawn(sums, related), volume) > 0.95


def test_an_asymmetric_map_stays_where_particles_were_seen() -> None:
    # Without noise nothing may be taken from what the particles say; copies fill the bare cone alone.
    group = PointGroup("D3", torch.stack([_Y @ one @ _Y.T for one in PointGroup.of("D3").rotations]))
    volume, related = density(group, 1.5), related_of(group)
    sums = sums_of(volume, 0.1, 0.0)
    own, kept = sums.solve_one(), drawn(sums, related)
    assert fsc(kept, own)[SHELLS].min() > 0.995
    assert fsc(kept, volume)[SHELLS].min() > fsc(own, volume)[SHELLS].min() - 0.005


def test_noise_alone_is_no_asymmetry() -> None:
    # A symmetric density and much noise: the map that tells poses apart is its symmetric part, whose noise is less.
    group = PointGroup.of("D3")
    volume, related = density(group, 0.0), related_of(group)
    sums = sums_of(volume, 8.0, 0.0)
    own, kept = fsc(sums.solve_one(), volume)[SHELLS], fsc(drawn(sums, related), volume)[SHELLS]
    # Of noise ν beside a signal of 1 the copies leave ν / 6: FSC 1 / sqrt(1 + ν) becomes 1 / sqrt(1 + ν / 6).
    expected = (1 + (own.pow(-2) - 1) / 6).rsqrt()
    assert own.min() < 0.8
    assert (kept - expected).abs().max() < 0.06


_Y = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])  # takes z to y
