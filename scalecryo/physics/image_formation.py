"""The forward model of an image: central slice, CTF, shift."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from scalecryo.physics.ctf import CtfParameters, contrast_transfer, ctf_power_in_box
from scalecryo.physics.fft import FourierPixels, irfft2_centred, rfft2_centred


class Filtered(NamedTuple):
    """Images as a reconstruction sums them up.

    Attributes:
        values: transforms times CTF, packed.
        power: what CTF² amounts to, packed alike; None: 1 everywhere.
    """

    values: Complex[Tensor, "b p"]
    power: Float[Tensor, "b p"] | None

    def select(self, keep: Tensor) -> "Filtered":
        """Some of the images, by mask or index."""
        return Filtered(self.values[keep], None if self.power is None else self.power[keep])


def shift_ramp(
    shift_px: Float[Tensor, "b 2"], kx: Float[Tensor, "p"], ky: Float[Tensor, "p"], box_size: int
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
    kx: Float[Tensor, "p"],
    ky: Float[Tensor, "p"],
    box_size: int,
) -> Complex[Tensor, "b p"]:
    """Transforms of the images that the microscope would give: slice, times CTF, content moved by +shift_px (x, y).

    None means no CTF, or a centred particle. Frequencies in cycles per box of `box_size` px.
    """
    images = slices if ctf is None else slices * ctf
    return images if shift_px is None else images * shift_ramp(shift_px, kx, ky, box_size)


def filtered(transforms: Complex[Tensor, "b p"], ctf: Float[Tensor, "b p"] | None) -> Filtered:
    """Images times their CTF, pixel by pixel: right where the CTF turns slowly from one Fourier pixel to the next."""
    return Filtered(transforms, None) if ctf is None else Filtered(transforms * ctf, ctf.square())


def filtered_on_padded_box(
    images: Float[Tensor, "b n n"], optics: CtfParameters, pixel_size: float, pixels: FourierPixels
) -> Filtered:
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
    box, edge = 2 * box_size, box_size // 2
    ky, kx = torch.meshgrid(
        torch.fft.fftfreq(box, 1 / box, device=images.device),
        torch.arange(box // 2 + 1.0, device=images.device),
        indexing="ij",
    )
    ctf = contrast_transfer(optics, kx.flatten(), ky.flatten(), box, pixel_size).view(-1, *kx.shape)
    wide = irfft2_centred(rfft2_centred(torch.nn.functional.pad(images, (edge,) * 4)) * ctf, box)
    inner = slice(edge, edge + box_size)
    values = pixels.pack(rfft2_centred(wide[:, inner, inner]))
    return Filtered(values, ctf_power_in_box(optics, pixels.kx, pixels.ky, box_size, pixel_size))
