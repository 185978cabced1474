"""Pose sources: each yields candidate poses for a batch, in the same form.

`known` reads them from the particle table (the paper's «tomo»), `table` holds one free pose per particle (its «AD»),
`encoder` computes them from the image.
"""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scalecryo.config import Parameterisation
from scalecryo.model.encoder import PoseEncoder
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import PoseCandidates, Poses
from scalecryo.physics.rotation import (
    euler_head_to_rotation,
    quaternion_to_rotation,
    s2s2_to_rotation,
)

ROTATION_PARAMETERS = {"s2s2": 6, "quaternion": 3, "euler": 3}
_TO_ROTATION = {
    "s2s2": s2s2_to_rotation,
    "quaternion": quaternion_to_rotation,
    "euler": euler_head_to_rotation,
}


def _candidates(
    parameters: Float[Tensor, "b k outputs"], parameterisation: Parameterisation, centred: bool, pixel_size: float
) -> PoseCandidates:
    """Read rotations, and shifts in pixels where they are free, out of network or table parameters."""
    count = ROTATION_PARAMETERS[parameterisation]
    rotation = _TO_ROTATION[parameterisation](parameters[..., :count])
    shift = torch.zeros_like(parameters[..., :2]) if centred else parameters[..., count:] * pixel_size
    return PoseCandidates(rotation, shift, torch.zeros_like(parameters[..., 0]))


class KnownPoses(nn.Module):
    """The poses that came with the particles."""

    def forward(self, images: ParticleImages) -> PoseCandidates:
        """One candidate per particle: its known rotation and shift."""
        known = cast(Poses, images.poses)
        return PoseCandidates(known.rotation[:, None], known.shift[:, None], torch.zeros_like(known.shift[:, :1]))


class PoseTable(nn.Module):
    """One free pose per particle, started at random: memory grows with the number of particles."""

    def __init__(
        self, count: int, parameterisation: Parameterisation, centred: bool, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.parameterisation: Parameterisation = parameterisation
        self.centred = centred
        start = torch.randn((count, ROTATION_PARAMETERS[parameterisation] + 2), generator=generator)
        start[:, -2:] = 0.0
        self.parameters_of_row = nn.Parameter(start)

    def forward(self, images: ParticleImages) -> PoseCandidates:
        """One candidate per particle: its row of the table; padding and rows beyond it get some row's."""
        rows = images.rows.clamp(0, len(self.parameters_of_row) - 1)
        return _candidates(self.parameters_of_row[rows, None], self.parameterisation, self.centred, images.pixel_size)


class EncoderPoses(nn.Module):
    """Poses computed from the image, `heads` of them; twice as many with the symmetric loss.

    The symmetric loss (cryoAI) scores the image Y and Y turned by 180° in its plane, each with its own predicted
    pose, and keeps the better. A pose (R, t) of the turned image is the pose (R·Rz(180°), -t) of Y itself, so the
    branch is simply one more set of candidates.
    """

    def __init__(
        self, encoder: PoseEncoder, parameterisation: Parameterisation, centred: bool, symmetric: bool
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.parameterisation: Parameterisation = parameterisation
        self.centred = centred
        self.symmetric = symmetric

    def forward(self, images: ParticleImages) -> PoseCandidates:
        """K = heads, or 2 x heads, candidates per particle."""
        real = cast(Tensor, images.real)
        if self.symmetric:
            # Turning by 180° about the centre N//2 of an even box maps index i to -i modulo N.
            turned = torch.roll(real.flip((-2, -1)), (1, 1), (-2, -1))
            real = torch.cat([real, turned])
        found = _candidates(self.encoder(real), self.parameterisation, self.centred, images.pixel_size)
        if not self.symmetric:
            return found
        half_turn = found.rotation.new_tensor([-1.0, -1.0, 1.0])
        straight, turned_rotation = found.rotation.chunk(2)
        shift, turned_shift = found.shift.chunk(2)
        return PoseCandidates(
            torch.cat([straight, turned_rotation * half_turn], 1),
            torch.cat([shift, -turned_shift], 1),
            torch.cat(found.log_weight.chunk(2), 1),
        )
