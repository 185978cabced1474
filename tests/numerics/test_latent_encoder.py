"""What the latent encoder reads does not depend on the image's turn in its plane; and what its error is made of."""

import math

import numpy as np
import pytest
import torch

from scalecryo.map.reference import reference_transform
from scalecryo.model.latent_encoder import LatentEncoder, posed_image
from scalecryo.physics.fft import fourier_pixels
from scalecryo.physics.fourier_slice import extract_slices
from scalecryo.physics.rotation import random_rotations
from scalecryo.train.latent_training import agreement, moments
from tests.support.blobs import blobs

BOX, RADIUS = 32, 8


def test_a_turn_in_the_plane_is_undone() -> None:
    """The same view, turned by any angle, gives the same image: the projection at the pose of its direction alone."""
    volume = blobs(BOX, 4)
    rng, pixels = torch.Generator().manual_seed(2), fourier_pixels(BOX, RADIUS + 2.0)
    rotation = random_rotations(5, rng)
    angle = torch.tensor([0.3, 1.2, 2.8, -2.0, -0.7])
    zero = torch.zeros_like(angle)
    turn = torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero, zero, zero, zero + 1], 1)
    turned = rotation @ turn.reshape(-1, 3, 3)
    transform = reference_transform(volume, 2)
    read = []
    for pose in (rotation, turned):
        slices = extract_slices(transform, pose, pixels.kx, pixels.ky, 2)
        ctf = torch.ones_like(slices.real)
        read.append(posed_image(slices, ctf, pixels.weight, pose, pixels, RADIUS))
    torch.testing.assert_close(read[0][1], read[1][1])
    # Both are sampled between the points of a grid four times as fine as the image's frequencies, by cubic splines.
    alike = (read[0][0] * read[1][0]).flatten(1).sum(1) / (read[0][0].flatten(1).norm(dim=1) ** 2)
    torch.testing.assert_close(alike, torch.ones(5), atol=0.02, rtol=0)
    assert float((read[0][0] - read[1][0]).norm() / read[0][0].norm()) < 0.05


def test_white_noise_is_read_with_a_variance_of_one() -> None:
    """With CTFs of a mean square of a half and the noise's own variance as weight."""
    rng, pixels = torch.Generator().manual_seed(3), fourier_pixels(BOX, RADIUS + 2.0)
    count, sigma = 400, 7.0
    noise = torch.view_as_complex(torch.randn(count, len(pixels), 2, generator=rng)) * sigma / math.sqrt(2)
    real = pixels.kx == 0  # of a real image: these have their Friedel partners beside them
    noise[:, real] = 0
    ctf = torch.full((count, len(pixels)), math.sqrt(0.5))
    weight = pixels.weight / sigma**2
    image, _ = posed_image(noise, ctf, weight, random_rotations(count, rng), pixels, RADIUS)
    missing = 1 - float(real[: pixels.count(RADIUS)].sum() / pixels.weight[: pixels.count(RADIUS)].sum())
    side = image.shape[-1]
    inner = image[:, side // 4 : -side // 4, side // 4 : -side // 4]  # corners turn out of the box
    assert float(inner.square().mean()) == pytest.approx(missing, rel=0.1)  # cubic sampling takes a little


def test_agreement_is_numpys_correlation_and_error() -> None:
    rng = np.random.default_rng(1)
    exact, weight = rng.normal(size=(500, 2)) * [1.0, 2.0] + 0.5, rng.integers(0, 2, 500).astype(float)
    found = exact + 0.3 * rng.normal(size=exact.shape)
    sums = sum(
        moments(*(torch.from_numpy(values[some]) for values in (weight, found, exact)))
        for some in (slice(0, 200), slice(200, None))
    )
    correlation, error = agreement(sums)
    kept = weight > 0
    for k in range(2):
        a, b = found[kept, k], exact[kept, k]
        assert float(correlation[k]) == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-9)
        assert float(error[k]) == pytest.approx(np.sqrt(np.mean((a - b) ** 2)) / b.std(), abs=1e-9)


def test_the_encoder_gives_a_mean_and_a_spread_for_every_component() -> None:
    encoder = LatentEncoder(RADIUS, 3, 16)
    mean, log_sd = encoder(torch.zeros(2, 2 * RADIUS, 2 * RADIUS), torch.eye(3)[:2])
    assert mean.shape == log_sd.shape == (2, 3)
