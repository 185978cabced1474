"""Local refinement and insertion in images/s, and slices against the closed form of Gaussian blobs.

    python -m tools.bench kernels [--rounds 5]

Rates are of one core where OMP_NUM_THREADS=1, in CPU time (see slice.py): local refinement at 32 Fourier pixels
in 4 passes, insertion at 64 Fourier pixels. Errors are those of trilinear slices of 300 blobs (sigma 1.5 px), relative
to the exact transform, in the shells 0.2 to 0.3 cycles a pixel.
"""

import argparse
import math

import torch
from torch import Tensor

from scalecryo.map.backprojection import Backprojection
from scalecryo.physics.fft import fourier_pixels, rfft3_centred
from scalecryo.physics.fourier_slice import extract_slices, gridding_correction, padded_box
from scalecryo.physics.image_formation import CtfWeightedImages
from scalecryo.physics.rotation import random_rotations
from scalecryo.pose.local_refinement import refine_poses
from tools.bench._shared import machine, quick


def refinement_rate(images: int, rounds: int) -> float:
    box, generator = 96, torch.Generator().manual_seed(0)
    pixels, scale = fourier_pixels(box, 32), 2.0
    volume = rfft3_centred(torch.rand(box, box, box, generator=generator), int(box * scale))
    rotation, shift = random_rotations(images, generator), torch.randn(images, 2, generator=generator)
    observed = torch.randn(images, len(pixels), dtype=torch.complex64, generator=generator)
    ctf = torch.rand(images, len(pixels), generator=generator)
    arguments = (volume, observed, rotation, shift, ctf, pixels.weight, pixels, scale)
    return 1e3 * images / quick({"refine": lambda: refine_poses(*arguments, passes=4)}, rounds)["refine"]


def insertion_rate(images: int, rounds: int) -> float:
    generator = torch.Generator().manual_seed(1)
    pixels, sums = fourier_pixels(130, 64), Backprojection(130)
    values = torch.randn(images, len(pixels), dtype=torch.complex64, generator=generator)
    given = CtfWeightedImages(values, values.real.square())
    pose = random_rotations(images, generator), torch.randn(images, 2, generator=generator), torch.ones(images)
    return 1e3 * images / quick({"insert": lambda: sums.insert(given, *pose, pixels)}, rounds)["insert"]


def slice_error(box: int, padding: float, extent: float, correct: bool, backend: str) -> float:
    """Relative error of slices of blobs that lie within `extent` box sizes of the centre."""
    generator, sigma = torch.Generator().manual_seed(1), 1.5
    direction = torch.nn.functional.normalize(torch.randn(300, 3, generator=generator), dim=1)
    centre = direction * extent * box * torch.rand(300, 1, generator=generator) ** (1 / 3)
    weight, axis = 0.5 + torch.rand(300, generator=generator), torch.arange(box) - box // 2
    lines = [torch.exp(-((axis - c[:, None]) ** 2) / (2 * sigma**2)) for c in centre.T]
    volume = torch.einsum("m,mz,my,mx->zyx", weight, *reversed(lines))
    pixels, rotation = fourier_pixels(box), random_rotations(8, generator)
    plane = centre @ rotation[:, :, :2]
    phase = -2 * math.pi / box * (plane[..., :1] * pixels.kx + plane[..., 1:] * pixels.ky)
    envelope = (2 * math.pi * sigma**2) ** 1.5 * torch.exp(-2 * (math.pi * sigma * pixels.radius / box) ** 2)
    exact = torch.complex(*(torch.einsum("m,bmp->bp", weight, part) for part in (phase.cos(), phase.sin()))) * envelope
    density = volume * gridding_correction(box, padding) if correct else volume
    d = padded_box(box, padding)
    found = extract_slices(rfft3_centred(density, d), rotation, pixels.kx, pixels.ky, d / box, backend=backend)
    shells = (pixels.radius >= 0.2 * box) & (pixels.radius <= 0.3 * box)
    difference: Tensor = (found - exact)[:, shells]
    return float(difference.norm() / exact[:, shells].norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(machine())
    print("| kernel | images/s |\n| --- | --- |")
    print(f"| local refinement, 32 Fourier pixels, 4 passes | {refinement_rate(200, rounds):.0f} |", flush=True)
    print(f"| insertion, 64 Fourier pixels, padding 2 | {insertion_rate(500, rounds):.0f} |", flush=True)
    print("| padding | within 0.2 N | 0.3 N | 0.42 N |\n| --- | --- | --- | --- |")
    for padding, correct in ((1, False), (1, True), (1.5, True), (2, False), (2, True)):
        errors = [slice_error(64, padding, extent, correct, "cpu") for extent in (0.2, 0.3, 0.42)]
        cells = " | ".join(f"{100 * error:.1f} %" for error in errors)
        print(f"| ×{padding:g} {'sinc²' if correct else 'none'} | {cells} |", flush=True)
