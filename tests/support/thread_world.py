"""Workers that are threads of one process: collectives without a process group."""

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scalecryo.distributed.world import World


@dataclass
class Meeting:
    """Where the threads exchange tensors."""

    size: int
    given: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=600)  # the others end where one has failed

    def exchange(self, rank: int, own: Any) -> list[Any]:
        """What every worker gave, in their order."""
        self.given[rank] = own
        self.barrier.wait()
        found = [self.given[other] for other in range(self.size)]
        self.barrier.wait()
        return found


@dataclass(frozen=True)
class ThreadWorld(World):
    """One of them. What a reduction leaves on those who do not own it is not a number, so that nothing can use it."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    @classmethod
    def of(cls, size: int) -> "list[ThreadWorld]":
        """So many workers that meet each other."""
        meeting = Meeting(size)
        return [cls(rank, size, meeting=meeting) for rank in range(size)]

    def _sums(self, tensors: tuple[Tensor, ...]) -> list[Tensor]:
        found = self.meeting.exchange(self.rank, [tensor.clone() for tensor in tensors])
        return [torch.stack([own[number] for own in found]).sum(0) for number in range(len(tensors))]

    def all_reduce_(self, *tensors: Tensor) -> None:
        for tensor, total in zip(tensors, self._sums(tensors), strict=True):
            tensor.copy_(total)

    def reduce_(self, owner: int, *tensors: Tensor) -> None:
        for tensor, total in zip(tensors, self._sums(tensors), strict=True):
            tensor.copy_(total if self.rank == owner else torch.full_like(total, torch.nan))

    def broadcast_(self, owner: int, *tensors: Tensor) -> None:
        for tensor in tensors:
            tensor.copy_(self.all_gather(tensor)[owner])

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        return self.meeting.exchange(self.rank, tensor.clone())

    def all_gather_names(self, names: list[str]) -> list[str]:
        return sorted(name for own in self.meeting.exchange(self.rank, list(names)) for name in own)
