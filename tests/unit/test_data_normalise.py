"""Normalisation: closed forms on images whose background is known."""

from pathlib import Path

import numpy as np
import pytest
import torch

from scalecryo.data.conversion.normalise import Normalisation, choose_normalisation, crops, normalise
from scalecryo.data.formats.mrc import Stack
from scalecryo.physics.fft import fourier_crop_2d


def _images(count: int, box: int, contrast: float, offset: float = 0.0) -> np.ndarray:
    """White noise of σ 1 with a soft disc of radius 0.2 box in the middle."""
    y, x = np.mgrid[:box, :box] - box // 2
    disc = np.clip(0.2 * box - np.hypot(y, x) + 0.5, 0, 1)
    noise = np.random.default_rng(0).normal(size=(count, box, box))
    return (noise + contrast * disc + offset).astype(np.float32)


@pytest.mark.parametrize("offset", [0.0, 32768.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_background_rule(offset: float, sign: int) -> None:
    box = 32
    source = _images(5, box, 3.0, offset)
    radius = np.hypot(*(np.mgrid[:box, :box] - box // 2))
    background = source.astype(np.float64)[:, radius > 0.375 * box]
    mean, sigma = background.mean(axis=1), background.std(axis=1)
    stored, stored_mean, scale = normalise(source.copy(), Normalisation(box, sign))
    # float32 holds pixels at an offset of 32768 to 2e-3 of their σ.
    tolerance = 1e-5 + offset * 2**-23
    assert stored_mean == pytest.approx(sign * mean, abs=tolerance)
    assert scale == pytest.approx(sigma, rel=tolerance)
    assert stored == pytest.approx(sign * (source - mean[:, None, None]) / sigma[:, None, None], abs=5 * tolerance)


def test_constant_and_not_finite_images_show() -> None:
    source = _images(4, 16, 1.0)
    source[1] = 1000.1
    source[2, 3, 4] = np.nan
    source[3, 3, 4] = np.inf
    for normalisation in ("background", "common"):
        with np.errstate(invalid="ignore"):
            stored, _, _ = normalise(source.copy(), Normalisation(16, 1, normalisation, 2.0))
        assert np.isfinite(stored).all(axis=(1, 2)).tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("contrast", "sign"), [(0.3, 1), (-0.3, -1), (0.0, 1)], ids=["bright", "dark", "nothing to see"]
)
def test_sign_of_simulated_contrast(contrast: float, sign: int) -> None:
    normalisation, reason = choose_normalisation(_images(50, 32, contrast), 32, None)
    assert normalisation == Normalisation(32, sign, "background", 1.0)
    assert {0.3: "bright", -0.3: "dark", 0.0: "unclear"}[contrast] in reason
    asked, reason = choose_normalisation(_images(50, 32, contrast), 32, -1)
    assert (asked.sign, reason) == (-1, "as asked")


@pytest.mark.parametrize(
    ("name", "sign", "normalisation"),
    [
        ("particles_real/empiar_10076/empiar_10076_7.mrc", -1, "background"),  # the data's README: dark protein
        ("particles_real/aspire_sample/sample.mrcs", 1, "background"),
        ("projections_relion/relion_proj_batch_pfac2.mrcs", 1, "common"),  # RELION's own projections have no noise
        ("toy/toy_projections.mrcs", 1, "common"),
    ],
)
def test_real_and_simulated_stacks(shared_data: Path, name: str, sign: int, normalisation: str) -> None:
    images = Stack.open(str(shared_data / name)).read(slice(0, 50))
    chosen, _ = choose_normalisation(images, images.shape[-1], None)
    assert (chosen.sign, chosen.kind) == (sign, normalisation)


def test_noise_free_stack_shares_one_scale() -> None:
    y, x = np.mgrid[:32, :32] - 16
    blob = np.exp(-(y**2 + x**2) / 18)
    source = (np.arange(1, 5)[:, None, None] * blob + 7).astype(np.float32)
    normalisation, _ = choose_normalisation(source.copy(), 32, None)
    assert normalisation.kind == "common"
    stored, mean, scale = normalise(source.copy(), normalisation)
    # Relative brightness of the images survives; the background goes to 0 but for the blob's tail there, e^-8.
    peaks = stored[:, 16, 16]
    assert peaks / peaks[0] == pytest.approx(np.arange(1, 5), rel=1e-4)
    assert mean == pytest.approx(np.full(4, 7.0), abs=2e-2)
    assert len(set(scale.tolist())) == 1


def test_cropping_keeps_white_noise() -> None:
    source = np.random.default_rng(2).normal(5, 2, (20, 64, 64)).astype(np.float32)
    stored, _, scale = normalise(source, Normalisation(32))
    # σ of a small box: the Nyquist row and column are empty, (31/32) of σ; error of σ from 20 · 500 px is 0.7 %.
    assert stored.shape == (20, 32, 32)
    assert scale.mean() == pytest.approx(2 * 31 / 32, rel=0.03)


@pytest.mark.parametrize(("box", "levels"), [(128, (64, 32)), (44, (32,)), (320, (128, 64, 32)), (32, ())])
def test_levels_from_one_transform(box: int, levels: tuple[int, ...]) -> None:
    """Against `fourier_crop_2d`, which moves the origin and transforms each level anew."""
    images = _images(3, box, 1.0, offset=5.0)
    for level, cropped in zip(levels, crops(images, levels), strict=True):
        expected = fourier_crop_2d(torch.from_numpy(images), level).numpy()
        # Single precision of values up to 10, through log2(box²) sums.
        assert cropped == pytest.approx(expected, abs=2e-5)


def test_memory_that_starts_anywhere_gives_the_same_bytes() -> None:
    source = _images(4, 44, 1.0)
    reference, *_ = normalise(source.copy(), Normalisation(44))
    for offset in (4, 8, 20, 32):
        memory = np.empty(source.nbytes + 128, np.uint8)
        start = -memory.ctypes.data % 64 + offset
        moved = memory[start : start + source.nbytes].view(np.float32).reshape(source.shape)
        moved[:] = source
        stored, *_ = normalise(moved, Normalisation(44))
        assert np.array_equal(stored, reference)
        assert np.array_equal(crops(stored, (32,))[0], crops(reference, (32,))[0])
