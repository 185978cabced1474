"""Batches out of a store, read ahead of their use.

`order.py` says which rows; this module fetches them. Each lane keeps the window in use and the next one, so memory is
bounded by lanes × two windows whatever the number of particles.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from scalecryo.data.order import BatchOrder, Rows
from scalecryo.data.particles import Columns
from scalecryo.data.shards import load_chunks
from scalecryo.data.store import ParticleStore
from scalecryo.errors import StoreError


@dataclass
class Batch:
    """Some particles on one device.

    Args:
        rows: row in the store; −1 for padding.
        images: protein-bright, float32.
        weight: 1, or 0 for padding rows, which carry some other particle's image and columns.
        columns: the particle columns asked for, each of length b, as in `particles.COLUMNS`.
    """

    rows: Int[Tensor, " b"]
    images: Float[Tensor, "b n n"]
    weight: Float[Tensor, " b"]
    columns: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch on another device."""
        return Batch(
            self.rows.to(device, non_blocking=non_blocking),
            self.images.to(device, non_blocking=non_blocking),
            self.weight.to(device, non_blocking=non_blocking),
            {name: values.to(device, non_blocking=non_blocking) for name, values in self.columns.items()},
        )


@dataclass
class _Window:
    """Rows of one lane's window in training order, and their data in the order in which it was read."""

    epoch: int
    first_slot: int
    position: Rows
    rows: Rows
    images: npt.NDArray
    columns: Columns

    def holds(self, epoch: int, slot: int) -> bool:
        return epoch == self.epoch and self.first_slot <= slot < self.first_slot + len(self.rows)


def _make_batch(rows: Rows, images: npt.NDArray, columns: Columns) -> Batch:
    return Batch(
        torch.from_numpy(rows),
        torch.from_numpy(images).to(torch.float32),
        torch.from_numpy((rows >= 0).astype(np.float32)),
        {name: torch.from_numpy(values) for name, values in columns.items()},
    )


class ParticleStream:
    """Endless training batches of one rank.

    Every rank of a world takes its own lanes of the same global batch; weights mark padding, so a loss is the weighted
    sum over all ranks divided by the summed weight. A damaged store raises from the iterator.

    Args:
        store: where the particles are.
        level: box size, one of the store's levels.
        order: which rows when; the first `count` rows of the store.
        rank, world_size: this process among all.
        start_step: global step of the first batch, counted over epochs.
        columns: particle columns to deliver with the images.
        threads: threads that read ahead.

    Raises:
        StoreError: the store lacks the level or a column, or has fewer particles than the order.
        ConfigError: there are more ranks than lanes.
    """

    def __init__(
        self,
        store: ParticleStore,
        level: int,
        order: BatchOrder,
        *,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        columns: Sequence[str] = (),
        threads: int = 2,
    ) -> None:
        if order.count > store.count:
            raise StoreError(f"{store.url}: holds {store.count} particles, the batch order is for {order.count}")
        self._images = store.image_array(level)
        self._columns = {name: store.column_array(name) for name in columns}
        self._order = order
        self._lanes = order.lane_range(rank, world_size)
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="particle-stream")
        self.step = start_step  #: Global step of the batch that comes next.
        self.wait_seconds = 0.0  #: Time the consumer has waited for data, in total.
        epoch, step = divmod(start_step, order.steps_per_epoch)
        self._current: dict[int, _Window] = {}
        self._ahead: dict[int, tuple[int, int, Future[_Window]]] = {}
        for lane in self._lanes:
            slot = min(step * order.rows_per_lane, order.lane_rows(lane) - 1)
            self._submit(lane, epoch, order.window_of(lane, slot)[0])

    def _submit(self, lane: int, epoch: int, window: int) -> None:
        self._ahead[lane] = (epoch, window, self._pool.submit(self._load, epoch, lane, window))

    def _load(self, epoch: int, lane: int, window: int) -> _Window:
        """Read the blocks of one window."""
        order = self._order
        size = order.block_rows
        starts = order.window_blocks_of(epoch, lane, window) * size
        stops = np.minimum(starts + size, order.count)
        first = np.concatenate([[0], np.cumsum(stops - starts)])
        box = self._images.box_size
        images = np.empty((int(first[-1]), box, box), dtype=self._images.dtype)
        load_chunks(self._columns.values(), starts.tolist())
        columns = {
            name: np.empty((int(first[-1]), *array.row_shape), dtype=array.dtype)
            for name, array in self._columns.items()
        }
        for start, stop, begin, end in zip(starts, stops, first[:-1], first[1:], strict=True):
            self._images.read(int(start), int(stop), images[begin:end])
            for name, array in self._columns.items():
                columns[name][begin:end] = array.read(int(start), int(stop))
        rows = order.window_rows(epoch, lane, window)
        read_order = np.argsort(starts)
        block = read_order[np.searchsorted(starts[read_order], rows, side="right") - 1]
        position = first[block] + rows - starts[block]
        return _Window(epoch, order.window_start(lane, window) * size, position, rows, images, columns)

    def _advance(self, lane: int) -> _Window:
        """The lane's next window; the one after it starts to be read."""
        epoch, window, future = self._ahead.pop(lane)
        begun = time.perf_counter()
        loaded = future.result()
        self.wait_seconds += time.perf_counter() - begun
        last = loaded.first_slot + len(loaded.rows) >= self._order.lane_rows(lane)
        self._submit(lane, epoch + last, 0 if last else window + 1)
        self._current[lane] = loaded
        return loaded

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        order, per_lane = self._order, self._order.rows_per_lane
        epoch, step = divmod(self.step, order.steps_per_epoch)
        box, size = self._images.box_size, len(self._lanes) * per_lane
        rows = np.full(size, -1, dtype=np.int64)
        images = np.empty((size, box, box), dtype=self._images.dtype)
        columns = {name: np.empty((size, *array.row_shape), dtype=array.dtype) for name, array in self._columns.items()}
        for number, lane in enumerate(self._lanes):
            slot, filled = step * per_lane, 0
            while filled < per_lane:
                # Past the end of a lane its last row stands in, with weight 0.
                real = min(slot, order.lane_rows(lane) - 1)
                window = self._current.get(lane)
                if window is None or not window.holds(epoch, real):
                    window = self._advance(lane)
                offset = real - window.first_slot
                taken = min(len(window.rows) - offset, per_lane - filled) if real == slot else 1
                here = slice(number * per_lane + filled, number * per_lane + filled + taken)
                source = window.position[offset : offset + taken]
                if real == slot:
                    rows[here] = window.rows[offset : offset + taken]
                np.take(window.images, source, axis=0, out=images[here], mode="clip")
                for name, values in columns.items():
                    values[here] = window.columns[name][source]
                slot, filled = slot + taken, filled + taken
        self.step += 1
        return _make_batch(rows, images, columns)

    def close(self) -> None:
        """Stop reading ahead."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._current.clear()
        self._ahead.clear()

    def __enter__(self) -> "ParticleStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def owned_rows(store: ParticleStore, rank: int, world_size: int, rows_limit: int | None = None) -> range:
    """The rows that one rank visits in `sequential`, at every level: whole shards, or blocks where shards are few."""
    count = store.count if rows_limit is None else min(rows_limit, store.count)
    # Block sizes are powers of two: the largest is whole blocks of every level.
    blocks = max(store.block_rows(level) for level in store.levels)
    unit = store.shard_rows if count >= 8 * world_size * store.shard_rows else blocks
    units = -(-count // unit)
    start, stop = (min(part * units // world_size * unit, count) for part in (rank, rank + 1))
    return range(start, stop)


def sequential(
    store: ParticleStore,
    level: int,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    columns: Sequence[str] = (),
    rows_limit: int | None = None,
    threads: int = 2,
) -> Iterator[Batch]:
    """All particles once, in the order of the store, each rank its own range; the last batch may be shorter.

    Args:
        store: where the particles are.
        level: box size, one of the store's levels.
        batch_size: rows of one rank's batch.
        rank, world_size: this process among all.
        columns: particle columns to deliver with the images.
        rows_limit: only the first so many particles.
        threads: batches that are read ahead.

    Raises:
        StoreError: the store lacks the level or a column, or a shard is missing or damaged.
    """
    owned = owned_rows(store, rank, world_size, rows_limit)

    def load(start: int) -> Batch:
        stop = min(start + batch_size, owned.stop)
        values = store.read_columns(start, stop, tuple(columns)) if columns else {}
        return _make_batch(np.arange(start, stop), store.read_images(level, start, stop), values)

    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="particle-sequential") as pool:
        starts = iter(range(owned.start, owned.stop, batch_size))
        ahead = [pool.submit(load, start) for start in islice(starts, threads + 1)]
        while ahead:
            batch = ahead.pop(0).result()
            if (start := next(starts, None)) is not None:
                ahead.append(pool.submit(load, start))
            yield batch
