"""Streams deliver the order's rows with those rows' images, for any number of ranks, threads and starting points."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from scalecryo.data.conversion.convert import convert, plan
from scalecryo.data.formats.mrc import StackWriter
from scalecryo.data.storage.store import ParticleStore
from scalecryo.data.streaming.order import BatchOrder
from scalecryo.data.streaming.stream import Batch, ParticleStream, _HostBatch, _Uploads, sequential
from scalecryo.errors import ConfigError, StoreError

COUNT = 403
COLUMNS = ("source_row", "image_scale")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ParticleStore:
    """403 noise images of 44 px: levels 44 and 32, blocks of 4, shards of 256."""
    folder = tmp_path_factory.mktemp("stream")
    images = np.random.default_rng(0).normal(size=(COUNT, 44, 44))
    with StackWriter(str(folder / "s.mrcs"), COUNT, 44, 2.0) as writer:
        writer.append(images)
    convert(plan(str(folder / "s.mrcs")), str(folder / "store"), workers=1)
    return ParticleStore.open(str(folder / "store"))


@pytest.fixture(scope="module")
def expected(store: ParticleStore) -> dict[int, torch.Tensor]:
    return {level: torch.from_numpy(store.read_images(level, 0, COUNT)).float() for level in store.levels}


def _take(batches: Iterator[Batch], count: int) -> list[Batch]:
    return list(islice(batches, count))


def _check(batch: Batch, images: torch.Tensor) -> None:
    real = batch.rows >= 0
    assert torch.equal(batch.weight, real.float())
    assert torch.equal(batch.images[real], images[batch.rows[real]])
    assert torch.equal(batch.columns["source_row"][real], batch.rows[real])
    # Padding carries a particle too: finite, and some row's own.
    assert torch.isfinite(batch.images).all()
    assert (batch.columns["image_scale"] > 0).all()


@pytest.mark.parametrize("level", [44, 32])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 7, 16])
def test_stream_equals_order(store: ParticleStore, expected: dict, level: int, world_size: int) -> None:
    order = BatchOrder(COUNT, store.block_rows(level), 48, seed=5)
    steps = 2 * order.steps_per_epoch + 1
    ranks = []
    for rank in range(world_size):
        with ParticleStream(store, level, order, rank=rank, world_size=world_size, columns=COLUMNS) as stream:
            ranks.append(_take(stream, steps))
            assert stream.step == steps
            assert stream.wait_seconds >= 0
    for step in range(steps):
        epoch, inside = divmod(step, order.steps_per_epoch)
        parts = [batches[step] for batches in ranks]
        assert np.array_equal(np.concatenate([part.rows.numpy() for part in parts]), order.rows(epoch, inside))
        for part in parts:
            _check(part, expected[level])


@pytest.mark.parametrize("start", [1, 4, 9, 10, 25])
def test_resume_equals_going_on(store: ParticleStore, start: int) -> None:
    order = BatchOrder(COUNT, 4, 48, seed=1)
    assert order.steps_per_epoch == 10
    with ParticleStream(store, 32, order, columns=COLUMNS) as stream:
        _take(stream, start)
        going_on = _take(stream, 10)
    with ParticleStream(store, 32, order, start_step=start, columns=COLUMNS) as stream:
        resumed = _take(stream, 10)
    for a, b in zip(going_on, resumed, strict=True):
        assert torch.equal(a.rows, b.rows)
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.columns["image_scale"], b.columns["image_scale"])


def test_fewer_particles_than_the_store(store: ParticleStore, expected: dict) -> None:
    order = BatchOrder(101, 4, 16, seed=3)
    with ParticleStream(store, 32, order, columns=COLUMNS) as stream:
        batches = _take(stream, order.steps_per_epoch)
    for batch in batches:
        _check(batch, expected[32])
    assert sorted(row for batch in batches for row in batch.rows.tolist() if row >= 0) == list(range(101))


@pytest.mark.parametrize("block_rows", [1, 7, 64, 500])
@pytest.mark.parametrize("threads", [1, 4])
def test_any_block_size_and_threads(store: ParticleStore, expected: dict, block_rows: int, threads: int) -> None:
    order = BatchOrder(COUNT, block_rows, 30, seed=2, window_blocks=2)
    with ParticleStream(store, 32, order, columns=COLUMNS, threads=threads) as stream:
        for step, batch in enumerate(islice(stream, order.steps_per_epoch + 2)):
            epoch, inside = divmod(step, order.steps_per_epoch)
            assert np.array_equal(batch.rows.numpy(), order.rows(epoch, inside))
            _check(batch, expected[32])


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 150])
@pytest.mark.parametrize("limit", [None, 101])
def test_sequential(store: ParticleStore, expected: dict, world_size: int, limit: int | None) -> None:
    rows = []
    for rank in range(world_size):
        for level in store.levels:
            batches = list(
                sequential(
                    store,
                    level,
                    batch_size=32,
                    rank=rank,
                    world_size=world_size,
                    columns=COLUMNS,
                    rows_limit=limit,
                )
            )
            for batch in batches:
                _check(batch, expected[level])
                assert (batch.weight == 1).all()
            found = [row for batch in batches for row in batch.rows.tolist()]
            if level == store.levels[0]:
                full = found
                rows += found
            assert found == full  # the same rows at every level
    assert rows == list(range(limit or COUNT))


def test_batch_to_keeps_everything(store: ParticleStore) -> None:
    batch = next(sequential(store, 32, batch_size=8, columns=COLUMNS))
    moved = batch.to("cpu")
    assert len(moved) == 8
    assert moved.images.dtype == torch.float32
    assert set(moved.columns) == set(COLUMNS)


def test_refusals(store: ParticleStore) -> None:
    order = BatchOrder(COUNT, 4, 48, seed=0)
    with pytest.raises(StoreError, match="no level 64; it has 44, 32"):
        ParticleStream(store, 64, order)
    with pytest.raises(StoreError, match="the source had no rotation"):
        ParticleStream(store, 32, order, columns=("rotation",))
    with pytest.raises(StoreError, match="holds 403 particles, the batch order is for 404"):
        ParticleStream(store, 32, BatchOrder(404, 4, 4, seed=0))
    with pytest.raises(ConfigError, match="50 ranks share 24 lanes"):
        ParticleStream(store, 32, order, rank=0, world_size=50)


def test_damage_reaches_the_consumer(store: ParticleStore, tmp_path: Path) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store.url, copy)
    (copy / "images/32/c/1/0/0").unlink()
    with (
        ParticleStream(ParticleStore.open(str(copy)), 32, BatchOrder(COUNT, 4, 48, seed=0)) as stream,
        pytest.raises(StoreError, match=r"images/32/c/1/0/0: the object is missing"),
    ):
        _take(stream, 9)


def test_uploads_run_in_a_stream_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for CUDA's streams: copies are queued in the own one, and the computing one waits for it."""
    said: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            said.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def stream(own: Stream) -> Iterator[None]:
        said.append(f"into {own.name}")
        yield
        said.append(f"out of {own.name}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("uploads"))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("compute"))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda values, using: said.append(f"kept for {using.name}"))
    host = _HostBatch(np.arange(3), torch.zeros(3, 2, 2, dtype=torch.float16), {"half": np.ones(3, np.int64)})
    moved = host.to(torch.device("cpu"))
    monkeypatch.setattr(_HostBatch, "to", lambda batch, device: said.append(f"to {device}") or moved)
    uploads = _Uploads(torch.device("cuda"))
    assert uploads.finish(uploads.begin(host)) is moved
    assert said[:4] == ["into uploads", "to cuda", "out of uploads", "compute waits for uploads"]
    assert said[4:] == ["kept for compute"] * 4  # rows, images, weight, one column
    assert moved.images.dtype == torch.float32
    assert moved.weight.tolist() == [1, 1, 1]
