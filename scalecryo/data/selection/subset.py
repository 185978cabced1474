"""Some of a store's particles, without rewriting it: one bit for each row, and counts for each block.

A subset of N rows takes N/8 bytes, and an order over it about 16 bytes for each block that holds a chosen row. Both are
made once, from columns that are streamed shard by shard. Blocks without a chosen row are never read.
"""

import io
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from scalecryo.config import TrainConfig
from scalecryo.data.formats.plainpickle import load_integers
from scalecryo.data.io import urls
from scalecryo.data.particles import Columns
from scalecryo.data.permutation import Rows
from scalecryo.data.selection.query import Query
from scalecryo.data.storage.shards import crc32c
from scalecryo.data.storage.store import ParticleStore
from scalecryo.errors import ConfigError

Mask = npt.NDArray[np.bool_]
_PIECE = 1 << 23  # rows unpacked at a time
_THREADS = 8
_LEAST_SHARE = 1 / 3  # of the particles in the smaller half
_CHANCE = 4.0  # standard deviations of a fair draw, within which halves of few particles differ


@dataclass(frozen=True, eq=False)
class Subset:
    """Rows chosen from a store.

    Args:
        bits: one bit for each row of the store, packed little end first.
        store_rows: rows of the store (or its first rows, where only they are trained on).
    """

    bits: npt.NDArray[np.uint8]
    store_rows: int

    @classmethod
    def from_mask(cls, mask: Mask) -> "Subset":
        """The rows where a mask holds."""
        return cls(np.packbits(mask, bitorder="little"), len(mask))

    @classmethod
    def from_rows(cls, rows: Rows, store_rows: int) -> "Subset":
        """Rows by number, in any order; repeated ones count once."""
        bits = np.zeros(-(-store_rows // 8), dtype=np.uint8)
        np.bitwise_or.at(bits, rows >> 3, np.left_shift(1, rows & 7).astype(np.uint8))
        return cls(bits, store_rows)

    @cached_property
    def count(self) -> int:
        """Number of chosen rows."""
        return int(np.bitwise_count(self.bits).sum(dtype=np.int64))

    @property
    def digest(self) -> str:
        """What tells one subset from another, for checkpoints."""
        return f"{self.count}-{crc32c(self.bits):08x}"

    def contains(self, rows: Rows) -> Mask:
        """Whether each row is chosen."""
        chosen: Mask = (self.bits[rows >> 3] >> (rows & 7).astype(np.uint8)) & 1 == 1
        return chosen

    def rows(self, start: int = 0, stop: int | None = None) -> Rows:
        """Chosen rows within start…stop−1, ascending."""
        stop = self.store_rows if stop is None else min(stop, self.store_rows)
        first = start - start % 8
        mask = np.unpackbits(self.bits[first // 8 : -(-stop // 8)], bitorder="little")[start - first : stop - first]
        return np.flatnonzero(mask).astype(np.int64) + start

    def block_counts(self, block_rows: int) -> npt.NDArray[np.int64]:
        """Number of chosen rows in each block."""
        unit = math.lcm(8, block_rows)
        piece = max(1, _PIECE // unit) * unit
        counts = []
        for start in range(0, self.store_rows, piece):
            mask = np.unpackbits(self.bits[start // 8 : (start + piece) // 8], bitorder="little")
            mask = mask[: self.store_rows - start]
            counts.append(np.add.reduceat(mask, np.arange(0, len(mask), block_rows), dtype=np.int64))
        return np.concatenate(counts)

    def both(self, other: "Subset") -> "Subset":
        """The rows that two subsets of the same store share."""
        return Subset(self.bits & other.bits, self.store_rows)


def choose(config: TrainConfig, store: ParticleStore) -> Subset | None:
    """The particles that `train.half`, `optics_group`, `index` and `query` leave; None where they name nothing.

    Only the first `train.rows` rows take part, as without a subset.

    Raises:
        ConfigError: the query or the index cannot be read, or nothing is left.
        StoreError: the store lacks a column, or an object is missing or damaged.
    """
    conditions: list[tuple[str, tuple[str, ...], Callable[[Columns], Mask]]] = []
    if config.half:
        conditions.append((f"train.half = {config.half}", ("half",), lambda c: c["half"] == config.half))
    if config.optics_group >= 0:
        group = f"train.optics_group = {config.optics_group}"
        conditions.append((group, ("optics_group",), lambda c: c["optics_group"] == config.optics_group))
    if config.query:
        query = Query.parse(config.query, _numeric_columns(store))
        conditions.append((f"train.query = {config.query!r}", query.columns, query.evaluate))
    count = min(config.rows or store.count, store.count)
    found = None
    if conditions:
        found = _where(store, count, [(columns, holds) for _, columns, holds in conditions])
    if config.index:
        conditions.append((f"train.index = {config.index!r}", (), lambda c: np.ones(0, dtype=bool)))
        listed = Subset.from_rows(read_index(config.index, store.count, count), count)
        found = listed if found is None else found.both(listed)
    if found is not None and found.count == 0:
        named = " and ".join(name for name, *_ in conditions)
        raise ConfigError(f"config: {named}: no particle of {urls.redacted(store.url)} (first {count}) is chosen")
    return found


def half_counts(store: ParticleStore, subset: "Subset | None", rows: int) -> tuple[int, int, int]:
    """Particles by the half that the table gives them (none, 1, 2), of a subset of the first so many rows.

    Raises:
        StoreError: an object is missing or damaged.
    """
    array, step = store.column_array("half"), store.shard_rows

    def piece(start: int) -> npt.NDArray[np.int64]:
        stop = min(start + step, rows)
        half = array.read(start, stop)
        if subset is not None:
            inside = np.arange(start, min(stop, subset.store_rows))
            half = half[: len(inside)][subset.contains(inside)]
        return np.bincount(half, minlength=3)

    with ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="halves") as pool:
        none, first, second = np.sum(list(pool.map(piece, range(0, rows, step))), axis=0).tolist()
    return none, first, second


def _numeric_columns(store: ParticleStore) -> tuple[str, ...]:
    return tuple(name for name in store.columns if not store.column_array(name).row_shape)


def _where(
    store: ParticleStore, count: int, conditions: list[tuple[tuple[str, ...], Callable[[Columns], Mask]]]
) -> Subset:
    """The first `count` rows for which every condition holds; columns are read shard by shard."""
    names = sorted({name for columns, _ in conditions for name in columns})
    arrays = {name: store.column_array(name) for name in names}
    unit = math.lcm(8, store.shard_rows)  # whole bytes of the result

    def piece(start: int) -> npt.NDArray[np.uint8]:
        stop = min(start + unit, count)
        columns = {name: array.read(start, stop) for name, array in arrays.items()}
        mask = np.ones(stop - start, dtype=bool)
        for _, holds in conditions:
            mask &= holds(columns)
        return np.packbits(mask, bitorder="little")

    with ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="subset") as pool:
        return Subset(np.concatenate(list(pool.map(piece, range(0, count, unit)))), count)


def read_index(url: str, store_rows: int, limit: int, where: str = "the store") -> Rows:
    """Row numbers, counted from 0, from a .npy of integers, cryoDRGN's .pkl of them, or a text file with
    one on each line (# begins a comment).

    Args:
        url: of the file.
        store_rows: rows of the store; a number beyond is an error.
        limit: rows from here on are left out.
        where: the rows are, for errors.

    Raises:
        MissingInputError: there is no such file.
        ConfigError, InputError: it holds something else than row numbers of the store.
    """
    shown = urls.redacted(url)
    data = urls.read_bytes(url)
    if url.endswith(".pkl"):
        return _checked_rows(load_integers(data, shown), shown, store_rows, limit, where)
    try:
        if url.endswith(".npy"):
            rows = np.load(io.BytesIO(data), allow_pickle=False)
        else:
            lines = (line.partition("#")[0].strip() for line in data.decode("utf-8-sig").splitlines())
            rows = np.array([int(line) for line in lines if line], dtype=np.int64)
    except (ValueError, EOFError, OverflowError) as error:
        raise ConfigError(f"{shown}: not row numbers ({error}): write one a line, or a .npy of integers") from error
    return _checked_rows(rows, shown, store_rows, limit, where)


def _checked_rows(rows: npt.NDArray, shown: str, store_rows: int, limit: int, where: str) -> Rows:
    """Row numbers within a store.

    Raises:
        ConfigError: they are none.
    """
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise ConfigError(f"{shown}: holds {rows.dtype} {rows.shape}: row numbers are a list of integers")
    outside = (rows < 0) | (rows >= store_rows)
    if outside.any():
        raise ConfigError(f"{shown}: row {rows[outside][0]} is not in {where}, whose rows are 0 to {store_rows - 1}")
    rows = rows.astype(np.int64)
    return rows[rows < limit]


def unequal_halves(counts: Sequence[int]) -> bool:
    """Whether a table's half-sets cannot serve as halves: all particles in one, or far more than in the other.

    Some programs write one and the same half-set where a job had none, and merged tables keep that.

    Args:
        counts: particles without a half-set, which are shared out evenly, in the first and in the second.
    """
    none, first, second = counts
    total, smaller = none + first + second, none / 2 + min(first, second)
    if not first and not second:
        return False
    if not none and not min(first, second):
        return total > 1
    return smaller < _LEAST_SHARE * total and total / 2 - smaller > _CHANCE * math.sqrt(total) / 2
