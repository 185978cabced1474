"""The forward model of an image: central slice, CTF, shift."""

import math

import torch
from jaxtyping import Complex, Float
from torch import Tensor


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
