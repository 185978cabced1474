"""What is drawn of every simulated particle before it is imaged: pose, defocus, shift."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from scalecryo.data.particles import ParticleTable
from scalecryo.errors import InputError
from scalecryo.physics.rotation import random_rotations

VOLTAGE_KV = 300.0
SPHERICAL_ABERRATION_MM = 2.7
AMPLITUDE_CONTRAST = 0.1


@dataclass(frozen=True)
class Imaging:
    """How the simulated particles are imaged.

    `defocus_um` (low, high) is the range of the mean defocus, µm underfocus, uniform; None leaves the CTF out.
    `astigmatism_um` is the largest U − V, µm, uniform from 0, at a uniform angle. `shift_a` is the standard deviation
    of each component of the shift, Å.
    """

    pixel_size: float
    defocus_um: tuple[float, float] | None = None
    astigmatism_um: float = 0.0
    shift_a: float = 0.0

    def __post_init__(self) -> None:
        if self.pixel_size <= 0 or not math.isfinite(self.pixel_size):
            raise InputError(f"pixel size {self.pixel_size:g} Å cannot be used: give a positive number, e.g. 0.8")
        if self.defocus_um is not None and not 0 < self.defocus_um[0] <= self.defocus_um[1]:
            low, high = self.defocus_um
            raise InputError(f"defocus range {low:g} to {high:g} µm cannot be used: give 0 < low <= high, e.g. 0.4 1.2")
        if self.astigmatism_um < 0 or self.shift_a < 0:
            raise InputError(
                f"astigmatism {self.astigmatism_um:g} µm and shift {self.shift_a:g} Å are spreads: "
                "they cannot be negative"
            )
        if self.astigmatism_um > 0 and self.defocus_um is None:
            raise InputError("astigmatism without a CTF means nothing: give a defocus range too")


def draw_particles(count: int, imaging: Imaging, stack: str, generator: torch.Generator) -> ParticleTable:
    """A table of `count` particles of one stack with random poses and optics, image i at index i."""
    if count < 1:
        raise InputError(f"{count} particles cannot be simulated: ask for at least one")
    index = np.arange(count)
    columns: dict[str, NDArray] = {
        "stack": np.zeros(count),
        "stack_index": index,
        "source_row": index,
        "optics_group": np.ones(count),
        "half": np.zeros(count),
        "rotation": random_rotations(count, generator, dtype=torch.float64).numpy(),
        "shift": imaging.shift_a * torch.randn(count, 2, generator=generator, dtype=torch.float64).numpy(),
    }
    if imaging.defocus_um is not None:
        low, high = imaging.defocus_um
        uniform = torch.rand(3, count, generator=generator, dtype=torch.float64).numpy()
        mean = low + (high - low) * uniform[0]
        half = 0.5 * imaging.astigmatism_um * uniform[1]
        columns |= {
            "defocus_u": 1e4 * (mean + half),
            "defocus_v": 1e4 * (mean - half),
            "astigmatism_angle": 180 * uniform[2],
            "voltage": np.full(count, VOLTAGE_KV),
            "spherical_aberration": np.full(count, SPHERICAL_ABERRATION_MM),
            "amplitude_contrast": np.full(count, AMPLITUDE_CONTRAST),
            "phase_shift": np.zeros(count),
        }
    return ParticleTable(imaging.pixel_size, (stack,), columns)
