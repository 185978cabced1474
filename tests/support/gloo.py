"""Workers that are processes of this machine, joined by gloo: those of Ray Train without Ray."""

import atexit
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from scalecryo.config import Config
from scalecryo.distributed.world import World
from scalecryo.train import loop


def by_workers(work: Callable[..., None], *arguments: Any, size: int = 2, join: bool = True) -> Any:
    """Call `work(world, *arguments)` in every worker; `work` is of a module's top level.

    Returns:
        What waits for them, unless they are waited for here.
    """
    # They meet at a file: a port that was free may be taken by the time they ask for it.
    folder = tempfile.mkdtemp(prefix="gloo-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # workers that are killed leave it
    meeting = Path(folder) / "meeting"
    return mp.spawn(_worker, args=(size, meeting.as_uri(), work, arguments), nprocs=size, join=join)


def train_by_workers(*configs: Config, size: int = 2, join: bool = True) -> Any:
    """Train one run after the other; see `by_workers`."""
    return by_workers(_train, configs, size=size, join=join)


def _worker(rank: int, size: int, meeting: str, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    try:
        work(World(rank, size), *arguments)
    finally:
        dist.destroy_process_group()


def _train(world: World, configs: tuple[Config, ...]) -> None:
    for config in configs:
        loop.train(config, world, torch.device("cpu"))
