"""Poses of a batch, as whoever found them hands them on."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class Posed(NamedTuple):
    """What a poser says of a batch.

    Attributes:
        rotation: image frame to volume frame.
        shift: Å.
        confidence: 0 … 1.
        weight: of the particle in the maps, 0 … 1.
        pictures: the first few images and their predictions, real space, where they were asked for.
    """

    rotation: Float[Tensor, "b 3 3"]
    shift: Float[Tensor, "b 2"]
    confidence: Float[Tensor, " b"]
    weight: Float[Tensor, " b"]
    pictures: tuple[Tensor, Tensor] | None
