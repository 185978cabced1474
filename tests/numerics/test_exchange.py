"""Related poses are drawn with their probabilities: against poses that images were made with, and a closed form."""

import torch
from torch import Tensor

from scalecryo.map.reference import References, ReferenceSet
from scalecryo.physics.fft import fourier_pixels
from scalecryo.physics.image_formation import form_images
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import Poses
from scalecryo.physics.rotation import geodesic_angle, random_rotations
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
    """Half 2's map, not filtered; half 1's is empty: whoever asks it takes every offer."""
    maps = torch.stack([torch.zeros(BOX, BOX, BOX), pair_of_blobs(difference)])[None]
    shells = torch.ones(1, BOX // 2)
    whole = torch.ones(1, BOX, BOX, BOX)
    noise = torch.full((BOX // 2 + 1,), sigma**2)
    return ReferenceSet(maps, PIXEL_SIZE, whole, shells, shells, noise, RADIUS).at(BOX, PIXELS)


def slices_at(references: References, rotation: Tensor) -> Tensor:
    return templates(references[0, 2].transform, rotation, PIXELS, references[0, 2].scale)


def exchanged(references: References, sigma: float, begun: Tensor) -> tuple[Tensor, Poses]:
    """Which of the particles, of half 1 and made at `ROTATION`, take the related pose, and what they were offered."""
    generator = torch.Generator().manual_seed(1)
    images = form_images(
        slices_at(references, ROTATION), None, torch.zeros(COUNT, 2), PIXELS.kx, PIXELS.ky, BOX
    )  # fmt: skip
    images = images + torch.randn(images.shape, dtype=torch.complex64, generator=generator) * BOX * sigma
    rows, one = torch.arange(COUNT), torch.ones(COUNT)
    particles = ParticleImages(rows, rows * 0 + 1, one, rows * 0, PIXELS, PIXEL_SIZE).with_transforms(images)
    related = RelatedPoses(torch.stack([torch.eye(3), TURN]), torch.zeros(2, 3))
    exchange = RelatedExchange(references, related, RADIUS, fit_shift=True)
    chance = torch.rand(COUNT, generator=generator)
    return exchange.accepted(particles, 1, Poses(begun, torch.zeros(COUNT, 2)), rows * 0 + 1, chance)


def test_wrong_related_poses_come_right_and_right_ones_stay() -> None:
    # A fifth of difference at this noise is tens of nats. Every second particle begins at the related pose.
    wrong = torch.arange(COUNT) % 2 > 0
    begun = torch.where(wrong[:, None, None], TURN @ ROTATION, ROTATION)
    taken, offered = exchanged(prepared(0.2, 0.3), 0.3, begun)
    assert (taken == wrong).float().mean() > 0.97
    assert geodesic_angle(offered.rotation, ROTATION)[taken & wrong].max() < 0.1  # degrees, of float32


def test_poses_that_nothing_tells_apart_are_taken_alike() -> None:
    # An exact symmetry: the likelihood ratio is 1, but for the interpolation of slices.
    taken, _ = exchanged(prepared(0.0, 0.3), 0.3, ROTATION)
    assert taken.float().mean() > 0.95


def test_right_poses_are_left_as_often_as_the_likelihoods_overlap() -> None:
    # Right and related pose predict images a distance d apart in units of the noise: their log-likelihood ratio has the
    # mean d²/2 and the variance d², and min(1, ratio) the mean 2 Phi(-d/2), the overlap of two Gaussians d apart.
    # Tolerance: four standard errors of so many draws.
    sigma = 0.5
    references = prepared(0.016, sigma)
    apart = slices_at(references, ROTATION) - slices_at(references, TURN @ ROTATION)
    near = PIXELS.prefix(RADIUS)
    squared = apart[:, : len(near)].abs().square() @ references[0, 2].noise.pixel_weight(near)
    expected = float(torch.special.erfc(squared.sqrt() / 8**0.5).mean())
    assert 0.2 < expected < 0.8
    taken, _ = exchanged(references, sigma, ROTATION)
    assert abs(float(taken.float().mean()) - expected) < 4 * (expected * (1 - expected) / COUNT) ** 0.5
