"""An encoder that reads an image on circles in Fourier space, where turning and mirroring it cost nothing.

The encoder looks at many turned and mirrored copies of an image (see `copies`), and every head gives a pose for each:
only one has to be right. On circles a turn is another first angle, and a mirror image is read backwards.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from scalecryo.model.copies import frames, turns_of
from scalecryo.model.pose_source import ROTATION_PARAMETERS, TO_ROTATION
from scalecryo.physics.fft import FourierPixels, fourier_pixels
from scalecryo.settings import Parameterisation

ANGLES = 64  # on a circle: enough for 14 circles of a particle that fills the box


class Candidates(NamedTuple):
    """What the encoder says of a batch: a pose by each head for each copy, head by head within copy by copy.

    Attributes:
        rotation: image frame to volume frame.
        shift: where the content sits, (x, y), as a share of the box.
    """

    rotation: Float[Tensor, "b k 3 3"]
    shift: Float[Tensor, "b k 2"]


class CircleEncoder(nn.Module):
    """A two-layer perceptron on circles 1 to C; half a circle of angles, the other half being its complex conjugate."""

    def __init__(
        self,
        circles: int,
        hidden: int,
        heads: int,
        copies: int,
        *,
        parameterisation: Parameterisation,
        centred: bool,
    ) -> None:
        """
        Args:
            circles: number of them; circle r holds the frequencies of r cycles a box.
            hidden: units of each layer.
            heads: poses for each copy.
            copies: of each image, up to `ANGLES`.
            parameterisation: how a head writes a rotation.
            centred: no shifts.
        """
        super().__init__()
        self.circles, self.heads, self.centred = circles, heads, centred
        self.parameterisation: Parameterisation = parameterisation
        self._rotation_outputs = ROTATION_PARAMETERS[parameterisation]
        outputs = self._rotation_outputs + (0 if centred else 2)
        self.trunk = nn.Sequential(nn.Linear(circles * ANGLES, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.pose_head = nn.Linear(hidden, heads * outputs)
        self.score_head = nn.Sequential(nn.Linear(hidden, hidden // 4), nn.ReLU(), nn.Linear(hidden // 4, heads))
        self.register_buffer("scale", torch.ones(circles))
        self.register_buffer("look", _first_angles(copies), persistent=False)
        self.register_buffer("frames", frames(copies), persistent=False)
        self.scale: Tensor
        """Of each circle; brings it to unit mean square."""
        self.look: Tensor
        self.frames: Tensor

    @property
    def copies(self) -> int:
        """Number of copies of each image."""
        return len(self.frames)

    def forward(
        self, circles: Float[Tensor, "b c a"], candidate: Int[Tensor, " b"], hidden: Float[Tensor, "b copies h"]
    ) -> tuple[Float[Tensor, "b 3 3"], Float[Tensor, "b 2"], Float[Tensor, "b k"]]:
        """Rotation and shift of one candidate of each image, and the scores of all, differentiable.

        The scores learn from what the trunk gives and do not teach it.

        Args:
            circles: `CircleTransform`'s.
            candidate: which of `candidates`.
            hidden: what `candidates` gave.
        """
        copy, head = candidate // self.heads, candidate % self.heads
        seen = self._normalised(circles).gather(2, self.look[copy][:, None].expand(-1, circles.shape[1], -1))
        outputs = self.pose_head(self.trunk(seen.flatten(1))).unflatten(-1, (self.heads, -1))
        own = outputs.gather(1, head[:, None, None].expand(-1, 1, outputs.shape[-1]))[:, 0]
        return *self._poses(own, self.frames[copy]), self.scores(hidden)

    @torch.no_grad()
    def candidates(self, circles: Float[Tensor, "b c a"]) -> tuple[Candidates, Float[Tensor, "b copies h"]]:
        """All of them, and the trunk's outputs for each copy."""
        seen = self._normalised(circles)[:, :, self.look].transpose(1, 2).flatten(2)
        hidden = self.trunk(seen)
        outputs = self.pose_head(hidden).unflatten(-1, (self.heads, -1))
        rotation, shift = self._poses(outputs, self.frames[:, None])
        return Candidates(rotation.flatten(1, 2), shift.flatten(1, 2)), hidden

    def scores(self, hidden: Float[Tensor, "b copies h"]) -> Float[Tensor, "b k"]:
        """Of each candidate, larger for better, up to a constant per image: learnt, without a look at the map."""
        return self.score_head(hidden).flatten(1)

    def _normalised(self, circles: Tensor) -> Tensor:
        return circles * self.scale.repeat(2)[:, None]

    def _poses(self, outputs: Tensor, frame: Tensor) -> tuple[Tensor, Tensor]:
        """From a head's outputs for a copy to the pose of the image."""
        rotation = TO_ROTATION[self.parameterisation](outputs[..., : self._rotation_outputs]) @ frame
        if self.centred:
            return rotation, torch.zeros_like(rotation[..., 0, :2])
        # In-plane shifts turn with the copy; heads write them in 32nds of the box.
        moved = outputs[..., None, self._rotation_outputs :] @ frame[..., :2, :2]
        return rotation, moved[..., 0, :] / 32


def _first_angles(copies: int) -> Int[Tensor, "copies half"]:
    """Which angles each copy reads, of a whole circle's: a turn begins elsewhere, a mirrored copy goes backwards."""
    turns, mirrored = turns_of(copies)
    first, step = torch.arange(turns)[:, None] * (ANGLES // turns), torch.arange(ANGLES // 2)
    return torch.cat([first + step, first - step] if mirrored else [first + step]) % ANGLES


class CircleTransform(nn.Module):
    """From packed Fourier pixels to circles: the exact transform of the real image at points between the pixels."""

    def __init__(self, circles: int) -> None:
        super().__init__()
        box = 2 * (circles + 4)  # the smallest whose pixels surround the last circle with room
        self.pixels: FourierPixels = fourier_pixels(box)
        # Without the row and column at -box/2, which have no partner: the copies stay exact.
        position = torch.arange(1.0, box, dtype=torch.float64) - box // 2
        x, y = position.repeat(box - 1), position.repeat_interleave(box - 1)
        turns = 2 * math.pi / box
        phase = turns * (self.pixels.kx.double()[:, None] * x + self.pixels.ky.double()[:, None] * y)
        weight = self.pixels.weight.double()[:, None] / box**2
        to_real = torch.cat([phase.cos() * weight, -phase.sin() * weight])
        angle = torch.arange(ANGLES // 2, dtype=torch.float64) * 2 * math.pi / ANGLES
        points = torch.arange(1.0, circles + 1)[:, None, None] * torch.stack([angle.cos(), angle.sin()], -1)
        phase = turns * (x[:, None] * points[..., 0].flatten() + y[:, None] * points[..., 1].flatten())
        matrix = to_real @ torch.cat([phase.cos(), -phase.sin()], 1)
        self.register_buffer("matrix", matrix.float(), persistent=False)
        self.matrix: Tensor

    def forward(self, transforms: Tensor) -> Float[Tensor, "b c a"]:
        """Real, then imaginary parts of every circle at `ANGLES` angles.

        Args:
            transforms: packed by rising radius, (b, p), at least up to `self.pixels`; of any box.
        """
        count = len(self.pixels)
        near = torch.cat([transforms.real[:, :count], transforms.imag[:, :count]], 1)
        half = (near @ self.matrix).unflatten(1, (2, -1, ANGLES // 2))
        other = half * half.new_tensor([1.0, -1.0])[:, None, None]
        return torch.cat([half, other], -1).flatten(1, 2)
