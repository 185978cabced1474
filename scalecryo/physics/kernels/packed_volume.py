"""A transform as the compiled kernels of local refinement read it."""

import numpy as np
from jaxtyping import Complex
from torch import Tensor

from scalecryo.physics.kernels import refine_cpu


class PackedVolume:
    """A transform that many batches are refined against: the compiled kernels' copies of it, by radius, are kept."""

    def __init__(self, volume_rfft: Complex[Tensor, "d d h"]) -> None:
        self.volume_rfft = volume_rfft
        self._compact: dict[int, np.ndarray] = {}

    def compact(self, half: int) -> np.ndarray:
        """Frequencies up to `half` along each axis, as the compiled kernels want them."""
        if half not in self._compact:
            self._compact[half] = _compact(self.volume_rfft, half)
        return self._compact[half]


def _compact(volume_rfft: Tensor, half: int) -> np.ndarray:
    """Frequencies up to half along each axis, origin in the middle, in bricks: no wrapping, fewer cache lines."""
    wrapped = volume_rfft.detach().resolve_conj().numpy()
    box, size = wrapped.shape[0], 2 * half + 1
    grid = np.empty((size, size, half + 1), np.complex64)
    parts = ((slice(half, size), slice(0, half + 1)), (slice(0, half), slice(box - half, box)))
    for plane, from_plane in parts:
        for row, from_row in parts:
            grid[plane, row] = wrapped[from_plane, from_row, : half + 1]
    return refine_cpu.bricks(grid)
