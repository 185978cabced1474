"""Images beside their predictions, for people to look at."""

from jaxtyping import Complex, Float
from torch import Tensor

from scalecryo.physics.fft import FourierPixels, irfft2_centred

EXAMPLES = 8

Pairs = tuple[Float[Tensor, "e y x"], Float[Tensor, "e y x"]]
"""A few images and their predictions, real space, on the CPU."""


def pictures_of(observed: Complex[Tensor, "b p"], predicted: Complex[Tensor, "b p"], pixels: FourierPixels) -> Pairs:
    """The first few images and predictions, packed, as real-space pictures."""
    first, second = (
        irfft2_centred(pixels.unpack(packed[:EXAMPLES].detach()), pixels.box_size).cpu()
        for packed in (observed, predicted)
    )
    return first, second


def correlation(
    observed: Complex[Tensor, "b p"], predicted: Complex[Tensor, "b p"], weight: Float[Tensor, " p"]
) -> Float[Tensor, " b"]:
    """Correlation of images with their predictions over packed Fourier pixels, clipped to 0 … 1."""
    weight = weight.clone()
    weight[0] = 0.0  # the mean carries no shape
    cross = (weight * (observed * predicted.conj()).real).sum(-1)
    power = (weight * observed.abs().square()).sum(-1) * (weight * predicted.abs().square()).sum(-1)
    return (cross / power.sqrt().clamp_min(1e-20)).clamp(0, 1)
