"""Particles on disk: stacks, tables, the Zarr store and the stream out of it."""
