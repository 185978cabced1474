"""Which half, which part of a half, and which held-out set a particle belongs to."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Partition:
    """Pure functions of a particle's row in the store.

    Attributes:
        new_halves: halves are made anew, whatever the table says: for a run on one of its halves (`train.half`).
    """

    new_halves: bool = False

    def half(self, rows: Int[Tensor, " b"], table_half: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """1 or 2: as the table says, where it says (0: it does not)."""
        if self.new_halves:
            return 1 + ((rows * 2654435761) >> 16) % 2  # Knuth's multiplicative hash: no pattern along the rows
        half = table_half.long()
        return torch.where(half > 0, half, 1 + rows % 2)

    def part(self, rows: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """0 or 1: the two parts of each half, one of which is posed against a map of the other."""
        return (rows // 2) % 2

    def held_out(self, rows: Int[Tensor, " b"]) -> Bool[Tensor, " b"]:
        """A tenth of the particles, which the start never learns from."""
        return (rows // 2) % 10 == 9
