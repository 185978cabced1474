"""Particles in a reproducible order, prefetched."""
