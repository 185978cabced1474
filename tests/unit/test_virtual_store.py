"""A store made of another one's shards: every array is readable by anyone and repeats the small store's rows."""

from pathlib import Path

import numpy as np
import pytest
import zarr

from scalecryo.commands import verify as verify_command
from scalecryo.data.conversion.convert import convert, plan
from scalecryo.data.formats.mrc import StackWriter
from scalecryo.data.storage.store import ParticleStore
from scalecryo.errors import OutputExistsError
from tests.support.virtual_store import make_virtual_store


@pytest.mark.parametrize(("real", "count"), [(600, 2000), (600, 100), (600, 1024), (100, 700)])
def test_rows_repeat(tmp_path: Path, real: int, count: int) -> None:
    """Shards of 256 rows: the real store has two full ones, or none; the virtual one ends anywhere."""
    images = np.random.default_rng(0).normal(3, 2, (real, 44, 44)).astype(np.float32)
    with StackWriter(str(tmp_path / "s.mrcs"), real, 44, 1.5) as writer:
        writer.append(images)
    convert(plan(str(tmp_path / "s.mrcs")), str(tmp_path / "small"))
    make_virtual_store(tmp_path / "small", tmp_path / "virtual", count)
    small, virtual = (ParticleStore.open(str(tmp_path / name)) for name in ("small", "virtual"))
    shard, full = small.shard_rows, count - count % small.shard_rows
    # Full shards repeat the real ones, or one that is made of all rows; the last one starts anew.
    period = real // shard * shard or shard
    rows = np.concatenate([np.arange(full) % period, np.arange(count - full)]) % real
    group = zarr.open(tmp_path / "virtual", mode="r")
    for level in small.levels:
        expected = small.read_images(level, 0, real)[rows]
        assert np.array_equal(virtual.read_images(level, 0, count), expected)
        assert np.array_equal(group[f"images/{level}"][:], expected)
    known = small.read_columns(0, real)
    for name, values in virtual.read_columns(0, count).items():
        assert np.array_equal(values, known[name][rows])
        assert np.array_equal(group[f"particles/{name}"][:], values)
    verify_command.run(str(tmp_path / "virtual"), full=True)
    with pytest.raises(OutputExistsError, match="exists already"):
        make_virtual_store(tmp_path / "small", tmp_path / "virtual", count)


def test_shards_are_links(tmp_path: Path) -> None:
    images = np.random.default_rng(0).normal(3, 2, (300, 44, 44)).astype(np.float32)
    with StackWriter(str(tmp_path / "s.mrcs"), 300, 44, 1.5) as writer:
        writer.append(images)
    convert(plan(str(tmp_path / "s.mrcs")), str(tmp_path / "small"))
    make_virtual_store(tmp_path / "small", tmp_path / "virtual", 256 * 40)
    assert (tmp_path / "small/images/44/c/0/0/0").samefile(tmp_path / "virtual/images/44/c/39/0/0")
