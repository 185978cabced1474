"""What a conversion finds: repeated rows against a plain search, images that differ in everything that counts."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from scalecryo.data.conversion.quality import (
    bad_images,
    duplicates,
    group_statistics,
    identical,
    listed,
    repeated_rows,
    storable,
)
from scalecryo.data.particles import ParticleTable


def _table(count: int, **columns: np.ndarray) -> ParticleTable:
    zero = np.zeros(count)
    always = {"stack": zero, "stack_index": np.arange(count), "source_row": np.arange(count)}
    return ParticleTable(1.0, ("a.mrcs", "b.mrcs"), {**always, "optics_group": zero + 1, "half": zero, **columns})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), max_size=30))
def test_repeated_rows_against_a_plain_search(pairs: list[tuple[int, int]]) -> None:
    first, second = (np.array([pair[axis] for pair in pairs], dtype=np.int64) for axis in (0, 1))
    expected = [row for row, pair in enumerate(pairs) if pair in pairs[:row]]
    assert repeated_rows(first, second).tolist() == expected


def test_duplicates_name_the_later_row() -> None:
    table = _table(5, stack=np.array([0, 1, 0, 1, 0]), stack_index=np.array([3, 3, 3, 4, 0]))
    assert duplicates(table) == {"count": 1, "first": ["image 4 of a.mrcs"]}
    assert duplicates(_table(3)) == {"count": 0, "first": []}


def test_identical_images_only_inside_one_stack() -> None:
    table = _table(5, stack=np.array([0, 0, 1, 0, 0]), stack_index=np.array([0, 1, 0, 2, 0]))
    columns = {
        **table.columns,
        "image_crc32c": np.array([7, 7, 7, 7, 7], np.uint32),
        "image_mean": np.array([1, 1, 1, 2, 1], np.float32),
        "image_scale": np.ones(5, np.float32),
    }
    # Row 1 repeats row 0; row 2 is of another stack, row 3 has another mean, row 4 is row 0 itself once more.
    assert identical(columns, table) == {"count": 1, "first": ["image 2 of a.mrcs"]}


def test_groups_in_source_units() -> None:
    columns = {
        "optics_group": np.array([1, 1, 1, 5]),
        "image_mean": np.array([-1, -2, -30, 4], np.float32),
        "image_scale": np.array([0.5, 0.25, 9, 1], np.float32),
    }
    assert group_statistics(columns, -1) == [
        {"optics_group": 1, "particles": 3, "background_mean": 2.0, "scale": 0.5},
        {"optics_group": 5, "particles": 1, "background_mean": -4.0, "scale": 1.0},
    ]


def test_problems_by_source_and_by_what_was_made_of_it() -> None:
    source = np.random.default_rng(0).normal(size=(6, 8, 8)).astype(np.float32)
    stored = source.copy()
    assert storable(stored, "float16")
    assert storable(stored[:1] * 0 + 65504, "float16")
    source[1, 0, 0] = stored[1, 0, 0] = np.nan
    source[2, 0, 0] = stored[2, 0, 0] = -np.inf
    source[3] = 2.0
    stored[4] = np.nan
    stored[5, 1, 1] = 65520
    assert not storable(stored[1:2], "float16")
    assert not storable(stored[2:3], "float32")
    assert not storable(stored[5:], "float16")
    assert storable(stored[5:], "float32")
    found = bad_images(stored, "float16", _table(6), source)
    assert [(image.source_row, image.problem) for image in found] == [
        (1, "has pixels that are not finite"),
        (2, "has pixels that are not finite"),
        (3, "every pixel is 2"),
        (4, "its background is flat while others have noise"),
        (5, "a pixel of 6.55e+04 σ does not fit float16"),
    ]
    assert listed(found * 2).endswith("; and 5 more")
