"""Layout rules, shard encoding against zarr-python, and what a damaged store says."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from scalecryo.data.io import urls
from scalecryo.data.storage.arrays import ColumnArray, ImageArray
from scalecryo.data.storage.layout import block_rows_of, levels_of, metadata_of, shard_rows_of
from scalecryo.data.storage.shard_writer import ShardWriter
from scalecryo.data.storage.shards import crc32c, encode_column
from scalecryo.data.storage.store import ParticleStore
from scalecryo.errors import MissingInputError, StoreError


@pytest.mark.parametrize(
    ("box", "levels"),
    [(30, (30,)), (42, (42,)), (44, (44, 32)), (64, (64, 32)), (100, (100, 64, 32)), (320, (320, 128, 64, 32))],
)
def test_levels(box: int, levels: tuple[int, ...]) -> None:
    assert levels_of(box) == levels


@pytest.mark.parametrize(
    ("box", "dtype", "count", "block"),
    [
        (64, "float16", 10**7, 256),
        (128, "float16", 10**7, 64),
        (256, "float16", 10**7, 16),
        (512, "float16", 10**7, 4),
        (128, "float32", 10**7, 32),
        (1024, "float32", 10**7, 4),
        (32, "float16", 10**7, 256),
        (128, "float16", 9000, 16),  # 563 blocks; blocks of 32 would be 282
        (128, "float16", 7, 4),
    ],
)
def test_block_rule(box: int, dtype: str, count: int, block: int) -> None:
    assert block_rows_of(box, dtype, count) == block
    assert shard_rows_of(box, dtype, count) == 64 * block


def _store(count: int, box: int, dtype: str, block: int, shard: int) -> tuple[dict[str, bytes], dict[str, np.ndarray]]:
    """Objects of one image array and two columns, and what they hold."""
    rng = np.random.default_rng(count)
    held = {
        "images": rng.normal(size=(count, box, box)).astype(dtype),
        "half": rng.integers(0, 3, count).astype("i1"),
        "rotation": rng.normal(size=(count, 3, 3)).astype("f4"),
    }
    attrs = {"count": count, "levels": [box], "dtype": dtype, "shard_rows": shard, "block_rows": {str(box): block}}
    objects = metadata_of(attrs, {"half": ("i1", ()), "rotation": ("f4", (3, 3))})
    for number, start in enumerate(range(0, count, shard)):
        images = held["images"][start : start + shard]
        stream = io.BytesIO()
        writer = ShardWriter(stream, shard, block, box, dtype)
        for first in range(0, len(images), 3):  # pieces that no block is a multiple of
            writer.append(images[first : first + 3])
        entry = writer.finish()
        data = objects[f"images/{box}/c/{number}/0/0"] = stream.getvalue()
        assert entry == {"bytes": len(data), "crc32c": crc32c(data)}
        objects[f"particles/half/c/{number}"] = encode_column(held["half"][start : start + shard], shard).tobytes()
        rotation = encode_column(held["rotation"][start : start + shard], shard).tobytes()
        objects[f"particles/rotation/c/{number}/0/0"] = rotation
    return objects, held


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 70),
    block=st.sampled_from([1, 2, 4, 8]),
    blocks=st.sampled_from([1, 2, 8]),
    dtype=st.sampled_from(["float16", "float32"]),
    data=st.data(),
)
def test_zarr_python_and_own_reader_agree(
    tmp_path_factory: pytest.TempPathFactory, count: int, block: int, blocks: int, dtype: str, data: st.DataObject
) -> None:
    box, shard = 6, block * blocks
    objects, held = _store(count, box, dtype, block, shard)
    folder = tmp_path_factory.mktemp("store")
    for key, value in objects.items():
        urls.write_bytes_atomic(urls.join(str(folder), key), value)
    group = zarr.open_group(folder, mode="r")
    assert np.array_equal(group[f"images/{box}"][:], held["images"])
    assert np.array_equal(group["particles/rotation"][:], held["rotation"])
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    images = ImageArray(str(folder / "images" / str(box)), "images", count, box, dtype, block, shard)
    assert np.array_equal(images.read(start, stop), held["images"][start:stop])
    half = ColumnArray(str(folder / "particles" / "half"), "half", count, "i1", (), shard)
    rotation = ColumnArray(str(folder / "particles" / "rotation"), "rotation", count, "f4", (3, 3), shard)
    assert np.array_equal(half.read(start, stop), held["half"][start:stop])
    assert np.array_equal(rotation.read(start, stop), held["rotation"][start:stop])


def test_own_reader_reads_what_zarr_python_writes(tmp_path: Path) -> None:
    _, held = _store(20, 6, "float16", 4, 8)
    attrs = {"count": 20, "levels": [6], "dtype": "float16", "shard_rows": 8, "block_rows": {"6": 4}}
    for key, value in metadata_of(attrs, {}).items():
        urls.write_bytes_atomic(urls.join(str(tmp_path), key), value)
    zarr.open_group(tmp_path)["images/6"][:] = held["images"]
    images = ImageArray(str(tmp_path / "images" / "6"), "images", 20, 6, "float16", 4, 8)
    assert np.array_equal(images.read(0, 20), held["images"])


@pytest.fixture
def images(tmp_path: Path) -> tuple[Path, ImageArray]:
    objects, _ = _store(20, 6, "float32", 4, 8)
    for key, value in objects.items():
        urls.write_bytes_atomic(urls.join(str(tmp_path), key), value)
    return tmp_path / "images/6/c/1/0/0", ImageArray(str(tmp_path / "images/6"), "images/6", 20, 6, "float32", 4, 8)


def test_flipped_byte_is_found_in_its_block_only(images: tuple[Path, ImageArray]) -> None:
    path, array = images
    data = bytearray(path.read_bytes())
    data[4 * 6 * 6 * 4 + 4 + 10] ^= 1  # second block of shard 1: rows 12 to 15
    path.write_bytes(data)
    assert len(array.read(0, 12)) == 12
    assert len(array.read(16, 20)) == 4
    with pytest.raises(StoreError, match=r"1/0/0: wrong checksum in the block of particles 13… \(shard 1 of images/6"):
        array.read(13, 14)


def test_flipped_byte_in_the_index(images: tuple[Path, ImageArray]) -> None:
    path, array = images
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match="its index is damaged"):
        array.read(8, 9)


def test_missing_and_short_shards(images: tuple[Path, ImageArray]) -> None:
    path, array = images
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(StoreError, match="its index is damaged"):
        array.read(8, 9)
    path.unlink()
    with pytest.raises(StoreError, match=r"the object is missing \(shard 1 of images/6, particles 9 to 16\)"):
        array.read(8, 9)
    with pytest.raises(StoreError, match="rows 18 to 21 were asked for but it holds 20"):
        array.read(18, 21)


def test_damaged_column(tmp_path: Path) -> None:
    path = tmp_path / "half" / "c" / "0"
    path.parent.mkdir(parents=True)
    attrs = {"count": 5, "levels": [], "dtype": "float16", "shard_rows": 8, "block_rows": {}}
    (tmp_path / "half" / "zarr.json").write_bytes(metadata_of(attrs, {"half": ("i1", ())})["particles/half/zarr.json"])
    array = ColumnArray(str(tmp_path / "half"), "half", 5, "i1", (), 8)
    with pytest.raises(StoreError, match="the object is missing"):
        array.read(0, 5)
    data = encode_column(np.arange(5, dtype="i1"), 8)
    data[1] ^= 1
    path.write_bytes(data.tobytes())
    with pytest.raises(StoreError, match="wrong length or checksum"):
        array.read(0, 5)


def test_open_refuses_what_is_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="no such store"):
        ParticleStore.open(str(tmp_path / "none"))
    with pytest.raises(StoreError, match="not a particle store"):
        ParticleStore.open(str(tmp_path))
    zarr.create_group(tmp_path / "other")
    with pytest.raises(StoreError, match="not a particle store"):
        ParticleStore.open(str(tmp_path / "other"))
    (tmp_path / "zarr.json").write_text("{broken")
    with pytest.raises(StoreError, match=r"zarr\.json is damaged"):
        ParticleStore.open(str(tmp_path))
    for attrs, message in (
        ({"format_version": 99}, "store format 99"),
        ({"format_version": 1}, "its conversion did not finish"),
        ({"format_version": 1, "complete": True}, "its attributes are damaged"),
    ):
        (tmp_path / "zarr.json").write_text(json.dumps({"attributes": {"scalecryo_version": "0", **attrs}}))
        with pytest.raises(StoreError, match=message):
            ParticleStore.open(str(tmp_path))
