"""The objects of a store's arrays as bytes: Zarr v3 shards and chunks with CRC32C, without a compressor.

An image array is sharded: an object holds up to 64 blocks, each `bytes (little endian) + crc32c`, and an index at its
end (Zarr v3 `sharding_indexed`). A column is chunked by the same number of rows, one small object for each shard.
zarr-python reads both; `arrays.py` reads them faster.
"""

import google_crc32c
import numpy as np
import numpy.typing as npt

ABSENT = np.uint64(2**64 - 1)  # offset and length of a chunk that was not written
CRC_BYTES = 4


def crc32c(data: bytes | npt.NDArray) -> int:
    """CRC32C (Castagnoli) of bytes or of a contiguous array."""
    return int(google_crc32c.value(data))


def with_crc(data: npt.NDArray[np.uint8]) -> None:
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
    with_crc(data)
    return data


def encode_index(slots: int, blocks: int, chunk_bytes: int) -> npt.NDArray[np.uint8]:
    """A shard's index: offset and length of every block, which lie side by side from its start, and a checksum."""
    data = np.zeros(slots * 16 + CRC_BYTES, dtype=np.uint8)
    index = np.full((slots, 2), ABSENT, dtype="<u8")
    index[:blocks, 0] = np.arange(blocks, dtype=np.uint64) * np.uint64(chunk_bytes)
    index[:blocks, 1] = chunk_bytes
    data[:-CRC_BYTES] = index.view(np.uint8).reshape(-1)
    with_crc(data)
    return data
