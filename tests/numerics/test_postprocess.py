"""Masked FSC, weighting and sharpening of half-maps, against what was put in."""

import math

import pytest
import torch

from scalecryo.map.postprocess import guinier_b_factor, postprocess
from scalecryo.map.reference import ReferenceSet
from scalecryo.physics.fft import irfft3_centred, rfft3_centred
from scalecryo.physics.fsc import fsc, resolution, shell_index_3d
from scalecryo.physics.mask import soft_sphere

BOX, PIXEL_SIZE = 64, 1.5


def white(seed: int) -> torch.Tensor:
    return torch.randn(BOX, BOX, BOX, generator=torch.Generator().manual_seed(seed))


def fallen_off(volume: torch.Tensor, b_factor: float) -> torch.Tensor:
    """A map with amplitudes times exp(-B s² / 4)."""
    squared = (shell_index_3d(BOX) / (BOX * PIXEL_SIZE)).square()
    return irfft3_centred(rfft3_centred(volume) * torch.exp(-b_factor / 4 * squared), BOX)


def halves(signal: torch.Tensor, noise: float, mask: torch.Tensor) -> ReferenceSet:
    maps = torch.stack([signal + noise * white(1), signal + noise * white(2)])[None]
    spectrum = torch.ones(BOX // 2 + 1)
    return ReferenceSet.of_maps(maps, PIXEL_SIZE, noise=spectrum, radius=BOX / 2 - 1, mask=mask[None])


@pytest.mark.parametrize("b_factor", [30.0, 100.0])
def test_guinier_fit_finds_the_b_factor(b_factor: float) -> None:
    # White amplitudes times exp(-B s²/4): the fit over shells 10 to 31, some 10⁴ coefficients, is good to a few %.
    curve = torch.ones(BOX // 2 + 1)
    assert guinier_b_factor(fallen_off(white(0), b_factor), curve, PIXEL_SIZE) == pytest.approx(b_factor, rel=0.05)


def test_no_b_factor_where_nothing_falls_off_or_too_little_is_seen() -> None:
    curve = torch.ones(BOX // 2 + 1)
    assert guinier_b_factor(fallen_off(white(0), -50.0), curve, PIXEL_SIZE) == 0.0
    for shells in (12, 3):  # 8 Å, two shells past 10 Å; 32 Å, none
        low = torch.where(torch.arange(BOX // 2 + 1) < shells, 1.0, 0.0)
        assert guinier_b_factor(white(0), low, PIXEL_SIZE) == 0.0


def test_a_tight_mask_does_not_make_resolution() -> None:
    # Reference: Chen et al. 2013. Signal to shell 12 only; past it the half-maps share nothing but the mask, which
    # correlates neighbouring shells. The mask's transform, a sphere's of radius r, falls to nothing within about N/r
    # shells (first zero at 0.72 N/r), so true signal reaches that far past shell 12; beyond, the corrected curve must
    # be near 0.
    keep = (shell_index_3d(BOX) <= 12).float()
    signal = irfft3_centred(rfft3_centred(white(0)) * keep, BOX)
    radius = 12
    mask = soft_sphere(BOX, radius, edge_px=2)
    made = halves(signal, 0.3, mask)
    final = postprocess(made, torch.Generator().manual_seed(0))
    shell, _ = resolution(final.fsc_corrected, BOX, PIXEL_SIZE, 0.143)
    masked, _ = resolution(made.fsc_masked[0], BOX, PIXEL_SIZE, 0.143)
    assert shell < 12.5 + BOX / radius
    assert shell <= masked
    # 33 shells of about 10³ independent values within the mask: a mean within 0.1 of zero.
    assert final.fsc_corrected[18:31].mean().abs() < 0.1


def test_weighting_leaves_a_noise_free_map_alone() -> None:
    made = halves(white(0), 0.0, torch.ones(BOX, BOX, BOX))
    final = postprocess(made, torch.Generator().manual_seed(0))
    curve = fsc(final.map, white(0))
    assert curve[:32].min() > 0.999
    assert math.isfinite(final.b_factor)


def test_the_unsharpened_map_lacks_the_b_factor_alone() -> None:
    # Reference: the Guinier form itself. Each shell of the two maps differs by exp(B s²/4) and by nothing else.
    mask = torch.ones(BOX, BOX, BOX)
    final = postprocess(halves(fallen_off(white(0), 60.0), 0.01, mask), torch.Generator().manual_seed(0))
    assert final.b_factor > 30
    shells = shell_index_3d(BOX)
    squared = (shells / (BOX * PIXEL_SIZE)).square()
    sharpened = rfft3_centred(final.unsharpened) * torch.exp(final.b_factor / 4 * squared)
    within = shells <= BOX // 2
    # Single precision of both maps, relative to the whole.
    difference = (rfft3_centred(final.map) - sharpened)[within].norm() / sharpened[within].norm()
    assert difference < 1e-5
