"""Windows of blocks read ahead of their use, in the order in which they will be needed, within a number of bytes."""

import heapq
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scalecryo.data.particles import Columns
from scalecryo.data.permutation import Rows
from scalecryo.data.storage.arrays import ColumnArray, ImageArray
from scalecryo.data.streaming.order import BatchOrder


@dataclass
class Window:
    """Rows of one lane's window in training order, and their data in the order in which it was read.

    Args:
        epoch, first_slot: of the lane.
        rows: in the store, in training order.
        position: where each of them lies in `images` and `columns`.
        images: whole blocks, (n, box, box).
        columns: of the same rows as `images`.
    """

    epoch: int
    first_slot: int
    rows: Rows
    position: Rows
    images: npt.NDArray
    columns: Columns

    def holds(self, epoch: int, slot: int) -> bool:
        """Whether a lane's slot lies here."""
        return epoch == self.epoch and self.first_slot <= slot < self.first_slot + len(self.rows)


@dataclass
class _PendingWindow:
    """A window on its way: the blocks' first rows, and what is still to come: pixels, and the columns of each block."""

    epoch: int
    lane: int
    number: int
    starts: Rows
    stops: Rows
    images: npt.NDArray
    blocks: list[Future[Columns]]


class WindowQueue:
    """The windows of some lanes, each handed out once, in the order in which batches need them.

    Reading runs ahead while all that was asked for and not yet handed out stays within `limit` bytes and two windows
    per lane; one window is always read. Buffers are used again.

    Args:
        order: which blocks when.
        lanes: the lanes of this rank.
        images, columns: what is read.
        threads: reading threads.
        limit: bytes of pixels.
        start_step: global step of the first batch, counted over epochs.
    """

    def __init__(
        self,
        order: BatchOrder,
        lanes: Sequence[int],
        images: ImageArray,
        columns: Mapping[str, ColumnArray],
        *,
        threads: int,
        limit: int,
        start_step: int,
    ) -> None:
        self._order = order
        self._images = images
        self._columns = columns
        self._limit = limit
        self._most = 2 * len(lanes)
        self._window_shape = (order.window_blocks * order.block_rows, images.box_size, images.box_size)
        self._window_bytes = math.prod(self._window_shape) * np.dtype(images.dtype).itemsize
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="particle-reader")
        self._free: list[npt.NDArray] = []
        self._pending: deque[_PendingWindow] = deque()
        self._fetching: dict[tuple[str, int], Future[npt.NDArray]] = {}
        self.bytes_ahead = 0  #: Bytes of pixels asked for and not yet handed out.
        epoch, step = divmod(start_step, order.steps_per_epoch)
        # (epoch, step at which it is needed, lane, window): the order in which batches ask.
        self._next: list[tuple[int, int, int, int]] = []
        for lane in lanes:
            slot = min(step * order.rows_per_lane, order.lane_rows(lane) - 1)
            heapq.heappush(self._next, (epoch, step, lane, order.window_of(lane, slot)[0]))
        self._read_ahead()

    def take(self, used: Window | None) -> Window:
        """The window that is needed next, once it is there; a window that is used up makes room.

        Raises:
            StoreError: a shard is missing or damaged, or the object store kept failing.
        """
        if used is not None:
            self._free.append(used.images)
        window = self._finish(self._pending.popleft())
        self.bytes_ahead -= self._window_bytes
        self._read_ahead()
        return window

    def close(self) -> None:
        """Stop reading."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()
        self._free.clear()

    def _read_ahead(self) -> None:
        order = self._order
        # Windows count as the largest: what is planned here is read.
        size = self._window_bytes
        while not self._pending or (self.bytes_ahead + size <= self._limit and len(self._pending) < self._most):
            epoch, _, lane, number = self._next[0]
            blocks = order.window_blocks_of(epoch, lane, number)
            self.bytes_ahead += size
            self._pending.append(self._start(epoch, lane, number, blocks))
            slot = order.window_slot(lane, number + 1)
            # The lane's window after this one, in the next epoch where the lane ends.
            following = (
                (epoch, slot // order.rows_per_lane, lane, number + 1)
                if slot < order.lane_rows(lane)
                else (epoch + 1, 0, lane, 0)
            )
            heapq.heapreplace(self._next, following)

    def _start(self, epoch: int, lane: int, number: int, blocks: Rows) -> _PendingWindow:
        order, size = self._order, self._order.block_rows
        starts = blocks * size
        stops = np.minimum(starts + size, order.count)
        # Every window fits the largest: one size of buffer for all.
        images = self._free.pop() if self._free else np.empty(self._window_shape, dtype=self._images.dtype)
        futures = []
        first = 0
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            # Asked for first: a block's thread may wait for its chunks.
            chunks = {
                (name, shard): self._chunk(name, shard)
                for name, column in self._columns.items()
                for shard, *_ in _pieces(start, stop, column.shard_rows)
            }
            view = images[first : first + stop - start]
            futures.append(self._pool.submit(self._read_block, start, stop, view, chunks))
            first += stop - start
        return _PendingWindow(epoch, lane, number, starts, stops, images, futures)

    def _chunk(self, name: str, shard: int) -> Future[npt.NDArray]:
        """A chunk of a column, on its way once; forgotten as soon as it is there, for chunks are far more than rows."""
        key = name, shard
        future = self._fetching.get(key)
        if future is None:
            future = self._fetching[key] = self._pool.submit(self._columns[name].chunk, shard)
            future.add_done_callback(lambda _: self._fetching.pop(key, None))
        return future

    def _read_block(
        self, start: int, stop: int, images: npt.NDArray, chunks: Mapping[tuple[str, int], Future[npt.NDArray]]
    ) -> Columns:
        """Fill `images` with rows start…stop−1; their columns."""
        self._images.read(start, stop, images)
        columns = {}
        for name, column in self._columns.items():
            values = columns[name] = np.empty((stop - start, *column.row_shape), dtype=column.dtype)
            for shard, low, high in _pieces(start, stop, column.shard_rows):
                at = shard * column.shard_rows + low - start
                values[at : at + high - low] = chunks[name, shard].result()[low:high]
        return columns

    def _finish(self, pending: _PendingWindow) -> Window:
        order, starts, stops = self._order, pending.starts, pending.stops
        blocks = [block.result() for block in pending.blocks]
        columns = {name: np.concatenate([block[name] for block in blocks]) for name in self._columns}
        first = np.concatenate([[0], np.cumsum(stops - starts)])
        rows = order.window_rows(pending.epoch, pending.lane, pending.number, starts // order.block_rows)
        ascending = np.argsort(starts)
        block = ascending[np.searchsorted(starts[ascending], rows, side="right") - 1]
        position = first[block] + rows - starts[block]
        return Window(
            pending.epoch, order.window_slot(pending.lane, pending.number), rows, position, pending.images, columns
        )


def _pieces(start: int, stop: int, size: int) -> Iterator[tuple[int, int, int]]:
    """The shards that rows start…stop−1 lie in, and the range inside each."""
    for shard in range(start // size, (stop - 1) // size + 1):
        yield shard, max(start - shard * size, 0), min(stop - shard * size, size)
