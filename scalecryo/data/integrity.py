"""Is a store what its conversion wrote: every object against its manifest, and rows against the source."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scalecryo.data import files
from scalecryo.data.convert import read_rows
from scalecryo.data.mrc import Stack
from scalecryo.data.normalise import Recipe, crop, normalise
from scalecryo.data.particles import Columns
from scalecryo.data.shards import crc32c
from scalecryo.data.store import ParticleStore, read_manifest
from scalecryo.errors import MissingInputError, StoreError

_SAMPLE = 64
_BATCH = 64


@dataclass(frozen=True)
class Finding:
    """One thing checked.

    Args:
        bytes: how much was read.
        problem: what is wrong, one line; empty when nothing is.
    """

    bytes: int = 0
    problem: str = ""


def expected_keys(store: ParticleStore, shard: int) -> set[str]:
    """Keys of all objects of one shard."""
    images = [store.image_array(level).shard_url(shard) for level in store.levels]
    columns = [store.column_array(name).shard_url(shard) for name in store.columns]
    return {url.removeprefix(store.url + "/") for url in images + columns}


def _damaged_blocks(store: ParticleStore, key: str) -> str:
    """Which particles of a damaged image shard are lost, by reading each of its blocks."""
    _, level, _, shard, *_ = key.split("/")
    array = store.image_array(int(level))
    first, last = int(shard) * array.shard_rows, min((int(shard) + 1) * array.shard_rows, array.count)
    lost = []
    for start in range(first, last, array.block_rows):
        stop = min(start + array.block_rows, last)
        try:
            array.read(start, stop)
        except StoreError:
            lost.append(f"{start + 1} to {stop}")
    return f"; damaged particles: {', '.join(lost)}" if lost else ""


def _check_object(store: ParticleStore, key: str, length: int, checksum: int) -> Finding:
    url = files.join(store.url, key)
    where = f"{files.shown(url)} (particles from shard {key.split('/')[3]})" if "/c/" in key else files.shown(url)
    try:
        data = files.read_bytes(url)
    except MissingInputError:
        return Finding(0, f"{where}: missing")
    if len(data) == length and crc32c(data) == checksum:
        return Finding(len(data))
    what = f"{len(data)} bytes instead of {length}" if len(data) != length else "wrong CRC32C"
    return Finding(len(data), f"{where}: {what}" + (_damaged_blocks(store, key) if key.startswith("images/") else ""))


def check_objects(store: ParticleStore) -> Iterator[Finding]:
    """Length and CRC32C of every object of a store, and whether the manifests list every object."""
    for name in ("metadata", *(f"{shard:08d}" for shard in range(store.shards))):
        try:
            manifest = read_manifest(store.url, name)
        except StoreError as error:
            yield Finding(0, str(error))
            continue
        if name != "metadata":
            for key in sorted(expected_keys(store, int(name)) - set(manifest)):
                yield Finding(0, f"{files.shown(store.url)}: manifest {name} does not list {key}")
        for key, entry in manifest.items():
            yield _check_object(store, key, entry["bytes"], entry["crc32c"])


def _expected_rows(
    store: ParticleStore, stacks: dict[int, Stack], columns: Columns
) -> Iterator[npt.NDArray[np.float32]]:
    """What every level should hold for some rows, from the source's pixels."""
    attrs = store.attrs
    recipe = Recipe(store.box_size, attrs["sign"], attrs["normalisation"], attrs["common_scale"])
    images, _, _ = normalise(read_rows(stacks, columns), recipe)
    for level in store.levels:
        images = crop(images, level)
        yield images


def compare_with_source(store: ParticleStore, every_row: bool) -> Iterator[Finding]:
    """Stored pixels against the source's, where the source still is; sampled rows, or all of them.

    Stored pixels may differ from recomputed ones by the stored type's precision and 1e-5 of the image's largest pixel,
    since Fourier transforms round differently on another machine.

    Raises:
        MissingInputError: a stack is no longer where it was.
        InputError: a stack can no longer be read.
    """
    stacks = {number: Stack.open(url) for number, url in enumerate(store.stack_urls)}
    step = 1 if every_row else max(1, store.count // _SAMPLE)
    precision = float(np.finfo(store.dtype).eps)
    size = _BATCH if every_row else 1
    for start in range(0, store.count, step * size):
        stop = min(start + size, store.count)
        columns = store.read_columns(start, stop, ["stack", "stack_index"])
        for level, expected in zip(store.levels, _expected_rows(store, stacks, columns), strict=True):
            stored = store.read_images(level, start, stop).astype(np.float32)
            allowed = precision * np.abs(expected) + 1e-5 * np.abs(expected).max()
            wrong = (np.abs(stored - expected) > allowed).any(axis=(1, 2))
            if wrong.any():
                row = start + int(np.flatnonzero(wrong)[0])
                yield Finding(
                    0, f"{files.shown(store.url)}: particle {row + 1} of images/{level} differs from its source"
                )
            else:
                yield Finding(stored.nbytes)
