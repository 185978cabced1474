"""The posterior of images over the classes of several maps, against Bayes' rule written out."""

import math

import pytest
import torch
from torch import Tensor

from scalecryo.map.reference import reference_transform
from scalecryo.physics.fft import fourier_pixels
from scalecryo.physics.image_formation import form_images, shift_ramp
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.rotation import random_rotations
from scalecryo.physics.so3_grid import so3_grid
from scalecryo.pose import class_posterior
from scalecryo.pose.class_posterior import ClassPosterior
from scalecryo.pose.search import shift_grid, templates

BOX, RADIUS, COUNT, CLASSES, SCALE = 24, 8.0, 30, 3, 2.0
PIXELS = fourier_pixels(BOX, RADIUS)
GRID, FEW = so3_grid(72), so3_grid(24)
SHIFTS = shift_grid(1.0, 1.0)


def volume(number: int) -> Tensor:
    """Blobs of a class."""
    line = torch.arange(BOX) - BOX // 2
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    places = torch.randn((12, 3), generator=torch.Generator().manual_seed(number)) * BOX / 9
    squared = ((x - at[0]) ** 2 + (y - at[1]) ** 2 + (z - at[2]) ** 2 for at in places)
    return torch.stack([torch.exp(-one / 4) for one in squared]).sum(0)


TRANSFORMS = [reference_transform(volume(number), SCALE) for number in range(CLASSES)]


def images_of(sigma: float) -> tuple[ParticleImages, Tensor, Tensor]:
    """Images of the classes in turn, with a CTF and noise; their pixel weight; which class each shows."""
    generator = torch.Generator().manual_seed(9)
    rotation = random_rotations(COUNT, generator)
    label = torch.arange(COUNT) % CLASSES
    slices = torch.stack([
        templates(TRANSFORMS[int(label[row])], rotation[row : row + 1], PIXELS, SCALE)[0] for row in range(COUNT)
    ])  # fmt: skip
    ctf = 2 * torch.rand(COUNT, len(PIXELS), generator=generator) - 1
    made = form_images(slices, ctf, torch.zeros(COUNT, 2), PIXELS.kx, PIXELS.ky, BOX)
    made = made + torch.randn(made.shape, dtype=torch.complex64, generator=generator) * BOX * sigma
    weight = PIXELS.weight / (BOX * sigma) ** 2
    weight[0] = 0
    rows, one = torch.arange(COUNT), torch.ones(COUNT)
    images = ParticleImages(rows, rows * 0 + 1, one, rows * 0, PIXELS, 3.0)
    return images.with_transforms(made, ctf), weight, label


def posterior() -> ClassPosterior:
    return ClassPosterior(TRANSFORMS, SCALE, GRID, FEW, SHIFTS, PIXELS)


def test_the_evidence_is_bayes_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every class, flip, shift and rotation written out; 1e-3 nats: sums of exponentials in single precision.
    monkeypatch.setattr(class_posterior, "MARGIN", 1e6)  # nothing is ruled out
    images, weight, _ = images_of(1.0)
    prior = torch.tensor([0.7, 0.2, 0.1]).log()
    found = posterior().log_evidence(images, weight, prior)

    y, w, ctf = images.transforms.to(torch.complex128), weight.double(), images.ctf
    assert ctf is not None
    c = ctf.double()
    t = torch.stack([templates(one, GRID, PIXELS, SCALE) for one in TRANSFORMS]).to(torch.complex128)
    ramp = shift_ramp(SHIFTS.double(), PIXELS.kx.double(), PIXELS.ky.double(), BOX)
    score = torch.empty(COUNT, CLASSES, 2, len(GRID), len(SHIFTS), dtype=torch.float64)
    for number in range(CLASSES):
        for flip, slices in enumerate((t[number], t[number].conj())):
            predicted = torch.einsum("ip,hp,sp->ihsp", c.to(y.dtype), slices, ramp)
            score[:, number, flip] = -0.5 * (w * (y[:, None, None] - predicted).abs().square()).sum(-1)
    constant = -0.5 * (w * y.abs().square()).sum(-1)
    wanted = score.flatten(2).logsumexp(2) - constant[:, None] + prior.double()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(posterior().shares(images, weight, prior).double(), wanted.softmax(1), rtol=0, atol=1e-3)


def test_what_the_first_look_rules_out_has_no_mass(monkeypatch: pytest.MonkeyPatch) -> None:
    images, weight, label = images_of(0.3)
    prior = torch.zeros(CLASSES)
    found = posterior().log_evidence(images, weight, prior)
    share = posterior().shares(images, weight, prior)
    monkeypatch.setattr(class_posterior, "MARGIN", 1e6)
    whole = posterior().log_evidence(images, weight, prior)
    ruled_out = found == -math.inf
    assert 0.2 < ruled_out.float().mean() < (CLASSES - 1) / CLASSES + 1e-6
    assert whole.softmax(1)[ruled_out].max() < 1e-3
    assert torch.equal(found[~ruled_out], whole[~ruled_out])
    torch.testing.assert_close(share, whole.softmax(1), rtol=0, atol=2e-3)
    assert (share.argmax(1) == label).float().mean() > 0.9


def test_an_empty_class_gets_nothing() -> None:
    images, weight, label = images_of(0.3)
    prior = torch.tensor([0.0, -math.inf, 0.0])
    share = posterior().shares(images, weight, prior)
    assert (share[:, 1] == 0).all()
    assert (share.sum(1) - 1).abs().max() < 1e-5
    assert (share.argmax(1) == label)[label != 1].float().mean() > 0.9
