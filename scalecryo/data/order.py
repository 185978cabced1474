"""Which particle goes where: the order of training batches as a pure function of seed, epoch and step.

Rows are grouped in blocks (an image array's inner chunks). An epoch is a keyed permutation of the blocks; permuted
block j belongs to lane j mod `lanes`; each lane shuffles its rows inside windows of a few blocks, and a global batch
takes the same number of rows from every lane. A rank owns a contiguous range of lanes, so the global batches do not
depend on how many ranks there are. Nothing here grows with the number of particles and any step is reached directly.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scalecryo.errors import ConfigError

Rows = npt.NDArray[np.int64]

_ROUNDS = 6
_MASK = (1 << 64) - 1


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's output function (Steele, Lea & Flood 2014): spreads every input bit over 64 bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: Rows, size: int, seed: int, epoch: int) -> Rows:
    """Images of `index` under a pseudo-random permutation of range(size), keyed by seed and epoch.

    A balanced Feistel network on the next power of four, walked until it lands inside the range
    (Black & Rogaway 2002): random access, no memory in `size`.
    """
    half_bits = max(3, ((size - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    base = np.array([seed & _MASK, epoch & _MASK, 0x9E3779B97F4A7C15], dtype=np.uint64)
    key = _mix(_mix(_mix(base[:1]) ^ base[1:2]) ^ base[2:])
    round_keys = _mix(key + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * base[2])

    def step(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = value >> shift, value & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        return (left << shift) | right

    value = step(np.asarray(index, dtype=np.uint64))
    outside = value >= np.uint64(size)
    while outside.any():
        value[outside] = step(value[outside])
        outside = value >= np.uint64(size)
    return value.astype(np.int64)


@dataclass(frozen=True)
class BatchOrder:
    """The order of all batches over `count` particles.

    Args:
        count: number of particles.
        block_rows: particles in one block; a block is read whole.
        batch_size: rows of one global batch, over all ranks.
        seed: any integer; the same seed gives the same batches.
        max_lanes: upper limit of the number of lanes, and so of ranks.
        window_blocks: blocks that a lane mixes at a time.
    """

    count: int
    block_rows: int
    batch_size: int
    seed: int
    max_lanes: int = 32
    window_blocks: int = 4

    def __post_init__(self) -> None:
        for name in ("count", "block_rows", "batch_size", "max_lanes", "window_blocks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"batch order: {name} is {getattr(self, name)}, it must be at least 1")

    @property
    def full_blocks(self) -> int:
        """Number of blocks that hold `block_rows` rows; a shorter one may follow them."""
        return self.count // self.block_rows

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.count // self.block_rows)

    @property
    def lanes(self) -> int:
        """Number of lanes: the largest divisor of the batch size within `max_lanes` and the blocks."""
        limit = min(self.max_lanes, self.blocks, self.batch_size)
        return next(lanes for lanes in range(limit, 0, -1) if self.batch_size % lanes == 0)

    @property
    def rows_per_lane(self) -> int:
        """Rows that one lane gives to a global batch."""
        return self.batch_size // self.lanes

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every particle has been seen once; lanes that end sooner are padded with -1."""
        return -(-max(self.lane_rows(0), self.lane_rows(self.full_blocks % self.lanes)) // self.rows_per_lane)

    def lane_blocks(self, lane: int) -> int:
        """Number of blocks of one lane, the same in every epoch."""
        return -(-(self.blocks - lane) // self.lanes)

    def lane_rows(self, lane: int) -> int:
        """Number of rows of one lane, the same in every epoch because the short block is always placed last."""
        rows = self.lane_blocks(lane) * self.block_rows
        short = self.blocks != self.full_blocks and lane == self.full_blocks % self.lanes
        return rows - (self.blocks * self.block_rows - self.count) if short else rows

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
        offset = slot // self.block_rows - 1 - lane % self.window_blocks
        window = 0 if offset < 0 else 1 + offset // self.window_blocks
        return window, self.window_start(lane, window) * self.block_rows

    def window_blocks_of(self, epoch: int, lane: int, window: int) -> Rows:
        """Blocks of one window, in the order in which they are read; empty past the end of the lane."""
        stop = min(self.window_start(lane, window + 1), self.lane_blocks(lane))
        position = np.arange(self.window_start(lane, window), stop, dtype=np.int64) * self.lanes + lane
        blocks = position.copy()
        full = position < self.full_blocks
        if full.any():
            blocks[full] = permute(position[full], self.full_blocks, self.seed, epoch)
        return blocks

    def window_rows(self, epoch: int, lane: int, window: int) -> Rows:
        """Rows of one window in training order: its blocks' rows, shuffled.

        The shuffle sorts raw Philox words, which NumPy keeps stable between versions.
        """
        starts = self.window_blocks_of(epoch, lane, window) * self.block_rows
        rows = (starts[:, None] + np.arange(self.block_rows)).reshape(-1)
        rows = rows[rows < self.count]
        key = np.array([self.seed & _MASK, epoch & _MASK], dtype=np.uint64)
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
