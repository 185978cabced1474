"""What several benchmarks need: times of contenders that take turns, the machine in words, noise to convert."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scalecryo.data.formats.mrc import StackWriter, read_map
from scalecryo.data.formats.relion import read_poses
from scalecryo.evaluate.align_maps import rotational_symmetry

_POOL = 512


def machine() -> str:
    """Processor, cores, threads, load and torch's version, for the head of a table."""
    return (f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load "
            f"{os.getloadavg()[0]:.1f}, torch {torch.__version__}")  # fmt: skip


def quick(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each, taking turns: the 20th percentile of the rounds after a warm-up.

    Of the process's own CPU time where torch has one thread, else by the clock; other work on the machine changes both
    little.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, work in contenders.items():
            start = clock()
            work()
            if number:
                times[name].append(1e3 * (clock() - start))
    return {name: sorted(values)[len(values) // 5] for name, values in times.items()}


def write_noise(path: Path, count: int, box: int, pixel_size: float = 1.0) -> None:
    """A stack of noise; its images repeat after 512, with other means."""
    pool = np.random.default_rng(0).normal(3, 2, (_POOL, box, box)).astype(np.float32)
    with StackWriter(str(path), count, box, pixel_size) as writer:
        for first in range(0, count, _POOL):
            writer.append(pool[: min(_POOL, count - first)] + np.float32(first * 1e-5))


def symmetric_poses(folder: Path, count: int | None = None) -> tuple[Tensor, Tensor]:
    """The true map of a simulated dataset, and the first rotations with those that give nearly the same image.

    Returns:
        density (n, n, n) and rotations (count, g, 3, 3) under the map's pseudo-symmetry, the true one first.
    """
    density = torch.from_numpy(read_map(str(folder / "truth.mrc"))[0])
    truth = torch.from_numpy(read_poses(str(folder / "truth.star")).rotation[:count]).float()
    return density, torch.einsum("gij,njk->ngik", rotational_symmetry(density), truth)
