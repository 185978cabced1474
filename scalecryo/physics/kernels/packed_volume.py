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
            self._compact[half] = refine_cpu.bricks(self.volume_rfft.detach().resolve_conj().numpy(), half)
        return self._compact[half]
