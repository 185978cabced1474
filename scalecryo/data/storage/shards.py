"""The objects of a store's arrays as bytes: Zarr v3 shards and chunks with CRC32C, without a compressor.

An image array is sharded: an object holds up to 64 blocks, each `bytes (little endian) + crc32c`, and an index at its
end (Zarr v3 `sharding_indexed`). A column is chunked by the same number of rows, one small object for each shard.
zarr-python reads both; `arrays.py` reads them faster.
"""

from typing import BinaryIO

import google_crc32c
import numpy as np
import numpy.typing as npt
import torch

from scalecryo.data.io import urls

ABSENT = np.uint64(2**64 - 1)  # offset and length of a chunk that was not written
CRC_BYTES = 4


def crc32c(data: bytes | npt.NDArray) -> int:
    """CRC32C (Castagnoli) of bytes or of a contiguous array."""
    return int(google_crc32c.value(data))


def _with_crc(data: npt.NDArray[np.uint8]) -> None:
    """Write the checksum of all but the last four bytes into the last four."""
    data[-CRC_BYTES:] = np.frombuffer(np.array(crc32c(data[:-CRC_BYTES]), dtype="<u4").tobytes(), np.uint8)


def crc_holds(data: npt.NDArray[np.uint8], stored: bytes | bytearray | memoryview) -> bool:
    """Whether the stored four bytes are the data's CRC32C."""
    return crc32c(data) == int.from_bytes(stored, "little")


def encode_column(values: npt.NDArray, shard_rows: int) -> npt.NDArray[np.uint8]:
    """The object of one chunk of a column: `values` padded with zeros to `shard_rows`, and a checksum."""
    dtype = values.dtype.newbyteorder("<")
    row_bytes = values[0].nbytes
    data = np.zeros(shard_rows * row_bytes + CRC_BYTES, dtype=np.uint8)
    data[: len(values) * row_bytes] = np.ascontiguousarray(values, dtype=dtype).view(np.uint8).reshape(-1)
    _with_crc(data)
    return data


def _encode_index(slots: int, blocks: int, chunk_bytes: int) -> npt.NDArray[np.uint8]:
    """A shard's index: offset and length of every block, which lie side by side from its start, and a checksum."""
    data = np.zeros(slots * 16 + CRC_BYTES, dtype=np.uint8)
    index = np.full((slots, 2), ABSENT, dtype="<u8")
    index[:blocks, 0] = np.arange(blocks, dtype=np.uint64) * np.uint64(chunk_bytes)
    index[:blocks, 1] = chunk_bytes
    data[:-CRC_BYTES] = index.view(np.uint8).reshape(-1)
    _with_crc(data)
    return data


class ShardWriter:
    """One shard of an image array, written block by block.

    Args:
        stream: where the object goes.
        shard_rows, block_rows: rows of a full shard and of a block.
        box_size: side of the images, px.
        dtype: `float16` or `float32`.
    """

    def __init__(self, stream: BinaryIO, shard_rows: int, block_rows: int, box_size: int, dtype: str) -> None:
        self._stream = stream
        self._slots = shard_rows // block_rows
        self._rows = block_rows
        kept = {"float16": torch.float16, "float32": torch.float32}[dtype]
        size = block_rows * box_size * box_size * kept.itemsize
        chunk = torch.zeros(size + CRC_BYTES, dtype=torch.uint8)
        self._chunk: npt.NDArray[np.uint8] = chunk.numpy()
        self._images = chunk[:size].view(kept).view(block_rows, box_size, box_size)
        self._filled = self._blocks = self._bytes = self._crc = 0

    def append(self, images: npt.NDArray) -> None:
        """Add images (n, box, box), float32 or as they are stored."""
        source = torch.from_numpy(images)
        while len(source):
            taken = min(len(source), self._rows - self._filled)
            # Torch's cast to float16 is several times faster than NumPy's.
            self._images[self._filled : self._filled + taken].copy_(source[:taken])
            self._filled += taken
            source = source[taken:]
            if self._filled == self._rows:
                self._flush()

    def _flush(self) -> None:
        _with_crc(self._chunk)
        self._put(self._chunk)
        self._blocks, self._filled = self._blocks + 1, 0

    def _put(self, data: npt.NDArray[np.uint8]) -> None:
        self._crc = int(google_crc32c.extend(self._crc, data))
        self._bytes += len(data)
        urls.write_all(self._stream, data.data)

    def finish(self) -> dict[str, int]:
        """Write the last, short block and the index; what a manifest says of the object."""
        if self._filled:
            self._images[self._filled :] = 0  # the array's fill value
            self._flush()
        self._put(_encode_index(self._slots, self._blocks, len(self._chunk)))
        return {"bytes": self._bytes, "crc32c": self._crc}
