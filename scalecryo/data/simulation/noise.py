"""The noise of simulated images: Gaussian, white or in part low-pass, of a given variance."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.data.simulation.projector import PADDING
from scalecryo.physics.fft import irfft2_centred, rfft2_centred

#: The low-pass part of the noise has the power spectrum 1 / (1 + (CORNER_A s)²), s in 1/Å.
CORNER_A = 30.0


def noise_sigma(signal: Float[Tensor, "b n n"], snr_db: float) -> float:
    """Standard deviation of noise that gives 10 log₁₀(var(signal) / var(noise)) = snr_db over whole images."""
    return math.sqrt(float(signal.double().var(correction=0)) / 10 ** (snr_db / 10))


class Noise:
    """Stationary Gaussian noise, a share of its variance low-pass and the rest white.

    The low-pass part is filtered on a grid of twice the box and cropped, so that it does not continue from one edge to
    the opposite one, as noise cut out of a micrograph does not either.

    Args:
        sigma: standard deviation of a pixel.
        colour: share of the variance that is low-pass, 0 to 1.
        box_size: px.
        pixel_size: Å.
        white: stream of the white part.
        low_pass: stream of the low-pass part.
    """

    def __init__(
        self,
        sigma: float,
        colour: float,
        box_size: int,
        pixel_size: float,
        white: torch.Generator,
        low_pass: torch.Generator,
    ) -> None:
        self._box, self._white, self._low_pass = box_size, white, low_pass
        self._white_sigma = sigma * math.sqrt(1 - colour)
        self._amplitude: Tensor | None = None
        if colour > 0:
            box = PADDING * box_size
            ky, kx = torch.fft.fftfreq(box, pixel_size), torch.fft.fftfreq(box, pixel_size)
            power = 1 / (1 + CORNER_A**2 * (ky[:, None].square() + kx.square()))
            # The mean over all frequencies is the variance of a pixel.
            self._amplitude = (sigma**2 * colour * power / power.mean()).sqrt()[:, : box // 2 + 1]

    def draw(self, count: int) -> Float[Tensor, "b n n"]:
        """The noise of the next images."""
        size = (count, self._box, self._box)
        noise = self._white_sigma * torch.randn(size, generator=self._white)
        if self._amplitude is None:
            return noise
        box = PADDING * self._box
        transform = rfft2_centred(torch.randn((count, box, box), generator=self._low_pass))
        low_pass = irfft2_centred(transform * self._amplitude, box)
        return noise + low_pass[:, : self._box, : self._box]
