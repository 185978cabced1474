"""Pose, shift and CTF conventions against RELION: projections written by its own `relion_project`."""

from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest
import starfile
import torch
from torch import Tensor

from scalecryo.physics.ctf import CtfParameters, contrast_transfer
from scalecryo.physics.fft import fourier_pixels, irfft2_centred, rfft2_centred, rfft3_centred
from scalecryo.physics.fourier_slice import extract_slices, gridding_correction, padded_box
from scalecryo.physics.image_formation import form_images
from scalecryo.physics.rotation import euler_to_rotation

PIXEL_SIZE = 3.54  # Å, of the point mass set; its volume's header has none
PADDING = 2.0  # what relion_project uses


def read_mrc(path: Path) -> Tensor:
    with mrcfile.open(path) as mrc:
        return torch.from_numpy(np.array(mrc.data, dtype=np.float32))


def columns(table: pd.DataFrame, *names: str) -> Tensor:
    return torch.tensor(table[list(names)].to_numpy(dtype=np.float32))


def rotations(table: pd.DataFrame) -> Tensor:
    return euler_to_rotation(columns(table, "rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"))


def project(volume: Tensor, rotation: Tensor, shift_px: Tensor, ctf: Tensor | None = None) -> Tensor:
    n = volume.shape[-1]
    pixels, box = fourier_pixels(n), padded_box(n, PADDING)
    transform = rfft3_centred(volume * gridding_correction(n, PADDING), box)
    slices = extract_slices(transform, rotation, pixels.kx, pixels.ky, box / n)
    packed = form_images(slices, ctf, shift_px, pixels.kx, pixels.ky, n)
    return irfft2_centred(pixels.unpack(packed), n)


def correlations(a: Tensor, b: Tensor) -> Tensor:
    pairs = torch.stack([a.flatten(1), b.flatten(1)], dim=1)
    return torch.stack([torch.corrcoef(pair)[0, 1] for pair in pairs])


@pytest.fixture
def point_mass(shared_data: Path) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Volume, RELION's images, rotations, shifts in px, CTF at our Fourier pixels."""
    folder = shared_data / "projections_relion"
    star = starfile.read(folder / "relion_proj_batch_pfac2.star", always_dict=True)
    table = star["particles"].merge(star["optics"], on="rlnOpticsGroup")
    assert [int(name.split("@")[0]) for name in table.rlnImageName] == list(range(1, 25))
    images = read_mrc(folder / "relion_proj_batch_pfac2.mrcs")
    pixels = fourier_pixels(64)
    # RELION keeps |k| = 32 too, and a point mass has a tenth of its power there: compare where both are defined.
    images = irfft2_centred(pixels.unpack(pixels.pack(rfft2_centred(images))), 64)
    names = ["rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle", "rlnVoltage", "rlnSphericalAberration"]
    parameters = CtfParameters(*columns(table, *names, "rlnAmplitudeContrast", "rlnPhaseShift").unbind(1))
    ctf = contrast_transfer(parameters, pixels.kx, pixels.ky, 64, PIXEL_SIZE)
    shift = -columns(table, "rlnOriginXAngst", "rlnOriginYAngst") / PIXEL_SIZE
    return read_mrc(folder / "pointmass.mrc"), images, rotations(table), shift, ctf


def test_point_mass_with_ctf_and_shift(point_mass):
    volume, images, rotation, shift, ctf = point_mass
    # Same padding and interpolation as RELION: only rounding and its single precision CTF are left.
    assert correlations(project(volume, rotation, shift, ctf), images).min() > 0.999


def test_every_sign_matters(point_mass):
    volume, images, rotation, shift, ctf = point_mass
    assert correlations(project(volume, rotation, -shift, ctf), images).max() < 0.5
    assert correlations(project(volume, rotation, shift, -ctf), images).max() < -0.9
    assert correlations(project(volume, rotation.mT, shift, ctf), images).median() < 0.5
    assert correlations(project(volume, rotation, shift.flip(1), ctf), images).median() < 0.5


@pytest.mark.parametrize("name", ["rln_proj_65", "rln_proj_65_centered", "rln_proj_65_shifted"])
def test_ribosome(shared_data: Path, name: str):
    folder = shared_data / "projections_relion"
    star = starfile.read(folder / f"{name}.star", always_dict=True)
    table = star["particles"]
    # The odd box of 65 px goes into one of 66 px, centre 32 on centre 33.
    volume = torch.zeros(66, 66, 66)
    volume[1:, 1:, 1:] = read_mrc(folder / "ribosome70s_65.mrc")
    images = read_mrc(folder / f"{name}.mrcs")
    shift = torch.zeros(len(table), 2)
    if "shifted" in name:
        shift = -columns(table, "rlnOriginX", "rlnOriginY")
    # With an odd box RELION puts its images 1 px further in x and y than a rotation about index 32 does.
    ours = project(volume, rotations(table), shift + 1)[:, 1:, 1:]
    # RELION's transform has 65 px, ours 66, and its shifted images wrap around: 0.995 at the largest shift.
    assert correlations(ours, images).min() > 0.99
    if "shifted" in name:
        assert correlations(project(volume, rotations(table), 1 - shift)[:, 1:, 1:], images).max() < 0.5
