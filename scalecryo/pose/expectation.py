"""The E-step of a search in full: every image in every pose of a grid, weighted by its posterior.

Where an image says little of its pose (low signal to noise), its posterior spreads over hundreds of hypotheses, and the
best few of them would be fitted to its noise. All of them at once are sums of images for each rotation: two more matrix
products (as RELION and cryoSPARC sum; Scheres 2012, equation 5).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from scalecryo.physics.fft import FourierPixels
from scalecryo.physics.image_formation import CtfWeightedImages, shift_ramp
from scalecryo.pose.pair_scores import (
    add_images,
    pair_shares,
    products_of_images,
    squared_modulus,
    template_bank,
)
from scalecryo.pose.search import check_packed


@dataclass(frozen=True, eq=False)
class Expectation:
    """Sums over a batch's images.

    Attributes:
        slices: sum over images and shifts of posterior mass times CTF times the image brought back to the centre, at
            each rotation, and of posterior mass times CTF².
        log_evidence: of each image, up to the image's constant: see `Posterior`.
        residual: expected power of the residuals of all images, by Fourier pixel.
        mass: posterior mass of each image at each rotation and its flip together.
    """

    slices: CtfWeightedImages
    log_evidence: Float[Tensor, " b"]
    residual: Float[Tensor, " p"]
    mass: Float[Tensor, "b h"]


@torch.no_grad()
def expected_slices(
    observed: Complex[Tensor, "b p"],
    ctf: Float[Tensor, "b p"] | None,
    pixel_weight: Float[Tensor, " p"],
    templates: Complex[Tensor, "h p"],
    shift_grid_px: Float[Tensor, "t 2"],
    pixels: FourierPixels,
    *,
    image_weight: Float[Tensor, " b"] | None = None,
    chunk_elements: int = 2**21,
) -> Expectation:
    """Posterior-weighted sums of all images at h rotations; what belongs to a flip goes, conjugate, to its rotation.

    Args:
        observed, ctf, pixel_weight, templates, shift_grid_px, pixels: as in `grid_posterior`.
        image_weight: how much each image counts in all sums; None: 1. Its evidence stays.
        chunk_elements: most scores that live at a time (but at least those of one image).

    Raises:
        InputError: packed lengths differ, or an array is empty.
    """
    check_packed(pixels, observed=observed, ctf=ctf, pixel_weight=pixel_weight, templates=templates)
    half = len(templates)
    back = shift_ramp(-shift_grid_px, pixels.kx, pixels.ky, pixels.box_size)
    bank = template_bank(templates)
    sums = bank.new_zeros(2, half, len(pixels))
    weight, mass, evidence = bank.new_zeros(half, len(pixels)), bank.new_zeros(half), []
    masses = []
    for rows, products in products_of_images(observed, ctf, pixel_weight, bank, back, chunk_elements):
        some, own = observed[rows], None if ctf is None else ctf[rows]
        share = pair_shares(products)
        evidence.append(share.log_evidence)
        counts = share.total.reciprocal() if image_weight is None else image_weight[rows] / share.total
        centred = (counts[:, None] * (some if own is None else some * own))[:, None] * back
        add_images(share, centred, sums)
        by_rotation = share.mass * counts[:, None]
        masses.append(by_rotation)
        mass += by_rotation.sum(0)
        if own is not None:
            weight.addmm_(by_rotation.T, own.square())
    if ctf is None:
        weight += mass[:, None]
    values = torch.complex(sums[0], sums[1])
    whole = squared_modulus(observed)
    whole = whole.sum(0) if image_weight is None else image_weight @ whole
    residual = whole - 2 * (templates.conj() * values).real.sum(0) + (weight * 2 * bank[2]).sum(0)
    return Expectation(CtfWeightedImages(values, weight), torch.cat(evidence), residual, torch.cat(masses))
