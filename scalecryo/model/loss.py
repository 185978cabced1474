"""The reconstruction loss: squared residual between an image and its prediction, in Fourier space."""

from jaxtyping import Complex, Float
from torch import Tensor


def residual_loss(
    observed: Complex[Tensor, "*batch p"],
    predicted: Complex[Tensor, "*batch p"],
    weight: Float[Tensor, " p"],
    box_size: int,
) -> Float[Tensor, "*batch"]:
    """Mean squared residual per pixel of each image.

    By Parseval's theorem the Hermitian-weighted sum over the packed half disc, divided by N⁴ for an unscaled
    forward transform, is the real-space mean over N² pixels of the residual within the disc: pure white noise of
    unit variance gives the share of Fourier pixels in the disc (about π/4).
    """
    residual = predicted - observed
    power = residual.real.square() + residual.imag.square()
    return (power * weight).sum(-1) / box_size**4
