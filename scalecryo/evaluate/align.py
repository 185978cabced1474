"""Bringing an estimate onto the truth: an ab initio result is known only up to a rotation, an origin, and its hand.

With V' the estimated map, or its mirror image V_est(x, y, −z), and R' the estimated rotations, or F R F (`flip_hand`):

    V_true(y) = V'(Qᵀ (y − u))        R_true = Q R'        shift_est = shift_true + (R_trueᵀ u)_xy

Q is `Alignment.rotation` and u `Alignment.shift_px`. The hand cannot be known from projections, so both are tried.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.errors import InputError
from scalecryo.physics.rotation import flip_hand, geodesic_angle

_NEAR_DEG = 30.0


@dataclass(frozen=True)
class Alignment:
    """How an estimate lies on the truth (see the module).

    Attributes:
        rotation: Q, from the estimate's volume frame to the true one.
        mirrored: whether the estimate has the opposite hand.
        shift_px: u, (x, y, z) in px of the maps.
        score: how well it fits, at most 1: mean closeness of rotations, or mean shell correlation of maps.
    """

    rotation: Float[Tensor, "3 3"]
    mirrored: bool
    shift_px: Float[Tensor, "3"]
    score: float

    def rotations(self, rotation_est: Float[Tensor, "n 3 3"]) -> Float[Tensor, "n 3 3"]:
        """Estimated rotations in the true frame, to be compared with R_true."""
        own = flip_hand(rotation_est) if self.mirrored else rotation_est
        return self.rotation.to(own) @ own


def align_poses(
    rotation_est: Float[Tensor, "n 3 3"],
    rotation_true: Float[Tensor, "m 3 3"],
    symmetry: Float[Tensor, "g 3 3"] | None = None,
) -> Alignment:
    """The rotation and hand that bring the most estimated rotations near the true ones.

    Every image proposes Q = R_true R'ᵀ; the proposal with the highest mean of max(0, 1 − θ / 30°) over the images
    wins, and is refined as the L1 mean (reweighted Procrustes) of the proposals within 30° of it. A result in which
    only a part of the particles is right is therefore aligned on that part. With a point group of the truth
    (`symmetry`) an image's proposals are g Q, and its nearest one counts.
    """
    if len(rotation_est) != len(rotation_true) or len(rotation_est) == 0:
        raise InputError(f"cannot align {len(rotation_est)} rotations with {len(rotation_true)}: give equal numbers")
    best: Alignment | None = None
    for mirrored in (False, True):
        own = (flip_hand(rotation_est) if mirrored else rotation_est).double()
        proposals = rotation_true.double() @ own.mT
        # A thousand proposals judged by some thousands of images are as good as all, and quadratic in neither.
        every = max(1, len(proposals) // 1000)
        judges = proposals[:: max(1, len(proposals) // 4000)]
        candidates = proposals[::every][:1000]
        trace = candidates.flatten(1) @ judges.flatten(1).mT
        for operator in () if symmetry is None else symmetry[1:].double():
            trace = torch.maximum(trace, candidates.flatten(1) @ (operator @ judges).flatten(1).mT)
        angle = torch.rad2deg(torch.arccos(((trace - 1) / 2).clamp(-1, 1)))
        rotation = candidates[_closeness(angle).argmax()]
        for _ in range(20):
            if symmetry is not None:
                proposals = _nearest_copies(proposals, rotation, symmetry.double())
            angle = geodesic_angle(proposals, rotation.expand_as(proposals))
            weight = (angle < _NEAR_DEG) / angle.clamp_min(1e-3)
            rotation = _nearest_rotation((weight[:, None, None] * proposals).sum(0))
        angle = geodesic_angle(proposals, rotation.expand_as(proposals))
        score = float(_closeness(angle))
        if best is None or score > best.score:
            best = Alignment(rotation, mirrored, torch.zeros(3, dtype=rotation.dtype), score)
    assert best is not None
    return best


def _nearest_copies(
    proposals: Float[Tensor, "n 3 3"], rotation: Float[Tensor, "3 3"], symmetry: Float[Tensor, "g 3 3"]
) -> Float[Tensor, "n 3 3"]:
    """Of g Q for each proposal Q the nearest to a rotation."""
    trace = (symmetry.mT @ rotation).flatten(1) @ proposals.flatten(1).mT
    return symmetry[trace.argmax(0)] @ proposals


def _closeness(angle_deg: Float[Tensor, "... n"]) -> Float[Tensor, "..."]:
    """Mean of max(0, 1 − θ / 30°)."""
    return (1 - angle_deg / _NEAR_DEG).clamp_min(0).mean(-1)


def _nearest_rotation(matrix: Float[Tensor, "3 3"]) -> Float[Tensor, "3 3"]:
    """The rotation nearest to a matrix (orthogonal Procrustes, Kabsch 1976)."""
    left, _, right = torch.linalg.svd(matrix)
    sign = torch.linalg.det(left @ right)
    return left @ torch.diag(torch.stack([torch.ones_like(sign), torch.ones_like(sign), sign])) @ right


def origin_offset(
    shift_est: Float[Tensor, "n 2"], shift_true: Float[Tensor, "n 2"], rotation_true: Float[Tensor, "n 3 3"]
) -> Float[Tensor, "3"]:
    """The least-squares u with shift_est − shift_true = (R_trueᵀ u)_xy, in the units of the shifts.

    Repeated without the particles whose residual is above three times the median, so that particles with a wrong pose
    do not move the origin.
    """
    seen = rotation_true.double().mT[:, :2]
    difference = (shift_est - shift_true).double()
    keep = torch.ones(len(seen), dtype=torch.bool)
    offset = torch.zeros(3, dtype=torch.float64)
    for _ in range(5):
        offset = torch.linalg.lstsq(seen[keep].reshape(-1, 3), difference[keep].reshape(-1, 1)).solution[:, 0]
        residual = (difference - seen @ offset).norm(dim=-1)
        keep = residual <= 3 * residual.median() + 1e-9
    return offset
