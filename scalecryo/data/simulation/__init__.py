"""The generator of simulated particles: a density, poses and a microscope in, images out.

Follows the simulation of Nashed et al. 2021 (projections of a centred potential map at rotations uniform on SO(3), CTF,
white Gaussian noise), to which `Imperfections` adds what real data have.
"""

from scalecryo.data.simulation.density import densities, diameter, fit_map
from scalecryo.data.simulation.hinge import Hinge
from scalecryo.data.simulation.imperfections import (
    Conditions,
    Imperfections,
    draw_conditions,
    with_defocus_errors,
    with_preferred_views,
)
from scalecryo.data.simulation.micelle import with_micelle
from scalecryo.data.simulation.noise import Noise, noise_sigma
from scalecryo.data.simulation.particles import Imaging, draw_particles
from scalecryo.data.simulation.projector import Projector
from scalecryo.data.simulation.recording import Recording

__all__ = [
    "Conditions", "Hinge", "Imaging", "Imperfections", "Noise", "Projector", "Recording", "densities", "diameter",
    "draw_conditions", "draw_particles", "fit_map", "noise_sigma", "with_defocus_errors", "with_micelle",
    "with_preferred_views",
]  # fmt: skip
