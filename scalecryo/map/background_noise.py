"""The noise spectrum of each optics group, from the corners of the images: before any map is known."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scalecryo.map.image_signal import ImageSignal
from scalecryo.physics.fft import FourierPixels

INNER, OUTER = 0.375, 0.45  # of the box: the particle's circle (as in normalisation), and where the corners begin
GROUPS = 1024  # optics groups that are told apart; those beyond share the last one's spectrum
PRIOR_IMAGES = 64  # a group's spectrum is drawn to that of all by so many images
LEAST_SHARE = 0.01  # of the images' mean power: images without noise get a flat spectrum
SMOOTHING = 2  # shells on each side


class BackgroundNoise:
    """Sums over images: power of the corners, for each group, and of the whole images.

    In units of unit-variance noise per Fourier coefficient: of unscaled transforms over the box.
    """

    def __init__(self, pixels: FourierPixels, device: torch.device | str) -> None:
        """
        Args:
            pixels: of the largest level that is trained on.
            device: of the images.
        """
        self._pixels = pixels
        shells = int(pixels.squared_radius[-1] ** 0.5 + 0.5) + 1  # on the host
        hermitian = pixels.weight.double()
        self._in_shell = torch.zeros(shells, dtype=torch.float64, device=device).index_add_(0, pixels.shell, hermitian)
        self._window = _corners(pixels.box_size, device)
        self.power = torch.zeros(GROUPS, shells, dtype=torch.float64, device=device)
        self.image_power = torch.zeros(shells, dtype=torch.float64, device=device)
        self.count = torch.zeros(GROUPS, dtype=torch.float64, device=device)

    def add(self, real: Float[Tensor, "b n n"], group: Int[Tensor, " b"], weight: Float[Tensor, " b"]) -> None:
        """Take in images, each with a weight, 0 or 1."""
        group, own = group.long().clamp(0, GROUPS - 1), weight.double()[:, None]
        corners = self._shell_power(real * self._window) / self._window.square().sum()
        self.power.index_add_(0, group, corners * own)
        self.count.index_add_(0, group, weight.double())
        self.image_power += (self._shell_power(real) * own).sum(0) / real.shape[-1] ** 2

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The sums, to be reduced over workers."""
        return self.power, self.image_power, self.count

    def variance(self) -> Float[Tensor, "groups shells"]:
        """Of every group, smooth; a group without images has that of all."""
        total = self.count.sum().clamp_min(1)
        every = self.power.sum(0) / total
        power = (self.power + PRIOR_IMAGES * every) / (self.count + PRIOR_IMAGES)[:, None]
        power[:, 0] = power[:, 1]  # normalisation took the mean off
        smooth = _smooth(power)
        mean = (self.image_power[1:] * self._in_shell[1:]).sum() / self._in_shell[1:].sum() / total
        return smooth.clamp_min(float(LEAST_SHARE * mean)).float()  # host sync: once a run

    def mean_image_power(self) -> Float[Tensor, " shells"]:
        """Mean power of the images in each shell, signal and noise."""
        return (self.image_power / self.count.sum().clamp_min(1)).float()

    def signal(self) -> ImageSignal:
        """Of the images, by what their power exceeds that of their corners. Host sync: once a run."""
        share = self.count / self.count.sum().clamp_min(1)
        ratio = _smooth((self.mean_image_power() / (share @ self.variance().double()) - 1)[None])[0]
        ratio[: SMOOTHING + 1] = ratio[SMOOTHING + 1]  # normalisation took the mean off
        return ImageSignal(ratio)

    def state_dict(self) -> dict[str, Any]:
        """The sums."""
        return {"power": self.power.cpu(), "image_power": self.image_power.cpu(), "count": self.count.cpu()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up sums."""
        for name, saved in state.items():
            getattr(self, name).copy_(saved)

    def _shell_power(self, real: Tensor) -> Tensor:
        """Mean squared modulus of unscaled transforms in each shell."""
        packed = self._pixels.pack(torch.fft.rfft2(real))
        power = (packed.real.square() + packed.imag.square()).double() * self._pixels.weight
        sums = torch.zeros(len(real), len(self._in_shell), dtype=torch.float64, device=real.device)
        return sums.index_add_(1, self._pixels.shell, power) / self._in_shell


def _smooth(values: Float[Tensor, "b shells"]) -> Float[Tensor, "b shells"]:
    """Mean over a few shells on each side."""
    padded = torch.nn.functional.pad(values[:, None], (SMOOTHING, SMOOTHING), mode="replicate")
    return torch.nn.functional.avg_pool1d(padded, 2 * SMOOTHING + 1, stride=1)[:, 0]


def _corners(box_size: int, device: torch.device | str) -> Float[Tensor, "n n"]:
    """0 within the particle's circle, 1 in the corners, a raised cosine between."""
    squared = (torch.arange(box_size, device=device, dtype=torch.float32) - box_size // 2).square()
    radius = (squared[:, None] + squared).sqrt() / box_size
    return 0.5 - 0.5 * torch.cos(torch.pi * ((radius - INNER) / (OUTER - INNER)).clamp(0, 1))
