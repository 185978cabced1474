"""Backends of the slice operations: compiled kernels with the semantics of `physics.fourier_slice`."""
