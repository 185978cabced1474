"""The workers that share a run, and the few collectives between them."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scalecryo.train.stopwatch import Stopwatch


@dataclass(frozen=True)
class World:
    """This worker's place among all workers; one worker needs no process group."""

    rank: int = 0
    size: int = 1
    watch: Stopwatch = field(default_factory=Stopwatch, compare=False, repr=False)
    """Counts the seconds spent in the collectives below, waiting for slower workers included."""

    @property
    def leads(self) -> bool:
        """Whether this worker writes files and reports."""
        return self.rank == 0

    def sum_(self, *tensors: Tensor) -> None:
        """Add each tensor over all workers, in place. Collective."""
        if self.size == 1:
            return
        with self.watch.part("reduce"):
            for tensor in tensors:
                # gloo has no complex reduction: reduce the real view of the same memory.
                dist.all_reduce(torch.view_as_real(tensor) if tensor.is_complex() else tensor)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every worker's tensor, on worker 0 (an empty list elsewhere); first sizes may differ. Collective."""
        if self.size == 1:
            return [tensor]
        gathered: list[Tensor | None] = [None] * self.size
        dist.gather_object(tensor, gathered if self.leads else None)
        return [part for part in gathered if part is not None] if self.leads else []

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Every worker's tensor, on every worker; first sizes may differ. Collective."""
        if self.size == 1:
            return [tensor]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, tensor)
        return gathered

    def barrier(self) -> None:
        """Wait for all workers. Collective."""
        if self.size > 1:
            dist.barrier()
