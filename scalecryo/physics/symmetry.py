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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from scalecryo.errors import InputError
from scalecryo.physics.rotation import geodesic_angle, nearest_turned, rotation_from_vector

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
_DIRECTIONS = 2000  # among which the one is chosen whose copies are furthest apart
_LARGEST_GROUP = 120  # rotations found in a map that generate more than these are no point group


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


@dataclass(frozen=True, eq=False)
class PointGroup:
    """The rotations that leave a map as it is: the poses g R show the same, for every g.

    Attributes:
        name: as the user gave it, in capitals.
        rotations: about RELION's axes, the identity first.
    """

    name: str
    rotations: Float[Tensor, "g 3 3"]

    @classmethod
    def of(cls, name: str, device: torch.device | str | None = None) -> "PointGroup":
        """The group of a name, in single precision.

        Raises:
            InputError: there is no such group here.
        """
        return cls(name.strip().upper(), symmetry_rotations(name).to(device, torch.float32))

    def to(self, device: torch.device | str) -> "PointGroup":
        """The same group on a device."""
        return PointGroup(self.name, self.rotations.to(device))

    def __len__(self) -> int:
        return len(self.rotations)

    @property
    def others(self) -> Float[Tensor, "e 3 3"]:
        """All but the identity."""
        return self.rotations[1:]

    @cached_property
    def generic(self) -> Float[Tensor, "3"]:
        """A direction that no rotation leaves near where it was: the middle of the asymmetric unit."""
        index = torch.arange(_DIRECTIONS, dtype=torch.float64)
        height, azimuth = 1 - (2 * index + 1) / _DIRECTIONS, index * math.pi * (3 - math.sqrt(5))
        ring = (1 - height.square()).sqrt()
        directions = torch.stack([ring * azimuth.cos(), ring * azimuth.sin(), height], -1).to(self.rotations)
        if len(self) == 1:
            return directions[0]
        nearest = torch.einsum("di,gij,dj->dg", directions, self.others, directions).amax(1)
        return directions[nearest.argmin()]

    def in_unit(self, rotation: Float[Tensor, "b 3 3"], margin_deg: float = 0.0) -> Bool[Tensor, " b"]:
        """Whether views d = R z lie in the asymmetric unit, d·d₀ ≥ (g d)·d₀ for all g, or within a margin of it."""
        if len(self) == 1:
            return torch.ones(len(rotation), dtype=torch.bool, device=rotation.device)
        apart = self.generic - self.generic @ self.others  # d₀ − gᵀ d₀, towards the unit
        inwards = apart / apart.norm(dim=-1, keepdim=True)
        return (rotation[:, :, 2] @ inwards.T >= -math.sin(math.radians(margin_deg))).all(1)

    def folded(self, rotation: Float[Tensor, "b 3 3"]) -> Float[Tensor, "b 3 3"]:
        """Of the poses g R the one whose view lies in the asymmetric unit."""
        along = torch.einsum("i,gij,bj->bg", self.generic, self.rotations, rotation[:, :, 2])
        return self.rotations[along.argmax(1)] @ rotation

    def nearest(self, rotation: Float[Tensor, "b 3 3"], to: Float[Tensor, "b 3 3"]) -> Float[Tensor, "b 3 3"]:
        """Of the poses g R the nearest to another pose of the same image."""
        return nearest_turned(self.rotations, rotation, to)

    def invariant(self, matrix: Float[Tensor, "*b 3 3"]) -> Float[Tensor, "*b 3 3"]:
        """The part of a tensor E of rank two that the group leaves as it is: the mean of g E gᵀ."""
        group = self.rotations.to(matrix)
        return torch.einsum("gij,...jk,glk->...il", group, matrix, group) / len(group)

    def beyond(self, rotations: Float[Tensor, "s 3 3"], apart_deg: float = 10.0) -> Float[Tensor, "t 3 3"]:
        """Of some rotations S those that are not the group's, one of each coset g S."""
        kept: list[Tensor] = []
        for rotation in rotations:
            known = torch.cat([self.rotations.to(rotation), *(self.rotations.to(rotation) @ other for other in kept)])
            if float(geodesic_angle(known, rotation.expand_as(known)).min()) >= apart_deg:
                kept.append(rotation)
        return torch.stack(kept) if kept else rotations[:0]


def generated_group(rotations: Sequence[Float[Tensor, "3 3"]], apart_deg: float = 10.0) -> str | None:
    """The name of the point group that some rotations generate, about axes of any direction; None: of none.

    Rotations may be wrong by a few degrees: products within `apart_deg` are one, so Cn and Dn are told up to n = 360 /
    (2 apart_deg).
    """
    found = torch.eye(3, dtype=torch.float64)[None]
    new = torch.stack([*rotations]).double() if len(rotations) else found[:0]
    while len(new):
        for rotation in new:
            if float(geodesic_angle(found, rotation.expand_as(found)).min()) >= apart_deg:
                found = torch.cat([found, rotation[None]])
        if len(found) > _LARGEST_GROUP:
            return None
        products = (found[:, None] @ found).flatten(0, 1)
        new = products[(products[:, None] - found).square().sum((2, 3)).amin(1) > _chord(apart_deg)][:64]
    size = len(found)
    if size == 1:
        return "C1"
    smallest = float(geodesic_angle(found[1:], torch.eye(3, dtype=torch.float64).expand_as(found[1:])).min())
    if smallest < 2 * apart_deg:  # turns of any angle seem to close so
        return None
    largest = round(360 / smallest)
    if size == largest:
        return f"C{size}"
    if size == 2 * largest:
        return f"D{largest}"
    return {(12, 3): "T", (24, 4): "O", (60, 5): "I"}.get((size, largest))


def _chord(angle_deg: float) -> float:
    """Squared Frobenius norm of the difference of two rotations that are an angle apart: 8 sin²(θ/2)."""
    return 8 * math.sin(math.radians(angle_deg) / 2) ** 2
