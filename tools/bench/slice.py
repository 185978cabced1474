"""Slicing forward and backward: the operator's backends beside torch-fourier-slice and grid_sample, in one process.

    python -m tools.bench slice [--boxes 64 128 256] [--batch 32] [--rounds 7]

Contenders take turns; each time is the 20th percentile of the rounds after a warm-up, with one thread of the process's
own CPU time: other work on the machine changes both little. Slices at padding 1 with radius N/2 - 1, with gradients by
the volume and by the rotation; ours once more with CTF and shift fused. Then the padded transform beside the plain
chain (pad, shift, rfftn under autograd).
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from scalecryo.physics.fft import fourier_pixels, rfft3_centred
from scalecryo.physics.fourier_slice import fourier_slice
from scalecryo.physics.rotation import random_rotations
from tools.bench._shared import machine, quick


def grid_sampled(volume: Tensor, rotation: Tensor, kx: Tensor, ky: Tensor) -> Tensor:
    """grid_sample's way: a centred half volume of two channels, one column of samples."""
    d = volume.shape[0]
    channels = torch.view_as_real(torch.fft.fftshift(volume, dim=(0, 1))).permute(3, 0, 1, 2)[None]
    x, y, z = (rotation[:, i, :1] * kx + rotation[:, i, 1:2] * ky for i in range(3))
    sign = torch.where(x < 0, -1.0, 1.0)
    at = torch.stack([x * sign * (4 / d) - 1, (y * sign + d // 2) * (2 / (d - 1)) - 1,
                      (z * sign + d // 2) * (2 / (d - 1)) - 1], dim=-1)  # fmt: skip
    values = torch.nn.functional.grid_sample(channels, at[None, None], align_corners=True)[0, :, 0]
    return torch.complex(values[0], values[1] * sign)


def slicing(box: int, batch: int) -> dict[str, Callable[[], object]]:
    """Forward and backward of each contender."""
    generator = torch.Generator().manual_seed(0)
    transform = torch.fft.rfftn(torch.randn(box, box, box, generator=generator)).requires_grad_()
    rotation, pixels = random_rotations(batch, generator).requires_grad_(), fourier_pixels(box)
    shift = torch.randn(batch, 2, generator=generator).requires_grad_()
    ctf = torch.randn(batch, len(pixels), generator=generator)
    weight = torch.randn(batch, len(pixels), dtype=torch.complex64, generator=generator)
    whole = pixels.unpack(weight)

    def both(images: Tensor, leaves: tuple[Tensor, ...], arriving: Tensor) -> object:
        return torch.autograd.grad(images, leaves, arriving)

    def ours(backend: str) -> object:
        images = fourier_slice(transform, rotation, None, None, pixels.kx, pixels.ky, 1.0, box, backend=backend)
        return both(images, (transform, rotation), weight)

    def fused() -> object:
        images = fourier_slice(transform, rotation, shift, ctf, pixels.kx, pixels.ky, 1.0, box)
        return both(images, (transform, rotation, shift), weight)

    def fourier_slice_package() -> object:
        # Of this contender alone: others import this module where it is not installed.
        from torch_fourier_slice import extract_central_slices_rfft_3d

        centred = torch.fft.fftshift(transform, dim=(0, 1))
        slices = extract_central_slices_rfft_3d(centred, rotation, rot_tolerance=None)
        return both(torch.fft.ifftshift(slices, dim=-2), (transform, rotation), whole)

    def sampled() -> object:
        return both(grid_sampled(transform, rotation, pixels.kx, pixels.ky), (transform, rotation), weight)

    return {"ours": lambda: ours("cpu"), "ours with CTF and shift": fused, "torch-fourier-slice": fourier_slice_package,
            "grid_sample": sampled, "reference": lambda: ours("reference")}  # fmt: skip


def transforms(box: int, padding: int) -> dict[str, Callable[[], object]]:
    """Padded transform and its gradient."""
    generator, d = torch.Generator().manual_seed(1), padding * box
    volume = torch.randn(box, box, box, generator=generator).requires_grad_()
    arriving = torch.randn(d, d, d // 2 + 1, dtype=torch.complex64, generator=generator)
    gap = (d - box) // 2

    def plain() -> object:
        padded = torch.nn.functional.pad(volume, [gap] * 6)
        return torch.autograd.grad(torch.fft.rfftn(torch.fft.ifftshift(padded)), volume, arriving)

    return {"ours": lambda: torch.autograd.grad(rfft3_centred(volume, d), volume, arriving), "plain": plain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boxes", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    print(f"{machine()}, B = {arguments.batch}")
    print("| forward + backward | ms | ours is faster by |\n| --- | --- | --- |")
    for box in arguments.boxes:
        found = quick(slicing(box, arguments.batch), arguments.rounds)
        for name, value in found.items():
            print(f"| slice N={box}, {name} | {value:.2f} | {value / found['ours']:.2f} |", flush=True)
    for box, padding in ((64, 2), (128, 1), (128, 2)):
        found = quick(transforms(box, padding), arguments.rounds)
        for name, value in found.items():
            print(f"| FFT N={box} ×{padding}, {name} | {value:.1f} | {value / found['ours']:.2f} |", flush=True)
