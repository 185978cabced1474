"""The noise power of each Fourier shell, estimated from the images themselves."""

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from scalecryo.physics.fft import FourierPixels


class NoiseSpectrum:
    """Running mean of the residual power of each shell, in the units of unscaled image transforms.

    The maximisation step for the noise in expectation maximisation (Scheres 2012, equation 6), with forgetting. It
    starts from the power of the images themselves, which is too large where there is signal: the first posteriors
    are broad, as they should be.
    """

    def __init__(self, shells: int, device: torch.device | str = "cpu") -> None:
        self.power = torch.zeros(shells, dtype=torch.float64, device=device)
        self.count = torch.zeros(shells, dtype=torch.float64, device=device)

    def decay(self, keep: float) -> None:
        """Multiply what has been seen by a factor below 1."""
        self.power *= keep
        self.count *= keep

    def add(self, residual: Complex[Tensor, "b p"], weight: Float[Tensor, " b"] | None, pixels: FourierPixels) -> None:
        """Take in residuals (images less predictions, or images alone), each image with a weight."""
        squared = residual.real.square() + residual.imag.square()
        each = weight if weight is not None else squared.new_ones(len(squared))
        hermitian = pixels.weight.double()
        self.power.index_add_(0, pixels.shell, (each @ squared).double() * hermitian)
        self.count.index_add_(0, pixels.shell, each.sum().double() * hermitian)

    def add_power(self, power: Float[Tensor, " p"], images: float | Float[Tensor, ""], pixels: FourierPixels) -> None:
        """Take in the power of so many images' residuals (or of their summed weight), summed over them, by pixel."""
        hermitian = pixels.weight.double()
        self.power.index_add_(0, pixels.shell, power.double() * hermitian)
        self.count.index_add_(0, pixels.shell, images * hermitian)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """The two sums, to be reduced over workers."""
        return self.power, self.count

    def variance(self) -> Float[Tensor, " shells"]:
        """Mean squared modulus of the noise in each shell; shells never seen get the largest of those that were.

        The largest, since a likelihood divides by it: what nothing is known of weighs least.
        """
        known = self.power / self.count.clamp_min(1e-30)
        floor = 1e-4 * known.max().clamp_min(1e-30)  # noise-free simulations: interpolation errors are the noise
        return torch.where(self.count > 0, known.clamp_min(floor), known.max().clamp_min(floor)).float()

    def pixel_weight(self, pixels: FourierPixels) -> Float[Tensor, " p"]:
        """Hermitian weight over noise variance, 0 at the origin: what likelihoods are summed with."""
        weight = pixels.weight / self.variance()[pixels.shell]
        weight[0] = 0.0
        return weight
