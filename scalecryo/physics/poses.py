"""Candidate poses: what every pose source yields and the decoder scores."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class PoseCandidates:
    """K candidate poses for each of B particles.

    Attributes:
        rotation: image frame to volume frame.
        shift_px: where the content sits from the centre, (x, y) in pixels.
        log_weight: natural logarithm of each candidate's weight, up to a constant per particle.
    """

    rotation: Float[Tensor, "b k 3 3"]
    shift_px: Float[Tensor, "b k 2"]
    log_weight: Float[Tensor, "b k"]

    def select(self, best: Int[Tensor, " b"]) -> tuple[Float[Tensor, "b 3 3"], Float[Tensor, "b 2"]]:
        """Rotation and shift of one candidate a particle, differentiable in both."""
        row = torch.arange(len(best), device=best.device)
        return self.rotation[row, best], self.shift_px[row, best]


@dataclass(frozen=True)
class Assignment:
    """A pose for every particle, by row of the store.

    Attributes:
        rotation: image frame to volume frame.
        shift: (x, y) in Å, where the particle sits from the centre.
        confidence: 0 … 1. Guided: probability that the image shows the particle, in this pose and not in another mode;
            auto-encoder: correlation of each image with its prediction.
        half: 1 or 2.
        observed, predicted: a few images and their predictions, real space, for pictures.
    """

    rotation: Float[Tensor, "n 3 3"]
    shift: Float[Tensor, "n 2"]
    confidence: Float[Tensor, " n"]
    half: Int[Tensor, " n"]
    observed: Float[Tensor, "e y x"]
    predicted: Float[Tensor, "e y x"]
