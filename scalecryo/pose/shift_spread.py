"""How far particles lie from the centres of their images: a Gaussian, of which a search over a disc sees a part.

A particle farther out than the disc fits nowhere and looks like junk. Among those found, the squared distance from the
centre falls exponentially up to the disc's edge; how fast says how many lie beyond it, and how far. Wrong poses lie
anywhere in the disc, so that the shifts of a set whose images say little are a mixture of the two.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LEAST = 100.0  # particles that tell it
REACH = 4.0  # standard deviations: all but one in 3,000
FLATTEST = 0.5  # decay of the density over the disc, below which it can hardly be told from a flat one
BINS = 64  # of the squared distance
STEEP = 2.0  # decay from which on the Gaussian is one: the disc's radius is two standard deviations
BETTER = 10.0  # nats that a mixture must explain the shifts better by than a Gaussian alone
STEPS = 200  # of the mixture's fit


def shift_log_prior(shift_px: Float[Tensor, "*b 2"], pixel_size: float, sigma: float) -> Float[Tensor, "*b"]:
    """Logarithm of the Gaussian, up to a constant, whose standard deviation along x and y is given in Å."""
    return -0.5 * (shift_px * (pixel_size / sigma)).square().sum(-1)


class ShiftSpread:
    """Sums over the particles that were found within a disc.

    Attributes:
        sums: their squared distances from the centre in units of the disc's radius, and how many there are in each of
            equal bins of these; sums over particles, so those of several workers add.
    """

    def __init__(self, radius: float, device: torch.device) -> None:
        """
        Args:
            radius: of the disc, Å.
            device: of the sums.
        """
        self._radius = radius
        self.sums = torch.zeros(1 + BINS, dtype=torch.float64, device=device)

    def add(self, shift: Float[Tensor, "b 2"], use: Bool[Tensor, " b"]) -> None:
        """Take in particles, at shifts in Å; those outside the disc tell nothing."""
        squared = shift.double().square().sum(1) / self._radius**2
        inside = (use & (squared < 1)).double()
        self.sums[0] += (inside * squared).sum()
        self.sums[1:].index_add_(0, (BINS * squared).long().clamp_max(BINS - 1), inside)

    def reach(self) -> float:
        """Radius in Å that holds nearly all particles; at least the disc's. Host sync."""
        total, *bins = self.sums.tolist()
        count = sum(bins)
        if count < LEAST:
            return self._radius
        return max(self._radius, REACH * self._radius / (2 * _decay(total / count)) ** 0.5)

    def sigma(self) -> float | None:
        """Standard deviation in Å along x and y of the particles that were posed rightly; None: it cannot be told, or
        is not small beside the disc. Host sync."""
        total, *bins = self.sums.tolist()
        count = sum(bins)
        if count < LEAST:
            return None
        decay = _decay(total / count)
        mixed, share = _mixture(bins)
        alone = _log_likelihood(bins, decay, 1.0)
        decay = mixed if _log_likelihood(bins, mixed, share) > alone + BETTER else decay
        return self._radius / (2 * decay) ** 0.5 if decay >= STEEP else None


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


def _densities(decay: float) -> list[float]:
    """Share of a truncated exponential density in each bin."""
    edges = [math.exp(-decay * number / BINS) for number in range(BINS + 1)]
    return [(low - high) / (edges[0] - edges[-1]) for low, high in itertools.pairwise(edges)]


def _log_likelihood(bins: Sequence[float], decay: float, share: float) -> float:
    """Of so many particles in each bin, a share of them exponential and the others anywhere."""
    mixed = (share * density + (1 - share) / BINS for density in _densities(decay))
    return sum(count * math.log(density) for count, density in zip(bins, mixed, strict=True) if count > 0)


def _mixture(bins: Sequence[float]) -> tuple[float, float]:
    """Decay and share of the exponential part, by expectation maximisation."""
    decay, share, total = 8.0, 0.5, sum(bins)
    for _ in range(STEPS):
        own = [share * density for density in _densities(decay)]
        mass = [count * part / (part + (1 - share) / BINS) for count, part in zip(bins, own, strict=True)]
        share = min(max(sum(mass) / total, 1e-3), 1 - 1e-9)
        decay = _decay(sum(part * (number + 0.5) / BINS for number, part in enumerate(mass)) / max(sum(mass), 1e-30))
    return decay, share
