"""Related poses are drawn with their probabilities: against poses that images were made with, and a closed form."""

import pytest
import torch
from torch import Tensor

from scalecryo.map.reference import References, ReferenceSet
from scalecryo.physics.fft import fourier_pixels
from scalecryo.physics.image_formation import form_images
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import Poses
from scalecryo.physics.rotation import geodesic_angle, random_rotations
from scalecryo.physics.symmetry import PointGroup
from scalecryo.pose.exchange import RelatedExchange
from scalecryo.pose.related import RelatedPoses
from scalecryo.pose.search import templates

BOX, PIXEL_SIZE, COUNT, RADIUS = 32, 3.0, 400, 12.0
TURN = torch.tensor([[-1.0, 0.0, 0.0], [0.0, -1.0, 0.0], [0.0, 0.0, 1.0]])  # C2 about z
PIXELS = fourier_pixels(BOX, RADIUS + 1)
ROTATION = random_rotations(COUNT, torch.Generator().manual_seed(2))


def pair_of_blobs(difference: float) -> Tensor:
    """Eight pairs of blobs about the axis z, of which one blob of each is brighter by `difference`."""
    line = torch.arange(BOX) - BOX // 2
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    volume = torch.zeros(BOX, BOX, BOX)
    for place in torch.randn((8, 3), generator=torch.Generator().manual_seed(0)) * BOX / 8:
        for centre, height in ((place, 1 + difference), (TURN @ place, 1.0)):
            squared = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2
            volume += height * torch.exp(-squared / (2 * 1.5**2))
    return volume


def prepared(difference: float, sigma: float) -> References:
    return prepared_of(pair_of_blobs(difference), sigma)


def prepared_of(volume: Tensor, sigma: float) -> References:
    """Half 2's map, not filtered; half 1's is empty: whoever asks it takes every offer."""
    maps = torch.stack([torch.zeros(BOX, BOX, BOX), volume])[None]
    shells = torch.ones(1, BOX // 2)
    whole = torch.ones(1, BOX, BOX, BOX)
    noise = torch.full((BOX // 2 + 1,), sigma**2)
    return ReferenceSet(maps, PIXEL_SIZE, whole, shells, shells, noise, RADIUS).at(BOX, PIXELS)


def slices_at(references: References, rotation: Tensor) -> Tensor:
    return templates(references[0, 2].transform, rotation, PIXELS, references[0, 2].scale)


def exchanged(
    references: References,
    sigma: float,
    begun: Tensor,
    related: RelatedPoses | None = None,
) -> tuple[Tensor, Poses]:
    """Which of the particles, of half 1 and made at `ROTATION`, take the related pose, and what they were offered."""
    generator = torch.Generator().manual_seed(1)
    images = form_images(
        slices_at(references, ROTATION), None, torch.zeros(COUNT, 2), PIXELS.kx, PIXELS.ky, BOX
    )  # fmt: skip
    images = images + torch.randn(images.shape, dtype=torch.complex64, generator=generator) * BOX * sigma
    rows, one = torch.arange(COUNT), torch.ones(COUNT)
    particles = ParticleImages(rows, rows * 0 + 1, one, rows * 0, PIXELS, PIXEL_SIZE).with_transforms(images)
    if related is None:
        related = RelatedPoses(torch.stack([torch.eye(3), TURN]), torch.zeros(2, 3))
    exchange = RelatedExchange(references, related, RADIUS, fit_shift=True)
    chance = torch.rand(COUNT, 2 + exchange.offers, generator=generator)
    return exchange.accepted(particles, 1, Poses(begun, torch.zeros(COUNT, 2)), chance)


def test_wrong_related_poses_come_right_and_right_ones_stay() -> None:
    # A fifth of difference at this noise is tens of nats. Every second particle begins at the related pose.
    wrong = torch.arange(COUNT) % 2 > 0
    begun = torch.where(wrong[:, None, None], TURN @ ROTATION, ROTATION)
    taken, offered = exchanged(prepared(0.2, 0.3), 0.3, begun)
    assert (taken == wrong).float().mean() > 0.97
    assert geodesic_angle(offered.rotation, ROTATION)[taken & wrong].max() < 0.1  # degrees, of float32


def test_poses_that_nothing_tells_apart_are_taken_alike() -> None:
    # An exact symmetry: the likelihood ratio is 1, but for the interpolation of slices. Four standard errors.
    taken, _ = exchanged(prepared(0.0, 0.3), 0.3, ROTATION)
    assert abs(float(taken.float().mean()) - 0.5) < 4 * 0.5 / COUNT**0.5


@pytest.mark.parametrize("low", [0.25, 2.0])
def test_right_poses_are_left_as_often_as_the_likelihoods_say(low: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right and related pose predict images a distance d apart in units of the noise.

    Their log-likelihood ratio x has the mean -d²/2 and the variance d². Looked at once, the related one is taken with
    the probability 1 / (1 + exp(-x)). Looked at twice, at low frequencies (d₁) and in full, the first look takes it
    with 1 / (1 + exp(-x₁)), the second with min(1, exp(x - x₁)), whose mean is 2 Phi(-d₂/2), d₂² = d² - d₁².
    Tolerance: four standard errors of so many draws.
    """
    monkeypatch.setattr("scalecryo.pose.exchange.LOW_RADIUS", low * RADIUS)
    sigma = 0.5
    references = prepared(0.016, sigma)
    apart = slices_at(references, ROTATION) - slices_at(references, TURN @ ROTATION)
    near = PIXELS.prefix(RADIUS)
    each = apart[:, : len(near)].abs().square() * references[0, 2].noise.pixel_weight(near)
    first = each[:, : len(PIXELS.prefix(min(low, 1.0) * RADIUS))].sum(1)
    rest = (each.sum(1) - first).clamp_min(0)
    normal = torch.linspace(-6, 6, 401)
    ratio = -first[:, None] / 2 + first[:, None].sqrt() * normal
    once = (ratio.sigmoid() * (-normal.square() / 2).softmax(0)).sum(1)
    expected = float((once * torch.special.erfc(rest.sqrt() / 8**0.5)).mean())
    assert 0.1 < expected < 0.4
    assert (float(rest.mean()) > 0.1) == (low < 1)
    taken, _ = exchanged(references, sigma, ROTATION)
    assert abs(float(taken.float().mean()) - expected) < 4 * (expected * (1 - expected) / COUNT) ** 0.5


@pytest.mark.parametrize(("name", "least"), [("T", 0.9), ("O", 0.35)])
def test_the_right_one_of_many_is_found_at_once(name: str, least: float) -> None:
    # About the turns of a tetrahedron a map with one brighter blob looks almost alike. Of the 23 others of an
    # octahedron at most 16 are offered: 1 - (22/23)^16 = 0.51 of the particles are offered the right one.
    group = PointGroup.of(name)
    line = torch.arange(BOX) - BOX // 2
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    volume = torch.zeros(BOX, BOX, BOX)
    for number, turn in enumerate(group.rotations):
        at = turn @ torch.tensor([7.0, 2.0, 4.0])
        squared = (x - at[0]) ** 2 + (y - at[1]) ** 2 + (z - at[2]) ** 2
        volume += (1 + 0.5 * (number == 0)) * torch.exp(-squared / (2 * 1.5**2))
    references = prepared_of(volume, 0.3)
    generator = torch.Generator().manual_seed(3)
    wrong = group.rotations[torch.randint(1, len(group), (COUNT,), generator=generator)] @ ROTATION
    related = RelatedPoses(group.rotations, torch.zeros(len(group), 3))
    taken, offered = exchanged(references, 0.3, wrong, related)
    right = geodesic_angle(torch.where(taken[:, None, None], offered.rotation, wrong), ROTATION) < 1
    assert least < right.float().mean()
    assert (name == "T") == bool(right.float().mean() > 0.6)
