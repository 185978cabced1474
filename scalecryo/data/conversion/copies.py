"""Which rows show one and the same image: named twice, by two spellings of a path or a link, or with equal pixels."""

import os
import posixpath
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from scalecryo.data.io import urls
from scalecryo.data.particles import Columns

_SAME = 1e-4  # of an image's σ: what the order of a sum may change in its mean and σ

Rows = npt.NDArray[np.int64]


def same_files(stacks: Sequence[str]) -> Rows:
    """A number for each stack, the same for those that are one file by another path or link.

    Args:
        stacks: their addresses.
    """
    keys: dict[object, int] = {}
    return np.array([keys.setdefault(_file_key(url), len(keys)) for url in stacks], dtype=np.int64)


def _file_key(url: str) -> object:
    if not urls.is_local(url):
        scheme, _, path = url.partition("://")
        return scheme, posixpath.normpath(path)
    local = urls.local_path(url)
    try:
        status = local.stat()
    except OSError:  # it has gone since
        return os.path.realpath(local)
    return status.st_dev, status.st_ino


def first_of_image(columns: Columns, places: Rows) -> Rows:
    """For each row the first row that shows the same image: itself where it is no copy.

    Args:
        columns: stack and stack_index; where the images are known, image_crc32c, image_mean and image_scale.
        places: `same_files` of the stacks.
    """
    count = len(columns["stack"])
    named = _groups([places[columns["stack"]], columns["stack_index"]], np.ones(max(count - 1, 0), dtype=bool))
    groups = [named]
    if "image_crc32c" in columns:
        mean, scale = (columns[name].astype(np.float64) for name in ("image_mean", "image_scale"))
        order = np.lexsort((scale, mean, columns["image_crc32c"]))
        near = _SAME * np.abs(scale[order[1:]])
        close = (np.abs(np.diff(mean[order])) <= near) & (np.abs(np.diff(scale[order])) <= near)
        groups.append(_groups([columns["image_crc32c"]], close, order))
    first = np.arange(count)
    while True:
        before = first
        for group in groups:
            least = np.full(count, count)
            np.minimum.at(least, group, first)
            first = least[group]
        if np.array_equal(first, before):
            return first


def _groups(keys: Sequence[npt.NDArray], close: npt.NDArray[np.bool_], order: Rows | None = None) -> Rows:
    """Numbers of groups of rows: neighbours in `order` with equal keys that are also `close`."""
    if order is None:
        order = np.lexsort(keys[::-1])
    same = close.copy()
    for values in keys:
        same &= values[order[1:]] == values[order[:-1]]
    group = np.empty(len(order), dtype=np.int64)
    group[order] = np.cumsum(np.concatenate([[0], ~same])[: len(order)])
    return group


def copies_table(first: Rows, half: npt.NDArray[np.integer]) -> Rows:
    """Rows that share an image, (c, 3): row, first row of that image, and the half that all of them are in, else 0.

    Args:
        first: `first_of_image`.
        half: of every row by the table, 0 to 2.
    """
    size = np.bincount(first, minlength=len(first))
    rows = np.flatnonzero(size[first] > 1)
    in_half = [np.bincount(first[rows][half[rows] == number], minlength=len(first)) > 0 for number in (1, 2)]
    agreed = np.where(in_half[0] != in_half[1], np.where(in_half[0], 1, 2), 0)
    return np.stack([rows, first[rows], agreed[first[rows]]], axis=1).astype(np.int64)
