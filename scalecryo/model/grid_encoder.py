"""The guided method's encoder: low-pass Fourier pixels → distribution over a grid of rotations, and a shift.

Classification over a grid keeps every mode of the posterior and needs far fewer images than regression of a rotation.
The input is the image's packed transform up to a low radius, times its CTF and over the noise: what the search sees.
"""

from typing import NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn

from scalecryo.physics.poses import PoseCandidates


class GridPrediction(NamedTuple):
    """What the encoder says of a batch.

    Attributes:
        logits: of each rotation of the grid, up to a constant per particle.
        shift_px: where the content sits, px of the encoder's level.
    """

    logits: Float[Tensor, "b g"]
    shift_px: Float[Tensor, "b 2"]


class GridEncoder(nn.Module):
    """Two hidden layers between Fourier pixels and a grid of rotations."""

    def __init__(self, grid: Float[Tensor, "g 3 3"], pixels: int, hidden: int, largest_shift_px: float) -> None:
        super().__init__()
        self.register_buffer("grid", grid, persistent=False)
        self.grid: Tensor
        self.largest_shift_px = largest_shift_px
        self.trunk = nn.Sequential(nn.Linear(2 * pixels, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU())
        self.rotation_head = nn.Linear(hidden, len(grid))
        self.shift_head = nn.Linear(hidden, 2)

    def forward(self, features: Float[Tensor, "b f"]) -> GridPrediction:
        """Logits and shift from `encoder_features`."""
        hidden = self.trunk(features)
        return GridPrediction(self.rotation_head(hidden), self.shift_head(hidden) * self.largest_shift_px)

    def candidates(self, prediction: GridPrediction, keep: int, pixel_size: float) -> PoseCandidates:
        """The likeliest `keep` rotations with their probability, all at the predicted shift.

        Args:
            prediction: of a batch.
            keep: candidates of each image.
            pixel_size: Å, of the encoder's level.
        """
        log_weight, index = prediction.logits.log_softmax(1).topk(keep, 1)
        shift = (prediction.shift_px * pixel_size)[:, None].expand(-1, keep, -1)
        return PoseCandidates(self.grid[index], shift, log_weight)

    def own_rotation(self, prediction: GridPrediction, nearest: int = 16, width_deg: float = 20.0) -> Tensor:
        """One differentiable rotation per particle: the mean of the grid around its likeliest point.

        The chordal mean, projected onto SO(3), of the `nearest` likeliest rotations within the width of the best.
        """
        weight, index = prediction.logits.softmax(1).topk(nearest, 1)
        rotation = self.grid[index]
        cosine = (torch.einsum("bij,bkij->bk", rotation[:, 0], rotation) - 1) / 2
        near = cosine > torch.cos(torch.deg2rad(torch.tensor(width_deg)))
        mean = torch.einsum("bk,bkij->bij", weight * near, rotation)
        # Gram-Schmidt of the first two columns: near a rotation it is as good as the polar factor, and cheap.
        first = torch.nn.functional.normalize(mean[:, :, 0], dim=-1)
        second = mean[:, :, 1] - (mean[:, :, 1] * first).sum(-1, keepdim=True) * first
        second = torch.nn.functional.normalize(second, dim=-1)
        return torch.stack([first, second, torch.linalg.cross(first, second)], -1)


def encoder_features(
    images: Complex[Tensor, "b p"], ctf: Float[Tensor, "b p"] | None, pixel_weight: Float[Tensor, " p"]
) -> Float[Tensor, "b 2*p"]:
    """What the encoder reads: the image times its CTF, over the noise, each image at unit mean square."""
    weighted = images * pixel_weight.sqrt()
    if ctf is not None:
        weighted = weighted * ctf
    features = torch.view_as_real(weighted).flatten(1)
    return features / features.square().mean(1, keepdim=True).sqrt().clamp_min(1e-12)
