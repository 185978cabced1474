"""Which half, which part of a half, and which held-out set a particle belongs to."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

# Odd 64-bit numbers: SplitMix64's increment and multipliers (Steele et al. 2014), as signed integers.
_INCREMENT = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
_HALF, _PART, _HELD_OUT = 1, 2, 3  # keys of the three hashes


@dataclass(frozen=True)
class Partition:
    """Pure functions of a particle's row in the store: independent hashes, so that none follows from another.

    Attributes:
        new_halves: halves are made anew, whatever the table says: for a run on one of its halves (`train.half`).
    """

    new_halves: bool = False

    def half(self, rows: Int[Tensor, " b"], table_half: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """1 or 2: as the table says, where it says (0: it does not)."""
        made = 1 + _hash(rows, _HALF) % 2
        return made if self.new_halves else torch.where(table_half > 0, table_half.long(), made)

    def part(self, rows: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """0 or 1: the two parts of each half, one of which is posed against a map of the other."""
        return _hash(rows, _PART) % 2

    def held_out(self, rows: Int[Tensor, " b"]) -> Bool[Tensor, " b"]:
        """A tenth of the particles, which the start never learns from."""
        return _hash(rows, _HELD_OUT) % 10 == 0


def _hash(rows: Int[Tensor, " b"], key: int) -> Int[Tensor, " b"]:
    """SplitMix64's finaliser of row and key: 31 well mixed bits. Products wrap around, as they should."""
    mixed = (rows * 4 + key) * _INCREMENT
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        # Shifts to the right are arithmetic: the mask makes them logical.
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * multiplier
    return (mixed >> 33) & 0x7FFFFFFF
