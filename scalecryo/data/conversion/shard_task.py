"""One task of a conversion: read, check and normalise the images of one shard, and write it for every array.

Images pass through in batches that stay in a core's cache and leave block by block, so a task holds some MiB however
large its shard is. What is written depends on the task alone: not on who runs it, nor on what ran before.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from scalecryo.data.conversion.normalise import Array, Normalisation, crops, normalise
from scalecryo.data.conversion.quality import BadImage, bad_images, refusal, storable
from scalecryo.data.conversion.source import Source
from scalecryo.data.formats.mrc import Stack
from scalecryo.data.io import urls
from scalecryo.data.particles import Columns, ParticleTable
from scalecryo.data.storage.layout import column_key, entry_of, image_key, write_manifest
from scalecryo.data.storage.shard_writer import ShardWriter
from scalecryo.data.storage.shards import crc32c, encode_column
from scalecryo.data.storage.store import ParticleStore
from scalecryo.errors import InputError, MissingInputError

PENDING = "_append"  #: Manifests of objects that an unfinished append is about to replace.

_BATCH_BYTES = 1 << 20  # of float32 source pixels: with what is made of them they fit a core's second cache
_MOST_ROWS = 256
_READ_BYTES = 4 << 20  # of one read from a disk
_REMOTE_BYTES = 16 << 20  # of one read from an object store


@dataclass(frozen=True)
class ShardTask:
    """All that writing one shard needs, so that it can run anywhere.

    Args:
        store_url: the store.
        shard: which.
        table: the particles that are new in it.
        stacks: those that hold them, by number.
        normalisation: how images are stored.
        dtype: `float16` or `float32`.
        shard_rows: rows of a full shard.
        block_rows: rows of a block by level, the full box first.
        columns: the columns of the store, from the table and from conversion.
        kept: rows of the shard that are stored already and stay, before the new ones.
    """

    store_url: str
    shard: int
    table: ParticleTable
    stacks: dict[int, Stack]
    normalisation: Normalisation
    dtype: str
    shard_rows: int
    block_rows: dict[int, int]
    columns: tuple[str, ...]
    kept: int = 0


def shard_task(
    store_url: str,
    particles: Source,
    normalisation: Normalisation,
    dtype: str,
    shard_rows: int,
    block_rows: dict[int, int],
    columns: tuple[str, ...],
    shard: int,
) -> ShardTask:
    """The task of one shard of a source's particles."""
    table = particles.table.select(slice(shard * shard_rows, min((shard + 1) * shard_rows, len(particles.table))))
    stacks = {int(number): particles.stacks[number] for number in np.unique(table.columns["stack"])}
    return ShardTask(store_url, shard, table, stacks, normalisation, dtype, shard_rows, block_rows, columns)


@dataclass(frozen=True)
class Done:
    """A task's result: how many particles it went through, and which of them cannot be stored."""

    rows: int
    bad: tuple[BadImage, ...] = ()


def read_rows(stacks: dict[int, Stack], columns: Columns) -> Array:
    """Source images of table rows, float32, in the table's order.

    Raises:
        InputError: a stack ended early.
    """
    stack, index = columns["stack"], columns["stack_index"]
    first = stacks[int(stack[0])]
    # Torch's memory starts where its vector code likes it.
    out: Array = torch.empty((len(stack), first.ny, first.nx)).numpy()
    if (stack == stack[0]).all():
        return first.read(index, out)
    for number in np.unique(stack):
        rows = np.flatnonzero(stack == number)
        out[rows] = stacks[int(number)].read(index[rows])
    return out


def batches(stacks: dict[int, Stack], table: ParticleTable) -> Iterator[tuple[slice, Array]]:
    """Rows of a table and their source images, a batch at a time; from object stores several batches in one read."""
    if not len(table):
        return
    first = next(iter(stacks.values()))
    image_bytes = 4 * first.nx * first.ny
    step = min(_MOST_ROWS, max(1, _BATCH_BYTES // image_bytes))
    local = all(urls.is_local(stack.url) for stack in stacks.values())
    reach = step * max(1, (_READ_BYTES if local else _REMOTE_BYTES) // (step * image_bytes))
    for start in range(0, len(table), reach):
        stop = min(start + reach, len(table))
        found = read_rows(stacks, {key: table.columns[key][start:stop] for key in ("stack", "stack_index")})
        for begin in range(start, stop, step):
            rows = slice(begin, min(begin + step, stop))
            yield rows, found[rows.start - start : rows.stop - start]


def refuse_changed(stacks: dict[int, Stack]) -> None:
    """Raise when a stack is no longer the file whose header was read.

    Raises:
        InputError: it was replaced or removed.
    """
    for stack in stacks.values():
        try:
            same = urls.fingerprint(stack.url) == stack.fingerprint
        except MissingInputError:
            same = False
        if not same:
            raise InputError(
                f"{urls.redacted(stack.url)}: was changed after the conversion had looked at it; when it is whole, "
                "convert again with --overwrite"
            )


def find_bad_in_shard(task: ShardTask) -> Done:
    """Which images of a task cannot be stored, without writing anything."""
    torch.set_num_threads(1)
    refuse_changed(task.stacks)
    bad: list[BadImage] = []
    for rows, source in batches(task.stacks, task.table):
        images, _, _ = _normalised(source, task.normalisation)
        bad += _bad(task, rows, images)
    return Done(len(task.table), tuple(bad))


def _normalised(source: Array, normalisation: Normalisation) -> tuple[Array, Array, Array]:
    with np.errstate(invalid="ignore", over="ignore"):
        return normalise(source, normalisation)


def _bad(task: ShardTask, rows: slice, images: Array) -> list[BadImage]:
    if storable(images, task.dtype):
        return []
    part = task.table.select(rows)
    return bad_images(images, task.dtype, part, read_rows(task.stacks, part.columns))


def _write_fresh(task: ShardTask, writers: dict[int, ShardWriter]) -> Columns:
    """Put the task's new images into every level; the columns that conversion adds.

    Raises:
        InputError: some of them cannot be stored.
    """
    count = len(task.table)
    mean, scale, checksum = np.empty(count, np.float32), np.empty(count, np.float32), np.empty(count, np.uint32)
    full, *smaller = writers
    bad: list[BadImage] = []
    for rows, source in batches(task.stacks, task.table):
        checksum[rows] = [crc32c(image) for image in source]
        images, mean[rows], scale[rows] = _normalised(source, task.normalisation)
        bad += _bad(task, rows, images)
        if bad:
            continue  # nothing of this shard will stay: only the rest of the list is wanted
        writers[full].append(images)
        for level, cropped in zip(smaller, crops(images, smaller), strict=True):
            writers[level].append(cropped)
    if bad:
        raise refusal(bad)
    return {**task.table.columns, "image_mean": mean, "image_scale": scale, "image_crc32c": checksum}


def _write_kept(task: ShardTask, writers: dict[int, ShardWriter]) -> Columns:
    """Put the rows that stay into every level, as they are stored; their columns.

    The shard may already have been replaced by an append that was interrupted: its first rows are still the same.
    """
    store = ParticleStore.open(task.store_url)
    start = task.shard * task.shard_rows
    for level, writer in writers.items():
        for row in range(start, start + task.kept, store.block_rows(level)):
            stop = min(row + store.block_rows(level), start + task.kept)
            writer.append(store.read_images(level, row, stop))
    return store.read_columns(start, start + task.kept)


def _joined(kept: Columns, fresh: Columns, names: tuple[str, ...]) -> Columns:
    return {name: np.concatenate([part[name] for part in (kept, fresh) if part]) for name in names}


def write_shard(task: ShardTask) -> Done:
    """Read, normalise and write one shard of every array, then its manifest.

    Raises:
        InputError: images cannot be stored, or a stack was replaced since it was opened.
        OutputError: the disk is full.
    """
    # OpenMP's number of threads belongs to the calling thread: with another number the last bits differ.
    torch.set_num_threads(1)
    name = f"{task.shard:08d}"
    refuse_changed(task.stacks)
    with ExitStack() as opened:
        writers = {}
        for level, size in task.block_rows.items():
            url = urls.join(task.store_url, image_key(level, task.shard))
            stream = opened.enter_context(urls.atomic_stream(url))
            writers[level] = ShardWriter(stream, task.shard_rows, size, level, task.dtype)
        kept = _write_kept(task, writers) if task.kept else {}
        fresh = _write_fresh(task, writers) if len(task.table) else {}
        refuse_changed(task.stacks)
        manifest = {image_key(level, task.shard): writer.finish() for level, writer in writers.items()}
        objects: dict[str, Any] = {
            column_key(column, task.shard, values.shape[1:]): encode_column(values, task.shard_rows)
            for column, values in _joined(kept, fresh, task.columns).items()
        }
        manifest |= {key: entry_of(data) for key, data in objects.items()}
        if task.kept:
            write_manifest(task.store_url, name, manifest, PENDING)
    for key, data in objects.items():
        urls.write_bytes_atomic(urls.join(task.store_url, key), data)
    write_manifest(task.store_url, name, manifest)
    return Done(len(task.table))
