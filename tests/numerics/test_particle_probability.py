"""Whether an image shows the particle: against exact evidence, and against images made of particles and of others."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from scalecryo.physics.fft import FourierPixels, fourier_pixels, rfft2_centred
from scalecryo.physics.image_formation import shift_ramp
from scalecryo.physics.mask import soft_disc
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import PoseEstimates
from scalecryo.physics.rotation import random_rotations
from scalecryo.pose.particle_probability import EDGE_PX, RandomDensity
from scalecryo.pose.search import templates
from tests.numerics.test_estimator import (
    BOX,
    COUNT,
    PIXEL_SIZE,
    SIGMA,
    blobs,
    estimator,
    particles,
    references,
    with_noise,
)  # fmt: skip

RADIUS, DIAMETER = 13.0, 0.5


def made_of_white_noise(pixels: FourierPixels, spectrum: Tensor) -> Tensor:
    """Packed transforms of every pixel of a disc, filtered: a random density in the disc is a sum of them, with weights
    of unit variance, and has the spectrum."""
    disc = soft_disc(BOX, DIAMETER * BOX / 2, EDGE_PX * BOX / (2 * RADIUS + 2))
    rows, columns = disc.nonzero(as_tuple=True)
    each = torch.zeros(len(rows), BOX, BOX)
    each[torch.arange(len(rows)), rows, columns] = disc[rows, columns]
    return pixels.pack(rfft2_centred(each)) * (spectrum / disc.square().sum()).sqrt()


@pytest.mark.parametrize("defocused", [False, True])
def test_the_evidence_of_a_random_density_is_that_of_a_gaussian_process(defocused: bool) -> None:
    # Reference: the exact log-evidence of a linear Gaussian model (determinant and quadratic form of its covariance),
    # of the densities drawn and of others. Cut and filtered pixel by pixel it is good to a seventh.
    pixels, generator = fourier_pixels(BOX, RADIUS), torch.Generator().manual_seed(5)
    spectrum = 20 * torch.exp(-((pixels.radius / 6) ** 2)) * BOX**2 * SIGMA**2
    waves = made_of_white_noise(pixels, spectrum)
    ctf = torch.sin(0.5 + 0.03 * pixels.radius**2) if defocused else torch.ones_like(pixels.radius)
    shift_px = torch.tensor([1.3, -0.7]).expand(COUNT, 2)
    there = shift_ramp(shift_px[:1], pixels.kx, pixels.ky, BOX)
    drawn = torch.randn(COUNT, len(waves), generator=generator)
    drawn[COUNT // 2 :] = 0  # half of the images hold nothing
    images = (drawn.to(waves.dtype) @ waves) * ctf * there
    images += torch.randn(images.shape, dtype=torch.complex64, generator=generator) * BOX * SIGMA
    weight = pixels.weight / (BOX * SIGMA) ** 2

    design = torch.view_as_real(waves * ctf * there * weight.sqrt()).flatten(1).double()
    seen = torch.view_as_real(images * weight.sqrt()).flatten(1).double()
    normal = torch.eye(len(design), dtype=torch.float64) + design @ design.T
    right = seen @ design.T
    exact = 0.5 * (right * torch.linalg.solve(normal, right.T).T).sum(1) - 0.5 * torch.logdet(normal)

    one = torch.ones(COUNT)
    rows = torch.arange(COUNT)
    particles = ParticleImages(rows, one.long(), one, rows * 0, pixels, PIXEL_SIZE)
    particles = particles.with_transforms(images, ctf.expand(COUNT, -1))
    poses = replace(PoseEstimates.unknown(COUNT), shift=shift_px * PIXEL_SIZE)
    found = RandomDensity(pixels, spectrum, weight, DIAMETER).log_evidence(particles, poses)
    for half in (slice(0, COUNT // 2), slice(COUNT // 2, COUNT)):
        assert float(found[half].mean() / exact[half].mean()) == pytest.approx(1, abs=0.15)
    assert float(torch.corrcoef(torch.stack([found, exact]))[0, 1]) > 0.99


def others(pixels: FourierPixels, images: ParticleImages) -> ParticleImages:
    """Images of as many other densities of the same kind, each as bright as the particle."""
    generator, slices = torch.Generator().manual_seed(9), []
    for number, rotation in enumerate(random_rotations(COUNT, generator)):
        reference = replace(references(1), maps=blobs(100 + number).expand(1, 2, BOX, BOX, BOX)).at(BOX, pixels)[0, 1]
        slices.append(templates(reference.transform, rotation[None], pixels, reference.scale)[0])
    noise = torch.randn(COUNT, len(pixels), dtype=torch.complex64, generator=generator) * BOX * SIGMA
    return images.with_transforms(torch.stack(slices) + noise)


def test_another_object_as_large_and_as_bright_is_less_often_taken_for_the_particle() -> None:
    # At this noise only the lowest shells say anything, and there one blob is like another: a density without a mean
    # and without an edge explained so little that 71 % of the others passed.
    pixels, known, sigma = fourier_pixels(BOX, RADIUS), references(1), 2.0
    images, _ = particles(known, pixels)
    told = replace(known, noise=torch.full((BOX // 2 + 1,), sigma**2))
    nothing, seen = PoseEstimates.unknown(COUNT), torch.zeros(COUNT, dtype=torch.bool)
    posed = estimator(told, pixels, search_known=True)
    right, wrong = (
        posed.estimate(with_noise(some, sigma), nothing, seen).particle_probability
        for some in (images, others(pixels, images))
    )
    assert float((right > 0.5).float().mean()) > 0.95
    assert float((wrong > 0.5).float().mean()) < 0.35


def test_images_that_cannot_tell_keep_even_odds() -> None:
    # The true pose gains less than chance gains among as many poses. The particles are not thrown away (their median
    # was 0.001 when one pose stood for all), and empty images still are no likelier than they.
    pixels, known, sigma = fourier_pixels(BOX, RADIUS), references(1), 12.0
    images, truth = particles(known, pixels)
    told = replace(known, noise=torch.full((BOX // 2 + 1,), sigma**2))
    posed, seen = estimator(told, pixels, search_known=False), torch.ones(COUNT, dtype=torch.bool)
    right, empty = (
        posed.estimate(with_noise(some, sigma), truth, seen).particle_probability
        for some in (images, images.with_transforms(images.transforms * 0))
    )
    assert 0.3 < float(right.median()) < 0.7
    assert float(empty.median()) < float(right.median())
