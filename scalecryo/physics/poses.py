"""The records of a pose: given, candidate, estimated. Shifts are in Å; `shift_px` gives them in a level's pixels."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

FITTING = 0.2  # probability of showing the particle below which an image does not; at 0.5 nobody can tell


@dataclass(frozen=True, eq=False)
class Poses:
    """Poses of b particles.

    Attributes:
        rotation: image frame to volume frame.
        shift: where the content sits from the centre, (x, y) in Å.
    """

    rotation: Float[Tensor, "b 3 3"]
    shift: Float[Tensor, "b 2"]

    def __len__(self) -> int:
        return len(self.rotation)

    def shift_px(self, pixel_size: float) -> Float[Tensor, "b 2"]:
        """The shifts in pixels of `pixel_size` Å."""
        return self.shift / pixel_size

    def select(self, index: Tensor | slice) -> Self:
        """Some of them, by mask, index or slice."""
        return replace(self, **{column.name: getattr(self, column.name)[index] for column in fields(self)})

    def put(self, index: Int[Tensor, " m"], other: Self) -> Self:
        """The same, with those at `index` replaced by `other`."""
        found = {}
        for column in fields(self):
            found[column.name] = getattr(self, column.name).index_copy(0, index, getattr(other, column.name))
        return replace(self, **found)


@dataclass(frozen=True, eq=False)
class PoseCandidates:
    """K candidate poses for each of b particles: what every source of poses yields and the decoder scores.

    Attributes:
        rotation: image frame to volume frame.
        shift: where the content sits from the centre, (x, y) in Å.
        log_weight: natural logarithm of each candidate's weight, up to a constant per particle.
    """

    rotation: Float[Tensor, "b k 3 3"]
    shift: Float[Tensor, "b k 2"]
    log_weight: Float[Tensor, "b k"]

    def select(self, best: Int[Tensor, " b"]) -> Poses:
        """One candidate per particle, differentiable in rotation and shift."""
        row = torch.arange(len(best), device=best.device)
        return Poses(self.rotation[row, best], self.shift[row, best])


@dataclass(frozen=True, eq=False)
class PoseEstimates(Poses):
    """Poses that were estimated, and how sure they are.

    Attributes:
        class_index: of the map that explains the image best, from 0.
        class_probability: of that class among all.
        confidence: probability of this pose among the candidates that were refined; of the auto-encoder: correlation
            of the image with its prediction.
        particle_probability: that the image shows a particle at all.
        log_likelihood: of the image, up to a constant of it.
    """

    class_index: Int[Tensor, " b"]
    class_probability: Float[Tensor, " b"]
    confidence: Float[Tensor, " b"]
    particle_probability: Float[Tensor, " b"]
    log_likelihood: Float[Tensor, " b"]

    @classmethod
    def unknown(cls, count: int, device: torch.device | str = "cpu") -> "PoseEstimates":
        """Room for so many estimates: zeros."""
        zero, index = torch.zeros(count, device=device), torch.zeros(count, dtype=torch.long, device=device)
        return cls(
            torch.zeros(count, 3, 3, device=device), torch.zeros(count, 2, device=device), index, zero, zero, zero, zero
        )


def concatenated(parts: Sequence[PoseCandidates], dim: int) -> PoseCandidates:
    """Candidates of several groups of particles (dim 0), or several sets for the same ones (dim 1)."""
    return PoseCandidates(
        torch.cat([part.rotation for part in parts], dim),
        torch.cat([part.shift for part in parts], dim),
        torch.cat([part.log_weight for part in parts], dim),
    )
