"""From a particle table and its image stacks to a store.

Everything that headers can tell is checked before anything is written. One task writes one whole shard of every array
and then its manifest, so an interrupted conversion goes on where it stopped and repeats byte for byte; the attribute
`complete` comes last.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import dask.config
import numpy as np
import numpy.typing as npt
import torch
from dask.base import compute
from dask.delayed import delayed

from scalecryo import __version__
from scalecryo.data import files
from scalecryo.data.layout import block_rows_of, levels_of, metadata_of, shard_rows_of, write_objects
from scalecryo.data.mrc import Stack
from scalecryo.data.normalise import Array, Recipe, choose_recipe, crop, normalise, one_torch_thread
from scalecryo.data.particles import COLUMNS, Columns, ParticleTable
from scalecryo.data.shards import ShardBuffer, encode_column
from scalecryo.data.source import Source, read_source
from scalecryo.data.store import (
    FORMAT_VERSION,
    IMAGE_COLUMNS,
    MANIFESTS,
    SOURCE_STACKS,
    SOURCE_TABLE,
    read_attributes,
    read_manifest,
)
from scalecryo.errors import InputError, OutputExistsError

_SAMPLE = 128
_TASKS_PER_WORKER = 4

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class ConvertPlan:
    """What a conversion will do, all of it decided."""

    source: Source
    recipe: Recipe
    sign_reason: str
    dtype: str
    levels: tuple[int, ...]
    shard_rows: int
    attrs: dict[str, Any] = field(repr=False)

    @property
    def count(self) -> int:
        """Number of particles."""
        return len(self.source.table)

    @property
    def shards(self) -> int:
        """Number of shards of every array."""
        return -(-self.count // self.shard_rows)

    @property
    def pixel_size(self) -> float:
        """Å of the full level."""
        return float(self.attrs["pixel_size"])


def read_rows(stacks: dict[int, Stack], columns: Columns) -> Array:
    """Source images of table rows, float32, in the table's order.

    Raises:
        InputError: a stack ended early.
    """
    stack, index = columns["stack"], columns["stack_index"]
    first = stacks[int(stack[0])]
    if (stack == stack[0]).all():
        return first.read(index)
    out = np.empty((len(stack), first.ny, first.nx), dtype=np.float32)
    for number in np.unique(stack):
        rows = np.flatnonzero(stack == number)
        out[rows] = stacks[int(number)].read(index[rows])
    return out


def _named(table: ParticleTable, row: int) -> str:
    stack, index = (int(table.columns[name][row]) for name in ("stack", "stack_index"))
    return f"image {index + 1} of {table.stacks[stack]}"


def _refuse_pixels(images: Array, table: ParticleTable) -> None:
    """Raise for the first image that is constant or holds pixels that are not finite."""
    for row, image in enumerate(images):
        if not np.isfinite(image).all():
            raise InputError(f"{_named(table, row)}: has pixels that are not finite; leave it out of the table")
        if image.max() == image.min():
            raise InputError(f"{_named(table, row)}: every pixel is {image.flat[0]:g}; leave it out of the table")


def plan(
    source: str,
    data_dir: str | None = None,
    box: int | None = None,
    dtype: str = "float16",
    sign: str | None = None,
) -> ConvertPlan:
    """Read the table and the headers, look at a sample of images, and decide everything.

    Args:
        source: a table (`.star`, `.cs`) or an image stack (`.mrcs`, `.mrc`); path or URL.
        data_dir: folder against which the table names its stacks.
        box: full box of the store, px; the source's own by default.
        dtype: `float16` or `float32`.
        sign: None to judge, `invert`, or `uninvert` to keep the source's contrast.

    Raises:
        MissingInputError: the table or a stack does not exist.
        InputError: anything about them that cannot be used.
    """
    if dtype not in ("float16", "float32"):
        raise InputError(f"--dtype {dtype}: images are stored as float16 or float32")
    found = read_source(source, data_dir)
    if box is not None and (box % 2 or not 0 < box <= found.box_size):
        raise InputError(f"--box {box}: the box must be even and at most the source's {found.box_size} px")
    box = box or found.box_size
    count = len(found.table)
    rows = np.unique(np.linspace(0, count - 1, min(_SAMPLE, count)).astype(np.int64))
    part = found.table.select(rows)
    sample = read_rows(dict(enumerate(found.stacks)), part.columns)
    _refuse_pixels(sample, part)
    recipe, reason = choose_recipe(sample, box, {None: None, "invert": -1, "uninvert": 1}[sign])
    levels = levels_of(box)
    shard_rows = shard_rows_of(box, dtype, count)
    columns = {name: COLUMNS[name] for name in COLUMNS if name in found.table.columns} | IMAGE_COLUMNS
    attrs: dict[str, Any] = {
        "scalecryo_version": __version__,
        "format_version": FORMAT_VERSION,
        "count": count,
        "box_size": box,
        "pixel_size": found.pixel_size * found.box_size / box,
        "dtype": dtype,
        "levels": list(levels),
        "shard_rows": shard_rows,
        "block_rows": {str(level): min(block_rows_of(level, dtype, count), shard_rows) for level in levels},
        "columns": list(columns),
        "contrast": "protein-bright",
        "sign": recipe.sign,
        "normalisation": recipe.normalisation,
        "common_scale": recipe.common_scale,
        "source": files.shown(files.absolute(source)),
        "source_box_size": found.box_size,
    }
    identity = {key: value for key, value in attrs.items() if key not in ("scalecryo_version", "source")}
    attrs["plan_hash"] = hashlib.sha256(
        json.dumps([identity, found.fingerprint()], sort_keys=True).encode()
    ).hexdigest()
    return ConvertPlan(found, recipe, reason, dtype, levels, shard_rows, attrs)


@dataclass(frozen=True)
class _ShardTask:
    """All that writing one shard needs, so that it can run anywhere."""

    store_url: str
    shard: int
    table: ParticleTable
    stacks: dict[int, Stack]
    recipe: Recipe
    dtype: str
    shard_rows: int
    block_rows: dict[int, int]


def _tasks(made: ConvertPlan, store_url: str, shards: list[int]) -> Iterator[_ShardTask]:
    block_rows = {level: int(made.attrs["block_rows"][str(level)]) for level in made.levels}
    for shard in shards:
        rows = slice(shard * made.shard_rows, min((shard + 1) * made.shard_rows, made.count))
        table = made.source.table.select(rows)
        stacks = {int(number): made.source.stacks[number] for number in np.unique(table.columns["stack"])}
        yield _ShardTask(store_url, shard, table, stacks, made.recipe, made.dtype, made.shard_rows, block_rows)


def _checked(images: Array, table: ParticleTable, task: _ShardTask, start: int) -> None:
    """Raise when normalised pixels cannot be stored, naming the image.

    Minimum and maximum carry NaN along, so two quick passes find everything.
    """
    limit = float(np.finfo(task.dtype).max)
    if -limit <= images.min() and images.max() <= limit:
        return
    rows = slice(start, start + len(images))
    part = table.select(rows)
    source = read_rows(task.stacks, part.columns)
    _refuse_pixels(source, part)
    for row, image in enumerate(images):
        if np.isnan(image).any():
            raise InputError(
                f"{_named(part, row)}: its background is flat while others have noise; leave it out of the table"
            )
        if np.abs(image).max() > limit:
            raise InputError(
                f"{_named(part, row)}: a pixel of {np.abs(image).max():.3g} σ does not fit {task.dtype}; "
                "use --dtype float32, or leave the image out"
            )


def write_shard(task: _ShardTask) -> int:
    """Read, normalise and write one shard of every array, then its manifest; returns its number of rows."""
    # OpenMP's number of threads belongs to the calling thread: with another number the last bits differ.
    torch.set_num_threads(1)
    table, rows = task.table, len(task.table)
    buffers = {
        level: ShardBuffer(rows, task.shard_rows, size, level, task.dtype) for level, size in task.block_rows.items()
    }
    mean, scale = np.empty(rows, np.float32), np.empty(rows, np.float32)
    # Pieces no longer than any level's block, so that each falls inside one block.
    step = min(task.block_rows.values())
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        source = read_rows(task.stacks, {key: table.columns[key][start:stop] for key in ("stack", "stack_index")})
        with np.errstate(invalid="ignore", over="ignore"):
            images, mean[start:stop], scale[start:stop] = normalise(source, task.recipe)
        _checked(images, table, task, start)
        for level, size in task.block_rows.items():
            images = crop(images, level)
            number, offset = divmod(start, size)
            target = torch.from_numpy(buffers[level].block(number)[offset : offset + len(images)])
            target.copy_(torch.from_numpy(images))  # several times faster than NumPy's float16 cast
    objects: dict[str, npt.NDArray] = {
        f"images/{level}/c/{task.shard}/0/0": buffer.finish() for level, buffer in buffers.items()
    }
    for name, values in {**table.columns, "image_mean": mean, "image_scale": scale}.items():
        key = "/".join([f"particles/{name}/c/{task.shard}", *("0" for _ in values.shape[1:])])
        objects[key] = encode_column(values, task.shard_rows)
    write_objects(task.store_url, f"{task.shard:08d}", objects)
    return rows


def check_destination(store_url: str, overwrite: bool) -> dict[str, Any]:
    """Attributes of the particle store at a place; empty when the place is free.

    Raises:
        OutputExistsError: something else is there, or a complete store that nobody asked to replace.
    """
    shown = files.shown(store_url)
    attrs = read_attributes(store_url)
    if not attrs:
        if files.exists(store_url) and (not files.is_folder(store_url) or files.list_folder(store_url)):
            raise OutputExistsError(f"{shown}: exists and is not a particle store; choose another place for the store")
    elif attrs.get("complete") is True and not overwrite:
        raise OutputExistsError(f"{shown}: a store is there already; add --overwrite to replace it")
    return attrs


def _clear_destination(made: ConvertPlan, store_url: str, overwrite: bool) -> None:
    """Remove what may be replaced; leave this very conversion unfinished to go on; refuse anything else."""
    attrs = check_destination(store_url, overwrite)
    shown = files.shown(store_url)
    if overwrite:
        files.remove_tree(store_url)
    elif attrs and attrs.get("plan_hash") != made.attrs["plan_hash"]:
        raise OutputExistsError(
            f"{shown}: holds an unfinished conversion of other data or with other options; "
            "add --overwrite to replace it"
        )
    elif attrs:
        files.remove_leftovers(store_url)


def convert(
    made: ConvertPlan, store_url: str, *, workers: int = 0, overwrite: bool = False, report: Report | None = None
) -> dict[str, Any]:
    """Carry out a plan; an unfinished store of the same plan is completed.

    Args:
        made: from `plan`.
        store_url: path or URL of the store.
        workers: threads, each with about one shard (some 200 MiB) in memory; 0 for one per core. A dask scheduler that
            the caller has set, such as a cluster's client, is used instead.
        overwrite: replace a store that is there.
        report: called with particles done and particles in all.

    Returns:
        The attributes of the finished store.

    Raises:
        OutputExistsError: something is there already.
        InputError: an image cannot be used; what was written stays incomplete and is refused by readers.
    """
    _clear_destination(made, store_url, overwrite)
    attrs = {**made.attrs, "complete": False}
    known = {**COLUMNS, **IMAGE_COLUMNS}
    documents = metadata_of(attrs, {name: known[name] for name in attrs["columns"]})
    group = json.loads(documents.pop("zarr.json"))
    files.write_bytes_atomic(files.join(store_url, "zarr.json"), json.dumps(group, indent=2).encode())
    stacks = {
        "names": made.source.table.stacks,
        "urls": [files.shown(files.absolute(stack.url)) for stack in made.source.stacks],
    }
    documents[SOURCE_STACKS] = json.dumps(stacks).encode()
    if made.source.star is not None:
        documents[SOURCE_TABLE] = made.source.star
    write_objects(store_url, "metadata", documents)

    finished = set(files.list_folder(files.join(store_url, MANIFESTS)))
    todo = [shard for shard in range(made.shards) if f"{shard:08d}.json" not in finished]
    workers = workers or os.cpu_count() or 1
    settings = {} if dask.config.get("scheduler", None) else {"scheduler": "threads", "num_workers": workers}
    done = made.count - sum(min(made.shard_rows, made.count - shard * made.shard_rows) for shard in todo)
    task = delayed(write_shard, pure=False, traverse=False)
    if report:
        report(done, made.count)
    # Some shards at a time: a graph of all of them would hold the whole table twice.
    for first in range(0, len(todo), _TASKS_PER_WORKER * workers):
        some = todo[first : first + _TASKS_PER_WORKER * workers]
        with one_torch_thread():
            results = compute(*(task(item) for item in _tasks(made, store_url, some)), **settings)
        done += sum(results)
        if report:
            report(done, made.count)

    manifests = [read_manifest(store_url, f"{shard:08d}") for shard in range(made.shards)]
    attrs["content_hash"] = hashlib.sha256(json.dumps(manifests, sort_keys=True).encode()).hexdigest()
    attrs["complete"] = True
    group["attributes"] = attrs
    files.write_bytes_atomic(files.join(store_url, "zarr.json"), json.dumps(group, indent=2).encode())
    return attrs
