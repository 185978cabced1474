"""What every backend of the slice operator is given, and what it gives back."""

from typing import NamedTuple

from jaxtyping import Complex, Float
from torch import Tensor


class Views(NamedTuple):
    """How a volume is seen: the arguments of `fourier_slice` that belong to images and pixels."""

    rotation: Float[Tensor, "b 3 3"]
    shift_px: Float[Tensor, "b 2"] | None
    ctf: Float[Tensor, "b p"] | None
    kx: Float[Tensor, " p"]
    ky: Float[Tensor, " p"]
    scale: float
    box_size: int


class Wanted(NamedTuple):
    """Which gradients are asked for."""

    volume: bool
    rotation: bool
    shift: bool


class Gradients(NamedTuple):
    """Gradients in torch's convention; what was not asked for has no elements."""

    volume: Complex[Tensor, "d d h"]
    rotation: Float[Tensor, "b 3 3"]
    shift_px: Float[Tensor, "b 2"]
