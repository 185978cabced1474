"""What is drawn of every simulated particle before it is imaged: pose, defocus, shift."""

import numpy as np
import torch
from numpy.typing import NDArray

from scalecryo.data.particles import ParticleTable
from scalecryo.data.simulation.settings import Imaging
from scalecryo.errors import InputError
from scalecryo.physics.rotation import random_rotations

VOLTAGE_KV = 300.0
SPHERICAL_ABERRATION_MM = 2.7
AMPLITUDE_CONTRAST = 0.1


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
