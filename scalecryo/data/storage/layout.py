"""How a store is cut into levels, blocks and shards, and the Zarr metadata that says so."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.storage import MemoryStore

from scalecryo.data.io import urls
from scalecryo.data.storage.shards import crc32c
from scalecryo.data.storage.store import MANIFESTS

_SMALLEST_LEVEL = 32
_BLOCK_BYTES = 2 << 20  # the knee of throughput against request size on object stores with 20 ms latency
_BLOCKS_PER_SHARD = 64
_WANTED_BLOCKS = 512  # enough for 32 lanes to be of nearly equal length


def levels_of(box_size: int) -> tuple[int, ...]:
    """Box sizes kept for a full box: itself, then powers of two from 3/4 of it down to 32."""
    powers = [1 << exponent for exponent in range(box_size.bit_length(), 0, -1)]
    return (box_size, *(box for box in powers if _SMALLEST_LEVEL <= box <= 0.75 * box_size))


def block_rows_of(box_size: int, dtype: str, count: int) -> int:
    """Images in one block: about 2 MiB, a power of two from 4 to 256, fewer where particles are few."""
    image_bytes = box_size * box_size * np.dtype(dtype).itemsize
    rows = 256
    while rows > 4 and (rows * image_bytes > _BLOCK_BYTES or -(-count // rows) < _WANTED_BLOCKS):
        rows //= 2
    return rows


def shard_rows_of(box_size: int, dtype: str, count: int) -> int:
    """Images in one shard, the same for every level and column."""
    return _BLOCKS_PER_SHARD * block_rows_of(box_size, dtype, count)


def metadata_of(attrs: dict[str, Any], columns: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, bytes]:
    """Every `zarr.json` of a store by its key, as zarr-python writes them.

    Args:
        attrs: attributes of the group: count, levels, block_rows, shard_rows, dtype and the rest.
        columns: dtype and row shape of the columns to declare.
    """
    documents: dict[str, Any] = {}
    memory = MemoryStore(documents)
    group = zarr.create_group(memory, zarr_format=3, attributes=attrs)
    count, shard = attrs["count"], attrs["shard_rows"]
    for level in attrs["levels"]:
        group.create_array(
            f"images/{level}",
            shape=(count, level, level),
            dtype=attrs["dtype"],
            chunks=(attrs["block_rows"][str(level)], level, level),
            shards=(shard, level, level),
            serializer=BytesCodec(endian="little"),
            compressors=[Crc32cCodec()],
            dimension_names=("particle", "y", "x"),
        )
    for name, (dtype, row_shape) in columns.items():
        group.create_array(
            f"particles/{name}",
            shape=(count, *row_shape),
            dtype=dtype,
            chunks=(shard, *row_shape),
            serializer=BytesCodec(endian="little"),
            compressors=[Crc32cCodec()],
        )
    return {key: value.to_bytes() for key, value in documents.items()}


def image_key(level: int, shard: int) -> str:
    """Key of one shard of a level."""
    return f"images/{level}/c/{shard}/0/0"


def column_key(name: str, shard: int, row_shape: Sequence[int]) -> str:
    """Key of one chunk of a column."""
    return "/".join([f"particles/{name}/c/{shard}", *("0" for _ in row_shape)])


def entry_of(data: bytes | npt.NDArray) -> dict[str, int]:
    """What a manifest says of an object."""
    return {"bytes": len(data), "crc32c": crc32c(data)}


def write_manifest(url: str, name: str, manifest: Mapping[str, Mapping[str, int]], folder: str = MANIFESTS) -> None:
    """Write a manifest below a store: length and CRC32C of objects by key."""
    document = json.dumps(manifest, indent=1).encode()
    urls.write_bytes_atomic(urls.join(url, folder, f"{name}.json"), document)


def write_objects(url: str, name: str, objects: Mapping[str, Any]) -> None:
    """Write objects by key below a store, and then the manifest that lists them."""
    for key, data in objects.items():
        urls.write_bytes_atomic(urls.join(url, key), data)
    write_manifest(url, name, {key: entry_of(data) for key, data in objects.items()})
