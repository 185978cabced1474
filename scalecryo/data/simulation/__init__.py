"""The generator of simulated particles: a density, poses and a microscope in, images out.

Follows the simulation of Nashed et al. 2021 (projections of a centred potential map at rotations uniform on SO(3), CTF,
white Gaussian noise), to which `Imperfections` adds what real data have.
"""
