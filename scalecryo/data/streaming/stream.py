"""Batches out of a store, read ahead of their use.

`order.py` says which rows, `prefetch.py` fetches them, and this module puts batches together: the next one while the
last is in use. Each lane keeps the window in use, and what is read ahead is bounded, whatever the number of particles.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from types import TracebackType

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from scalecryo.data.io import urls
from scalecryo.data.io.ranges import RangeReader
from scalecryo.data.io.retry import RetryPolicy
from scalecryo.data.particles import Columns
from scalecryo.data.permutation import Rows
from scalecryo.data.storage.store import ParticleStore
from scalecryo.data.streaming.order import BatchOrder
from scalecryo.data.streaming.prefetch import Window, WindowQueue
from scalecryo.errors import StoreError

PREFETCH_BYTES = 256 << 20
_LOCAL_THREADS, _REMOTE_THREADS = 4, 12


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


@dataclass(frozen=True)
class StreamMetrics:
    """What a stream has done so far.

    Args:
        wait_seconds: time that the consumer has waited for data.
        bytes_read, requests: from the store, images and columns.
        retries: requests that failed and were made again.
        bytes_ahead: pixels that are read or on their way, and not yet in use.
        bytes_in_flight: of requests under way now.
    """

    wait_seconds: float
    bytes_read: int
    requests: int
    retries: int
    bytes_ahead: int
    bytes_in_flight: int


@dataclass
class _HostBatch:
    """A batch before it goes to its device: the stored dtype, pinned where that device is a GPU."""

    rows: Rows
    images: Tensor
    columns: Columns

    def to(self, device: torch.device) -> Batch:
        weight = torch.from_numpy((self.rows >= 0).astype(np.float32))
        columns = {name: _moved(torch.from_numpy(values), device) for name, values in self.columns.items()}
        images = self.images.to(device, non_blocking=True).to(torch.float32)
        return Batch(_moved(torch.from_numpy(self.rows), device), images, _moved(weight, device), columns)


def _moved(values: Tensor, device: torch.device) -> Tensor:
    """On the device; through page-locked memory where that is a GPU, so that nobody waits for the copy."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


class _Uploads:
    """Batches on their way to a GPU, in a stream of their own: copies run beside what the GPU computes.

    Elsewhere a batch is moved when it is asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self, batch: _HostBatch) -> "_HostBatch | Batch":
        """Start the copies; on the thread that put the batch together."""
        if self._stream is None:
            return batch
        with torch.cuda.stream(self._stream):
            return batch.to(self._device)

    def finish(self, batch: "_HostBatch | Batch") -> Batch:
        """The batch, for the stream that computes: that stream waits for the copies, the host does not."""
        if isinstance(batch, _HostBatch):
            return batch.to(self._device)
        assert self._stream is not None, "only an own stream has copies under way"
        using = torch.cuda.current_stream(self._device)
        using.wait_stream(self._stream)
        for values in (batch.rows, batch.images, batch.weight, *batch.columns.values()):
            values.record_stream(using)  # its memory is not given away before the work on it has ended
        return batch


def _host_images(shape: tuple[int, ...], dtype: str, device: torch.device) -> Tensor:
    """Room for a batch's images; page-locked memory comes from torch's pool, which knows when a copy has ended."""
    return torch.empty(shape, dtype=getattr(torch, dtype), pin_memory=device.type == "cuda")


def reading_threads(url: str, threads: int) -> int:
    """The number asked for; where it is 0, few for files and enough to hide an object store's latency."""
    return threads or (_LOCAL_THREADS if urls.is_local(url) else _REMOTE_THREADS)


class ParticleStream:
    """Endless training batches of one rank.

    Every rank of a world takes its own lanes of the same global batch; weights mark padding, so a loss is the weighted
    sum over all ranks divided by the summed weight. A damaged store raises from the iterator.

    Args:
        store: where the particles are.
        level: box size, one of the store's levels; nothing else is read.
        order: which rows when; the first `count` rows of the store.
        rank, world_size: this process among all.
        start_step: global step of the first batch, counted over epochs.
        columns: particle columns to deliver with the images.
        threads: that read; 0: 4 for files, 12 for object storage.
        prefetch_bytes: pixels that are read ahead at most, but for one window.
        patience: with an object store that fails.
        device: of the batches; images go there in the stored dtype and become float32 there.

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
        threads: int = 0,
        prefetch_bytes: int = PREFETCH_BYTES,
        patience: RetryPolicy | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if order.count > store.count:
            raise StoreError(f"{store.url}: holds {store.count} particles, the batch order is for {order.count}")
        self._reader = RangeReader(patience)
        self._images = dataclasses.replace(store.image_array(level), reader=self._reader)
        arrays = {name: dataclasses.replace(store.column_array(name), reader=self._reader) for name in columns}
        self._columns = arrays
        self._order = order
        self._lanes = order.lane_range(rank, world_size)
        self._device = torch.device(device)
        self.step = start_step  #: Global step of the batch that comes next.
        self.wait_seconds = 0.0  #: Time the consumer has waited for data, in total.
        self._current: dict[int, Window] = {}
        self._rooms: dict[int, Tensor] = {}
        self._windows = WindowQueue(
            order, self._lanes, self._images, arrays, threads=reading_threads(store.url, threads),
            limit=prefetch_bytes, start_step=start_step,
        )  # fmt: skip
        self._assembler = ThreadPoolExecutor(max_workers=1, thread_name_prefix="particle-batch")
        self._uploads = _Uploads(self._device)
        self._coming: Future[_HostBatch | Batch] = self._assembler.submit(self._prepare, start_step)

    @property
    def metrics(self) -> StreamMetrics:
        """What the stream has done so far."""
        counts = self._reader.counts
        return StreamMetrics(
            self.wait_seconds, counts.bytes_read, counts.requests, counts.retries, self._windows.bytes_ahead,
            counts.bytes_in_flight,
        )  # fmt: skip

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        begun = time.perf_counter()
        batch = self._coming.result()
        self.wait_seconds += time.perf_counter() - begun
        self.step += 1
        ready = self._uploads.finish(batch)  # before the next copies are queued behind its own
        self._coming = self._assembler.submit(self._prepare, self.step)
        return ready

    def _prepare(self, global_step: int) -> _HostBatch | Batch:
        return self._uploads.begin(self._assemble(global_step))

    def _room(self, global_step: int, shape: tuple[int, ...]) -> Tensor:
        """Room for a batch: that of the batch before last, where it has become another tensor on the way out."""
        if self._device.type != "cpu" or self._images.dtype == "float32":
            return _host_images(shape, self._images.dtype, self._device)
        if global_step % 2 not in self._rooms:
            self._rooms[global_step % 2] = _host_images(shape, self._images.dtype, self._device)
        return self._rooms[global_step % 2]

    def _assemble(self, global_step: int) -> _HostBatch:
        """Gather this rank's rows of one batch from the lanes' windows."""
        order, per_lane = self._order, self._order.rows_per_lane
        epoch, step = divmod(global_step, order.steps_per_epoch)
        box, size = self._images.box_size, len(self._lanes) * per_lane
        rows = np.full(size, -1, dtype=np.int64)
        images = self._room(global_step, (size, box, box))
        pixels = images.numpy()
        columns = {name: np.empty((size, *array.row_shape), dtype=array.dtype) for name, array in self._columns.items()}
        for number, lane in enumerate(self._lanes):
            slot, filled = step * per_lane, 0
            while filled < per_lane:
                # Past the end of a lane its last row stands in, with weight 0.
                real = min(slot, order.lane_rows(lane) - 1)
                window = self._current.get(lane)
                if window is None or not window.holds(epoch, real):
                    window = self._current[lane] = self._windows.take(window)
                offset = real - window.first_slot
                taken = min(len(window.rows) - offset, per_lane - filled) if real == slot else 1
                here = slice(number * per_lane + filled, number * per_lane + filled + taken)
                source = window.position[offset : offset + taken]
                if real == slot:
                    rows[here] = window.rows[offset : offset + taken]
                np.take(window.images, source, axis=0, out=pixels[here], mode="clip")
                for name, values in columns.items():
                    values[here] = window.columns[name][source]
                slot, filled = slot + taken, filled + taken
        return _HostBatch(rows, images, columns)

    def close(self) -> None:
        """Stop reading ahead."""
        self._reader.stop()
        self._windows.close()
        self._assembler.shutdown(wait=True, cancel_futures=True)
        self._current.clear()

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
    threads: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """All particles once, in the order of the store, each rank its own range; the last batch may be shorter.

    Args:
        store: where the particles are.
        level: box size, one of the store's levels.
        batch_size: rows of one rank's batch.
        rank, world_size: this process among all.
        columns: particle columns to deliver with the images.
        rows_limit: only the first so many particles.
        threads: batches that are read ahead, within `PREFETCH_BYTES`; 0: 4 for files, 12 for object storage.
        device: of the batches; images become float32 there.

    Raises:
        StoreError: the store lacks the level or a column, or a shard is missing or damaged.
    """
    owned = owned_rows(store, rank, world_size, rows_limit)
    array, target = store.image_array(level), torch.device(device)
    affordable = PREFETCH_BYTES // (batch_size * level**2 * np.dtype(store.dtype).itemsize)
    threads = max(1, min(reading_threads(store.url, threads), affordable))

    def load(start: int) -> _HostBatch:
        stop = min(start + batch_size, owned.stop)
        values = store.read_columns(start, stop, tuple(columns)) if columns else {}
        images = _host_images((stop - start, level, level), store.dtype, target)
        array.read(start, stop, images.numpy())
        return _HostBatch(np.arange(start, stop), images, values)

    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="particle-sequential") as pool:
        starts = iter(range(owned.start, owned.stop, batch_size))
        ahead = [pool.submit(load, start) for start in islice(starts, threads + 1)]
        while ahead:
            batch = ahead.pop(0).result()
            if (start := next(starts, None)) is not None:
                ahead.append(pool.submit(load, start))
            yield batch.to(target)
