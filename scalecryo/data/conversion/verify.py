"""Is a store what its conversion wrote: every object against its manifest, and rows against the source."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scalecryo.data.conversion.normalise import Normalisation, crops, normalise
from scalecryo.data.conversion.resample import reopen
from scalecryo.data.conversion.shard_task import PENDING, read_rows
from scalecryo.data.formats.mrc import Stack
from scalecryo.data.io import urls
from scalecryo.data.particles import Columns
from scalecryo.data.storage.layout import entry_of
from scalecryo.data.storage.store import MANIFESTS, ParticleStore, read_manifest
from scalecryo.errors import MissingInputError, StoreError

_SAMPLE = 64
_BATCH = 64
_NAMED = 5

Entry = dict[str, int]


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


def _check_object(store: ParticleStore, key: str, entry: Entry, coming: Entry | None) -> Finding:
    url = urls.join(store.url, key)
    where = f"{urls.redacted(url)} (particles from shard {key.split('/')[3]})" if "/c/" in key else urls.redacted(url)
    try:
        data = urls.read_bytes(url)
    except MissingInputError:
        return Finding(0, f"{where}: missing")
    if entry_of(data) in (entry, coming):
        return Finding(len(data))
    length = entry["bytes"]
    what = f"{len(data)} bytes instead of {length}" if len(data) != length else "wrong CRC32C"
    return Finding(len(data), f"{where}: {what}" + (_damaged_blocks(store, key) if key.startswith("images/") else ""))


def _manifest_names(store: ParticleStore) -> list[str]:
    """Manifests that a store of its age has."""
    documents = ["metadata"]
    if "report" in (name.removesuffix(".json") for name in urls.list_folder(urls.join(store.url, MANIFESTS))):
        documents.append("report")
    return [*documents, *(f"{shard:08d}" for shard in range(store.shards))]


def check_objects(store: ParticleStore) -> Iterator[Finding]:
    """Length and CRC32C of every object of a store, whether the manifests list every object, and the manifests' hash.

    What an unfinished append has replaced may match that append's manifest instead.
    """
    replaced = {name.removesuffix(".json") for name in urls.list_folder(urls.join(store.url, PENDING))}
    shards = []
    for name in _manifest_names(store):
        try:
            manifest = read_manifest(store.url, name)
            coming = read_manifest(store.url, name, PENDING) if name in replaced else {}
        except StoreError as error:
            yield Finding(0, str(error))
            continue
        if name.isdigit():
            shards.append(manifest)
            for key in sorted(expected_keys(store, int(name)) - set(manifest)):
                yield Finding(0, f"{urls.redacted(store.url)}: manifest {name} does not list {key}")
        for key, entry in manifest.items():
            yield _check_object(store, key, entry, coming.get(key))
    hashed = hashlib.sha256(json.dumps(shards, sort_keys=True).encode()).hexdigest()
    if len(shards) == store.shards and not replaced and hashed != store.content_hash:
        yield Finding(
            0, f"{urls.redacted(store.url)}: a manifest was changed after the conversion (their hash differs)"
        )


def _expected_rows(
    store: ParticleStore, stacks: dict[int, Stack], columns: Columns
) -> Iterator[npt.NDArray[np.float32]]:
    """What every level should hold for some rows, from the source's pixels."""
    attrs = store.attrs
    normalisation = Normalisation(store.box_size, attrs["sign"], attrs["normalisation"], attrs["common_scale"])
    images, _, _ = normalise(read_rows(stacks, columns), normalisation)
    yield images
    yield from crops(images, store.levels[1:])


def compare_with_source(store: ParticleStore, every_row: bool) -> Iterator[Finding]:
    """Stored pixels against the source's, where the source still is; sampled rows, or all of them.

    Stored pixels may differ from recomputed ones by the stored type's precision and 1e-5 of the image's largest pixel,
    since Fourier transforms round differently on another machine.

    Raises:
        MissingInputError: a stack is no longer where it was.
        InputError: a stack can no longer be read.
    """
    stacks = dict(enumerate(reopen(store)))
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
                rows = (start + 1 + np.flatnonzero(wrong)).tolist()
                named = ", ".join(map(str, rows[:_NAMED])) + (f" and {len(rows) - _NAMED} more" * (len(rows) > _NAMED))
                differ = f"particle {named} of images/{level} differs from its source"
                yield Finding(0, f"{urls.redacted(store.url)}: {differ}")
            else:
                yield Finding(stored.nbytes)
