"""Reading and writing the objects of a store's arrays: Zarr v3 shards and chunks with CRC32C, without a compressor.

An image array is sharded: an object holds up to 64 blocks, each `bytes (little endian) + crc32c`, and an index at its
end (Zarr v3 `sharding_indexed`). A column is chunked by the same number of rows, one small object for each shard.
zarr-python reads both; this module reads a block with one positioned read straight into the caller's array.
"""

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass, field

import google_crc32c
import numpy as np
import numpy.typing as npt

from scalecryo.data import files
from scalecryo.errors import MissingInputError, StoreError

_ABSENT = np.uint64(2**64 - 1)
_CRC_BYTES = 4
_CACHE_ENTRIES = 512


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

    def __init__(self) -> None:
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
            while len(self._entries) > _CACHE_ENTRIES:
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
    _indexes: _Cache = field(default_factory=_Cache, repr=False, compare=False)

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
        length = files.size(url)
        tail = files.read_range(url, max(0, length - slots * 16 - _CRC_BYTES), length)
        body = np.frombuffer(tail[:-_CRC_BYTES], dtype=np.uint8)
        if len(tail) != slots * 16 + _CRC_BYTES or not _crc_holds(body, tail[-_CRC_BYTES:]):
            raise self._damaged(shard, "its index is damaged")
        index = body.view("<u8").reshape(slots, 2)
        self._indexes.put(url, index)
        return index

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
            block_start = row - row % self.block_rows
            block_stop = min(block_start + self.block_rows, stop)
            self._read_block(block_start, row, out[row - start : block_stop - start])
            row = block_stop
        return out

    def _read_block(self, block_start: int, first: int, out: npt.NDArray) -> None:
        """Fill `out` with rows of one block, from row `first` on."""
        shard, offset_rows = divmod(block_start, self.shard_rows)
        try:
            offset, length = (int(value) for value in self._index(shard)[offset_rows // self.block_rows])
            if length != self.block_rows * out[0].nbytes + _CRC_BYTES:
                raise self._damaged(shard, "a block is absent or of the wrong length")
            whole = len(out) == self.block_rows and out.flags.c_contiguous
            rows = out if whole else np.empty((self.block_rows, *out.shape[1:]), dtype=self.dtype)
            stored = self._read_into(shard, offset, rows.reshape(-1).view(np.uint8))
        except MissingInputError as error:
            raise self._damaged(shard, "the object is missing") from error
        if not _crc_holds(rows.reshape(-1).view(np.uint8), stored):
            raise self._damaged(shard, f"wrong checksum in the block of particles {block_start + 1}…")
        if not whole:
            out[:] = rows[first - block_start : first - block_start + len(out)]

    def _read_into(self, shard: int, offset: int, data: npt.NDArray[np.uint8]) -> bytes:
        """Fill `data` from an object and return the checksum that follows it."""
        url = self.shard_url(shard)
        if files.is_local(url):
            checksum = bytearray(_CRC_BYTES)
            with files.open_read(url) as stream:
                done = os.preadv(stream.fileno(), [data.data, checksum], offset)
            stored = bytes(checksum)
        else:
            found = files.read_range(url, offset, offset + len(data) + _CRC_BYTES)
            done, stored = len(found), found[-_CRC_BYTES:]
            if done == len(data) + _CRC_BYTES:
                data[:] = np.frombuffer(found, np.uint8)[:-_CRC_BYTES]
        if done != len(data) + _CRC_BYTES:
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
    cache: _Cache = field(default_factory=_Cache, repr=False, compare=False)

    def shard_url(self, shard: int) -> str:
        """Address of one chunk's object."""
        return "/".join([self.url, "c", str(shard), *("0" for _ in self.row_shape)])

    def _shard(self, shard: int) -> npt.NDArray:
        url = self.shard_url(shard)
        cached = self.cache.get(url)
        if cached is not None:
            return cached
        problem = "the object is missing"
        try:
            data = files.read_bytes(url)
        except MissingInputError as error:
            raise StoreError(f"{files.shown(url)}: {problem}; run `scalecryo verify`, then convert again") from error
        dtype = np.dtype(self.dtype).newbyteorder("<")
        expected = self.shard_rows * int(np.prod(self.row_shape, dtype=int)) * dtype.itemsize
        body = np.frombuffer(data, np.uint8)[:expected]
        if len(data) != expected + _CRC_BYTES or not _crc_holds(body, data[expected:]):
            raise StoreError(
                f"{files.shown(url)}: wrong length or checksum (chunk {shard} of {self.name}); run `scalecryo verify`, "
                "then convert again with --overwrite"
            )
        values = body.view(dtype).reshape(self.shard_rows, *self.row_shape)
        self.cache.put(url, values)
        return values

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
            out[row - start : row - start + taken] = self._shard(shard)[offset : offset + taken]
            row += taken
        return out
