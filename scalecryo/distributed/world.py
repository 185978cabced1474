"""The workers that share a run, and the few collectives between them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scalecryo.distributed.timer import Timer

TOGETHER_BYTES = 2**22  # smaller tensors are copied into one: a reduction costs a round trip each


def process_group_backend(device: str) -> str:
    """Gloo for tensors on the host, NCCL for those on a GPU: a group of NCCL alone refuses the former."""
    return "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"


@dataclass(frozen=True)
class World:
    """This worker's place among all workers; one worker needs no process group."""

    rank: int = 0
    size: int = 1
    timer: Timer = field(default_factory=Timer, compare=False, repr=False)
    """Counts the seconds spent in the collectives below, waiting for slower workers included."""

    @property
    def is_leader(self) -> bool:
        """Whether this worker writes files and reports."""
        return self.rank == 0

    def all_reduce_(self, *tensors: Tensor) -> None:
        """Add each tensor over all workers, in place. Collective; small ones travel together."""
        self._with_all(tensors, dist.all_reduce)

    def reduce_(self, owner: int, *tensors: Tensor) -> None:
        """Add each tensor over all workers, in place, on its owner alone: what the others hold is lost. Collective."""
        self._with_all(tensors, partial(dist.reduce, dst=owner))

    def broadcast_(self, owner: int, *tensors: Tensor) -> None:
        """Give every worker the owner's tensors, in place. Collective."""
        self._with_all(tensors, partial(dist.broadcast, src=owner))

    def _with_all(self, tensors: tuple[Tensor, ...], collective: Callable[[Tensor], object]) -> None:
        """A collective that works in place, of each tensor."""
        if self.size == 1:
            return
        with self.timer.part("reduce"):
            small: dict[torch.dtype, list[Tensor]] = {}
            for tensor in tensors:
                # gloo has no complex reduction: reduce the real view of the same memory.
                real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
                self.timer.reduced_bytes += real.nbytes
                if real.nbytes < TOGETHER_BYTES:
                    small.setdefault(real.dtype, []).append(real)
                else:
                    collective(real)
            for group in small.values():
                flat = torch.cat([tensor.reshape(-1) for tensor in group])
                collective(flat)
                for tensor, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
                    tensor.copy_(part.view_as(tensor))

    def all_reduce_async(self, tensor: Tensor) -> Callable[[], None]:
        """Begin to add a tensor over all workers, in place; call what is returned before it is used. Collective."""
        if self.size == 1:
            return lambda: None
        work = dist.all_reduce(tensor, async_op=True)

        def settle() -> None:
            with self.timer.part("reduce"):
                work.wait()

        return settle

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Every worker's tensor, on every worker; shapes must agree. Collective."""
        if self.size == 1:
            return [tensor]
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(gathered, tensor)
        return gathered

    def all_gather_names(self, names: list[str]) -> list[str]:
        """Every worker's names, on every worker, sorted. Collective; a barrier."""
        if self.size == 1:
            return sorted(names)
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, names)
        return sorted(name for part in gathered for name in part)
