"""Coarse-to-fine search: candidate poses of each image, refined by halving the spacing at a rising resolution.

The score is the log-likelihood of `search.py`; here every image has its own templates.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from scalecryo.errors import InputError
from scalecryo.physics.fft import FourierPixels
from scalecryo.physics.image_formation import shift_ramp
from scalecryo.physics.poses import PoseCandidates
from scalecryo.physics.rotation import rotation_from_vector
from scalecryo.pose.search import check_packed, squared_modulus, weighted_images

SliceExtractor = Callable[[Tensor, FourierPixels], Tensor]
"""(rotation (m, 3, 3), pixels) -> slices of the reference (m, p), complex, without CTF and shift."""


@torch.no_grad()
def refine_candidates(
    candidates: PoseCandidates,
    observed: Complex[Tensor, "b p"],
    ctf: Float[Tensor, "b p"] | None,
    pixel_weight: Float[Tensor, "p"],
    extract: SliceExtractor,
    pixels: FourierPixels,
    *,
    radii: Sequence[float],
    rotation_step_deg: float,
    shift_step_px: float,
    beam: int,
    chunk_elements: int = 2**21,
) -> PoseCandidates:
    """Subdivide the poses around each candidate, level by level, at a rising resolution (as Punjani et al. 2017).

    A level replaces a pose by 8 rotations x 4 shifts, a quarter of the level's step to either side along each axis of
    so(3) and of the image; then the steps are halved. Each candidate has a beam of its own, the `beam` best poses that
    descend from it, so that no mode crowds out another.

    Args:
        candidates: modes of each image; those with log-weight -inf stay so.
        observed, ctf, pixel_weight, pixels: as for `grid_posterior`, reaching at least to the largest radius.
        extract: makes the slices, 8 k beam of them for an image and level.
        radii: Fourier radius of each level, in cycles per box.
        rotation_step_deg: a candidate can move by half of it along each axis. 1.4 to 1.6 times the grid's spacing: the
            nearest grid rotation is not always the likeliest, and cells are no cubes.
        shift_step_px: likewise for shifts; 0 leaves them as they are.
        beam: 1 finds a little less; 4 was within 1 % of 16 on noise-free images with two modes.
        chunk_elements: most Fourier pixels of slices alive at a time (in a few tensors).

    Returns:
        The best descendant of each candidate, in the order of the candidates; its log-weight is the log-likelihood at
        the last radius, up to the constant of each image.

    Raises:
        InputError: no radii, a radius beyond the pixels, a beam below 1, or packed lengths differ.
    """
    check_packed(pixels, observed=observed, ctf=ctf, pixel_weight=pixel_weight)
    if not radii or max(radii) > pixels.radius_limit:
        raise InputError(
            f"radii {list(radii)} must be levels within the pixels' radius {pixels.radius_limit:g}: lower them"
        )
    if beam < 1:
        raise InputError(f"a beam of {beam} poses is empty: ask for at least 1")
    images_each = max(1, chunk_elements // (8 * candidates.log_weight.shape[1] * beam * len(pixels)))
    done = []
    for start in range(0, len(observed), images_each):
        rows = slice(start, start + images_each)
        weighted, energy = weighted_images(observed[rows], None if ctf is None else ctf[rows], pixel_weight)
        rotation, shift = candidates.rotation[rows, :, None], candidates.shift_px[rows, :, None]
        for level, radius in enumerate(radii):
            part = pixels.prefix(radius)
            near = weighted[:, : len(part)], energy[:, : len(part)]
            turns, moves = _turns(rotation_step_deg / 2**level, rotation), _moves(shift_step_px / 2**level, shift)
            rotation, shift, score = _subdivide(rotation, shift, *near, extract, part, turns, moves, beam)
        done.append((rotation[:, :, 0], shift[:, :, 0], score[:, :, 0]))
    rotation, shift, score = (torch.cat(column) for column in zip(*done, strict=True))
    return PoseCandidates(rotation, shift, score.masked_fill(candidates.log_weight.isneginf(), -math.inf))


def _turns(step_deg: float, like: Tensor) -> Float[Tensor, "8 3 3"]:
    """A quarter of the step to either side along each axis of so(3)."""
    side = like.new_tensor([-0.25, 0.25]) * math.radians(step_deg)
    return rotation_from_vector(torch.cartesian_prod(side, side, side))


def _moves(step_px: float, like: Tensor) -> Float[Tensor, "s 2"]:
    """A quarter of the step to either side along x and y; no move without a step."""
    if step_px == 0:
        return like.new_zeros(1, 2)
    side = like.new_tensor([-0.25, 0.25]) * step_px
    return torch.cartesian_prod(side, side)


def _subdivide(
    rotation: Float[Tensor, "b k m 3 3"],
    shift_px: Float[Tensor, "b k m 2"],
    weighted: Complex[Tensor, "b p"],
    energy: Float[Tensor, "c p"],
    extract: SliceExtractor,
    pixels: FourierPixels,
    turns: Float[Tensor, "r 3 3"],
    moves: Float[Tensor, "s 2"],
    beam: int,
) -> tuple[Float[Tensor, "b k q 3 3"], Float[Tensor, "b k q 2"], Float[Tensor, "b k q"]]:
    """One level: the best children's rotation, shift and log-likelihood, of each candidate's beam of m poses."""
    images, candidates, poses = rotation.shape[:3]
    turned = rotation[:, :, :, None] @ turns
    slices = extract(turned.flatten(0, 3), pixels).view(images, -1, len(turns), len(pixels))
    back = shift_ramp(-shift_px.flatten(0, 2), pixels.kx, pixels.ky, pixels.box_size).view(images, -1, len(pixels))
    moved = (weighted[:, None] * back)[:, :, None] * shift_ramp(-moves, pixels.kx, pixels.ky, pixels.box_size)
    # As real vectors of twice the length, Re(conj(T) Y) is one matrix product.
    score = torch.view_as_real(slices).flatten(3) @ torch.view_as_real(moved).flatten(3).mT
    score -= 0.5 * (squared_modulus(slices) @ energy[:, None, :, None])

    score, child = score.view(images, candidates, -1).topk(min(beam, poses * len(turns) * len(moves)))
    parent, turn, move = child // (len(turns) * len(moves)), child // len(moves) % len(turns), child % len(moves)
    row = torch.arange(images, device=child.device)[:, None, None]
    column = torch.arange(candidates, device=child.device)[None, :, None]
    return turned[row, column, parent, turn], shift_px[row, column, parent] + moves[move], score
