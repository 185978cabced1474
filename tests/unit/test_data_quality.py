"""What a conversion finds: groups, and images that cannot be stored."""

import numpy as np

from scalecryo.data.conversion.quality import (
    bad_images,
    group_statistics,
    listed,
    storable,
)
from scalecryo.data.particles import ParticleTable


def _table(count: int, **columns: np.ndarray) -> ParticleTable:
    zero = np.zeros(count)
    always = {"stack": zero, "stack_index": np.arange(count), "source_row": np.arange(count)}
    return ParticleTable(1.0, ("a.mrcs", "b.mrcs"), {**always, "optics_group": zero + 1, "half": zero, **columns})


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
