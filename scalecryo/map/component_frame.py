"""The frame of the latent space: which directions, in which order, and how far each half confirms them.

A linear model with z ~ N(0, 1) stays the same when W and z turn together. So both halves are turned to the frame in
which their components resemble each other most, ordered by how much of the variance each explains.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.physics.fsc import fsc

LEAST_FSC, MOST_FSC = 0.02, 0.999
SMOOTHED = 3  # shells
FIRST_FSC = 0.75  # taken for granted before the halves were compared


@dataclass(frozen=True, eq=False)
class Frame:
    """Components of both halves in one frame.

    Attributes:
        components: of half h (1 or 2) at index h − 1, each times the standard deviation of its coordinate.
        fsc: of each component between the halves.
        agreement: correlation of each component between the halves, over all shells.
        variance: of each component: the square of its norm, of both halves' mean.
    """

    components: Float[Tensor, "2 q n n n"]
    fsc: Float[Tensor, "q shells"]
    agreement: Float[Tensor, " q"]
    variance: Float[Tensor, " q"]

    @property
    def mean(self) -> Float[Tensor, "q n n n"]:
        """Of both halves."""
        return self.components.mean(0)


def scaled(components: Float[Tensor, "q n n n"], moment: Float[Tensor, "q q"]) -> Float[Tensor, "q n n n"]:
    """Components for coordinates of unit variance, from those whose coordinates have the second moment `moment`."""
    factor, _ = torch.linalg.cholesky_ex(moment.double() + 1e-9 * torch.eye(len(moment), device=moment.device))
    return torch.einsum("kl,kzyx->lzyx", factor.to(components), components)


def without_mean(
    components: Float[Tensor, "q n n n"], mean: Float[Tensor, "n n n"], mask: Float[Tensor, "n n n"]
) -> Float[Tensor, "q n n n"]:
    """What of the components is orthogonal to the mean: along it the contrast of an image varies."""
    seen = mean * mask
    share = torch.einsum("kzyx,zyx->k", components, seen) / seen.square().sum().clamp_min(1e-30)
    return components - share[:, None, None, None] * seen


def common_frame(components: Float[Tensor, "2 q n n n"]) -> Frame:
    """Turn both halves' components onto each other, and along the principal axes of their mean."""
    first, second = components.double().flatten(2)
    left, _, right = torch.linalg.svd(first @ second.T)
    paired = torch.stack([left.T @ first, right @ second])
    mean = paired.mean(0)
    variance, turn = torch.linalg.eigh(mean @ mean.T)
    order = variance.argsort(descending=True)
    made = torch.einsum("kl,hkv->hlv", turn[:, order], paired)
    norms = made.norm(dim=2).clamp_min(1e-30)
    agreement = (made[0] * made[1]).sum(1) / (norms[0] * norms[1])
    found = made.to(components.dtype).unflatten(2, components.shape[2:])
    curves = torch.stack([fsc(*pair) for pair in found.transpose(0, 1)])
    return Frame(found, curves.float(), agreement.float(), variance[order].clamp_min(0).float())


def ridge_of(
    curves: Float[Tensor, "q shells"] | None, mean_weight: Float[Tensor, "q weighed"]
) -> Float[Tensor, "q weighed"]:
    """Inverse prior variance by shell: what shrinks each shell of a component by the correlation of its halves.

    With the noise variance 1 / M of a coefficient and the prior variance τ, FSC = τ / (τ + 1 / M).

    Args:
        curves: of the frame that the halves were in; None: they were not compared yet.
        mean_weight: of M's diagonal, of a half. Coordinates have unit variance: much the same for all components.
    """
    weight = mean_weight.mean(0, keepdim=True).expand_as(mean_weight)
    if curves is None:
        return weight * (1 - FIRST_FSC) / FIRST_FSC
    kernel = torch.ones(1, 1, SMOOTHED, device=curves.device) / SMOOTHED
    padded = torch.nn.functional.pad(curves[:, None], (SMOOTHED // 2,) * 2, mode="replicate")
    known = torch.nn.functional.conv1d(padded, kernel)[:, 0].clamp(LEAST_FSC, MOST_FSC)
    shells = torch.arange(mean_weight.shape[-1], device=curves.device).clamp_max(known.shape[1] - 1)
    return weight * ((1 - known) / known)[:, shells]
