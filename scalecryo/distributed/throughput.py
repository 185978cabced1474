"""How fast a run goes: images/s of all workers and of the slowest, waits, requests, memory, seconds by part."""

import logging
import os
import time
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.distributed.world import World

logger = logging.getLogger(__name__)
STRAGGLER_FRACTION = 0.6  # of the median worker's images/s
_STATM = Path("/proc/self/statm")


class Throughput:
    """Counts from one pass to the next."""

    def __init__(self, world: World, device: torch.device) -> None:
        self._world, self._device = world, device
        self._reduced, self._reduce_seconds = 0, 0.0
        self.begin()

    def begin(self) -> None:
        """A pass begins."""
        self._mark = time.monotonic()

    def measure(
        self, images: int, batches: int, wait_seconds: float, retries: int, bytes_read: int
    ) -> tuple[dict[str, float], Float[Tensor, " w"]]:
        """What the pass took, by name, and the images/s of each worker. Collective.

        A worker far slower than the others is named in the log: all wait for it at the end of each pass.

        Args:
            images: that this worker worked on.
            batches: of the pass.
            wait_seconds: that it waited for data.
            retries, bytes_read: of its stream so far.
        """
        world, timer = self._world, self._world.timer
        seconds = max(time.monotonic() - self._mark, 1e-9)
        own = torch.tensor([images / seconds, wait_seconds / seconds, retries, bytes_read], dtype=torch.float64)
        every = torch.stack(world.all_gather(own.to(self._device))).cpu()  # host sync: once per pass
        speed = every[:, 0]
        slowest, median = float(speed.min()), float(speed.median())
        if world.is_leader and slowest < STRAGGLER_FRACTION * median:
            logger.warning("worker %d is slow: %.0f images/s, the median %.0f", int(speed.argmin()), slowest, median)
        reduced, self._reduced = timer.reduced_bytes - self._reduced, timer.reduced_bytes
        waited = timer.seconds.get("reduce", 0.0)
        reduce_seconds, self._reduce_seconds = waited - self._reduce_seconds, waited
        rates = {
            "images_per_second": float(speed.sum()),
            "images_per_second_slowest_worker": slowest,
            "data_wait_share": float(every[:, 1].mean()),
            "stream/retries": float(every[:, 2].sum()),
            "stream/mib_read": float(every[:, 3].sum()) / 2**20,
            "world_size": world.size,
            "pass_seconds": seconds,
            **{f"seconds/{part}": total for part, total in timer.seconds.items()},
            **memory_mib(self._device),
        }
        if world.size > 1:
            rates["reduce/seconds_per_step"] = reduce_seconds / max(batches, 1)
            rates["reduce/mib_per_step"] = reduced / 2**20 / max(batches, 1)
        return rates, speed.float()


def memory_mib(device: torch.device) -> dict[str, float]:
    """Resident memory of this process, where the system tells it, and allocated memory of its CUDA device; MiB."""
    found = {}
    if _STATM.exists():
        found["memory/resident_mib"] = int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    if device.type == "cuda":
        found["memory/device_mib"] = torch.cuda.memory_allocated(device) / 2**20
    return found
