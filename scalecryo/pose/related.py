"""Poses that a map's own symmetry or pseudo-symmetry relates, and which of them nothing tells apart."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.evaluate.align import Alignment
from scalecryo.evaluate.align_maps import compare_turned, rotational_symmetry
from scalecryo.map.reference import ReferenceSet
from scalecryo.physics.rotation import geodesic_angle

ALIKE = 0.97  # of the halves' own correlation: a turned half that agrees as well as this is the same map


@dataclass(frozen=True, eq=False)
class RelatedRotations:
    """Rotations S, without the identity, with V(S x) ≈ V(x): the pose S R shows almost what R shows.

    Attributes:
        similar: all that are found.
        equivalent: those under which the halves agree with each other as they do without: nothing tells S R from R.
    """

    similar: Float[Tensor, "s 3 3"]
    equivalent: Float[Tensor, "e 3 3"]

    @classmethod
    def of(cls, references: ReferenceSet, class_index: int = 0) -> "RelatedRotations":
        """Of a class's map, to the shell that its halves agree to."""
        mean, device = references.mean(class_index) * references.mask[class_index], references.maps.device
        similar = rotational_symmetry(mean.cpu())[1:]
        radius = references.resolution(0.143)[0]
        first, second = (half.cpu() * references.mask[class_index].cpu() for half in references.maps[class_index])
        starts = [Alignment(s.mT, False, torch.zeros(3), 0.0) for s in (torch.eye(3), *similar)]
        scores = compare_turned(first, second, starts, radius) if len(similar) else [1.0]
        alike = torch.tensor([score >= ALIKE * scores[0] for score in scores[1:]], dtype=torch.bool)
        return cls(similar.to(device), similar[alike].to(device))


def angle_modulo(
    a: Float[Tensor, "b 3 3"], b: Float[Tensor, "b 3 3"], equivalent: Float[Tensor, "e 3 3"] | None
) -> Float[Tensor, " b"]:
    """Angle in degrees between rotations, of all that are equivalent to the second the nearest."""
    angle = geodesic_angle(a, b)
    for turn in () if equivalent is None else equivalent:
        angle = torch.minimum(angle, geodesic_angle(a, turn @ b))
    return angle
