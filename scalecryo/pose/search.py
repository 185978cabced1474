"""Exhaustive search over poses: the posterior on a grid of rotations and shifts, given a map.

Images and templates are Fourier pixels packed by `FourierPixels`. With white noise in each shell the log-likelihood of
rotation R and shift t, up to the constant -1/2 sum_k w |Y|^2 of the image, is

    L(R, t) = sum_k w Re(conj(CTF ramp_t T_R) Y) - 1/2 sum_k w CTF^2 |T_R|^2,   w = Hermitian weight / noise variance

(Sigworth 1998; Scheres 2012), where T_R is the slice at R and the noise variance is the shell's mean |noise
coefficient|^2 in the units of Y. Give the origin weight 0: an image's mean carries no pose. Both sums are matrix
products.

The projection at R Rz(180°), its *in-plane flip*, is the complex conjugate of the one at R. The real and the imaginary
part
of a template each contribute to both: their sum is the score of R, their difference that of the flip, and the second
term is the same. So every template is scored as two rotations at the price of one; the first half of a grid is the
one that templates are made for, the second half their flips (`with_flips`).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from scalecryo.errors import InputError
from scalecryo.physics.fft import FourierPixels
from scalecryo.physics.fourier_slice import extract_slices
from scalecryo.physics.image_formation import shift_ramp
from scalecryo.physics.poses import PoseCandidates
from scalecryo.physics.rotation import random_rotations
from scalecryo.pose.pair_scores import (
    pair_evidence,
    pair_products,
    pair_scores,
    products_of_images,
    template_bank,
    tensor_cores,
    weighted_images,
)

# Rows of a matrix product below which a core no longer works at full speed.
_ROWS = 128
# Samples (slices x pixels) whose neighbours torch holds at a time.
_SAMPLES_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Posterior:
    """The best k hypotheses of each image, best first, and the sum over all hypotheses that were scored.

    The posterior mass of a hypothesis, under equal priors, is exp(log_likelihood - log_evidence).
    """

    rotation_index: Int[Tensor, "b k"]
    """Into the grid with flips, 2 h rotations."""
    shift_index: Int[Tensor, "b k"]
    """Into the shift grid."""
    log_likelihood: Float[Tensor, "b k"]
    """Up to the constant of each image."""
    log_evidence: Float[Tensor, " b"]
    """log of the summed likelihoods, up to the same constant: take off log(number of hypotheses) to compare grids."""

    def candidates(self, rotations: Float[Tensor, "g 3 3"], shift_grid: Float[Tensor, "t 2"]) -> PoseCandidates:
        """The hypotheses as poses, the shift grid in Å; their log-weight is the logarithm of the posterior mass."""
        mass = self.log_likelihood - self.log_evidence[:, None]
        return PoseCandidates(rotations[self.rotation_index], shift_grid[self.shift_index], mass)


def with_flips(rotations: Float[Tensor, "h 3 3"]) -> Float[Tensor, "2*h 3 3"]:
    """The rotations, followed by their flips R Rz(180°).

    `with_flips(so3_grid(2304))` covers SO(3) slightly better than `so3_grid(4608)`: the mean distance to the nearest
    grid rotation is 7.3° against 7.4°.
    """
    half_turn = rotations.new_tensor([-1.0, -1.0, 1.0])
    return torch.cat([rotations, rotations * half_turn])


def turned_grid(grid: Float[Tensor, "g 3 3"], generator: torch.Generator | None) -> Float[Tensor, "g 3 3"]:
    """The grid turned by one random rotation Q, as Q R: spacing and flips are kept, no direction is preferred."""
    return random_rotations(1, generator, grid.device, grid.dtype) @ grid


def shift_grid(radius_px: float, step_px: float) -> Float[Tensor, "t 2"]:
    """Shifts (x, y) in px on a square lattice within a disc, the nearest to the centre first.

    Raises:
        InputError: a negative radius, or a step that is not positive.
    """
    if radius_px < 0 or step_px <= 0:
        raise InputError(f"shift radius {radius_px:g} px, step {step_px:g} px: give a radius >= 0 and a step > 0")
    reach = math.floor(radius_px / step_px + 1e-6)
    line = torch.arange(-reach, reach + 1)
    lattice = torch.cartesian_prod(line, line)
    squared = lattice.square().sum(-1)
    inside = squared <= (radius_px / step_px + 1e-6) ** 2
    order = torch.argsort(squared[inside], stable=True)
    return lattice[inside][order].float() * step_px


@torch.no_grad()
def templates(
    volume_rfft: Complex[Tensor, "d d d//2+1"],
    rotations: Float[Tensor, "h 3 3"],
    pixels: FourierPixels,
    scale: float,
) -> Complex[Tensor, "h p"]:
    """Slices of a reference at the grid rotations (without their flips), or at any others.

    Arguments as `extract_slices`; made some slices at a time.
    """
    parts = torch.split(rotations, max(1, _SAMPLES_AT_ONCE // len(pixels)))
    return torch.cat([extract_slices(volume_rfft, part, pixels.kx, pixels.ky, scale) for part in parts])


@torch.no_grad()
def grid_posterior(
    observed: Complex[Tensor, "b p"],
    ctf: Float[Tensor, "b p"] | None,
    pixel_weight: Float[Tensor, " p"],
    templates: Complex[Tensor, "h p"],
    shift_grid_px: Float[Tensor, "t 2"],
    pixels: FourierPixels,
    *,
    keep: int,
    shift_log_prior: Float[Tensor, " t"] | None = None,
    chunk_elements: int = 2**20,
) -> Posterior:
    """Score every image at 2 h rotations (each template's and its flip's) times t shifts; keep the best few.

    Nothing of size b·t·h is ever stored: scores are made, ranked and summed a chunk at a time. Results do not depend on
    the chunk size but for rounding.

    Args:
        observed: transforms of the images, packed.
        ctf: of each image, exact (no grouping by defocus); None for none.
        pixel_weight: Hermitian weight / noise variance, 0 at the origin.
        templates: slices of the reference at the first half of the grid.
        shift_grid_px: hypotheses of where the content sits from the centre, (x, y).
        pixels: that all of the above are packed by.
        keep: hypotheses kept for each image.
        shift_log_prior: logarithm of each shift's prior probability, up to a constant; None: all are equally likely.
        chunk_elements: most elements in a tensor of scores (but at least 2 t); about three of that size live at a time.

    Raises:
        InputError: keep is not within 1..2 h t, chunk_elements < 1, or packed lengths differ.
    """
    check_packed(pixels, observed=observed, ctf=ctf, pixel_weight=pixel_weight, templates=templates)
    half, shifts = len(templates), len(shift_grid_px)
    if not 1 <= keep <= 2 * half * shifts:
        raise InputError(f"cannot keep {keep} of {2 * half * shifts} hypotheses: give a number from 1 to that")
    images_each, rotations_each = _chunks(len(observed), shifts, half, len(pixels), chunk_elements)
    # Memory that is used again stays in the cache; fresh memory costs more than the arithmetic on it.
    work = torch.empty((2, 2 * images_each * shifts * rotations_each), dtype=pixel_weight.dtype, device=observed.device)
    # The conjugate of the ramp: images are moved back instead of templates forth.
    back = shift_ramp(-shift_grid_px, pixels.kx, pixels.ky, pixels.box_size)
    bank = template_bank(templates)
    parts = []
    for start in range(0, len(observed), images_each):
        rows = slice(start, start + images_each)
        weighted, energy = weighted_images(observed[rows], None if ctf is None else ctf[rows], pixel_weight)
        moved = weighted[:, None] * back
        best = _Best(len(weighted), keep, work)
        for first in range(0, half, rotations_each):
            with tensor_cores():
                products = pair_products(moved, energy, bank[:, first : first + rotations_each], work[1])
            scores = pair_scores(products, work[0])
            if shift_log_prior is not None:
                scores += shift_log_prior[:, None]
            best.add(scores, work[1], first, half)
        parts.append((best.index, best.value, best.evidence))
    index, value, evidence = (torch.cat(part) for part in zip(*parts, strict=True))
    return Posterior(index % (2 * half), index // (2 * half), value, evidence)


@torch.no_grad()
def grid_evidence(
    observed: Complex[Tensor, "b p"],
    ctf: Float[Tensor, "b p"] | None,
    pixel_weight: Float[Tensor, " p"],
    templates: Complex[Tensor, "h p"],
    shift_grid_px: Float[Tensor, "t 2"],
    pixels: FourierPixels,
    *,
    chunk_elements: int = 2**21,
) -> Float[Tensor, " b"]:
    """The log-evidence of `grid_posterior` alone, in less time; arguments as there.

    Raises:
        InputError: packed lengths differ, or an array is empty.
    """
    check_packed(pixels, observed=observed, ctf=ctf, pixel_weight=pixel_weight, templates=templates)
    back = shift_ramp(-shift_grid_px, pixels.kx, pixels.ky, pixels.box_size)
    chunks = products_of_images(observed, ctf, pixel_weight, template_bank(templates), back, chunk_elements)
    return torch.cat([pair_evidence(products) for _, products in chunks])


def check_packed(pixels: FourierPixels, **named: Tensor | None) -> None:
    """Refuse arrays that are not packed by `pixels`, and empty ones.

    Raises:
        InputError: names the array.
    """
    for name, values in named.items():
        if values is None:
            continue
        if values.shape[-1] != len(pixels):
            raise InputError(
                f"{name} holds {values.shape[-1]} Fourier pixels where {len(pixels)} are due: pack to one radius"
            )
        if len(values) == 0:
            raise InputError(f"{name} is empty: give at least one row")


def _chunks(images: int, shifts: int, half: int, pixels: int, chunk_elements: int) -> tuple[int, int]:
    """Images and templates a chunk: enough rows for the matrix product, then templates, then more images."""
    if chunk_elements < 1:
        raise InputError(f"chunk_elements {chunk_elements} is less than one score: raise it")
    pairs = chunk_elements // 2
    rotations = max(1, min(half, pairs // min(images * shifts, max(shifts, _ROWS))))
    rotations = math.ceil(half / math.ceil(half / rotations))
    # The moved images, 2 * pixels each, are kept within the limit too.
    return max(1, min(images, pairs // (shifts * max(rotations, pixels)))), rotations


class _Best:
    """The best hypotheses of a few images so far, and the evidence summed so far."""

    def __init__(self, images: int, keep: int, like: Tensor) -> None:
        self.keep = keep
        self.value = like.new_empty((images, 0))
        self.index = like.new_empty((images, 0), dtype=torch.long)
        self.evidence = like.new_full((images,), -math.inf)

    def add(self, scores: Float[Tensor, "b 2 t w"], scratch: Float[Tensor, " n"], first: int, half: int) -> None:
        """Take in the scores of templates `first`, first + 1, ... of `half`, and of their flips, at all shifts."""
        _, _, shifts, width = scores.shape
        flat = scores.flatten(1)
        value, at = largest(flat, min(self.keep, flat.shape[1]))
        self.evidence = torch.logaddexp(self.evidence, _log_sum_exp(flat, value[:, :1], scratch))
        rotation = first + at % width + at // (shifts * width) * half
        index = at // width % shifts * (2 * half) + rotation
        value, index = torch.cat([self.value, value], 1), torch.cat([self.index, index], 1)
        self.value, order = value.topk(min(self.keep, value.shape[1]))
        self.index = index.gather(1, order)


def _log_sum_exp(
    values: Float[Tensor, "b n"], top: Float[Tensor, "b 1"], scratch: Float[Tensor, " m"]
) -> Float[Tensor, " b"]:
    """logsumexp along rows whose maxima are known: 2 to 20 times faster than torch's on a CPU."""
    terms = torch.sub(values, top, out=scratch[: values.numel()].view(values.shape))
    # exp2 is several times faster than exp; results that underflow would be slower still, and add nothing.
    terms.mul_(1 / math.log(2)).clamp_(min=-100).exp2_()
    return top[:, 0] + terms.sum(1).log()


def largest(values: Float[Tensor, "b n"], count: int) -> tuple[Float[Tensor, "b count"], Int[Tensor, "b count"]]:
    """`topk` along rows, largest first, several times faster for long rows on a CPU.

    Rows are split into interleaved groups; only the `count` groups with the largest maxima can hold the `count` largest
    values.
    """
    length = values.shape[1]
    size = 2 ** round(math.log2(math.sqrt(length / count)))
    groups = length // size
    if size < 4 or groups < count:
        found = values.topk(count)
        return found.values, found.indices
    chosen = values[:, : groups * size].view(-1, size, groups).amax(1).topk(count, sorted=False).indices
    lines = torch.arange(0, groups * size, groups, device=values.device)
    rest = torch.arange(groups * size, length, device=values.device).expand(len(values), -1)
    where = torch.cat([(chosen[:, :, None] + lines).flatten(1), rest], 1)
    found = values.gather(1, where).topk(count)
    return found.values, where.gather(1, found.indices)
