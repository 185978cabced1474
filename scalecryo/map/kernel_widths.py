"""One map out of those of kernels of several widths: each place, at each frequency, takes the width that serves it.

What does not move is the same in all images and wants them all; what moves far wants those near the place alone.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.physics.fft import irfft3_centred, rfft3_centred
from scalecryo.physics.fsc import shell_index_3d
from scalecryo.physics.mask import gaussian_low_pass

_FIRST, _GROWTH = 6.0, 1.4  # shells of the first band of frequencies; how much further each next one goes, or 5 shells
_NEIGHBOURHOOD = 2.5  # wavelengths of a band at which the errors are smoothed; at fewer, noise that agrees is chosen
_LEAST_PX = 12.0


def locally_best(maps: Float[Tensor, "w 2 n n n"]) -> Float[Tensor, "2 n n n"]:
    """Half-maps that take, at each voxel and in each band of frequencies, the width whose error seems least.

    A width's error is told by the other half's map of the narrowest kernel, which blurs least and has noise of its own:
    (a_w − b_0)² + (b_w − a_0)², summed over a few wavelengths. Both halves take the same width. Cross-validation of a
    kernel's width by regions and frequencies: Gilles & Singer 2025 (RECOVAR); here of half-maps, in overlapping bands.

    Args:
        maps: half-maps of each width, the narrowest first.
    """
    box_size = maps.shape[-1]
    shell = shell_index_3d(box_size, maps.device).float()
    transforms = [[rfft3_centred(half) for half in pair] for pair in maps]
    best = torch.zeros_like(maps[0])
    for low, high in _bands(box_size):
        weight = _rise(shell, low) - _rise(shell, high)
        band = torch.stack([
            torch.stack([irfft3_centred(transform * weight, box_size) for transform in pair]) for pair in transforms
        ])  # fmt: skip
        wavelength = box_size / (0.5 * (max(low, 0.0) + min(high, box_size / 2)))
        reach = max(_NEIGHBOURHOOD * wavelength, _LEAST_PX)
        errors = (band - band[0].flip(0)).square_().sum(1)
        chosen = torch.stack([gaussian_low_pass(error, 1.0, reach) for error in errors]).argmin(0)
        best += band.gather(0, chosen.expand(1, 2, *chosen.shape))[0]
    return best


def _bands(box_size: int) -> list[tuple[float, float]]:
    """Shells between which each band of frequencies lies; the first one has no beginning and the last one no end."""
    edges, following = [-math.inf], _FIRST
    while following < box_size / 2 or len(edges) == 1:
        edges.append(following)
        following = max(_GROWTH * following, following + 5)
    return list(zip(edges, [*edges[1:], math.inf], strict=True))


def _rise(shell: Float[Tensor, "n n h"], edge: float) -> Float[Tensor, "n n h"]:
    """From 0 to 1 over two shells about an edge."""
    return ((shell - edge + 1) / 2).clamp(0, 1)
