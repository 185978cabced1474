"""How much signal right poses would have added up, by the images' own power, and how much of it half-maps have.

A half's N/2 images lay N/(4k) samples on every voxel of shell k. At right poses the half-maps' spectral signal-to-noise
ratio, FSC/(1 − FSC), is therefore N/(4k) times that of the images (Penczek 2010), and larger by the share of the box
that a solved map keeps: noise fills the box, the particle lies in its sphere. Wrong poses add signal incoherently, and
uneven views (`slice_coverage`) leave directions bare: less of it is left. Halves that went wrong alike agree none the
less: this asks not whether they agree, but how well.

What the CTF carries into the corners of an image counts as noise, so that small boxes hold more than is asked for.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

LEAST_SIGNAL = 0.02  # of the noise: corners are not so exactly like the noise in the middle that less could be told
LEAST_SHELLS = 8  # with signal, from which on anything is said
SPHERE = math.pi / 6  # of the box: what maps are cut to (`Backprojection.solve`)


@dataclass(frozen=True)
class ImageSignal:
    """Of a set of images.

    Attributes:
        ratio: mean power of signal over noise by shell, CTF included.
    """

    ratio: Float[Tensor, " shells"]

    def expected(self, particles: int) -> Float[Tensor, " shells"]:
        """Spectral signal-to-noise ratio of half-maps of so many images at right poses."""
        shell = torch.arange(len(self.ratio), device=self.ratio.device).clamp_min(1)
        return self.ratio * particles / (4 * SPHERE * shell)

    def last_shell(self, particles: int) -> int:
        """Up to which such half-maps would agree (FSC 0.5) in a row. Host sync."""
        enough = (self.expected(particles) >= 1) & (self.ratio >= LEAST_SIGNAL)
        return int(enough[1:].long().cumprod(0).sum())

    def coherent_share(self, fsc: Float[Tensor, " n"], particles: int) -> float | None:
        """Signal-to-noise ratio of half-maps over what right poses of even views would give; None: too little signal.

        The median over the upper half of the shells with signal, where wrong poses tell most. Where the images of a
        share p add up and the others' signal is lost, it is p². Host sync.

        Args:
            fsc: of the half-maps, cut to the sphere and not masked further.
            particles: in both.
        """
        last = min(self.last_shell(particles), len(fsc) - 1)
        if last < LEAST_SHELLS:
            return None
        upper = slice(last // 2, last + 1)
        agreed = fsc[upper].to(self.ratio).clamp(0, 0.999)
        return float((agreed / (1 - agreed) / self.expected(particles)[upper]).median())
