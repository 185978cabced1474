"""Copies of an image that are projections too: turned in the plane, and mirrored (projection's O(2) symmetry).

A copy turned by a holds x'(r) = x(Rz(a) r); a mirrored one x'(r) = x(Rz(a) diag(1, -1) r). With B the rotation from
the image's frame to the copy's, Rz(-a) or diag(1, -1, -1) Rz(-a), a pose (R', t') of the copy is the pose
(R' B, Bᵀ t') of the image. cryoAI's symmetric loss (Levy et al. 2022) is two copies, half a turn apart.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

MIRRORED_FROM = 8  # so many copies and more: half of them mirrored


def turns_of(copies: int) -> tuple[int, bool]:
    """How many turns so many copies are made of, and whether each comes mirrored as well."""
    return (copies // 2, True) if copies >= MIRRORED_FROM else (copies, False)


def frames(copies: int) -> Float[Tensor, "copies 3 3"]:
    """B of each copy: all turns, then all mirrored ones."""
    turns, mirrored = turns_of(copies)
    angle = -2 * math.pi * torch.arange(turns, dtype=torch.float64) / turns
    turned = torch.zeros(turns, 3, 3, dtype=torch.float64)
    turned[:, 0, 0], turned[:, 0, 1] = angle.cos(), -angle.sin()
    turned[:, 1, 0], turned[:, 1, 1] = angle.sin(), angle.cos()
    turned[:, 2, 2] = 1.0
    both = [turned, turned.new_tensor([1.0, -1.0, -1.0])[:, None] * turned] if mirrored else [turned]
    return torch.cat(both).float()


def image_copies(images: Float[Tensor, "b n n"], copies: int) -> Float[Tensor, "b copies n n"]:
    """The copies of real images with an even box, in the order of `frames`; 1, 2, 4 or 8 of them."""
    turns, mirrored = turns_of(copies)
    made = [images]
    for _ in range(turns - 1):
        quarter = _reversed(made[-1], -1).mT
        made.append(quarter if turns == 4 else _reversed(quarter, -1).mT)
    if mirrored:
        made += [_reversed(image, -2) for image in made]
    return torch.stack(made, 1)


def _reversed(images: Tensor, dim: int) -> Tensor:
    """Mirrored about the centre N//2: index i goes to -i modulo N."""
    return images.flip(dim).roll(1, dim)
