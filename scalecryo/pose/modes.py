"""From many scored poses to a few: separate modes of the posterior, and soft labels that teach a classifier."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from scalecryo.errors import InputError
from scalecryo.physics.poses import PoseCandidates
from scalecryo.physics.symmetry import PointGroup
from scalecryo.pose.search import largest


@torch.no_grad()
def separated_modes(
    candidates: PoseCandidates, count: int, min_angle_deg: float, group: PointGroup | None = None
) -> PoseCandidates:
    """The best `count` candidates of each image that are at least `min_angle_deg` apart, with the mass around each.

    Greedy: the likeliest candidate left is a mode and absorbs all candidates left within the angle, whatever their
    shifts. A mode's weight is the mass of what it absorbed; the weights of an image's modes sum to 1, and candidates
    near no mode are forgotten. Modes come in order of their peaks, which need not be that of their weights.

    Args:
        candidates: as many as the search kept, with log-likelihoods (up to a constant of the image) as log-weights. Let
            them cover the posterior: what was not kept weighs nothing. At least one of each image must be finite.
        count: modes wanted. Images with fewer are filled up with copies of their best one at log-weight -inf.
        min_angle_deg: below it two candidates are one mode; 1.5 to 2 times the grid's spacing.
        group: whose related poses g R are one; None: C1.

    Raises:
        InputError: count < 1, or an angle outside 0..180.
    """
    if count < 1:
        raise InputError(f"{count} modes asked for: ask for at least 1")
    threshold = _trace_of_angle(min_angle_deg)
    flat, left = candidates.rotation.flatten(2), candidates.log_weight
    row = torch.arange(len(left), device=left.device)
    picks, masses = [], []
    for _ in range(count):
        pick = left.argmax(1)
        if group is None:
            absorbed: Bool[Tensor, "b k"] = (flat @ flat[row, pick, :, None])[:, :, 0] >= threshold
        else:
            copies = (group.rotations @ candidates.rotation[row, pick][:, None]).flatten(2)
            absorbed = (flat @ copies.mT).amax(2) >= threshold
        # Rounding must not let a mode miss itself.
        absorbed[row, pick] = True
        masses.append(left.masked_fill(~absorbed, -math.inf).logsumexp(1))
        picks.append(pick)
        left = left.masked_fill(absorbed, -math.inf)
    mass, index = torch.stack(masses, 1), torch.stack(picks, 1)
    index = torch.where(mass.isneginf(), index[:, :1], index)
    weight = mass - mass.logsumexp(1, keepdim=True)
    return PoseCandidates(candidates.rotation[row[:, None], index], candidates.shift[row[:, None], index], weight)


@torch.no_grad()
def soft_labels(
    candidates: PoseCandidates, grid: Float[Tensor, "g 3 3"], *, width_deg: float, nearest: int
) -> tuple[Int[Tensor, "b m"], Float[Tensor, "b m"]]:
    """Target distribution over a fixed grid of rotations: each candidate's weight, spread over its nearest grid points.

    The kernel is von Mises-Fisher's on SO(3) (matrix Fisher with a scalar concentration), exp((cos(angle) - 1) /
    width^2), cut off after the `nearest` points and scaled to sum to 1.

    Args:
        candidates: with log-weights up to a constant of each image; -inf weighs nothing.
        grid: classes.
        width_deg: standard deviation of the kernel about each axis, where it is small.
        nearest: grid points for each candidate.

    Returns:
        Class indices and their weights, m = k * nearest for each image; weights sum to 1. An index may occur for
        several candidates: add up its weights, as `torch.zeros(b, g).scatter_add_(1, index, weight)` does. The
        cross-entropy of log-probabilities q is -(weight * q.gather(1, index)).sum(1) as it is.

    Raises:
        InputError: a width that is not positive, or `nearest` outside 1..g.
    """
    if width_deg <= 0:
        raise InputError(f"label width {width_deg:g} degrees is not positive: give about the grid's spacing")
    if not 1 <= nearest <= len(grid):
        raise InputError(f"{nearest} nearest points of a grid of {len(grid)}: give a number from 1 to that")
    weight = candidates.log_weight.softmax(1)
    trace = candidates.rotation.reshape(-1, 9) @ grid.reshape(-1, 9).T
    near, index = largest(trace, nearest)
    # cos(angle) = (trace - 1) / 2; the constants fall out of the softmax.
    kernel = (0.5 * near / math.radians(width_deg) ** 2).softmax(1).view(*weight.shape, nearest)
    return index.view(len(weight), -1), (kernel * weight[:, :, None]).flatten(1)


def _trace_of_angle(angle_deg: float) -> float:
    """Trace of a rotation by an angle, so that angles are compared without arc cosines."""
    if not 0 <= angle_deg <= 180:
        raise InputError(f"angle {angle_deg:g} is outside 0..180 degrees: change it")
    return 1 + 2 * math.cos(math.radians(angle_deg))
