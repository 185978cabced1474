"""Reading rows of a store's arrays: a block with one positioned read straight into the caller's array.

What zarr-python reads, this reads identically: layouts that the direct reader does not know go through zarr-python.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from scalecryo.data.io import urls
from scalecryo.data.io.ranges import RangeReader
from scalecryo.data.io.retry import cause
from scalecryo.data.storage.shards import ABSENT, CRC_BYTES, crc_holds
from scalecryo.data.storage.zarr_layout import ObjectLayout, ZarrRows, read_layout
from scalecryo.errors import MissingInputError, StoreError

_INDEX_CACHE = 4 << 20  # bytes; an index is about 1 kB
_COLUMN_CACHE = 512 << 10  # bytes per column: all of it up to some 50,000 particles; of more, little would be met again
_REQUEST_BYTES = 8 << 20


class _Cache:
    """The most recently used arrays up to a number of bytes, and a layout, for several threads."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes = 0
        self._entries: OrderedDict[int, npt.NDArray] = OrderedDict()
        self._lock = threading.Lock()
        self._layout: ObjectLayout | None = None
        self._rows: ZarrRows | None = None

    def get(self, key: int) -> npt.NDArray | None:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: int, value: npt.NDArray) -> None:
        value = value.copy()  # of its own: an answer may be a piece of a far larger network buffer
        with self._lock:
            old = self._entries.pop(key, None)
            self._bytes += value.nbytes - (0 if old is None else old.nbytes)
            self._entries[key] = value
            while self._bytes > self._limit and len(self._entries) > 1:
                self._bytes -= self._entries.popitem(last=False)[1].nbytes

    def layout(self, make: Callable[[], ObjectLayout]) -> ObjectLayout:
        """The array's layout, made once."""
        with self._lock:
            if self._layout is None:
                self._layout = make()
            return self._layout

    def rows(self, url: str) -> ZarrRows:
        """The array as zarr-python opens it, opened once."""
        with self._lock:
            if self._rows is None:
                self._rows = ZarrRows(url)
            return self._rows


@dataclass(frozen=True)
class ImageArray:
    """A sharded image array on disk or in an object store; safe to read from several threads.

    Args:
        url: of the array (the folder of its `zarr.json`).
        name: as it appears in messages.
        count: rows of the array.
        box_size: side of the images, px.
        dtype: `float16` or `float32`.
        block_rows, shard_rows: rows of a block and of a shard.
        reader: of bytes.
    """

    url: str
    name: str
    count: int
    box_size: int
    dtype: str
    block_rows: int
    shard_rows: int
    reader: RangeReader = field(default_factory=RangeReader, repr=False, compare=False)
    _cache: _Cache = field(default_factory=lambda: _Cache(_INDEX_CACHE), repr=False, compare=False)

    @property
    def block_bytes(self) -> int:
        """Bytes of the pixels of one block."""
        return self.block_rows * self.box_size**2 * np.dtype(self.dtype).itemsize

    def shard_url(self, shard: int) -> str:
        """Address of one shard's object."""
        return f"{self.url}/c/{shard}/0/0"

    def read(self, start: int, stop: int, out: npt.NDArray | None = None) -> npt.NDArray:
        """Rows start…stop−1 as (n, box, box) in the stored dtype; every block read is checked against its CRC32C.

        Args:
            start, stop: rows.
            out: where to put them, C-contiguous; a new array when absent.

        Raises:
            StoreError: a shard is missing or damaged, or the object store kept failing.
        """
        if not 0 <= start <= stop <= self.count:
            raise StoreError(f"{self.name}: rows {start} to {stop} were asked for but it holds {self.count}")
        if out is None:
            out = np.empty((stop - start, self.box_size, self.box_size), dtype=self.dtype)
        layout = self._layout()
        row = start
        while row < stop:
            shard = row // self.shard_rows
            shard_stop = min((shard + 1) * self.shard_rows, stop)
            part = out[row - start : shard_stop - start]
            try:
                if layout.direct:
                    self._read_in_shard(row, part, layout)
                else:
                    part[:] = _through_zarr(
                        self._cache, self.url, self.shard_url(shard), row, shard_stop, self._where(shard)
                    )
            except MissingInputError as error:
                raise self._damaged(shard, "the object is missing") from error
            row = shard_stop
        return out

    def _layout(self) -> ObjectLayout:
        shape = (self.count, self.box_size, self.box_size)
        return self._cache.layout(
            lambda: read_layout(
                self.url, _metadata(self.reader, self.url), shape, self.dtype, self.shard_rows, self.block_rows
            )
        )

    def _where(self, shard: int) -> str:
        return f"shard {shard} of {self.name}, "

    def _damaged(self, shard: int, what: str) -> StoreError:
        first, last = shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.count)
        return StoreError(
            f"{urls.redacted(self.shard_url(shard))}: {what} (shard {shard} of {self.name}, particles {first + 1} to "
            f"{last}); run `scalecryo verify`, then convert again with --overwrite"
        )

    def _index(self, shard: int, layout: ObjectLayout) -> npt.NDArray:
        """Offset and length of every block of a shard; only the object's first or last kilobyte is read."""
        cached = self._cache.get(shard)
        if cached is not None:
            return cached
        slots = self.shard_rows // self.block_rows
        tail = slots * 16 + CRC_BYTES
        if layout.index_first:
            body = self._checked_index(shard, tail, tail)
        else:
            blocks = -(-min(self.shard_rows, self.count - shard * self.shard_rows) // self.block_rows)
            # Where conversion puts the index; a store written otherwise may be of another length: another request.
            body = self._checked_index(shard, blocks * (self.block_bytes + CRC_BYTES) + tail, tail)
            if body is None:
                body = self._checked_index(shard, self.reader.size(self.shard_url(shard)), tail)
        if body is None:
            raise self._damaged(shard, "its index is damaged")
        index = body.view("<u8").reshape(slots, 2)
        self._cache.put(shard, index)
        return index

    def _checked_index(self, shard: int, stop: int, tail: int) -> npt.NDArray[np.uint8] | None:
        """The bytes of an object before `stop`, without their checksum; None when it does not hold."""
        found = self.reader.read(
            self.shard_url(shard), max(0, stop - tail), stop, whole=False, where=self._where(shard) + "index, "
        )
        body = np.frombuffer(found, dtype=np.uint8)[:-CRC_BYTES]
        return body if len(found) == tail and crc_holds(body, found[-CRC_BYTES:]) else None

    def _read_in_shard(self, first: int, out: npt.NDArray, layout: ObjectLayout) -> None:
        """Fill `out` with rows of one shard, from row `first` on; neighbouring blocks share a request."""
        shard = first // self.shard_rows
        index = self._index(shard, layout)
        length = self.block_bytes + CRC_BYTES
        run: list[int] = []  # first rows of blocks that follow each other in the object
        run_offset = 0
        for start in range(first - first % self.block_rows, first + len(out), self.block_rows):
            offset, found = (int(value) for value in index[start % self.shard_rows // self.block_rows])
            if found == offset == ABSENT:
                out[max(start - first, 0) : max(start + self.block_rows - first, 0)] = layout.fill_value
                continue
            if found != length:
                raise self._damaged(shard, "a block is of the wrong length")
            if run and (offset != run_offset + len(run) * length or len(run) * length >= _REQUEST_BYTES):
                self._read_run(shard, run_offset, run, first, out)
                run = []
            if not run:
                run_offset = offset
            run.append(start)
        if run:
            self._read_run(shard, run_offset, run, first, out)

    def _read_run(self, shard: int, offset: int, run: list[int], first: int, out: npt.NDArray) -> None:
        """Read blocks that lie side by side, check them, and put the rows that `out` wants where they belong."""
        size, stop = self.block_rows, first + len(out)
        # Whole blocks are read in place, blocks at the ends that are wanted in part through a copy.
        blocks = [
            out[start - first : start - first + size]
            if first <= start and start + size <= stop
            else np.empty((size, *out.shape[1:]), dtype=out.dtype)
            for start in run
        ]
        data = [block.reshape(-1).view(np.uint8) for block in blocks]
        wrong = self._fill(shard, offset, data)
        if wrong and not urls.is_local(self.url):
            wrong = self._fill(shard, offset, data)  # once more: the network may have done it
        if wrong:
            raise self._damaged(shard, f"wrong checksum in the block of particles {run[wrong[0]] + 1}…")
        for start, block in zip(run, blocks, strict=True):
            begin, end = max(start, first), min(start + size, stop)
            if end - begin < size:
                out[begin - first : end - first] = block[begin - start : end - start]

    def _fill(self, shard: int, offset: int, data: list[npt.NDArray[np.uint8]]) -> list[int]:
        """Fill buffers from an object, in which a checksum follows each; which of them do not match it."""
        checksums = [bytearray(CRC_BYTES) for _ in data]
        buffers = [buffer for part, checksum in zip(data, checksums, strict=True) for buffer in (part.data, checksum)]
        if not self.reader.read_into(self.shard_url(shard), offset, buffers, where=self._where(shard)):
            raise self._damaged(shard, "the object is shorter than its index says")
        pairs = zip(data, checksums, strict=True)
        return [number for number, (part, checksum) in enumerate(pairs) if not crc_holds(part, checksum)]


@dataclass(frozen=True)
class ColumnArray:
    """A per-particle column: one chunk for each shard of the images. Arguments as for `ImageArray`."""

    url: str
    name: str
    count: int
    dtype: str
    row_shape: tuple[int, ...]
    shard_rows: int
    reader: RangeReader = field(default_factory=RangeReader, repr=False, compare=False)
    _cache: _Cache = field(default_factory=lambda: _Cache(_COLUMN_CACHE), repr=False, compare=False)

    def shard_url(self, shard: int) -> str:
        """Address of one chunk's object."""
        return "/".join([self.url, "c", str(shard), *("0" for _ in self.row_shape)])

    def chunk(self, shard: int) -> npt.NDArray:
        """Rows of one chunk, which may be padded to `shard_rows`.

        Raises:
            StoreError: the object is missing or damaged, or the object store kept failing.
        """
        values = self.cached(shard)
        if values is None:
            values = self._fetch(shard)
            self._cache.put(shard, values)
        return values

    def cached(self, shard: int) -> npt.NDArray | None:
        """As `chunk`, where it is in memory."""
        return self._cache.get(shard)

    def read(self, start: int, stop: int) -> npt.NDArray:
        """Rows start…stop−1.

        Raises:
            StoreError: an object is missing or damaged, or the object store kept failing.
        """
        out = np.empty((stop - start, *self.row_shape), dtype=self.dtype)
        row = start
        while row < stop:
            shard, offset = divmod(row, self.shard_rows)
            taken = min(self.shard_rows - offset, stop - row)
            out[row - start : row - start + taken] = self.chunk(shard)[offset : offset + taken]
            row += taken
        return out

    def _fetch(self, shard: int) -> npt.NDArray:
        url = self.shard_url(shard)
        shape = (self.count, *self.row_shape)
        layout = self._cache.layout(
            lambda: read_layout(self.url, _metadata(self.reader, self.url), shape, self.dtype, self.shard_rows, None)
        )
        try:
            if not layout.direct:
                start, stop = shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.count)
                return _through_zarr(self._cache, self.url, url, start, stop, f"{self.name}, ")
            data = self.reader.read_object(url)
        except MissingInputError as error:
            raise StoreError(
                f"{urls.redacted(url)}: the object is missing ({self.name}); run `scalecryo verify`, "
                "then convert again with --overwrite"
            ) from error
        dtype = np.dtype(self.dtype).newbyteorder("<")
        expected = self.shard_rows * int(np.prod(self.row_shape, dtype=int)) * dtype.itemsize
        body = np.frombuffer(data, np.uint8)[:expected]
        if len(data) != expected + CRC_BYTES or not crc_holds(body, data[expected:]):
            raise StoreError(
                f"{urls.redacted(url)}: wrong length or checksum ({self.name}); run `scalecryo verify`, "
                "then convert again with --overwrite"
            )
        return body.view(dtype).reshape(self.shard_rows, *self.row_shape)


def load_chunks(columns: Iterable[ColumnArray], shards: Iterable[int]) -> None:
    """Bring chunks of several columns into memory, from an object store side by side.

    Raises:
        StoreError: an object is missing or damaged, or the object store kept failing.
    """
    shards = list(shards)
    wanted = [(column, shard) for column in columns for shard in shards if column.cached(shard) is None]
    if len(wanted) < 2 or urls.is_local(wanted[0][0].url):
        for column, shard in wanted:
            column.chunk(shard)
        return
    with ThreadPoolExecutor(max_workers=min(len(wanted), 16), thread_name_prefix="columns") as pool:
        for _ in pool.map(lambda item: item[0].chunk(item[1]), wanted):
            pass


def _metadata(reader: RangeReader, url: str) -> bytes:
    try:
        return bytes(reader.read_object(urls.join(url, "zarr.json")))
    except MissingInputError as error:
        raise StoreError(f"{urls.redacted(url)}: its zarr.json is missing; convert again with --overwrite") from error


def _through_zarr(cache: _Cache, url: str, object_url: str, start: int, stop: int, where: str) -> npt.NDArray:
    """Rows of one object through zarr-python, which would take a missing object for fill values.

    Raises:
        MissingInputError: the object is missing.
        StoreError: zarr-python cannot decode it.
    """
    if not urls.exists(object_url):
        raise MissingInputError(f"{urls.redacted(object_url)}: no such file")
    try:
        rows: npt.NDArray = cache.rows(url).read(start, stop)
    except (ValueError, RuntimeError) as error:
        raise StoreError(
            f"{urls.redacted(object_url)}: zarr cannot decode it ({where}rows {start} to {stop}: {cause(error)}); "
            "run `scalecryo verify`, then convert again with --overwrite"
        ) from error
    return rows
