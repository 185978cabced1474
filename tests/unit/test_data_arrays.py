"""The direct reader against zarr-python, on every layout that Zarr v3 allows an array to have."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec

from scalecryo.data.io.ranges import RangeReader
from scalecryo.data.storage.arrays import ColumnArray, ImageArray
from scalecryo.data.storage.zarr_layout import read_layout
from scalecryo.errors import StoreError

BOX = 6
INNER = {
    "plain": ([BytesCodec(endian="little"), Crc32cCodec()], True),
    "no checksum": ([BytesCodec(endian="little")], False),
    "big endian": ([BytesCodec(endian="big"), Crc32cCodec()], False),
    "zstd": ([BytesCodec(endian="little"), ZstdCodec(level=1), Crc32cCodec()], False),
    "blosc": ([BytesCodec(endian="little"), BloscCodec(typesize=2)], False),
}


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 50),
    block=st.sampled_from([1, 2, 4]),
    blocks=st.sampled_from([1, 2, 4]),
    dtype=st.sampled_from(["float16", "float32"]),
    inner=st.sampled_from(sorted(INNER)),
    index=st.sampled_from(["start", "end"]),
    fill=st.sampled_from([0.0, 1.5]),
    data=st.data(),
)
def test_any_layout_reads_as_zarr_python_reads_it(
    tmp_path_factory: pytest.TempPathFactory, count: int, block: int, blocks: int, dtype: str, inner: str, index: str,
    fill: float, data: st.DataObject,
) -> None:  # fmt: skip
    shard = block * blocks
    codecs, direct = INNER[inner]
    sharding = ShardingCodec(chunk_shape=(block, BOX, BOX), codecs=codecs, index_location=index)
    folder = tmp_path_factory.mktemp("array")
    array = zarr.create_array(
        str(folder), shape=(count, BOX, BOX), dtype=dtype, chunks=(shard, BOX, BOX), serializer=sharding,
        compressors=None, filters=None, fill_value=fill,
    )  # fmt: skip
    values = np.random.default_rng(count).normal(size=(count, BOX, BOX)).astype(dtype)
    # Blocks of nothing but the fill value are not written; each shard keeps one block that is.
    for empty in data.draw(st.lists(st.integers(0, -(-count // block) - 1), max_size=5)):
        if empty % blocks:
            values[empty * block : (empty + 1) * block] = fill
    array[:] = values
    own = ImageArray(str(folder), "images", count, BOX, dtype, block, shard)
    assert own._layout().direct == direct
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    reference = zarr.open_array(str(folder), mode="r")[start:stop]
    assert np.array_equal(reference, values[start:stop])
    assert np.array_equal(own.read(start, stop), reference)


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 40),
    shard=st.sampled_from([1, 4, 16]),
    inner=st.sampled_from(sorted(INNER)),
    row_shape=st.sampled_from([(), (2,), (3, 3)]),
    dtype=st.sampled_from(["int8", "int64", "float32"]),
    data=st.data(),
)
def test_columns_read_as_zarr_python_reads_them(
    tmp_path_factory: pytest.TempPathFactory, count: int, shard: int, inner: str, row_shape: tuple[int, ...],
    dtype: str, data: st.DataObject,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("column")
    (serializer, *others), _ = INNER[inner]
    array = zarr.create_array(
        str(folder), shape=(count, *row_shape), dtype=dtype, chunks=(shard, *row_shape), serializer=serializer,
        compressors=others, filters=None, config={"write_empty_chunks": True},
    )  # fmt: skip
    array[:] = (np.random.default_rng(count).normal(size=(count, *row_shape)) * 50).astype(dtype)
    own = ColumnArray(str(folder), "column", count, dtype, row_shape, shard)
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    assert np.array_equal(own.read(start, stop), array[start:stop])


def written(folder: Path, inner: str, **settings_of_array: object) -> ImageArray:
    codecs, _ = INNER[inner]
    sharding = ShardingCodec(chunk_shape=(4, BOX, BOX), codecs=codecs)
    array = zarr.create_array(
        str(folder), shape=(20, BOX, BOX), dtype="float16", chunks=(8, BOX, BOX), serializer=sharding,
        compressors=None, filters=None, **settings_of_array,
    )  # fmt: skip
    array[:] = np.random.default_rng(0).normal(size=(20, BOX, BOX)).astype("float16")
    return ImageArray(str(folder), "images/6", 20, BOX, "float16", 4, 8)


@pytest.mark.parametrize("inner", ["plain", "zstd"])
def test_a_missing_shard_is_named_and_never_taken_for_fill_values(tmp_path: Path, inner: str) -> None:
    array = written(tmp_path, inner)
    os.remove(array.shard_url(1))
    assert len(array.read(0, 8)) == 8
    with pytest.raises(StoreError, match=r"c/1/0/0: the object is missing \(shard 1 of images/6, particles 9 to 16\)"):
        array.read(6, 12)


@pytest.mark.parametrize("inner", ["plain", "zstd"])
def test_a_flipped_bit_is_named(tmp_path: Path, inner: str) -> None:
    array = written(tmp_path, inner)
    path = Path(array.shard_url(2))
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        StoreError, match=r"c/2/0/0: .*(wrong checksum in the block of particles 17|zarr cannot decode)"
    ):
        array.read(0, 20)


def test_metadata_of_another_array_is_refused(tmp_path: Path) -> None:
    array = written(tmp_path, "plain")
    document = (tmp_path / "zarr.json").read_bytes()
    assert read_layout("x", document, (20, BOX, BOX), "float16", 8, 4).direct
    for shape, dtype in (((21, BOX, BOX), "float16"), ((20, BOX, BOX), "float32")):
        with pytest.raises(StoreError, match="its store says"):
            read_layout("x", document, shape, dtype, 8, 4)
    # Another chunking than the store's attributes is read, by zarr-python.
    assert not read_layout("x", document, (20, BOX, BOX), "float16", 8, 2).direct
    assert not read_layout("x", document, (20, BOX, BOX), "float16", 16, 4).direct
    meta = json.loads(document)
    for key, value in (("fill_value", "NaN"), ("storage_transformers", [{"name": "x"}])):
        assert not read_layout("x", json.dumps({**meta, key: value}).encode(), (20, BOX, BOX), "float16", 8, 4).direct
    for damage in (b"{", b"[]", b'{"shape": [20, 6, 6]}'):
        with pytest.raises(StoreError, match=r"zarr\.json is damaged"):
            read_layout("x", damage, (20, BOX, BOX), "float16", 8, 4)
    (tmp_path / "zarr.json").unlink()
    with pytest.raises(StoreError, match=r"its zarr\.json is missing"):
        array.read(0, 1)


def test_a_reader_counts_what_it_does(tmp_path: Path) -> None:
    path = tmp_path / "object"
    path.write_bytes(bytes(range(100)))
    reader = RangeReader()
    assert bytes(reader.read(str(path), 10, 20)) == bytes(range(10, 20))
    first, second = bytearray(3), bytearray(4)
    assert reader.read_into(str(path), 90, [first, second])
    assert (first, second) == (bytearray(range(90, 93)), bytearray(range(93, 97)))
    assert not reader.read_into(str(path), 95, [first, second])
    assert len(reader.read(str(path), 95, 200, whole=False)) == 5
    with pytest.raises(StoreError, match="ends before byte 200"):
        reader.read(str(path), 95, 200)
    counts = reader.counts
    assert (counts.requests, counts.retries, counts.bytes_in_flight) == (5, 0, 0)
    assert counts.bytes_read == 10 + 7 + 5 + 5 + 5


def test_a_reader_does_not_cross_a_fork(tmp_path: Path) -> None:
    # After a fork the clients' threads are gone and a read would wait for ever.
    reader = RangeReader()
    child = os.fork()
    if child == 0:
        try:
            reader.read("s3://bucket/x", 0, 1)
        except StoreError as error:
            os._exit(7 if "forked" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
