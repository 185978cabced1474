"""How far particles lie from the centres of their images: a Gaussian, of which a search over a disc sees a part.

A particle farther out than the disc fits nowhere and looks like junk. Among those found, the squared distance from the
centre falls exponentially up to the disc's edge; how fast says how many lie beyond it, and how far.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LEAST = 100.0  # particles that tell it
REACH = 4.0  # standard deviations: all but one in 3,000
FLATTEST = 0.5  # decay of the density over the disc, below which it can hardly be told from a flat one


class ShiftSpread:
    """Sums over the particles that were found within a disc.

    Attributes:
        sums: their number, and of their squared distances from the centre in units of the disc's radius; sums over
            particles, so those of several workers add.
    """

    def __init__(self, radius: float, device: torch.device) -> None:
        """
        Args:
            radius: of the disc, Å.
            device: of the sums.
        """
        self._radius = radius
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, shift: Float[Tensor, "b 2"], use: Bool[Tensor, " b"]) -> None:
        """Take in particles, at shifts in Å; those outside the disc tell nothing."""
        squared = shift.double().square().sum(1) / self._radius**2
        inside = (use & (squared < 1)).double()
        self.sums += torch.stack([inside.sum(), (inside * squared).sum()])

    def reach(self) -> float:
        """Radius in Å that holds nearly all particles; at least the disc's. Host sync."""
        count, total = self.sums.tolist()
        if count < LEAST:
            return self._radius
        return max(self._radius, REACH * self._radius / (2 * _decay(total / count)) ** 0.5)


def _decay(mean: float) -> float:
    """a >= FLATTEST of the density exp(-a u) on 0 ... 1 whose mean is given: 1 / a - 1 / (e^a - 1), by bisection."""
    low, high = FLATTEST, 500.0
    for _ in range(60):
        middle = (low + high) / 2
        if 1 / middle - 1 / math.expm1(middle) > mean:
            low = middle
        else:
            high = middle
    return low
