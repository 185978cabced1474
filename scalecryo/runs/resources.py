"""What a worker holds."""

import os
from pathlib import Path

import torch

_STATM = Path("/proc/self/statm")


def memory_mib(device: torch.device) -> dict[str, float]:
    """Resident memory of this process, where the system tells it, and allocated memory of its CUDA device; MiB."""
    found = {}
    if _STATM.exists():
        found["memory/resident_mib"] = int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    if device.type == "cuda":
        found["memory/device_mib"] = torch.cuda.memory_allocated(device) / 2**20
    return found
