"""A first look at a source, before anything is written: a sample of its images, or all of them.

What is decided here holds for every image; what is found here stands in the store's report.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from scalecryo.data.conversion.normalise import Normalisation, choose_normalisation
from scalecryo.data.conversion.quality import BadImage, bad_pixels, listed, refusal
from scalecryo.data.conversion.scheduler import ProgressCallback, run_tasks
from scalecryo.data.conversion.shard_task import find_bad_in_shard, read_rows, shard_task
from scalecryo.data.conversion.source import Source
from scalecryo.data.storage.layout import shard_rows_of
from scalecryo.errors import InputError

_SAMPLE = 128
_GROUP_SAMPLE = 32
_MOST_GROUPS = 64


def choose(particles: Source, box: int, sign: int | None, bad_images: str) -> tuple[Normalisation, str]:
    """The normalisation, from a sample of the images; where one of them is bad it is refused, or left out."""
    count = len(particles.table)
    part = particles.table.select(np.unique(np.linspace(0, count - 1, min(_SAMPLE, count)).astype(np.int64)))
    sample = read_rows(dict(enumerate(particles.stacks)), part.columns)
    bad = bad_pixels(sample, part)
    if bad and (bad_images == "refuse" or len(bad) == len(sample)):
        raise refusal(bad)
    rows = {image.source_row for image in bad}
    return choose_normalisation(sample[[row not in rows for row in part.columns["source_row"].tolist()]], box, sign)


def find_bad_images(
    particles: Source,
    normalisation: Normalisation,
    dtype: str,
    workers: int,
    scheduler: str | None,
    progress: ProgressCallback | None,
) -> tuple[BadImage, ...]:
    """Every image that cannot be stored, by row."""
    bad: list[BadImage] = []
    count = len(particles.table)
    size = shard_rows_of(particles.box_size, dtype, count)
    tasks = (shard_task("", particles, normalisation, dtype, size, {}, (), shard) for shard in range(-(-count // size)))
    run_tasks(find_bad_in_shard, tasks, lambda done: bad.extend(done.bad), total=count, workers=workers,
              scheduler=scheduler, progress=progress)  # fmt: skip
    bad += [BadImage(row, f"row {row + 1} of the table", why) for row, why in particles.left_out.items()]
    return tuple(sorted(bad, key=lambda image: image.source_row))


def drop_rows(particles: Source, excluded: tuple[BadImage, ...]) -> Source:
    """The source without some images."""
    out = {image.source_row for image in excluded}
    keep = np.flatnonzero([row not in out for row in particles.table.columns["source_row"].tolist()])
    if not len(keep):
        raise InputError(f"none of {len(particles.table):,} images can be stored: {listed(excluded)}")
    return replace(particles, table=particles.table.select(keep))


def contrast_of_groups(particles: Source, box: int) -> tuple[dict[str, Any], ...]:
    """The sign that each optics group's own images suggest; of many groups the first ones."""
    groups = particles.table.columns["optics_group"]
    judged = []
    for group in np.unique(groups)[:_MOST_GROUPS]:
        rows = np.flatnonzero(groups == group)
        part = particles.table.select(rows[np.unique(np.linspace(0, len(rows) - 1, _GROUP_SAMPLE).astype(np.int64))])
        sample = read_rows(dict(enumerate(particles.stacks)), part.columns)
        bad = {image.source_row for image in bad_pixels(sample, part)}
        sample = sample[[row not in bad for row in part.columns["source_row"].tolist()]]
        if len(sample):
            normalisation, reason = choose_normalisation(sample, box, None)
            judged.append({"optics_group": int(group), "sign": normalisation.sign, "reason": reason})
    return tuple(judged)
