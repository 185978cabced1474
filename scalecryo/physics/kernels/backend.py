"""Which implementation of the slice operations runs: it follows the tensors, can be asked for, and falls back."""

import functools
import importlib
import warnings
from typing import Any, Literal

import torch
from torch import Tensor

Backend = Literal["reference", "cpu", "cuda"]
"""Plain torch (any device, single and double precision); numba on the CPU; Triton on a GPU (both single)."""


@functools.cache
def cuda_kernels() -> Any:
    """`kernels.cuda`, or None where Triton is not installed."""
    try:
        return importlib.import_module("scalecryo.physics.kernels.cuda")
    except ImportError:
        return None


def backend_module(backend: str) -> Any:
    """The module that holds `forward` and `backward` of a backend."""
    return cuda_kernels() if backend == "cuda" else importlib.import_module(f"scalecryo.physics.kernels.{backend}")


def choose_backend(values: Tensor, wanted: Backend | None = None) -> Backend:
    """The backend for complex values: the wanted one where it can take them, else the reference, with one warning.

    Args:
        values: the volume's transform, or what else decides device and precision.
        wanted: None for the one that suits: `cpu` or `cuda` in single precision on such a device, else `reference`.
    """
    single, device = values.dtype == torch.complex64, values.device.type
    if wanted is None:
        wanted = "cpu" if single and device == "cpu" else "cuda" if single and device == "cuda" else "reference"
    if wanted == "reference":
        return wanted
    kernels = cuda_kernels() if wanted == "cuda" else None
    if wanted == "cuda" and kernels is None:
        _warn_once("Triton is not installed: slices are made by plain torch, several times slower; pip install triton")
        return "reference"
    # Triton's interpreter takes tensors of the CPU.
    devices = ("cuda", "cpu") if kernels is not None and kernels.INTERPRETED else (wanted,)
    # Kernels count in 32 bits, CUDA's real numbers (boxes up to 1280 px), the CPU's voxels (up to 1600 px).
    if single and device in devices and values.numel() < (2**31 if wanted == "cpu" else 2**30):
        return wanted
    found = f"{tuple(values.shape)} {values.dtype} on {device}"
    _warn_once(f"the {wanted} kernels cannot take {found}: slices are made by plain torch")
    return "reference"


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)
