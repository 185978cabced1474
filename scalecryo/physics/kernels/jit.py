"""How the CPU kernels are compiled and spread over threads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import numba
import numpy as np
import torch

Real = float | np.floating[Any]
Integer = int | np.signedinteger[Any]
"""Scalars in kernels: as good as either, compiled for what they are."""

_Function = TypeVar("_Function", bound=Callable[..., Any])

# What lets sums be vectorised. Not nnan, ninf, nsz: comparisons with NaN and the sign of zero must stay meaningful.
_FAST_MATH = {"reassoc", "contract", "arcp"}
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": _FAST_MATH}

# Below this many samples for each, threads cost more than they save.
_SAMPLES_A_THREAD = 50_000


def part(function: _Function) -> _Function:
    """Compile a function that kernels of the same file call."""
    return cast(_Function, numba.njit(**_OPTIONS)(function))


def kernel(function: _Function) -> _Function:
    """Compile a kernel on first use, to run without the interpreter lock; keep the machine code for later processes.

    Kernels are serial and are spread over plain threads (`in_threads`), not numba's: that compiles several times
    faster and brings in no second OpenMP or TBB, with their limits on fork and on calls from several threads.
    numba's cache notices changes in the kernel's own file only: keep its parts there.
    """
    try:
        return cast(_Function, numba.njit(cache=True, **_OPTIONS)(function))
    except RuntimeError:  # no folder where numba could write: compile in every process
        return part(function)


def shares_of(samples: int) -> int:
    """Over how many threads work goes: never more than torch.get_num_threads(), fewer when there is little of it."""
    return min(torch.get_num_threads(), 1 + samples // _SAMPLES_A_THREAD)


def in_threads(work: Callable[..., None], samples: int, *arguments: Any) -> None:
    """Run work(share, shares, *arguments) for every share, each on a thread of its own."""
    shares = shares_of(samples)
    if shares == 1:
        work(0, 1, *arguments)
        return
    with ThreadPoolExecutor(shares - 1) as pool:
        others = [pool.submit(work, share, shares, *arguments) for share in range(1, shares)]
        work(0, shares, *arguments)
        for other in others:
            other.result()
