"""Scores of images at rotations and at their in-plane flips, by two matrix products, and what all of them add up to.

With the real part of w CTF conj(ramp) Y times that of a slice, and imaginary part times imaginary part, summed,

    even = sum_k Re Re,   odd = sum_k Im Im,   bias = 1/2 sum_k w CTF² |T|²,

a rotation's score is even - bias + odd, its flip's even - bias - odd (see `search`).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from scalecryo.physics.kernels.cpu_posterior import add_shares_cpu, pair_evidence_cpu, pair_shares_cpu

# What all hypotheses that are left out of a sum may add up to at most, and share of the rotations up to which leaving
# out saves time. At -14 dB a hundredth of the hypotheses is left, and what is left out adds up to 5e-5.
NEGLIGIBLE, FEW = 1e-2, 0.25


class PairProducts(NamedTuple):
    """What the scores of images at rotations are made of.

    Attributes:
        even, odd: see the module; contiguous.
        bias: one row for all images without a CTF.
    """

    even: Float[Tensor, "b t h"]
    odd: Float[Tensor, "b t h"]
    bias: Float[Tensor, "c h"]


class PairShares(NamedTuple):
    """Posterior mass, but for a factor of each image.

    Attributes:
        sum, difference: of what a rotation and its flip have, at each shift.
        mass: of both, over all shifts.
        total: of each image: what all of these are to be divided by.
        log_evidence: see `search.Posterior`.
    """

    sum: Float[Tensor, "b t h"]
    difference: Float[Tensor, "b t h"]
    mass: Float[Tensor, "b h"]
    total: Float[Tensor, " b"]
    log_evidence: Float[Tensor, " b"]


def squared_modulus(values: Complex[Tensor, "..."]) -> Float[Tensor, "..."]:
    """|z|^2."""
    return values.real.square() + values.imag.square()


def weighted_images(
    observed: Complex[Tensor, "b p"], ctf: Float[Tensor, "b p"] | None, pixel_weight: Float[Tensor, " p"]
) -> tuple[Complex[Tensor, "b p"], Float[Tensor, "c p"]]:
    """w CTF Y, and w CTF^2 (one row for all images without a CTF)."""
    if ctf is None:
        return observed * pixel_weight, pixel_weight[None]
    weighted = ctf * pixel_weight
    return observed * weighted, weighted * ctf


def template_bank(templates: Complex[Tensor, "h p"]) -> Float[Tensor, "3 h p"]:
    """Of templates: real part, imaginary part, half of the squared modulus."""
    return torch.stack([templates.real, templates.imag, 0.5 * squared_modulus(templates)])


@contextmanager
def tensor_cores() -> Iterator[None]:
    """TF32 products on CUDA, several times faster; nothing changes on other devices.

    The ranking survives: scores err by 1.4 % at most of what parts the best hypothesis from the second, at 0 dB and at
    -10 dB (tools/bench/search.py). Rotations elsewhere are products too, so this must not be on for long.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def pair_products(
    moved: Complex[Tensor, "b t p"],
    energy: Float[Tensor, "c p"],
    bank: Float[Tensor, "3 h p"],
    work: Float[Tensor, " n"],
) -> PairProducts:
    """The products of images and templates.

    Args:
        moved: w CTF Y of each image at every shift, brought back to the centre.
        energy: w CTF² (one row for all images without a CTF).
        bank: see `template_bank`.
        work: memory for the result, 2 b t h: used again it stays in the cache, and fresh memory costs more than the
            arithmetic on it.
    """
    images, shifts, pixels = moved.shape
    real, imaginary, half_square = bank
    shape = (images, shifts, len(real))
    even, odd = work[: 2 * math.prod(shape)].view(2, *shape)
    for of_images, of_templates, product in ((moved.real, real, even), (moved.imag, imaginary, odd)):
        torch.mm(of_images.reshape(-1, pixels), of_templates.T, out=product.view(-1, len(real)))
    return PairProducts(even, odd, energy @ half_square.T)


def products_of_images(
    observed: Complex[Tensor, "b p"],
    ctf: Float[Tensor, "b p"] | None,
    pixel_weight: Float[Tensor, " p"],
    bank: Float[Tensor, "3 h p"],
    back: Complex[Tensor, "t p"],
    chunk_elements: int,
) -> Iterator[tuple[slice, PairProducts]]:
    """Some images at a time: which, and their products with all templates; these stand until the next are asked for.

    Args:
        observed, ctf, pixel_weight: see `search.grid_posterior`.
        bank: see `template_bank`.
        back: ramps that move an image back from each shift.
        chunk_elements: most scores that live at a time (but at least those of one image).
    """
    scores = 2 * bank.shape[1] * len(back)  # of an image
    each = max(1, min(len(observed), chunk_elements // scores))
    work = bank.new_empty(each * scores)
    for start in range(0, len(observed), each):
        rows = slice(start, start + each)
        weighted, energy = weighted_images(observed[rows], None if ctf is None else ctf[rows], pixel_weight)
        with tensor_cores():
            products = pair_products(weighted[:, None] * back, energy, bank, work)
        yield rows, products


def pair_scores(products: PairProducts, work: Float[Tensor, " n"]) -> Float[Tensor, "b 2 t h"]:
    """Log-likelihoods at the templates' rotations and at their flips, up to each image's constant.

    Args:
        products: of images and templates; `even` is overwritten.
        work: memory for the result, 2 b t h.
    """
    even, odd, bias = products
    images, shifts, rotations = even.shape
    even -= bias[:, None]
    scores = work[: 2 * even.numel()].view(images, 2, shifts, rotations)
    torch.add(even, odd, out=scores[:, 0])
    torch.sub(even, odd, out=scores[:, 1])
    return scores


def pair_evidence(products: PairProducts) -> Float[Tensor, " b"]:
    """Logarithm of the summed likelihoods of each image, up to its constant; the products may be overwritten."""
    return pair_evidence_cpu(*products) if _compiled(products.even) else pair_shares(products).log_evidence


def pair_shares(products: PairProducts) -> PairShares:
    """Posterior mass of each image over rotations, flips and shifts; the products are overwritten."""
    even, odd, bias = products
    if _compiled(even):
        return PairShares(even, odd, *pair_shares_cpu(even, odd, bias))
    even -= bias[:, None]
    top = (even + odd.abs()).flatten(1).amax(1)
    even -= top[:, None, None]
    here, flip = (torch.exp(even + odd), torch.exp(even - odd))
    both = here + flip
    mass = both.sum(1)
    total = mass.sum(1)
    return PairShares(both, here - flip, mass, total, top + total.log())


def add_images(shares: PairShares, images: Complex[Tensor, "b t p"], sums: Float[Tensor, "2 h p"]) -> None:
    """Add images to sums of rotations, real and imaginary parts, by their shares.

    The flip's image is the conjugate: its real part adds, its imaginary part subtracts. On the CPU hypotheses of next
    to no mass are left out.

    Args:
        shares: of the images.
        images: at every shift, divided by the shares' total.
        sums: are added to.
    """
    least = shares.total * NEGLIGIBLE / shares.sum[0].numel()
    if _compiled(sums) and float((shares.mass > least[:, None]).float().mean()) < FEW:
        add_shares_cpu(shares.sum, shares.difference, shares.mass, least, images, sums)
        return
    sums[0].addmm_(shares.sum.flatten(0, 1).T, images.real.flatten(0, 1))
    sums[1].addmm_(shares.difference.flatten(0, 1).T, images.imag.flatten(0, 1))


def _compiled(values: Tensor) -> bool:
    """Whether the CPU's kernels can take what is like these."""
    return values.device.type == "cpu" and values.dtype == torch.float32
