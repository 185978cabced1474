"""What the model receives for a batch of particles: tensors only, no storage."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from scalecryo.physics.ctf import CtfParameters


@dataclass(frozen=True)
class ParticleInputs:
    """A batch of particles at one level of the store.

    Attributes:
        images: real-space images, background at zero mean and unit standard deviation, protein bright.
        rows: row of each particle in the store.
        ctf: the microscope's parameters, or None where the images carry no CTF.
        rotation: known rotations (image frame to volume frame), or None.
        shift_px: known shifts (x, y) in pixels of these images, or None.
    """

    images: Float[Tensor, "b n n"]
    rows: Int[Tensor, " b"]
    ctf: CtfParameters | None = None
    rotation: Float[Tensor, "b 3 3"] | None = None
    shift_px: Float[Tensor, "b 2"] | None = None
