"""The poses that a pass over all particles found."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


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
