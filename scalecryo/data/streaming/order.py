"""Which particle goes where: the order of training batches as a pure function of seed, epoch and step.

Rows are grouped in blocks (an image array's inner chunks). An epoch is a keyed permutation of the blocks; permuted
block j belongs to lane j mod `lanes`; each lane shuffles its rows inside windows of a few blocks, and a global batch
takes the same number of rows from every lane. A rank owns a contiguous range of lanes, so the global batches do not
depend on how many ranks there are. Any step is reached directly, and nothing here grows with the number of particles,
but for a subset's tables (see `_ChosenBlocks`).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from scalecryo.data.permutation import MASK, Rows, mix, permute
from scalecryo.data.selection.subset import Subset
from scalecryo.errors import ConfigError

_ALWAYS = -1  # the key, in place of an epoch, of what is the same in every epoch


class _Blocks(Protocol):
    """The blocks of an epoch by position. Position j is in lane j mod lanes; how many rows lie there never changes."""

    @property
    def blocks(self) -> int:
        """Number of blocks."""

    @property
    def lanes(self) -> int:
        """Number of lanes."""

    def lane_slot(self, lane: int, block: int) -> int:
        """Rows of a lane before its block of this number."""

    def lane_block(self, lane: int, slot: int) -> int:
        """The number, inside the lane, of the block that holds a slot."""

    def at(self, position: Rows, epoch: int) -> Rows:
        """The blocks at some positions."""


def _lane_blocks(blocks: int, lanes: int, lane: int) -> int:
    return -(-(blocks - lane) // lanes)


@dataclass(frozen=True)
class _EvenBlocks:
    """All rows of a store: every block is full, but for a last one, which keeps the last position."""

    count: int
    block_rows: int
    seed: int
    blocks: int
    lanes: int

    def lane_slot(self, lane: int, block: int) -> int:
        full = self.count // self.block_rows
        ends_short = self.blocks != full and lane == full % self.lanes
        short = ends_short and block == _lane_blocks(self.blocks, self.lanes, lane)
        return block * self.block_rows - (self.blocks * self.block_rows - self.count if short else 0)

    def lane_block(self, lane: int, slot: int) -> int:
        return slot // self.block_rows

    def at(self, position: Rows, epoch: int) -> Rows:
        blocks = position.copy()
        full = position < self.count // self.block_rows
        if full.any():
            blocks[full] = permute(position[full], self.count // self.block_rows, self.seed, epoch)
        return blocks


class _ChosenBlocks:
    """The blocks that hold rows of a subset, with as many chosen rows at a position in every epoch.

    Blocks are ranked by their number of chosen rows and dealt to the lanes from the fullest on, each rank once, the
    deals in a random order that stays: lanes differ by about a block. In each epoch blocks of the same number of chosen
    rows change places. Two numbers for each block are kept.
    """

    def __init__(self, subset: Subset, block_rows: int, seed: int, limit: int, batch_size: int) -> None:
        counts = subset.block_counts(block_rows)
        occupied = np.flatnonzero(counts)
        self._ranked = occupied[np.argsort(-counts[occupied], kind="stable")]
        self._seed = seed
        self.blocks: int = len(occupied)
        self.lanes: int = _lanes(min(limit, self.blocks), batch_size)
        ranked = counts[self._ranked]
        self._classes = np.concatenate([[0], np.flatnonzero(np.diff(ranked)) + 1, [self.blocks]])
        held = ranked[self._rank(np.arange(self.blocks))]
        self._slots = [np.concatenate([[0], np.cumsum(held[lane :: self.lanes])]) for lane in range(self.lanes)]

    def _rank(self, position: Rows) -> Rows:
        """Which block, counted from the fullest, has its number of rows at a position."""
        deals = self.blocks // self.lanes
        turn, lane = np.divmod(position, self.lanes)
        rank = position.copy()  # the last, incomplete deal: the emptiest blocks
        dealt = turn < deals
        if dealt.any():
            deal = permute(turn[dealt], deals, self._seed, _ALWAYS)
            first = mix(deal.astype(np.uint64) ^ np.uint64(self._seed & MASK)) % np.uint64(self.lanes)
            rank[dealt] = deal * self.lanes + (lane[dealt] + first.astype(np.int64)) % self.lanes
        return rank

    def lane_slot(self, lane: int, block: int) -> int:
        return int(self._slots[lane][block])

    def lane_block(self, lane: int, slot: int) -> int:
        return int(np.searchsorted(self._slots[lane], slot, side="right")) - 1

    def at(self, position: Rows, epoch: int) -> Rows:
        rank = self._rank(position)
        number = np.searchsorted(self._classes, rank, side="right") - 1
        for held in np.unique(number):
            start, stop = (int(value) for value in self._classes[held : held + 2])
            same = number == held
            rank[same] = start + permute(rank[same] - start, stop - start, self._seed + (int(held) << 32), epoch)
        return self._ranked[rank]


def _lanes(limit: int, batch_size: int) -> int:
    """The largest divisor of the batch size up to a limit."""
    return next(lanes for lanes in range(min(limit, batch_size), 0, -1) if batch_size % lanes == 0)


@dataclass(frozen=True)
class BatchOrder:
    """The order of all batches over `count` particles, or over a subset of them.

    Args:
        count: the first so many particles of the store take part.
        block_rows: particles in one block; a block is read whole.
        batch_size: rows of one global batch, over all ranks.
        seed: any integer; the same seed gives the same batches.
        max_lanes: upper limit of the number of lanes, and so of ranks.
        window_blocks: blocks that a lane mixes at a time.
        subset: only these rows; blocks that hold none of them are never read.

    Raises:
        ConfigError: a size is below one, or the subset is empty or of another number of rows.
    """

    count: int
    block_rows: int
    batch_size: int
    seed: int
    max_lanes: int = 32
    window_blocks: int = 4
    subset: Subset | None = None

    def __post_init__(self) -> None:
        for name in ("count", "block_rows", "batch_size", "max_lanes", "window_blocks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"batch order: {name} is {getattr(self, name)}, it must be at least 1")
        if self.subset is not None and (self.subset.store_rows != self.count or not self.subset.count):
            raise ConfigError(
                f"batch order: a subset of {self.subset.count} out of {self.subset.store_rows} rows, over {self.count}"
            )

    @cached_property
    def _blocks(self) -> _Blocks:
        if self.subset is not None:
            return _ChosenBlocks(self.subset, self.block_rows, self.seed, self.max_lanes, self.batch_size)
        blocks = -(-self.count // self.block_rows)
        lanes = _lanes(min(self.max_lanes, blocks), self.batch_size)
        return _EvenBlocks(self.count, self.block_rows, self.seed, blocks, lanes)

    @property
    def blocks(self) -> int:
        """Number of blocks that are read in an epoch."""
        return self._blocks.blocks

    @property
    def lanes(self) -> int:
        """Number of lanes: the largest divisor of the batch size within `max_lanes` and the blocks."""
        return self._blocks.lanes

    @property
    def rows_per_lane(self) -> int:
        """Rows that one lane gives to a global batch."""
        return self.batch_size // self.lanes

    @cached_property
    def steps_per_epoch(self) -> int:
        """Steps until every particle has been seen once; lanes that end sooner are padded with -1."""
        return -(-max(self.lane_rows(lane) for lane in range(self.lanes)) // self.rows_per_lane)

    def lane_blocks(self, lane: int) -> int:
        """Number of blocks of one lane, the same in every epoch."""
        return _lane_blocks(self.blocks, self.lanes, lane)

    def lane_rows(self, lane: int) -> int:
        """Number of rows of one lane, the same in every epoch."""
        return self._blocks.lane_slot(lane, self.lane_blocks(lane))

    def lane_range(self, rank: int, world_size: int) -> range:
        """Lanes of one rank: contiguous, disjoint, and as even as they can be.

        Raises:
            ConfigError: there are more ranks than lanes, or no such rank.
        """
        if not 0 <= rank < world_size:
            raise ConfigError(f"batch order: rank {rank} does not exist among {world_size} ranks")
        if world_size > self.lanes:
            raise ConfigError(
                f"batch order: {world_size} ranks share {self.lanes} lanes; use fewer workers, or a batch size "
                f"(now {self.batch_size}) with a divisor of at least {world_size} (max_lanes {self.max_lanes})"
            )
        return range(rank * self.lanes // world_size, (rank + 1) * self.lanes // world_size)

    def window_start(self, lane: int, window: int) -> int:
        """First block of a window, counted inside the lane.

        Window 0 is of 1 + lane mod `window_blocks` blocks, so that lanes do not all change windows in one step.
        """
        return 0 if window == 0 else 1 + lane % self.window_blocks + (window - 1) * self.window_blocks

    def window_of(self, lane: int, slot: int) -> tuple[int, int]:
        """Window that holds a lane's slot (0 = first row of the epoch), and the window's own first slot."""
        offset = self._blocks.lane_block(lane, slot) - 1 - lane % self.window_blocks
        window = 0 if offset < 0 else 1 + offset // self.window_blocks
        return window, self.window_slot(lane, window)

    def window_slot(self, lane: int, window: int) -> int:
        """A lane's slot at which one of its windows begins."""
        return self._blocks.lane_slot(lane, min(self.window_start(lane, window), self.lane_blocks(lane)))

    def window_blocks_of(self, epoch: int, lane: int, window: int) -> Rows:
        """Blocks of one window, in the order in which they are read; empty past the end of the lane."""
        stop = min(self.window_start(lane, window + 1), self.lane_blocks(lane))
        position = np.arange(self.window_start(lane, window), stop, dtype=np.int64) * self.lanes + lane
        return self._blocks.at(position, epoch)

    def window_rows(self, epoch: int, lane: int, window: int, blocks: Rows | None = None) -> Rows:
        """Rows of one window in training order: its blocks' rows, shuffled.

        The shuffle sorts raw Philox words, which NumPy keeps stable between versions.

        Args:
            blocks: what `window_blocks_of` gave, where it was asked already.
        """
        starts = (self.window_blocks_of(epoch, lane, window) if blocks is None else blocks) * self.block_rows
        rows = (starts[:, None] + np.arange(self.block_rows)).reshape(-1)
        rows = rows[rows < self.count]
        if self.subset is not None:
            rows = rows[self.subset.contains(rows)]
        key = np.array([self.seed & MASK, epoch & MASK], dtype=np.uint64)
        counter = np.array([0, 0, window, lane], dtype=np.uint64)
        words = np.random.Philox(key=key, counter=counter).random_raw(len(rows))
        return rows[np.argsort(words, kind="stable")]

    def rows(self, epoch: int, step: int, lanes: range | None = None) -> Rows:
        """Rows of one batch, lane after lane; -1 pads lanes that have ended.

        Args:
            epoch: 0, 1, …
            step: step inside the epoch, below `steps_per_epoch`.
            lanes: the lanes wanted (`lane_range`), all of them by default: the global batch.
        """
        chosen = range(self.lanes) if lanes is None else lanes
        out = np.full((len(chosen), self.rows_per_lane), -1, dtype=np.int64)
        for line, lane in zip(out, chosen, strict=True):
            start = step * self.rows_per_lane
            stop = min(start + self.rows_per_lane, self.lane_rows(lane))
            filled = 0
            while start + filled < stop:
                window, first = self.window_of(lane, start + filled)
                offset = start + filled - first
                part = self.window_rows(epoch, lane, window)[offset : offset + stop - start - filled]
                line[filled : filled + len(part)] = part
                filled += len(part)
        return out.reshape(-1)
