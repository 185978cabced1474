"""Pose sources: each yields candidate poses for a batch, in the same form.

`known` reads them from the particle table (the paper's «tomo»), `table` holds one free pose per particle (its «AD»),
`encoder` computes them from the image.
"""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scalecryo.model.copies import frames, image_copies
from scalecryo.model.encoder import PoseEncoder
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import PoseCandidates, Poses
from scalecryo.physics.rotation import (
    euler_head_to_rotation,
    quaternion_to_rotation,
    s2s2_to_rotation,
)
from scalecryo.settings import Parameterisation

ROTATION_PARAMETERS = {"s2s2": 6, "quaternion": 3, "euler": 3}
TO_ROTATION = {
    "s2s2": s2s2_to_rotation,
    "quaternion": quaternion_to_rotation,
    "euler": euler_head_to_rotation,
}


def _candidates(
    parameters: Float[Tensor, "b k outputs"], parameterisation: Parameterisation, centred: bool, pixel_size: float
) -> PoseCandidates:
    """Read rotations, and shifts in pixels where they are free, out of network or table parameters."""
    count = ROTATION_PARAMETERS[parameterisation]
    rotation = TO_ROTATION[parameterisation](parameters[..., :count])
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
    """Poses computed from the image: `heads` of them for each of its copies (see `copies`)."""

    def __init__(
        self, encoder: PoseEncoder, parameterisation: Parameterisation, *, centred: bool, copies: int = 1
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.parameterisation: Parameterisation = parameterisation
        self.centred = centred
        self.register_buffer("frames", frames(copies), persistent=False)
        self.frames: Tensor

    def forward(self, images: ParticleImages) -> PoseCandidates:
        """K = copies x heads candidates per particle."""
        real, count = cast(Tensor, images.real), len(self.frames)
        parameters = self.encoder(image_copies(real, count).flatten(0, 1))
        found = _candidates(parameters, self.parameterisation, self.centred, images.pixel_size)
        rotation = found.rotation.unflatten(0, (-1, count)) @ self.frames[:, None]
        shift = found.shift.unflatten(0, (-1, count))[..., None, :] @ self.frames[:, None, :2, :2]
        return PoseCandidates(
            rotation.flatten(1, 2),
            shift[..., 0, :].flatten(1, 2),
            found.log_weight.unflatten(0, (-1, count)).flatten(1),
        )
