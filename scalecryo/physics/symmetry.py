"""Point groups of rotations about RELION's axes.

A map V has the symmetry of a group when V(g x) = V(x) for each of its rotations g; poses R and g R then give the same
image. Axes, in the volume frame (RELION, symmetries.cpp; Heymann, Chagoyen & Belnap 2005 for the icosahedral settings):

    Cn           n-fold on z
    Dn           n-fold on z, 2-fold on x
    T            3-fold on z, 2-fold on (0, √2, 1)
    O            4-fold on z, 3-fold on (1, 1, 1)
    I (= I2)     2-fold on x, y, z, 5-fold on (1, 0, φ)
    I1           2-fold on x, y, z, 5-fold on (φ, 0, −1)
    I3           5-fold on z, 2-fold on (−1, 0, φ)
    I4           2-fold on (1, 0, φ), 5-fold on (2, 0, 1)

with φ = (1 + √5) / 2.
"""

import math
import re

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.errors import InputError
from scalecryo.physics.rotation import rotation_from_vector

_PHI = (1 + math.sqrt(5)) / 2
_Axis = tuple[int, tuple[float, float, float]]
#: Order and direction of the axes that generate each polyhedral group, and how many rotations it has.
_POLYHEDRAL: dict[str, tuple[tuple[_Axis, ...], int]] = {
    "T": (((3, (0, 0, 1)), (2, (0, math.sqrt(2), 1))), 12),
    "O": (((4, (0, 0, 1)), (3, (1, 1, 1))), 24),
    "I1": (((2, (0, 0, 1)), (5, (_PHI, 0, -1)), (3, (_PHI**2, 1, 0))), 60),
    "I2": (((2, (0, 0, 1)), (5, (1, 0, _PHI)), (3, (0, 1, _PHI**2))), 60),
    "I3": (((5, (0, 0, 1)), (2, (-1, 0, _PHI))), 60),
    "I4": (((2, (1, 0, _PHI)), (5, (2, 0, 1))), 60),
}
_SAME = 1e-6


def symmetry_rotations(group: str) -> Float[Tensor, "g 3 3"]:
    """All rotations of a point group, the identity first, in double precision.

    Args:
        group: C1, C2, …, D1, D2, …, T, O, I (which is I2), I1, I2, I3 or I4; small letters will do.

    Raises:
        InputError: there is no such group here.
    """
    name = group.strip().upper()
    found = re.fullmatch(r"([CD])([1-9][0-9]{0,3})", name)
    if found:
        order = int(found.group(2))
        turns = _rotation((0, 0, 1), 2 * math.pi * torch.arange(order, dtype=torch.float64) / order)
        return turns if found.group(1) == "C" else torch.cat([turns, turns @ _rotation((1, 0, 0), _half_turn())])
    name = "I2" if name == "I" else name
    if name not in _POLYHEDRAL:
        raise InputError(f"point group {group!r} is not known: give C1, C7, D7, T, O, I (= I2), I1, I2, I3, I4 or such")
    axes, size = _POLYHEDRAL[name]
    generators = torch.cat([_rotation(axis, _half_turn() * (2 / order)) for order, axis in axes])
    rotations = torch.eye(3, dtype=torch.float64)[None]
    while len(rotations) < size:
        rotations = _distinct(torch.cat([rotations, (generators[:, None] @ rotations).flatten(0, 1)]))
    return rotations


def _half_turn() -> Float[Tensor, "1"]:
    return torch.full((1,), math.pi, dtype=torch.float64)


def _rotation(axis: tuple[float, float, float], angle: Float[Tensor, " b"]) -> Float[Tensor, "b 3 3"]:
    """Turns about an axis by angles in radians."""
    direction = torch.tensor(axis, dtype=torch.float64)
    return rotation_from_vector(angle[:, None] * direction / direction.norm())


def _distinct(rotations: Float[Tensor, "m 3 3"]) -> Float[Tensor, "n 3 3"]:
    """The first of all that are equal."""
    kept = rotations[:1]
    for rotation in rotations[1:]:
        if float((kept - rotation).abs().amax(dim=(1, 2)).min()) > _SAME:
            kept = torch.cat([kept, rotation[None]])
    return kept
