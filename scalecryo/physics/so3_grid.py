"""Near-uniform deterministic grids on SO(3)."""

import math

import roma
import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.errors import InputError

# The paper's choice: phi = sqrt(2), psi the positive root of psi^4 = psi + 4.
_PHI = math.sqrt(2.0)
_PSI = 1.533751168755204288118041413


def so3_grid(count: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "g 3 3"]:
    """`count` near-uniform rotations on a super-Fibonacci spiral (Alexa, CVPR 2022, algorithm 1).

    Any count works; the grid is the same on every machine. Turn it by one random rotation to sample
    without a preferred direction.

    Raises:
        InputError: count < 1.
    """
    if count < 1:
        raise InputError(f"a grid of {count} rotations is empty: ask for at least 1")
    position = torch.arange(count, dtype=torch.float64) + 0.5
    turn = 2 * math.pi * position
    inner, outer = (position / count).sqrt(), (1 - position / count).sqrt()
    alpha, beta = turn / _PHI, turn / _PSI
    quaternion = torch.stack([inner * alpha.sin(), inner * alpha.cos(), outer * beta.sin(), outer * beta.cos()], dim=-1)
    return roma.unitquat_to_rotmat(quaternion).to(dtype)
