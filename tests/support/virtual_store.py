"""Make a store of very many particles out of a small one, by hard links: its shards repeat, nothing is computed.

    python -m tests.support.virtual_store small.zarr virtual.zarr 10000000

What is measured on such a store says how planning, metadata, memory and file handles grow with the number of particles.
It says nothing about the bandwidth of a disk: few real shards stay in the page cache.
"""

import argparse
import hashlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from scalecryo.data.particles import COLUMNS
from scalecryo.data.storage.layout import column_key, entry_of, image_key, metadata_of, write_objects
from scalecryo.data.storage.shard_writer import ShardWriter
from scalecryo.data.storage.shards import encode_column
from scalecryo.data.storage.store import IMAGE_COLUMNS, MANIFESTS, SOURCE_STACKS, ParticleStore
from scalecryo.errors import OutputExistsError

Manifest = dict[str, dict[str, int]]


def _write_shard(small: ParticleStore, out: Path, shard: int, rows: int) -> Manifest:
    """Write one shard that holds the first rows of the small store, from the start again where it has fewer."""
    objects: dict[str, Any] = {}
    position = np.arange(rows) % small.count
    stop = min(rows, small.count)
    for level in small.levels:
        size = small.block_rows(level)
        images = small.read_images(level, 0, stop)
        stream = io.BytesIO()
        writer = ShardWriter(stream, small.shard_rows, size, level, small.dtype)
        for start in range(0, rows, size):
            writer.append(images[position[start : start + size]])
        writer.finish()
        objects[image_key(level, shard)] = stream.getvalue()
    for name, values in small.read_columns(0, stop).items():
        objects[column_key(name, shard, values.shape[1:])] = encode_column(values[position], small.shard_rows)
    write_objects(str(out), f"{shard:08d}", objects)
    return {key: entry_of(data) for key, data in objects.items()}


def _same_key(key: str, shard: int) -> str:
    """The key of the same array's object in another shard."""
    parts = key.split("/")
    parts[parts.index("c") + 1] = str(shard)
    return "/".join(parts)


def _link_shard(templates: list[tuple[Path, str, dict[str, int]]], out: Path, shard: int) -> Manifest:
    """Hard-link every object of a real shard under another number, and write its manifest."""
    manifest: Manifest = {}
    for source, key, entry in templates:
        target = _same_key(key, shard)
        path = out / target
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, path)
        except OSError:  # another file system, no links there, or too many to one file
            shutil.copyfile(source, path)
        manifest[target] = entry
    folder = out / MANIFESTS
    folder.mkdir(exist_ok=True)
    (folder / f"{shard:08d}.json").write_text(json.dumps(manifest, indent=1))
    return manifest


def _templates(small: ParticleStore, out: Path, count: int) -> list[list[tuple[Path, str, dict[str, int]]]]:
    """The real, full shards that may be linked; where the small store has none, one is made by repeating its rows."""
    rows = small.shard_rows
    root, full = Path(small.url), small.count // rows
    if not full and count >= rows:
        manifest = _write_shard(small, out, 0, rows)
        return [[(out / key, key, entry) for key, entry in manifest.items()]]
    return [[(root / key, key, entry) for key, entry in small.manifest(shard).items()] for shard in range(full)]


def make_virtual_store(small_store: Path, out: Path, count: int) -> None:
    """Make a complete store of `count` particles whose shards are those of a small store, again and again.

    Blocks and shards keep the small store's number of rows. The stacks are named as in the small store; the source
    table is left out, since its rows repeat.

    Args:
        small_store: a complete store on a local disk.
        out: folder to make; on the same file system shards are hard links, elsewhere copies.
        count: number of particles, any.

    Raises:
        OutputExistsError: `out` is there already.
        ScalecryoError: the small store cannot be read.
    """
    small = ParticleStore.open(str(small_store))
    if out.exists():
        raise OutputExistsError(f"{out}: exists already; remove it, or choose another place")
    out.mkdir(parents=True)
    attrs = {key: value for key, value in small.attrs.items() if key not in ("content_hash", "plan_hash")}
    attrs |= {"count": count, "complete": False, "virtual": {"store": small.url, "shards": small.shards}}
    known = {**COLUMNS, **IMAGE_COLUMNS}
    documents = metadata_of(attrs, {name: known[name] for name in small.columns})
    group = json.loads(documents.pop("zarr.json"))
    documents[SOURCE_STACKS] = (Path(small.url) / SOURCE_STACKS).read_bytes()
    write_objects(str(out), "metadata", documents)

    templates = _templates(small, out, count)
    full, rest = divmod(count, small.shard_rows)
    manifests = []
    for shard in range(full):
        template = templates[shard % len(templates)]
        if shard == 0 and template[0][0].is_relative_to(out):
            manifests.append({key: entry for _, key, entry in template})
        else:
            manifests.append(_link_shard(template, out, shard))
    if rest:
        manifests.append(_write_shard(small, out, full, rest))
    identity = json.dumps(manifests, sort_keys=True).encode()
    attrs |= {"content_hash": hashlib.sha256(identity).hexdigest(), "complete": True}
    attrs["plan_hash"] = attrs["content_hash"]
    group["attributes"] = attrs
    (out / "zarr.json").write_text(json.dumps(group, indent=2))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("small_store", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("count", type=int)
    args = parser.parse_args()
    make_virtual_store(args.small_store, args.out, args.count)
    store = ParticleStore.open(str(args.out))
    print(f"{args.out}: {store.count:,} particles in {store.shards:,} shards, from {args.small_store}")


if __name__ == "__main__":
    main()
