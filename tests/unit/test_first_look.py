"""What a look at the first particles says of their CTFs."""

import logging
from dataclasses import replace

import pytest
import torch

from scalecryo.physics.ctf import CtfParameters
from scalecryo.physics.fft import fourier_pixels
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.train.stages.checks import LOOKED_AT, FirstLook

COUNT, BOX, PIXEL_SIZE = LOOKED_AT, 64, 4.0


def particles(snr: float) -> ParticleImages:
    """Images of random objects whose spectrum falls off, so much signal in the noise of a middling Fourier pixel."""
    generator, pixels = torch.Generator().manual_seed(1), fourier_pixels(BOX)
    zero, one = torch.zeros(COUNT), torch.ones(COUNT)
    defocus = 8000 + 17000 * torch.rand(COUNT, generator=generator)
    optics = CtfParameters(defocus, defocus + 300, zero, 300 * one, 2.7 * one, 0.1 * one, zero)
    rows, half = torch.arange(COUNT), torch.ones(COUNT, dtype=torch.long)
    images = ParticleImages(rows, half, one, rows * 0, pixels, PIXEL_SIZE, optics=optics)
    shape = (2, COUNT, len(pixels))
    signal, noise = torch.randn(shape, dtype=torch.complex64, generator=generator)
    spectrum = snr * torch.exp(-pixels.radius / 10 + 1)
    return images.with_transforms(signal * spectrum.sqrt() * images.ctf + noise, images.ctf)


def look_at(images: ParticleImages) -> None:
    """In batches."""
    look = FirstLook("here")
    for rows in torch.arange(COUNT).split(100):
        look.add(images.select(rows))


@pytest.mark.parametrize("snr", [0.5, 0.1])
def test_ctfs_are_doubted_where_they_are_wrong_alone(snr: float, caplog: pytest.LogCaptureFixture) -> None:
    # At 0.1 the correlation is 0.012 though the CTFs are right; a batch alone does not tell.
    caplog.set_level(logging.WARNING)
    right = particles(snr)
    look_at(right)
    assert not caplog.records
    optics = right.optics
    assert optics is not None
    off = replace(optics, defocus_u=optics.defocus_u.flip(0), defocus_v=optics.defocus_v.flip(0))
    wrong = replace(right, optics=off, real=None)
    look_at(wrong.with_transforms(right.transforms, wrong.ctf))
    assert "does not follow the CTFs" in caplog.text
