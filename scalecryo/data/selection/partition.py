"""Which half, which part of a half, and which held-out set a particle belongs to."""

import json
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from scalecryo.data.io import urls
from scalecryo.data.selection.subset import Subset, half_counts, unequal_halves
from scalecryo.data.storage.store import REPORT, ParticleStore
from scalecryo.errors import MissingInputError

# Odd 64-bit numbers: SplitMix64's increment and multipliers (Steele et al. 2014), as signed integers.
_INCREMENT = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
PARTS = 4
_HALF, _PART, _HELD_OUT, _LABEL = 1, 2, 3, 0  # keys of the hashes
_LABEL_STRIDE = 1 << 40  # rows between two draws of labels


@dataclass(frozen=True)
class Copies:
    """Rows whose image is also another row's: named twice, symmetry-expanded, or of the very same pixels.

    Attributes:
        rows: ascending.
        first: the first row of the same image.
        half: 1 or 2 where the table puts all of them there; 0 where it does not say, or says both.
    """

    rows: Int[Tensor, " c"]
    first: Int[Tensor, " c"]
    half: Int[Tensor, " c"]

    @classmethod
    def of(cls, store: ParticleStore, device: torch.device) -> "Copies":
        """Those that conversion found; none in a store of an older version."""
        table = torch.from_numpy(np.ascontiguousarray(store.copies().T)).to(device)
        return cls(*table)

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, rows: Int[Tensor, " b"]) -> tuple[Bool[Tensor, " b"], Int[Tensor, " b"]]:
        """Which of some rows are copies, and where in these columns they stand."""
        place = torch.searchsorted(self.rows, rows.contiguous()).clamp_max(max(len(self) - 1, 0))
        return self.rows[place] == rows, place


@dataclass(frozen=True)
class Partition:
    """Pure functions of a particle's row in the store: independent hashes, so that none follows from another.

    Copies of one image share a half, a part and a held-out set: what only one of them saw would agree with the other.

    Attributes:
        new_halves: halves are made anew, whatever the table says.
        copies: rows that share an image; None: there are none.
        notes: what a person should know of the halves.
    """

    new_halves: bool = False
    copies: Copies | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, store: ParticleStore, subset: Subset | None, rows: int, device: torch.device, *, new_halves: bool
    ) -> "Partition":
        """The partition of the particles that take part.

        Args:
            store: that holds them.
            subset, rows: which take part: the chosen ones of the first so many rows.
            device: where rows will live.
            new_halves: made anew in any case, since the run is on one of the table's halves.

        Raises:
            StoreError: the store is damaged.
        """
        notes: list[str] = []
        copies = Copies.of(store, device)
        if len(copies):
            images = int(torch.unique(copies.first).numel())  # host sync
            notes.append(f"{len(copies):,} particles show only {images:,} images: copies of one image share a half")
        if not new_halves:
            counts = _counts(store, subset, rows)
            new_halves = unequal_halves(counts)
            if new_halves:
                notes.append(
                    f"the table's half-sets hold {counts[1]:,} and {counts[2]:,} of these particles: "
                    "halves are made anew"
                )
        return cls(new_halves, copies if len(copies) else None, tuple(notes))

    def half(self, rows: Int[Tensor, " b"], table_half: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """1 or 2: as the table says, where it says (0: it does not)."""
        made = 1 + _hash(self._image(rows), _HALF) % 2
        if self.new_halves:
            return made
        said = table_half.long()
        if self.copies is not None:
            among, place = self.copies.at(rows)
            said = torch.where(among, self.copies.half[place], said)
        return torch.where(said > 0, said, made)

    def part(self, rows: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """0 to 3: parts of each half, each of which is searched against a map of the others."""
        return _hash(self._image(rows), _PART) % PARTS

    def label(self, rows: Int[Tensor, " b"], number: int, count: int) -> Int[Tensor, " b"]:
        """One of `count` random labels, each as likely; another draw for every number from 0."""
        return _hash(self._image(rows), _LABEL + 4 * (number + 1) * _LABEL_STRIDE) % count

    def held_out(self, rows: Int[Tensor, " b"]) -> Bool[Tensor, " b"]:
        """A tenth of the particles, which the start never learns from."""
        return _hash(self._image(rows), _HELD_OUT) % 10 == 0

    def _image(self, rows: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """The first row of the same image."""
        if self.copies is None:
            return rows
        among, place = self.copies.at(rows)
        return torch.where(among, self.copies.first[place], rows)


def _counts(store: ParticleStore, subset: Subset | None, rows: int) -> tuple[int, int, int]:
    """Particles that take part, by the half that the table gives them: none, 1 and 2."""
    if subset is None and rows == store.count:
        try:
            known = json.loads(urls.read_bytes(urls.join(store.url, REPORT))).get("halves")
        except MissingInputError:
            known = None
        if known is not None:
            return int(known[0]), int(known[1]), int(known[2])
    return half_counts(store, subset, rows)


def _hash(rows: Int[Tensor, " b"], key: int) -> Int[Tensor, " b"]:
    """SplitMix64's finaliser of row and key: 31 well mixed bits. Products wrap around, as they should."""
    mixed = (rows * 4 + key) * _INCREMENT
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        # Shifts to the right are arithmetic: the mask makes them logical.
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * multiplier
    return (mixed >> 33) & 0x7FFFFFFF
