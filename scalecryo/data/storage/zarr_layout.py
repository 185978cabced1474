"""Which arrays the direct reader can read: what an array's `zarr.json` says of its objects.

Direct are the layouts that conversion writes: shards of `bytes (little endian) + crc32c` blocks with their index at
either end, and columns chunked the same way. Everything else Zarr v3 allows goes through zarr-python.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from scalecryo.data.io import urls
from scalecryo.data.io.objects import ObjectFiles, remote_files
from scalecryo.errors import MissingInputError, StoreError

_PLAIN = ["bytes", "crc32c"]


@dataclass(frozen=True)
class ObjectLayout:
    """How an array's objects are laid out.

    Args:
        direct: the direct reader may read them; else only zarr-python.
        index_first: a shard's index lies at its start instead of its end.
        fill_value: of blocks that were not written.
    """

    direct: bool
    index_first: bool = False
    fill_value: float = 0.0


def read_layout(
    url: str, document: bytes, shape: tuple[int, ...], dtype: str, chunk_rows: int, block_rows: int | None
) -> ObjectLayout:
    """The layout of an array, from its metadata document.

    Args:
        url: of the array, for messages.
        document: its `zarr.json`.
        shape, dtype: what the store says of the array.
        chunk_rows: rows of one object.
        block_rows: rows of one block inside a shard; None: the objects are not sharded.

    Raises:
        StoreError: it is not the array that the store describes.
    """
    try:
        meta: dict[str, Any] = json.loads(document)
        found, kind = tuple(meta["shape"]), np.dtype(meta["data_type"])
        # Longer than the store says: an append is about to be completed, or was interrupted.
        if found[:1] < shape[:1] or found[1:] != shape[1:] or kind != np.dtype(dtype):
            raise StoreError(
                f"{urls.redacted(url)}: holds {kind} {found}, its store says {dtype} {shape}; convert again"
            )
        grid = tuple(meta["chunk_grid"]["configuration"]["chunk_shape"])
        keys = meta["chunk_key_encoding"]
        plain_keys = keys["name"] == "default" and keys.get("configuration", {}).get("separator", "/") == "/"
        fill = _fill_value(meta["fill_value"])
        if fill is None or grid != (chunk_rows, *shape[1:]) or not plain_keys or meta.get("storage_transformers"):
            return ObjectLayout(False)
        if block_rows is None:
            return ObjectLayout(_is_plain(meta["codecs"]), fill_value=fill)
        return _sharded(meta["codecs"], (block_rows, *shape[1:]), fill)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{urls.redacted(url)}: its zarr.json is damaged ({error!r}); convert again") from error


def _sharded(codecs: list[dict[str, Any]], block_shape: tuple[int, ...], fill: float) -> ObjectLayout:
    settings = codecs[0].get("configuration", {}) if codecs[0]["name"] == "sharding_indexed" else {}
    direct = (
        len(codecs) == 1
        and tuple(settings.get("chunk_shape", ())) == block_shape
        and _is_plain(settings["codecs"])
        and _is_plain(settings["index_codecs"])
    )
    return ObjectLayout(direct, settings.get("index_location", "end") == "start", fill)


def _is_plain(codecs: list[dict[str, Any]]) -> bool:
    """Whether the codecs are little-endian bytes and their CRC32C."""
    return [codec["name"] for codec in codecs] == _PLAIN and (
        # A type of one byte has no endianness, and zarr-python then writes none.
        codecs[0].get("configuration", {}).get("endian", "little") == "little"
    )


def _fill_value(value: Any) -> float | None:
    """A plain finite number, or None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


class ZarrRows:
    """Rows of an array through zarr-python: the reference, and the way for every layout that is not direct."""

    def __init__(self, url: str) -> None:
        # Takes half a second to import, and few stores need it.
        import zarr

        place: dict[str, Any] = {"store": url}
        if not urls.is_local(url):
            files, key = remote_files(url)
            if isinstance(files, ObjectFiles):
                place = {"store": zarr.storage.ObjectStore(files.store, read_only=True), "path": key}
        try:
            self._array = zarr.open_array(**place, mode="r")
        except FileNotFoundError as error:
            raise MissingInputError(f"{urls.redacted(url)}: no such array") from error
        except ValueError as error:
            raise StoreError(f"{urls.redacted(url)}: zarr cannot read it ({error})") from error

    def read(self, start: int, stop: int) -> Any:
        """Rows start…stop−1."""
        return self._array[start:stop]
