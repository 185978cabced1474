"""Poses and CTF tables of cryoDRGN's simulated set: its volume, projected at its rotations, gives its images."""

import pickle
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from torch import Tensor

from scalecryo.physics.ctf import CtfParameters, contrast_transfer
from scalecryo.physics.fft import fourier_pixels, irfft2_centred, rfft2_centred, rfft3_centred
from scalecryo.physics.fourier_slice import extract_slices, gridding_correction, padded_box


@pytest.fixture
def toy(shared_data: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Volume, images, rotations (cryoDRGN stores the transpose of R)."""
    folder = shared_data / "toy"
    # The stack has no `MAP ` id, which strict mrcfile refuses: 1,000 float32 images after 1,024 bytes of header.
    raw = np.fromfile(folder / "toy_projections.mrcs", dtype="<f4", offset=1024)
    with mrcfile.open(folder / "toymodel_small_nocenter.mrc") as mrc:
        volume = torch.from_numpy(np.array(mrc.data, dtype=np.float32))
    with (folder / "toy_rot_zerotrans.pkl").open("rb") as file:
        rotation, _ = pickle.load(file)
    return volume, torch.from_numpy(raw.reshape(1000, 30, 30)), torch.from_numpy(rotation).float().mT


def test_projections(toy):
    volume, images, rotation = toy
    # cryoDRGN turned the volume in real space, linearly interpolated: a blur that leaves 2/3 of this sharp volume's
    # amplitude at |k| = 10 of 15. Compare up to there.
    pixels, box = fourier_pixels(30, radius=10), padded_box(30, 3)
    transform = rfft3_centred(volume * gridding_correction(30, 3), box)
    theirs = irfft2_centred(pixels.unpack(pixels.pack(rfft2_centred(images))), 30)

    def correlation(rotation: Tensor) -> Tensor:
        slices = extract_slices(transform, rotation, pixels.kx, pixels.ky, box / 30)
        ours = irfft2_centred(pixels.unpack(slices), 30)
        a, b = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (ours, theirs))
        return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))

    assert correlation(rotation).min() > 0.99
    assert correlation(rotation.mT).median() < 0.5


def test_ctf_table_of_the_toy_set_is_one(shared_data: Path):
    with (shared_data / "toy" / "test_ctf.pkl").open("rb") as file:
        table = torch.from_numpy(pickle.load(file)).float()
    box, pixel_size = int(table[0, 0]), float(table[0, 1])
    defocus_u, defocus_v, angle, voltage, cs, contrast, phase = table[:8, 2:].T
    parameters = CtfParameters(defocus_u, defocus_v, angle, voltage, cs, contrast, phase)
    pixels = fourier_pixels(box)
    ctf = contrast_transfer(parameters, pixels.kx, pixels.ky, box, pixel_size)
    # No defocus, no aberration, a 90 degree phase plate: sin(90 + asin w) = sqrt(1 - w^2), positive here
    # (cryoDRGN's own formula has the other sign).
    expected = (1 - contrast**2).sqrt()[:, None].expand_as(ctf)
    # Its Cs of 0.001 mm adds 0.006 rad at the edge, of which the slope sin(asin w) = 0.1 leaves 6e-4.
    torch.testing.assert_close(ctf, expected, rtol=0, atol=1e-3)
