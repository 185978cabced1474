"""From a particle table and its image stacks to a store.

Everything that headers can tell is checked before anything is written. One task writes one whole shard of every array
and then its manifest, so an interrupted conversion goes on where it stopped and repeats byte for byte; the attribute
`complete` comes last.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from scalecryo import __version__
from scalecryo.data.conversion.inspect import (
    choose,
    contrast_of_groups,
    drop_rows,
    find_bad_images,
)
from scalecryo.data.conversion.normalise import Normalisation
from scalecryo.data.conversion.places import check_destination
from scalecryo.data.conversion.quality import BadImage, find_report
from scalecryo.data.conversion.scheduler import ProgressCallback, run_tasks
from scalecryo.data.conversion.shard_task import ShardTask, shard_task, write_shard
from scalecryo.data.conversion.source import ReadOptions, Source, read_source
from scalecryo.data.io import urls
from scalecryo.data.io.lock import LOCK, writing
from scalecryo.data.particles import COLUMNS
from scalecryo.data.storage.layout import block_rows_of, levels_of, metadata_of, shard_rows_of, write_objects
from scalecryo.data.storage.store import (
    EXCLUDED,
    FORMAT_VERSION,
    IMAGE_COLUMNS,
    MANIFESTS,
    SOURCE_CS,
    SOURCE_STACKS,
    SOURCE_TABLE,
    read_attributes,
    read_manifests,
)
from scalecryo.errors import InputError, OutputError, OutputExistsError


@dataclass(frozen=True)
class ConvertPlan:
    """What a conversion will do, all of it decided.

    Args:
        source: the table and its stacks, without the images that are left out.
        normalisation: how images are stored.
        sign_reason: why with this sign.
        dtype, levels, shard_rows: of the store.
        attrs: of the store's group.
        excluded: images that are left out.
        contrast: for every optics group, the sign that its own images suggest and why.
    """

    source: Source
    normalisation: Normalisation
    sign_reason: str
    dtype: str
    levels: tuple[int, ...]
    shard_rows: int
    attrs: dict[str, Any] = field(repr=False)
    excluded: tuple[BadImage, ...] = ()
    contrast: tuple[dict[str, Any], ...] = ()

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

    def documents(self) -> dict[str, Any]:
        """What lies beside the arrays: the source's table and stacks, and which images were left out."""
        stacks: dict[str, Any] = {
            "names": self.source.table.stacks,
            "urls": [urls.redacted(urls.absolute(stack.url)) for stack in self.source.stacks],
        }
        if self.source.resampling:
            stacks["resampling"] = [[item.fourier_box, item.box_size] for item in self.source.resampling]
            stacks["pixel_sizes"] = self.source.table.stack_pixel_sizes
            stacks["boxes"] = self.source.table.stack_boxes
        documents: dict[str, Any] = {SOURCE_STACKS: json.dumps(stacks).encode()}
        if self.source.star is not None:
            documents[SOURCE_TABLE] = np.frombuffer(self.source.star, np.uint8)
        if self.source.cs is not None:
            documents[SOURCE_CS] = self.source.cs
        if self.excluded:
            rows = [{"source_row": bad.source_row, "image": bad.name, "problem": bad.problem} for bad in self.excluded]
            documents[EXCLUDED] = json.dumps(rows, indent=1).encode()
        return documents


def plan(
    source: str,
    data_dir: str | None = None,
    box: int | None = None,
    dtype: str = "float16",
    sign: str | None = None,
    bad_images: Literal["refuse", "exclude"] = "refuse",
    *,
    workers: int = 0,
    scheduler: str | None = None,
    progress: ProgressCallback | None = None,
    options: ReadOptions | None = None,
) -> ConvertPlan:
    """Read the table and the headers, look at a sample of images, and decide everything.

    Args:
        source: a table (`.star`, `.cs`, `.csg`) or an image stack (`.mrcs`, `.mrc`); path or URL.
        data_dir: folder against which the table names its stacks.
        box: full box of the store, px; the source's own by default.
        dtype: `float16` or `float32`.
        sign: None to judge, `invert`, or `uninvert` to keep the source's contrast.
        bad_images: `exclude` looks at every image now and leaves out those that cannot be stored.
        workers, scheduler: who looks (`run_tasks`).
        progress: called with particles looked at and particles in all.
        options: what else to know for reading the source.

    Raises:
        MissingInputError: the table or a stack does not exist.
        InputError: anything about them that cannot be used.
    """
    if dtype not in ("float16", "float32"):
        raise InputError(f"--dtype {dtype}: images are stored as float16 or float32")
    options = replace(options or ReadOptions(), leave_out=bad_images == "exclude")
    particles = read_source(source, data_dir, options)
    if box is not None and (box % 2 or not 0 < box <= particles.box_size):
        raise InputError(f"--box {box}: the box must be even and at most the source's {particles.box_size} px")
    box = box or particles.box_size
    asked = {None: None, "invert": -1, "uninvert": 1}[sign]
    normalisation, reason = choose(particles, box, asked or particles.sign, bad_images)
    if asked is None and particles.sign is not None:
        reason = "as blob/sign says"
    excluded: tuple[BadImage, ...] = ()
    if bad_images == "exclude":
        excluded = find_bad_images(particles, normalisation, dtype, workers, scheduler, progress)
        particles = drop_rows(particles, excluded)
    attrs = _attributes(source, particles, normalisation, dtype, len(excluded))
    contrast = contrast_of_groups(particles, box)
    return ConvertPlan(
        particles, normalisation, reason, dtype, tuple(attrs["levels"]), attrs["shard_rows"], attrs, excluded, contrast
    )


def _attributes(
    source: str, particles: Source, normalisation: Normalisation, dtype: str, excluded: int
) -> dict[str, Any]:
    """Attributes of a new store, with the hash of all that decides its bytes."""
    box, count = normalisation.box_size, len(particles.table)
    levels, shard_rows = levels_of(box), shard_rows_of(box, dtype, count)
    attrs: dict[str, Any] = {
        "scalecryo_version": __version__,
        "format_version": FORMAT_VERSION,
        "count": count,
        "box_size": box,
        "pixel_size": particles.pixel_size * particles.box_size / box,
        "dtype": dtype,
        "levels": list(levels),
        "shard_rows": shard_rows,
        "block_rows": {str(level): min(block_rows_of(level, dtype, count), shard_rows) for level in levels},
        "columns": [*(name for name in COLUMNS if name in particles.table.columns), *IMAGE_COLUMNS],
        "contrast": "protein-bright",
        "sign": normalisation.sign,
        "normalisation": normalisation.kind,
        "common_scale": normalisation.common_scale,
        "source": urls.redacted(urls.absolute(source)),
        "source_box_size": particles.box_size,
        "source_rows": count + excluded,
        "excluded": excluded,
    }
    attrs["plan_hash"] = plan_hash(attrs, particles)
    return attrs


def plan_hash(attrs: dict[str, Any], particles: Source) -> str:
    """Hash of attributes and source: conversions of one plan write the same bytes."""
    identity = {key: value for key, value in attrs.items() if key not in ("scalecryo_version", "source")}
    return hashlib.sha256(json.dumps([identity, particles.fingerprint()], sort_keys=True).encode()).hexdigest()


def _tasks(plan: ConvertPlan, store_url: str, shards: list[int]) -> Iterator[ShardTask]:
    block_rows = {level: int(plan.attrs["block_rows"][str(level)]) for level in plan.levels}
    columns = tuple(plan.attrs["columns"])
    for shard in shards:
        yield shard_task(
            store_url, plan.source, plan.normalisation, plan.dtype, plan.shard_rows, block_rows, columns, shard
        )


def write_group(store_url: str, group: dict[str, Any], attrs: dict[str, Any]) -> None:
    """Write the group's `zarr.json` with other attributes."""
    document = json.dumps({**group, "attributes": attrs}, indent=2).encode()
    urls.write_bytes_atomic(urls.join(store_url, "zarr.json"), document)


def _clear_destination(plan: ConvertPlan, store_url: str, overwrite: bool) -> None:
    """Remove what may be replaced; leave this very conversion unfinished to go on; refuse anything else."""
    attrs = check_destination(store_url, overwrite)
    shown = urls.redacted(store_url)
    if overwrite and attrs:
        # No longer a store that can be read, but still known as one when this is interrupted.
        known = {"scalecryo_version": __version__, "format_version": FORMAT_VERSION, "complete": False}
        write_group(store_url, {"zarr_format": 3, "node_type": "group"}, known)
        for name in set(urls.list_folder(store_url)) - {LOCK, "zarr.json"}:
            urls.remove_tree(urls.join(store_url, name))
    elif attrs and attrs.get("plan_hash") != plan.attrs["plan_hash"]:
        raise OutputExistsError(
            f"{shown}: holds an unfinished conversion of other data or with other options; "
            "add --overwrite to replace it"
        )
    elif attrs:
        urls.remove_leftovers(store_url)


def convert(
    plan: ConvertPlan,
    store_url: str,
    *,
    workers: int = 0,
    scheduler: str | None = None,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Carry out a plan; an unfinished store of the same plan is completed.

    Args:
        plan: from `plan`.
        store_url: path or URL of the store.
        workers, scheduler: who writes (`run_tasks`); each thread holds some tens of MiB on disk, one shard elsewhere.
        overwrite: replace a store that is there.
        progress: called with particles done and particles in all.

    Returns:
        The attributes of the finished store.

    Raises:
        OutputExistsError: something is there already.
        OutputError: another conversion writes there, or the disk is full.
        InputError: an image cannot be used; what was written stays incomplete and is refused by readers.
    """
    check_destination(store_url, overwrite)
    with writing(store_url, plan.attrs["plan_hash"]) as renew:
        _clear_destination(plan, store_url, overwrite)
        attrs = {**plan.attrs, "complete": False}
        known = {**COLUMNS, **IMAGE_COLUMNS}
        documents = metadata_of(attrs, {name: known[name] for name in attrs["columns"]})
        group = json.loads(documents.pop("zarr.json"))
        write_group(store_url, group, attrs)
        write_objects(store_url, "metadata", {**documents, **plan.documents()})

        present = set(urls.list_folder(urls.join(store_url, MANIFESTS)))
        todo = [shard for shard in range(plan.shards) if f"{shard:08d}.json" not in present]
        done = plan.count - sum(min(plan.shard_rows, plan.count - shard * plan.shard_rows) for shard in todo)
        run_tasks(write_shard, _tasks(plan, store_url, todo), lambda _: renew(), total=plan.count, done=done,
                  workers=workers, scheduler=scheduler, progress=progress)  # fmt: skip
        if read_attributes(store_url).get("plan_hash") != plan.attrs["plan_hash"]:
            raise OutputError(f"{urls.redacted(store_url)}: another conversion took this place; choose another")
        attrs = finish(store_url, attrs, plan.source, plan.contrast)
        write_group(store_url, group, attrs)
    return attrs


def finish(
    store_url: str, attrs: dict[str, Any], particles: Source, contrast: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Write the report of a store whose shards are all there; its attributes as they are when it is complete."""
    stacks = [stack.url for stack in particles.stacks]
    write_objects(store_url, "report", find_report(store_url, attrs, particles.table, stacks, contrast))
    return {**attrs, "content_hash": content_hash(store_url, attrs), "complete": True}


def content_hash(store_url: str, attrs: dict[str, Any]) -> str:
    """Hash of the manifests of all shards, and so of every byte of images and columns."""
    shards = range(-(-attrs["count"] // attrs["shard_rows"]))
    manifests = read_manifests(store_url, [f"{shard:08d}" for shard in shards])
    return hashlib.sha256(json.dumps(manifests, sort_keys=True).encode()).hexdigest()
