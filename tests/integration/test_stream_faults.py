"""Reading from a real S3 server that fails: SeaweedFS behind a proxy that delays, refuses, cuts, flips and goes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pytest
import s3fs

from scalecryo.data.io.ranges import RangeReader
from scalecryo.data.io.retry import RetryPolicy
from scalecryo.data.storage.arrays import ImageArray
from scalecryo.data.storage.store import ParticleStore
from scalecryo.data.streaming.order import BatchOrder
from scalecryo.data.streaming.stream import Batch, ParticleStream, sequential
from scalecryo.errors import MissingInputError, StoreError
from tests.conftest import Seaweed, SimulatedParticles
from tests.support.fault_proxy import Fault, FaultProxy, no_faults

PLACE = "particles/faults"
COLUMNS = ("half", "defocus_u")
QUICK = RetryPolicy(seconds=60, first_wait=0.02, longest_wait=0.3, request_seconds=2)


@pytest.fixture(scope="module")
def proxy(seaweed_server: Seaweed) -> Iterator[FaultProxy]:
    host, _, port = seaweed_server.endpoint.removeprefix("http://").partition(":")
    between = FaultProxy((host, int(port)))
    yield between
    between.down()


@pytest.fixture(autouse=True)
def _environment(seaweed: Seaweed, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Clients find the server through the proxy, by the environment alone."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    s3fs.S3FileSystem.clear_instance_cache()
    proxy.faults = no_faults
    proxy.requests.clear()
    yield
    proxy.faults = no_faults
    s3fs.S3FileSystem.clear_instance_cache()


def upload(server: Seaweed, folder: str, name: str) -> tuple[s3fs.S3FileSystem, str]:
    """Copy a store to S3, past the proxy; a file system that goes there, and the store's key."""
    env = server.env
    fs = s3fs.S3FileSystem(
        key=env["AWS_ACCESS_KEY_ID"], secret=env["AWS_SECRET_ACCESS_KEY"], endpoint_url=server.endpoint
    )
    for path in Path(folder).rglob("*"):
        if path.is_file():
            fs.put_file(str(path), f"{PLACE}/{name}/{path.relative_to(folder)}")
    return fs, f"{PLACE}/{name}"


@pytest.fixture(scope="module")
def uploaded(seaweed_server: Seaweed, simulated: SimulatedParticles) -> str:
    """The simulated store on S3."""
    return f"s3://{upload(seaweed_server, simulated.store, 'store.zarr')[1]}"


def order_of(store: ParticleStore) -> BatchOrder:
    return BatchOrder(store.count, store.block_rows(32), 32, seed=3, max_lanes=8)


def batches(store: ParticleStore, count: int, **settings: object) -> tuple[list[Batch], int]:
    """The first batches of a stream, and how often it asked again."""
    with ParticleStream(store, 32, order_of(store), columns=COLUMNS, patience=QUICK, **settings) as stream:
        return list(islice(stream, count)), stream.metrics.retries


def same(found: list[Batch], expected: list[Batch]) -> bool:
    return len(found) == len(expected) and all(
        np.array_equal(a.rows, b.rows) and np.array_equal(a.images, b.images)
        and all(np.array_equal(a.columns[name], b.columns[name]) for name in COLUMNS)
        for a, b in zip(found, expected, strict=True)
    )  # fmt: skip


def on_shards(fault: Fault, every: int) -> Callable[[str, str, int], Fault]:
    """A fault of every so many requests for pixels and columns."""
    return lambda method, path, number: fault if "/c/" in path and number % every == 0 else Fault()


@pytest.mark.parametrize(
    "fault",
    [Fault(status=503), Fault(status=500), Fault(status=429), Fault(cut=True), Fault(delay=2.5)],
    ids=["503", "500", "429", "cut", "slow"],
)
def test_passing_faults_change_nothing(
    uploaded: str, simulated: SimulatedParticles, proxy: FaultProxy, fault: Fault
) -> None:
    expected, _ = batches(ParticleStore.open(simulated.store), 12)
    remote = ParticleStore.open(uploaded)
    proxy.faults = on_shards(fault, 9 if fault.delay else 4)
    found, retries = batches(remote, 12)
    assert same(found, expected)
    assert retries > 0


class OtherProtocol(s3fs.S3FileSystem):
    """A protocol that obstore does not speak."""

    protocol = "other-s3"


@pytest.mark.parametrize("fault", [Fault(status=503), Fault(cut=True)], ids=["503", "cut"])
def test_faults_are_survived_through_fsspec_as_well(
    uploaded: str, simulated: SimulatedParticles, proxy: FaultProxy, fault: Fault
) -> None:
    fsspec.register_implementation("other-s3", OtherProtocol, clobber=True)
    local = ParticleStore.open(simulated.store)
    url = f"other-{uploaded}/images/32"
    array = ImageArray(url, "images/32", local.count, 32, local.dtype, local.block_rows(32), local.shard_rows,
                       RangeReader(QUICK))  # fmt: skip
    proxy.faults = on_shards(fault, 3)
    assert np.array_equal(array.read(0, local.count), local.read_images(32, 0, local.count))


def test_a_server_that_is_gone_for_seconds_is_waited_for(
    uploaded: str, simulated: SimulatedParticles, proxy: FaultProxy
) -> None:
    expected, _ = batches(ParticleStore.open(simulated.store), 16)
    remote = ParticleStore.open(uploaded)
    with ParticleStream(remote, 32, order_of(remote), columns=COLUMNS, patience=QUICK, prefetch_bytes=1) as stream:
        found = list(islice(stream, 2))
        proxy.down()
        back = threading.Timer(3.0, proxy.up)
        back.start()
        found += list(islice(stream, 14))
        back.join()
        assert stream.metrics.retries > 0
        assert stream.metrics.wait_seconds > 1
    assert same(found, expected)


def secrets_of(server: Seaweed) -> tuple[str, str]:
    return server.env["AWS_ACCESS_KEY_ID"], server.env["AWS_SECRET_ACCESS_KEY"]


def test_a_server_that_stays_away_is_named(uploaded: str, proxy: FaultProxy, seaweed_server: Seaweed) -> None:
    remote = ParticleStore.open(uploaded)
    patience = RetryPolicy(seconds=1.5, first_wait=0.05, longest_wait=0.3, request_seconds=1)
    with ParticleStream(remote, 32, order_of(remote), patience=patience, prefetch_bytes=1) as stream:
        next(stream)
        proxy.down()
        begun = time.monotonic()
        try:
            with pytest.raises(StoreError) as caught:
                list(islice(stream, 20))
        finally:
            proxy.up()
    message = str(caught.value)
    assert time.monotonic() - begun < 100
    assert f"{uploaded}/images/32/c/" in message
    assert "shard " in message
    assert "of images/32, bytes " in message
    assert "no good answer in" in message
    assert not any(secret in message for secret in secrets_of(seaweed_server))


def test_default_patience_outlasts_half_a_minute() -> None:
    assert RetryPolicy().seconds >= 60


def test_a_stream_that_waits_is_closed_at_once(uploaded: str, proxy: FaultProxy) -> None:
    remote = ParticleStore.open(uploaded)
    stream = ParticleStream(remote, 32, order_of(remote), patience=RetryPolicy(seconds=600), prefetch_bytes=1)
    next(stream)
    proxy.down()
    try:
        time.sleep(1.0)
        begun = time.monotonic()
        stream.close()
        assert time.monotonic() - begun < 100  # of 600
    finally:
        proxy.up()


def test_a_shard_deleted_in_mid_run_is_named(seaweed: Seaweed, simulated: SimulatedParticles) -> None:
    fs, key = upload(seaweed, simulated.store, "deleted.zarr")
    remote = ParticleStore.open(f"s3://{key}")
    with ParticleStream(remote, 32, order_of(remote), patience=QUICK, prefetch_bytes=1) as stream:
        next(stream)
        fs.rm_file(f"{key}/images/32/c/0/0/0")
        with pytest.raises(StoreError, match=r"deleted.zarr/images/32/c/0/0/0: the object is missing \(shard 0 of"):
            list(islice(stream, 20))


def test_a_bit_flipped_on_the_way_is_read_again(
    uploaded: str, simulated: SimulatedParticles, proxy: FaultProxy
) -> None:
    expected, _ = batches(ParticleStore.open(simulated.store), 12)
    remote = ParticleStore.open(uploaded)
    proxy.faults = lambda method, path, number: Fault(flip="/images/32/c/" in path and number % 5 == 0)
    found, _ = batches(remote, 12, threads=1)
    assert same(found, expected)


def test_a_bit_flipped_in_the_store_is_never_trained_on(seaweed: Seaweed, simulated: SimulatedParticles) -> None:
    fs, place = upload(seaweed, simulated.store, "flipped.zarr")
    local = ParticleStore.open(simulated.store)
    block = local.block_rows(32)
    key = f"{place}/images/32/c/0/0/0"
    data = bytearray(fs.cat_file(key))
    data[9 * local.image_array(32).block_bytes + 9 * 4 + 77] ^= 4
    fs.pipe_file(key, bytes(data))
    remote = ParticleStore.open(f"s3://{place}")
    delivered: set[int] = set()
    message = rf"wrong checksum in the block of particles {9 * block + 1}… \(shard 0 of images/32"
    with (
        ParticleStream(remote, 32, order_of(remote), patience=QUICK, prefetch_bytes=1) as stream,
        pytest.raises(StoreError, match=message),
    ):
        delivered.update(row for batch in stream for row in batch.rows.tolist())
    assert not delivered & set(range(9 * block, 10 * block))


def test_whole_passes_survive_as_well(uploaded: str, simulated: SimulatedParticles, proxy: FaultProxy) -> None:
    local = ParticleStore.open(simulated.store)
    expected = list(sequential(local, 32, batch_size=50, columns=COLUMNS))
    proxy.faults = on_shards(Fault(status=503), 5)
    assert same(list(sequential(ParticleStore.open(uploaded), 32, batch_size=50, columns=COLUMNS)), expected)


def test_wrong_credentials_are_refused_at_once(
    uploaded: str, monkeypatch: pytest.MonkeyPatch, proxy: FaultProxy
) -> None:
    array = ParticleStore.open(uploaded).image_array(32)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret-55")
    s3fs.S3FileSystem.clear_instance_cache()
    begun = time.monotonic()
    with pytest.raises(StoreError, match="cannot be read") as caught:
        array.read(0, 1)
    assert time.monotonic() - begun < 100
    assert "wrong-secret-55" not in str(caught.value)


def test_what_is_not_there_is_missing_at_once(uploaded: str) -> None:
    for url in ("s3://no-such-bucket-here/x", f"{uploaded}/nothing"):
        with pytest.raises(MissingInputError, match="no such file"):
            RangeReader(QUICK).read_object(url)


def train(uploaded: str, out: Path, environment: dict[str, str], *more: str) -> subprocess.Popen:
    """`scalecryo train` in a process of its own, in which forking is an error: clients would not survive it."""
    code = (
        "import sys\n"
        "def hook(event, args):\n"
        "    if event in ('os.fork', 'os.forkpty'): raise SystemExit('forked')\n"
        "sys.addaudithook(hook)\n"
        "from scalecryo.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", code, "train", "--data", uploaded, "--out", str(out), "--pose.source", "encoder",
               "--encoder.network", "cnn", "--train.steps", "60", "--train.batch_size", "16",
               "--train.checkpoint_every", "5", "--monitor.every", "1", "--encoder.channels", "4,8",
               "--encoder.hidden", "16", "--train.final_pass", "false", *more]  # fmt: skip
    return subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True)


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    by_step = {row["step"]: row["loss"] for row in rows if "loss" in row}
    return [by_step[step] for step in sorted(by_step)]


def test_training_from_s3_survives_faults_and_kill(
    uploaded: str, seaweed: Seaweed, simulated: SimulatedParticles, proxy: FaultProxy, tmp_path: Path
) -> None:
    environment = {"AWS_ENDPOINT_URL": proxy.url, "OMP_NUM_THREADS": "1"}
    alone = train(simulated.store, tmp_path / "alone", environment)
    proxy.faults = on_shards(Fault(status=503), 9)
    run = tmp_path / "run"
    killed = train(uploaded, run, environment)
    deadline = time.monotonic() + 300
    while not list((run / "checkpoints").glob("*")) and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    said = killed.communicate()[1]
    assert killed.returncode == -signal.SIGKILL, said
    resumed = train(uploaded, run, environment, "--resume")
    said += resumed.communicate(timeout=1200)[1]
    assert resumed.returncode == 0, said
    assert alone.communicate(timeout=1200)[1] is not None
    assert alone.returncode == 0
    # The same machine, the same operations: the same losses, whatever the network did.
    assert losses(run) == losses(tmp_path / "alone")
    kept = said + "".join(path.read_bytes().decode("latin1") for path in run.rglob("*") if path.is_file())
    assert not any(secret in kept for secret in secrets_of(seaweed))


def test_training_on_a_damaged_store_ends_with_one_line(
    seaweed: Seaweed, simulated: SimulatedParticles, tmp_path: Path
) -> None:
    fs, key = upload(seaweed, simulated.store, "lost.zarr")
    fs.rm_file(f"{key}/images/32/c/0/0/0")
    process = train(f"s3://{key}", tmp_path / "run", {})
    said = process.communicate(timeout=1200)[1]
    assert process.returncode == 1
    assert said.splitlines()[-1].startswith(f"scalecryo: s3://{key}/images/32/c/0/0/0: the object is missing")
    assert "Traceback" not in said


def test_fsspec_settings_reach_the_direct_reader(
    uploaded: str, seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, secret = secrets_of(seaweed)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"key": key, "secret": secret, "endpoint_url": seaweed.endpoint})
    s3fs.S3FileSystem.clear_instance_cache()
    assert len(RangeReader(QUICK).read(f"{uploaded}/zarr.json", 0, 10)) == 10
