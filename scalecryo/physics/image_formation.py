"""The forward model of an image: central slice, CTF, shift."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from scalecryo.physics.ctf import CtfParameters, contrast_transfer, ctf_power_in_box
from scalecryo.physics.fft import FourierPixels, rfft2_centred

_AT_ONCE = 16  # images on the padded box: few enough to stay in a processor's cache


class CtfWeightedImages(NamedTuple):
    """CTF-weighted images: what a reconstruction sums up.

    Attributes:
        values: transforms times CTF, packed.
        power: what CTF² amounts to, packed alike; None: 1 everywhere.
    """

    values: Complex[Tensor, "b p"]
    power: Float[Tensor, "b p"] | None

    def select(self, keep: Tensor) -> "CtfWeightedImages":
        """Some of the images, by mask or index."""
        return CtfWeightedImages(self.values[keep], None if self.power is None else self.power[keep])


def shift_ramp(
    shift_px: Float[Tensor, "b 2"], kx: Float[Tensor, " p"], ky: Float[Tensor, " p"], box_size: int
) -> Complex[Tensor, "b p"]:
    """exp(-2 pi i k.t / N): multiplying a transform by it moves the content by +t = (x, y) px.

    kx and ky are in cycles per box of `box_size` px. RELION's rlnOrigin is -t.
    """
    phase = (shift_px[:, :1] * kx + shift_px[:, 1:] * ky) * (-2 * math.pi / box_size)
    return torch.polar(torch.ones_like(phase), phase)


def form_images(
    slices: Complex[Tensor, "b p"],
    ctf: Float[Tensor, "b p"] | None,
    shift_px: Float[Tensor, "b 2"] | None,
    kx: Float[Tensor, " p"],
    ky: Float[Tensor, " p"],
    box_size: int,
) -> Complex[Tensor, "b p"]:
    """Transforms of the images that the microscope would give: slice, times CTF, content moved by +shift_px (x, y).

    None means no CTF, or a centred particle. Frequencies in cycles per box of `box_size` px.
    """
    images = slices if ctf is None else slices * ctf
    return images if shift_px is None else images * shift_ramp(shift_px, kx, ky, box_size)


def ctf_weighted(transforms: Complex[Tensor, "b p"], ctf: Float[Tensor, "b p"] | None) -> CtfWeightedImages:
    """Images times their CTF, pixel by pixel: right where the CTF turns slowly from one Fourier pixel to the next."""
    return CtfWeightedImages(transforms, None) if ctf is None else CtfWeightedImages(transforms * ctf, ctf.square())


def ctf_weighted_on_padded_box(
    images: Float[Tensor, "b n n"], optics: CtfParameters, pixel_size: float, pixels: FourierPixels
) -> CtfWeightedImages:
    """Images times their CTF as the adjoint of what the microscope and the cutting out did.

    The CTF moves signal outwards (by lambda D s: 150 Å at 1.2 µm and 1.6 Å), partly out of the box. On a box padded to
    twice the size it does not wrap around on its way back.

    Args:
        images: real space, centred at index n//2.
        optics: of each.
        pixel_size: Å.
        pixels: Fourier pixels of the n px box that are packed.
    """
    box_size = images.shape[-1]
    box = 2 * box_size
    kx, ky = (k.flatten() for k in _half_plane(box, images.device))
    parts = []
    for start in range(0, len(images), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        ctf = contrast_transfer(optics.select(some), kx, ky, box, pixel_size).unflatten(-1, (box, -1))
        # The CTF is real and even, so it filters wherever the image lies: here in a corner of the padded box. Rows and
        # columns that are padding, or cropped, are not transformed.
        wide = torch.fft.fft(torch.fft.rfft(images[some], n=box, dim=-1), n=box, dim=-2).mul_(ctf)
        rows = torch.fft.ifft(wide, dim=-2)[:, :box_size]
        back = torch.fft.irfft(rows, n=box, dim=-1)[:, :, :box_size]
        parts.append(pixels.pack(rfft2_centred(back)))
    return CtfWeightedImages(torch.cat(parts), ctf_power_in_box(optics, pixels.kx, pixels.ky, box_size, pixel_size))


def _half_plane(box: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """kx and ky of the half-complex transform of a box, each (box, box//2 + 1)."""
    kx = torch.arange(box // 2 + 1.0, device=device)
    ky = torch.fft.fftfreq(box, 1 / box, device=device)
    return kx.expand(box, -1), ky[:, None].expand(-1, len(kx))
