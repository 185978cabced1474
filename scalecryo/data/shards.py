"""Reading and writing the objects of a store's arrays: Zarr v3 shards and chunks with CRC32C, without a compressor.

An image array is sharded: an object holds up to 64 blocks, each `bytes (little endian) + crc32c`, and an index at its
end (Zarr v3 `sharding_indexed`). A column is chunked by the same number of rows, one small object for each shard.
zarr-python reads both; this module reads a block with one positioned read straight into the caller's array.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import google_crc32c
import numpy as np
import numpy.typing as npt

from scalecryo.data import files
from scalecryo.errors import MissingInputError, StoreError

_ABSENT = np.uint64(2**64 - 1)
_CRC_BYTES = 4
_INDEX_CACHE = 4096  # of about 1 kB
_COLUMN_CACHE = 64  # of up to 600 kB
_REQUEST_BYTES = 8 << 20


def crc32c(data: bytes | npt.NDArray) -> int:
    """CRC32C (Castagnoli) of bytes or of a contiguous array."""
    return int(google_crc32c.value(data))


def _with_crc(data: npt.NDArray[np.uint8]) -> None:
    """Write the checksum of all but the last four bytes into the last four."""
    data[-_CRC_BYTES:] = np.frombuffer(np.array(crc32c(data[:-_CRC_BYTES]), dtype="<u4").tobytes(), np.uint8)


def _crc_holds(data: npt.NDArray[np.uint8], stored: bytes) -> bool:
    return crc32c(data) == int.from_bytes(stored, "little")


class _Cache:
    """The most recently used arrays, for several threads."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[str, npt.NDArray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> npt.NDArray | None:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: str, value: npt.NDArray) -> None:
        with self._lock:
            self._entries[key] = value
            while len(self._entries) > self._limit:
                self._entries.popitem(last=False)


class ShardBuffer:
    """One shard of an image array while it is being filled.

    Args:
        rows: rows that the shard holds (the last one of an array may hold fewer than `shard_rows`).
        shard_rows, block_rows: rows of a full shard and of a block.
        box_size: side of the images, px.
        dtype: `float16` or `float32`.
    """

    def __init__(self, rows: int, shard_rows: int, block_rows: int, box_size: int, dtype: str) -> None:
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._shape = (block_rows, box_size, box_size)
        self._slots = shard_rows // block_rows
        self._chunk_bytes = block_rows * box_size * box_size * self._dtype.itemsize + _CRC_BYTES
        blocks = -(-rows // block_rows)
        # Rows past the end of a short last block stay zero, the array's fill value.
        self._data = np.zeros(blocks * self._chunk_bytes + self._slots * 16 + _CRC_BYTES, dtype=np.uint8)

    def block(self, number: int) -> npt.NDArray:
        """The rows of one block, to be written in place: (block_rows, n, n)."""
        start = number * self._chunk_bytes
        chunk = self._data[start : start + self._chunk_bytes - _CRC_BYTES]
        return chunk.view(self._dtype).reshape(self._shape)

    def finish(self) -> npt.NDArray[np.uint8]:
        """Add the checksums and the index; the bytes of the object."""
        index_start = len(self._data) - self._slots * 16 - _CRC_BYTES
        blocks = index_start // self._chunk_bytes
        index = np.full((self._slots, 2), _ABSENT, dtype="<u8")
        index[:blocks, 0] = np.arange(blocks, dtype=np.uint64) * np.uint64(self._chunk_bytes)
        index[:blocks, 1] = self._chunk_bytes
        for number in range(blocks):
            _with_crc(self._data[number * self._chunk_bytes : (number + 1) * self._chunk_bytes])
        self._data[index_start:-_CRC_BYTES] = index.view(np.uint8).reshape(-1)
        _with_crc(self._data[index_start:])
        return self._data


def encode_column(values: npt.NDArray, shard_rows: int) -> npt.NDArray[np.uint8]:
    """The object of one chunk of a column: `values` padded with zeros to `shard_rows`, and a checksum."""
    dtype = values.dtype.newbyteorder("<")
    row_bytes = values[0].nbytes
    data = np.zeros(shard_rows * row_bytes + _CRC_BYTES, dtype=np.uint8)
    data[: len(values) * row_bytes] = np.ascontiguousarray(values, dtype=dtype).view(np.uint8).reshape(-1)
    _with_crc(data)
    return data


@dataclass(frozen=True)
class ImageArray:
    """A sharded image array on disk or in an object store.

    Args:
        url: of the array (the folder of its `zarr.json`).
        name: as it appears in messages.
        count: rows of the array.
        box_size: side of the images, px.
        dtype: `float16` or `float32`.
        block_rows, shard_rows: rows of a block and of a shard.
    """

    url: str
    name: str
    count: int
    box_size: int
    dtype: str
    block_rows: int
    shard_rows: int
    _indexes: _Cache = field(default_factory=lambda: _Cache(_INDEX_CACHE), repr=False, compare=False)

    def _damaged(self, shard: int, what: str) -> StoreError:
        first, last = shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.count)
        return StoreError(
            f"{files.shown(self.shard_url(shard))}: {what} (shard {shard} of {self.name}, particles {first + 1} to "
            f"{last}); run `scalecryo verify`, then convert again with --overwrite"
        )

    def shard_url(self, shard: int) -> str:
        """Address of one shard's object."""
        return f"{self.url}/c/{shard}/0/0"

    def _index(self, shard: int) -> npt.NDArray:
        """Offset and length of every block of a shard; only the object's last kilobyte is read."""
        url = self.shard_url(shard)
        cached = self._indexes.get(url)
        if cached is not None:
            return cached
        slots = self.shard_rows // self.block_rows
        blocks = -(-min(self.shard_rows, self.count - shard * self.shard_rows) // self.block_rows)
        chunk = self.block_rows * self.box_size**2 * np.dtype(self.dtype).itemsize + _CRC_BYTES
        tail = slots * 16 + _CRC_BYTES
        # Where conversion puts the index; a store written otherwise may be of another length, which costs a request.
        body = self._checked_tail(url, blocks * chunk + tail, tail)
        if body is None:
            body = self._checked_tail(url, files.size(url), tail)
        if body is None:
            raise self._damaged(shard, "its index is damaged")
        index = body.view("<u8").reshape(slots, 2)
        self._indexes.put(url, index)
        return index

    def _checked_tail(self, url: str, length: int, tail: int) -> npt.NDArray[np.uint8] | None:
        """The last bytes of an object of this length without their checksum; None when it does not hold."""
        found = files.read_range(url, max(0, length - tail), length)
        body = np.frombuffer(found[:-_CRC_BYTES], dtype=np.uint8)
        return body if len(found) == tail and _crc_holds(body, found[-_CRC_BYTES:]) else None

    def read(self, start: int, stop: int, out: npt.NDArray | None = None) -> npt.NDArray:
        """Rows start…stop−1 as (n, box, box) in the stored dtype; every block read is checked against its CRC32C.

        Args:
            start, stop: rows.
            out: where to put them, C-contiguous; a new array when absent.

        Raises:
            StoreError: a shard is missing or damaged.
        """
        if not 0 <= start <= stop <= self.count:
            raise StoreError(f"{self.name}: rows {start} to {stop} were asked for but it holds {self.count}")
        if out is None:
            out = np.empty((stop - start, self.box_size, self.box_size), dtype=self.dtype)
        row = start
        while row < stop:
            shard_stop = min(row - row % self.shard_rows + self.shard_rows, stop)
            try:
                self._read_in_shard(row, out[row - start : shard_stop - start])
            except MissingInputError as error:
                raise self._damaged(row // self.shard_rows, "the object is missing") from error
            row = shard_stop
        return out

    def _read_in_shard(self, first: int, out: npt.NDArray) -> None:
        """Fill `out` with rows of one shard, from row `first` on; neighbouring blocks share a request."""
        shard = first // self.shard_rows
        index = self._index(shard)
        length = self.block_rows * out[0].nbytes + _CRC_BYTES
        run: list[int] = []  # first rows of blocks that follow each other in the object
        run_offset = 0
        for start in range(first - first % self.block_rows, first + len(out), self.block_rows):
            offset, found = (int(value) for value in index[start % self.shard_rows // self.block_rows])
            if found != length:
                raise self._damaged(shard, "a block is absent or of the wrong length")
            if run and (offset != run_offset + len(run) * length or len(run) * length >= _REQUEST_BYTES):
                self._read_run(shard, run_offset, run, first, out)
                run = []
            if not run:
                run_offset = offset
            run.append(start)
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
        checksums = self._fill(shard, offset, data)
        for start, block, part, checksum in zip(run, blocks, data, checksums, strict=True):
            if not _crc_holds(part, checksum):
                raise self._damaged(shard, f"wrong checksum in the block of particles {start + 1}…")
            begin, end = max(start, first), min(start + size, stop)
            if end - begin < size:
                out[begin - first : end - first] = block[begin - start : end - start]

    def _fill(self, shard: int, offset: int, data: list[npt.NDArray[np.uint8]]) -> list[bytes]:
        """Fill buffers from an object, in which a checksum follows each; returns the checksums."""
        url = self.shard_url(shard)
        total = sum(len(part) + _CRC_BYTES for part in data)
        if files.is_local(url):
            checksums = [bytearray(_CRC_BYTES) for _ in data]
            buffers = [
                buffer for part, checksum in zip(data, checksums, strict=True) for buffer in (part.data, checksum)
            ]
            with files.open_read(url) as stream:
                done = os.preadv(stream.fileno(), buffers, offset)
            stored = [bytes(checksum) for checksum in checksums]
        else:
            found = np.frombuffer(files.read_range(url, offset, offset + total), np.uint8)
            done, stored = len(found), []
            if done == total:
                for part, piece in zip(data, np.split(found, len(data)), strict=True):
                    part[:] = piece[:-_CRC_BYTES]
                    stored.append(piece[-_CRC_BYTES:].tobytes())
        if done != total:
            raise self._damaged(shard, "the object is shorter than its index says")
        return stored


@dataclass(frozen=True)
class ColumnArray:
    """A per-particle column: one chunk for each shard of the images. Arguments as for `ImageArray`."""

    url: str
    name: str
    count: int
    dtype: str
    row_shape: tuple[int, ...]
    shard_rows: int
    _chunks: _Cache = field(default_factory=lambda: _Cache(_COLUMN_CACHE), repr=False, compare=False)

    def shard_url(self, shard: int) -> str:
        """Address of one chunk's object."""
        return "/".join([self.url, "c", str(shard), *("0" for _ in self.row_shape)])

    def _decode(self, url: str, data: bytes) -> npt.NDArray:
        """Check and keep one chunk."""
        dtype = np.dtype(self.dtype).newbyteorder("<")
        expected = self.shard_rows * int(np.prod(self.row_shape, dtype=int)) * dtype.itemsize
        body = np.frombuffer(data, np.uint8)[:expected]
        if len(data) != expected + _CRC_BYTES or not _crc_holds(body, data[expected:]):
            raise StoreError(
                f"{files.shown(url)}: wrong length or checksum ({self.name}); run `scalecryo verify`, "
                "then convert again with --overwrite"
            )
        values = body.view(dtype).reshape(self.shard_rows, *self.row_shape)
        self._chunks.put(url, values)
        return values

    def chunk(self, shard: int) -> npt.NDArray:
        """All rows of one chunk, padded to `shard_rows`."""
        url = self.shard_url(shard)
        cached = self._chunks.get(url)
        return cached if cached is not None else _read_chunks([(self, url)])[0]

    def missing(self, shards: Iterable[int]) -> list[tuple["ColumnArray", str]]:
        """Chunks that are not in memory, for `load_chunks`."""
        urls = [self.shard_url(shard) for shard in shards]
        return [(self, url) for url in urls if self._chunks.get(url) is None]

    def read(self, start: int, stop: int) -> npt.NDArray:
        """Rows start…stop−1.

        Raises:
            StoreError: an object is missing or damaged.
        """
        out = np.empty((stop - start, *self.row_shape), dtype=self.dtype)
        row = start
        while row < stop:
            shard, offset = divmod(row, self.shard_rows)
            taken = min(self.shard_rows - offset, stop - row)
            out[row - start : row - start + taken] = self.chunk(shard)[offset : offset + taken]
            row += taken
        return out


def _read_chunks(wanted: Sequence[tuple[ColumnArray, str]]) -> list[npt.NDArray]:
    try:
        found = files.read_many([url for _, url in wanted])
    except MissingInputError as error:
        raise StoreError(f"{error}: the object is missing; run `scalecryo verify`, then convert again") from error
    return [array._decode(url, data) for (array, url), data in zip(wanted, found, strict=True)]


def load_chunks(columns: Iterable[ColumnArray], rows: Iterable[int]) -> None:
    """Bring the chunks of several columns that hold some rows into memory, from an object store in one round trip.

    Raises:
        StoreError: an object is missing or damaged.
    """
    rows = list(rows)
    wanted = [item for column in columns for item in column.missing({row // column.shard_rows for row in rows})]
    if wanted:
        _read_chunks(wanted)
