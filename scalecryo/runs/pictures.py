"""Images beside their predictions, for people to look at."""

from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from scalecryo.physics.fft import FourierPixels, irfft2_centred

EXAMPLES = 8

Pairs = tuple[Float[Tensor, "e y x"], Float[Tensor, "e y x"]]
"""A few images and their predictions, real space, on the CPU."""


def pictures_of(observed: Complex[Tensor, "b p"], predicted: Complex[Tensor, "b p"], pixels: FourierPixels) -> Pairs:
    """The first few images and predictions, packed, as real-space pictures."""
    first, second = (
        irfft2_centred(pixels.unpack(packed[:EXAMPLES].detach()), pixels.box_size).cpu()
        for packed in (observed, predicted)
    )
    return first, second


@dataclass(frozen=True, eq=False)
class Examples:
    """The surest and the least sure particles beside their predictions, the surest first.

    Attributes:
        pairs: images and predictions.
        score: of each, from 0 to 1.
    """

    pairs: Pairs
    score: Float[Tensor, " e"]

    @classmethod
    def none(cls) -> "Examples":
        """Before any batch."""
        empty = torch.zeros(0, 1, 1)
        return cls((empty, empty), torch.zeros(0))

    def __len__(self) -> int:
        return len(self.score)

    def wanted(self, score: Float[Tensor, " b"]) -> Int[Tensor, " k"]:
        """Which of a batch, at most as many as are shown, would be among the surest or the least sure."""
        if len(self) < EXAMPLES:
            order = score.argsort(stable=True)
            return torch.cat([order[: EXAMPLES // 2], order[EXAMPLES // 2 :][-(EXAMPLES // 2) :]])
        least, most = self.score[EXAMPLES // 2 :].max(), self.score[: EXAMPLES // 2].min()
        low, high = (score < least).nonzero()[:, 0], (score > most).nonzero()[:, 0]
        low, high = low[score[low].argsort()][: EXAMPLES // 2], high[score[high].argsort()][-(EXAMPLES // 2) :]
        return torch.cat([low, high])

    def with_more(self, pairs: Pairs, score: Float[Tensor, " k"]) -> "Examples":
        """The surest and the least sure of these and of more."""
        if not len(self):
            joined, scores = pairs, score
        else:
            joined = torch.cat([self.pairs[0], pairs[0]]), torch.cat([self.pairs[1], pairs[1]])
            scores = torch.cat([self.score, score])
        order = scores.argsort(descending=True, stable=True)
        order = torch.cat([order[: EXAMPLES // 2], order[EXAMPLES // 2 :][-(EXAMPLES // 2) :]])
        return Examples((joined[0][order], joined[1][order]), scores[order])


def correlation(
    observed: Complex[Tensor, "b p"], predicted: Complex[Tensor, "b p"], weight: Float[Tensor, " p"]
) -> Float[Tensor, " b"]:
    """Correlation of images with their predictions over packed Fourier pixels, clipped to 0 … 1."""
    weight = weight.clone()
    weight[0] = 0.0  # the mean carries no shape
    cross = (weight * (observed * predicted.conj()).real).sum(-1)
    power = (weight * observed.abs().square()).sum(-1) * (weight * predicted.abs().square()).sum(-1)
    return (cross / power.sqrt().clamp_min(1e-20)).clamp(0, 1)
