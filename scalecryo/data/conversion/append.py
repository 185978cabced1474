"""Add newly collected particles to a complete store, which stays readable and right at every moment.

Readers go by the count in the group's `zarr.json`, which is replaced last. Before that only things past the old count
are written, and the last, short shard is replaced by one that begins with the same rows. What is about to be replaced
has its new manifest in `_append/` first, so that `verify` knows both; `_append/commit.json` holds the last steps, and
whoever comes next takes them.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from scalecryo.data.conversion.append_plan import AppendPlan
from scalecryo.data.conversion.convert import content_hash, write_group
from scalecryo.data.conversion.quality import find_report
from scalecryo.data.conversion.scheduler import ProgressCallback, run_tasks
from scalecryo.data.conversion.shard_task import PENDING, ShardTask, write_shard
from scalecryo.data.conversion.verify import expected_keys
from scalecryo.data.io import urls
from scalecryo.data.io.lock import writing
from scalecryo.data.particles import COLUMNS, ParticleTable
from scalecryo.data.storage.layout import entry_of, metadata_of, write_manifest, write_objects
from scalecryo.data.storage.store import (
    IMAGE_COLUMNS,
    MANIFESTS,
    REPORT,
    SOURCE_CS,
    SOURCE_STACKS,
    SOURCE_TABLE,
    read_attributes,
)
from scalecryo.errors import MissingInputError, OutputError

_PLAN = f"{PENDING}/plan.json"
_COMMIT = f"{PENDING}/commit.json"


def _tasks(plan: AppendPlan, shards: list[int]) -> Iterator[ShardTask]:
    store, size = plan.store, plan.store.shard_rows
    block_rows = {level: store.block_rows(level) for level in store.levels}
    for shard in shards:
        start, stop = (max(row - store.count, 0) for row in (shard * size, (shard + 1) * size))
        table = plan.source.table.select(slice(start, stop))
        stacks = {int(number): plan.source.stacks[number] for number in np.unique(table.columns["stack"])}
        kept = max(store.count - shard * size, 0)
        yield ShardTask(
            store.url, shard, table, stacks, plan.normalisation, store.dtype, size, block_rows, store.columns, kept
        )


def _pending(store_url: str, key: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(urls.read_bytes(urls.join(store_url, key)))
    except MissingInputError:
        found = {}
    return found


def _abandon(plan: AppendPlan, shards: int) -> None:
    """Undo an unfinished append of other particles: the last old shard again as it was, nothing past it."""
    store, size = plan.store, plan.store.shard_rows
    last, rest = divmod(store.count, size)
    if rest:
        nobody = replace(plan.source, table=plan.source.table.select(slice(0, 0)))
        write_shard(next(_tasks(replace(plan, source=nobody), [last])))
    for shard in range(store.shards, shards):
        urls.remove_tree(urls.join(store.url, MANIFESTS, f"{shard:08d}.json"))
        for key in expected_keys(store, shard):
            urls.remove_tree(urls.join(store.url, key))
    urls.remove_tree(urls.join(store.url, PENDING))


def _todo(plan: AppendPlan) -> list[int]:
    """Shards that are not written yet."""
    store = plan.store
    last, rest = divmod(store.count, store.shard_rows)
    present = set(urls.list_folder(urls.join(store.url, MANIFESTS)))
    shards = range(last, -(-int(plan.attrs["count"]) // store.shard_rows))
    todo = [shard for shard in shards if f"{shard:08d}.json" not in present]
    if rest:
        name = f"{last:08d}.json"
        replaced = _pending(store.url, f"{PENDING}/{name}")
        if not replaced or replaced != _pending(store.url, f"{MANIFESTS}/{name}"):
            todo = [last, *(shard for shard in todo if shard != last)]
    return todo


def append(
    plan: AppendPlan, *, workers: int = 0, scheduler: str | None = None, progress: ProgressCallback | None = None
) -> dict[str, Any]:
    """Carry out a plan; an unfinished append of the same particles goes on.

    Args:
        plan: from `plan_append`.
        workers, scheduler: who writes (`run_tasks`).
        progress: called with new particles done and new particles in all.

    Returns:
        The attributes of the store.

    Raises:
        OutputError: another conversion writes to the store, or the disk is full.
        InputError: an image cannot be used; the store stays as it was.
    """
    store = plan.store
    with writing(store.url, plan.attrs["plan_hash"]) as renew:
        if read_attributes(store.url).get("plan_hash") != store.attrs["plan_hash"]:
            raise OutputError(f"{urls.redacted(store.url)}: was changed by another conversion; run this again")
        begun = _pending(store.url, _PLAN)
        if begun and begun["plan_hash"] != plan.attrs["plan_hash"]:
            _abandon(plan, int(begun["shards"]))
        urls.remove_leftovers(store.url)
        begun = {"plan_hash": plan.attrs["plan_hash"], "shards": -(-plan.attrs["count"] // store.shard_rows)}
        urls.write_bytes_atomic(urls.join(store.url, _PLAN), json.dumps(begun).encode())
        todo = _todo(plan)
        done = plan.count - sum(len(task.table) for task in _tasks(plan, todo))
        run_tasks(write_shard, _tasks(plan, todo), lambda _: renew(), total=plan.count, done=done, workers=workers,
                  scheduler=scheduler, progress=progress)  # fmt: skip
        _prepare_commit(plan)
        return _roll_forward(store.url)


def _prepare_commit(plan: AppendPlan) -> None:
    """Write every document that changes aside, and then what the last steps are."""
    store = plan.store
    old, new = store.table(), plan.source.table
    columns = {name: np.concatenate([old.columns[name], new.columns[name]]) for name in old.columns}
    table = ParticleTable(old.pixel_size, new.stacks, columns)
    before = _pending(store.url, REPORT).get("optics_groups", [])
    contrast = {item["optics_group"]: item for item in (*before, *plan.contrast) if "reason" in item}
    judged = [{key: item[key] for key in ("optics_group", "sign", "reason")} for item in contrast.values()]
    attrs = {**plan.attrs, "content_hash": content_hash(store.url, plan.attrs)}
    known = {**COLUMNS, **IMAGE_COLUMNS}
    documents = metadata_of(attrs, {name: known[name] for name in store.columns})
    group = json.loads(documents.pop("zarr.json"))
    documents |= plan.documents
    # A source table that does not hold them all is of no use: exports then write the store's own table.
    tables = [key for key in (SOURCE_TABLE, SOURCE_CS) if urls.exists(urls.join(store.url, key))]
    removed = [key for key in tables if key not in documents]
    stacks = json.loads(plan.documents[SOURCE_STACKS])["urls"]
    found = find_report(store.url, attrs, table, stacks, judged)
    for name, objects in (("metadata", documents), ("report", found)):
        for key, data in objects.items():
            urls.write_bytes_atomic(urls.join(store.url, PENDING, key), data)
        write_manifest(store.url, name, {key: entry_of(data) for key, data in objects.items()}, PENDING)
    steps = {
        "group": group,
        "attrs": attrs,
        "documents": {"metadata": list(documents), "report": list(found)},
        "removed": removed,
    }
    urls.write_bytes_atomic(urls.join(store.url, _COMMIT), json.dumps(steps).encode())


def _roll_forward(store_url: str) -> dict[str, Any]:
    """Take the last steps of an append whose shards are all written; the attributes of the store, empty without any."""
    steps = _pending(store_url, _COMMIT)
    if not steps:
        return {}
    attrs: dict[str, Any] = steps["attrs"]
    for name, keys in steps["documents"].items():
        objects = {key: urls.read_bytes(urls.join(store_url, PENDING, key)) for key in keys}
        write_objects(store_url, name, objects)
    write_group(store_url, steps["group"], attrs)
    for key in steps["removed"]:
        urls.remove_tree(urls.join(store_url, key))
    urls.remove_tree(urls.join(store_url, _COMMIT))
    urls.remove_tree(urls.join(store_url, PENDING))
    return attrs


def complete_append(store_url: str) -> None:
    """Take the last steps of an append that was interrupted among them; nothing where there is none.

    Raises:
        OutputError: another conversion is writing to the store.
    """
    if urls.exists(urls.join(store_url, _COMMIT)):
        with writing(store_url, "append"):
            _roll_forward(store_url)
