"""What a conversion finds in its source: images that cannot be stored, particles that come twice, optics groups.

The findings become `source/report.json` of the store.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from scalecryo.data.conversion.copies import copies_table, first_of_image, same_files
from scalecryo.data.conversion.normalise import Array
from scalecryo.data.io import urls
from scalecryo.data.particles import Columns, ParticleTable
from scalecryo.data.storage.layout import column_key
from scalecryo.data.storage.shards import CRC_BYTES, crc_holds
from scalecryo.data.storage.store import COPIES, IMAGE_COLUMNS, REPORT
from scalecryo.errors import InputError, StoreError

_NAMED = 5  # how many of many a line names
_CHUNKS_AT_ONCE = 256  # of which an object store is asked together


@dataclass(frozen=True)
class BadImage:
    """An image that cannot be stored.

    Args:
        source_row: its row in the source's table, from 0.
        name: as a line names it.
        problem: what is wrong with it.
    """

    source_row: int
    name: str
    problem: str


def _named(table: ParticleTable, row: int) -> str:
    stack, index = (int(table.columns[name][row]) for name in ("stack", "stack_index"))
    return f"image {index + 1} of {table.stacks[stack]}"


def _pixel_problem(image: Array) -> str:
    """What is wrong with a source image by itself; empty when nothing is."""
    if not np.isfinite(image).all():
        return "has pixels that are not finite"
    return f"every pixel is {image.flat[0]:g}" if image.max() == image.min() else ""


def bad_pixels(images: Array, table: ParticleTable) -> list[BadImage]:
    """Source images (n, N, N) of a table's rows that are constant or hold pixels that are not finite."""
    problems = [_pixel_problem(image) for image in images]
    rows = table.columns["source_row"]
    return [BadImage(int(rows[row]), _named(table, row), problem) for row, problem in enumerate(problems) if problem]


def storable(images: Array, dtype: str) -> bool:
    """Whether normalised images (n, N, N) are all finite and fit a dtype."""
    limit = float(np.finfo(dtype).max)
    # Minimum and maximum carry NaN along, so one quick pass finds everything.
    low, high = torch.aminmax(torch.from_numpy(images))
    return -limit <= float(low) and float(high) <= limit


def bad_images(images: Array, dtype: str, table: ParticleTable, sources: Array) -> list[BadImage]:
    """Normalised images (n, N, N) of a table's rows that cannot be stored, and why, by their source's pixels."""
    limit = float(np.finfo(dtype).max)
    found = []
    for row, (image, source) in enumerate(zip(images, sources, strict=True)):
        problem = _pixel_problem(source)
        if not problem and np.isnan(image).any():
            problem = "its background is flat while others have noise"
        elif not problem and np.abs(image).max() > limit:
            problem = f"a pixel of {np.abs(image).max():.3g} σ does not fit {dtype}"
        if problem:
            found.append(BadImage(int(table.columns["source_row"][row]), _named(table, row), problem))
    return found


def listed(bad: Sequence[BadImage]) -> str:
    """The first few images and how many more there are, in one line."""
    lines = "; ".join(f"{image.name}: {image.problem}" for image in bad[:_NAMED])
    return lines + (f"; and {len(bad) - _NAMED:,} more" if len(bad) > _NAMED else "")


def refusal(bad: Sequence[BadImage]) -> InputError:
    """The error that names images which cannot be stored."""
    repair = "use --dtype float32, or " if any("does not fit" in image.problem for image in bad) else ""
    return InputError(f"{listed(bad)}; {repair}leave out such images by --bad-images exclude")


def copies_found(table: ParticleTable, columns: Columns, places: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Rows whose image an earlier row has shown: how many, the first few by name, and the halves by the table's word.

    Args:
        table: the particles.
        columns: theirs, and what conversion found of their images.
        places: which file each stack is (`same_files`).

    Returns:
        duplicates (named twice), identical_images (the same pixels under another name), apart (in both halves by the
        table), halves (particles in none, 1 and 2), and the `copies_table` as `copies`.
    """
    named = first_of_image({name: columns[name] for name in ("stack", "stack_index")}, places)
    first, own = first_of_image(columns, places), np.arange(len(table))
    half = table.columns["half"].astype(np.int64)
    copies = copies_table(first, half)
    effective = half.copy()
    effective[copies[:, 0]] = copies[:, 2]

    def some(rows: npt.NDArray) -> dict[str, Any]:
        return {"count": len(rows), "first": [_named(table, int(row)) for row in rows[:_NAMED]]}

    return {
        "duplicates": some(np.flatnonzero(named != own)),
        "identical_images": some(np.flatnonzero((named == own) & (first != own))),
        "apart": int(np.count_nonzero((half != effective) & (half > 0))),
        "halves": np.bincount(effective, minlength=3).tolist(),
        "copies": copies,
    }


def group_statistics(columns: Columns, sign: int) -> list[dict[str, Any]]:
    """Background of every optics group: the median over its images of the background's mean and σ, in source units."""
    groups = columns["optics_group"]
    found = []
    for group in np.unique(groups):
        rows = groups == group
        found.append(
            {
                "optics_group": int(group),
                "particles": int(rows.sum()),
                # Shortest decimal of the float32: the same text from the same columns everywhere.
                "background_mean": float(str(np.median(columns["image_mean"][rows]) * np.float32(sign))),
                "scale": float(str(np.median(columns["image_scale"][rows]))),
            }
        )
    return found


def _stored_column(store_url: str, name: str, count: int, shard_rows: int) -> npt.NDArray:
    """A column that conversion added, read from its chunks, whatever the array's own metadata says by now.

    Raises:
        StoreError: a chunk is damaged.
        MissingInputError: a chunk is missing.
    """
    dtype = np.dtype(IMAGE_COLUMNS[name][0]).newbyteorder("<")
    addresses = [urls.join(store_url, column_key(name, shard, ())) for shard in range(-(-count // shard_rows))]
    values = np.empty(len(addresses) * shard_rows, dtype)
    for first in range(0, len(addresses), _CHUNKS_AT_ONCE):
        some = addresses[first : first + _CHUNKS_AT_ONCE]
        for number, (url, data) in enumerate(zip(some, urls.read_many(some), strict=True), first):
            body = np.frombuffer(data, np.uint8)[:-CRC_BYTES]
            if len(body) != shard_rows * dtype.itemsize or not crc_holds(body, data[-CRC_BYTES:]):
                raise StoreError(f"{urls.redacted(url)}: damaged while the store was written; convert with --overwrite")
            values[number * shard_rows : (number + 1) * shard_rows] = body.view(dtype)
    return values[:count]


def find_report(
    store_url: str,
    attrs: Mapping[str, Any],
    table: ParticleTable,
    stacks: Sequence[str],
    contrast: Sequence[dict[str, Any]],
) -> dict[str, bytes]:
    """What was found in the particles of a store whose shards are all written: its report, and which rows are copies.

    Args:
        store_url: the store.
        attrs: its attributes: count, shard_rows, columns, sign, excluded.
        table: its particles.
        stacks: addresses of its stacks.
        contrast: sign and reason by optics group, as judged when the conversion was planned.

    Raises:
        StoreError: a column is damaged.
    """
    names = [name for name in IMAGE_COLUMNS if name in attrs["columns"]]
    stored = {name: _stored_column(store_url, name, attrs["count"], attrs["shard_rows"]) for name in names}
    columns = {**table.columns, **stored}
    judged = {item["optics_group"]: item for item in contrast}
    groups = group_statistics(columns, int(attrs["sign"]))
    found = {
        "particles": len(table),
        "excluded": int(attrs.get("excluded", 0)),
        "optics_groups": [{**group, **judged.get(group["optics_group"], {})} for group in groups],
        **copies_found(table, columns, same_files(stacks)),
    }
    copies = io.BytesIO()
    np.save(copies, found.pop("copies"), allow_pickle=False)
    return {REPORT: json.dumps(found, indent=1).encode(), COPIES: copies.getvalue()}
