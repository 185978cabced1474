"""Posterior-weighted sums over a whole grid, against the same written out hypothesis by hypothesis."""

import pytest
import torch

from scalecryo.physics.fft import fourier_pixels
from scalecryo.physics.image_formation import shift_ramp
from scalecryo.pose.expectation import expected_slices
from scalecryo.pose.search import grid_posterior, shift_grid

BOX, IMAGES, ROTATIONS = 16, 5, 7


def problem(with_ctf: bool) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    pixels = fourier_pixels(BOX, 5.0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.complex(torch.randn(*shape, generator=generator), torch.randn(*shape, generator=generator))

    ctf = 2 * torch.rand(IMAGES, len(pixels), generator=generator) - 1 if with_ctf else None
    weight = pixels.weight * torch.rand(len(pixels), generator=generator) / 20
    return draw(IMAGES, len(pixels)), ctf, weight, draw(ROTATIONS, len(pixels)), shift_grid(2.0, 1.0)


@pytest.mark.parametrize("with_ctf", [True, False])
@pytest.mark.parametrize("chunk_elements", [1, 2**21])
def test_sums_equal_those_over_every_hypothesis(with_ctf: bool, chunk_elements: int) -> None:
    # Reference: Bayes' rule with the likelihood of the module docstring of pose/search.py, the flip of a template being
    # its complex conjugate (tested against projections elsewhere). 1e-4: sums in single precision.
    pixels = fourier_pixels(BOX, 5.0)
    observed, ctf, weight, templates, shifts = problem(with_ctf)
    found = expected_slices(observed, ctf, weight, templates, shifts, pixels, chunk_elements=chunk_elements)

    y, w = observed.to(torch.complex128), weight.double()
    c = torch.ones(y.shape, dtype=torch.float64) if ctf is None else ctf.double()
    t = templates.to(torch.complex128)
    ramp = shift_ramp(shifts.double(), pixels.kx.double(), pixels.ky.double(), BOX)
    both = torch.stack([t, t.conj()])  # rotation and flip
    predicted = c[:, None, None, None] * both[None, :, None] * ramp[None, None, :, None]  # image, flip, shift, rotation
    difference = y[:, None, None, None] - predicted
    score = -0.5 * (w * difference.abs().square()).sum(-1)
    mass = score.flatten(1).softmax(1).view(score.shape)
    centred = (c * y)[:, None] * ramp.conj()
    slices = torch.einsum("ith,itp->hp", mass[:, 0].to(y.dtype), centred)
    slices = slices + torch.einsum("ith,itp->hp", mass[:, 1].to(y.dtype), centred.conj())
    power = torch.einsum("ifth,ip->hp", mass, c.square())
    constant = -0.5 * (w * y.abs().square()).sum(-1)
    residual = torch.einsum("ifth,ifthp->p", mass, difference.abs().square())

    near = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found.slices.values.to(y.dtype), slices, **near)
    torch.testing.assert_close(found.slices.power.double(), power, **near)
    torch.testing.assert_close(found.log_evidence.double(), score.flatten(1).logsumexp(1) - constant, **near)
    torch.testing.assert_close(found.residual.double(), residual, **near)


def test_evidence_is_that_of_the_search() -> None:
    pixels = fourier_pixels(BOX, 5.0)
    problem_ = problem(True)
    found, ranked = expected_slices(*problem_, pixels), grid_posterior(*problem_, pixels, keep=3)
    torch.testing.assert_close(found.log_evidence, ranked.log_evidence, rtol=1e-5, atol=1e-5)  # rounding


def test_an_image_of_weight_two_counts_as_two_do() -> None:
    # Reference: the same images, the second and the fifth named twice.
    pixels = fourier_pixels(BOX, 5.0)
    observed, ctf, *rest = problem(True)
    assert ctf is not None
    weight = torch.tensor([1.0, 2.0, 1.0, 1.0, 2.0])
    for chunk_elements in (1, 2**21):
        found = expected_slices(
            observed, ctf, *rest, pixels, image_weight=weight, chunk_elements=chunk_elements
        )  # fmt: skip
        rows = torch.tensor([0, 1, 2, 3, 4, 1, 4])
        twice = expected_slices(observed[rows], ctf[rows], *rest, pixels)
        near = {"rtol": 1e-4, "atol": 1e-4}  # sums in single precision
        torch.testing.assert_close(found.slices.values, twice.slices.values, **near)
        torch.testing.assert_close(found.slices.power, twice.slices.power, **near)
        torch.testing.assert_close(found.residual, twice.residual, **near)
        torch.testing.assert_close(found.mass.sum(1), weight, **near)
        torch.testing.assert_close(found.log_evidence, twice.log_evidence[:5], **near)


def test_every_image_counts_once() -> None:
    pixels = fourier_pixels(BOX, 5.0)
    found = expected_slices(*problem(False), pixels)  # without a CTF the weight of a slice is its posterior mass
    torch.testing.assert_close(found.slices.power.sum(0), torch.full((len(pixels),), float(IMAGES)))
