"""An object store for real: convert to S3, verify, append, kill and resume there; no credential is left anywhere."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import s3fs

from scalecryo.commands import convert as convert_command
from scalecryo.commands import verify as verify_command
from scalecryo.data.formats.mrc import StackWriter
from scalecryo.data.io import urls
from scalecryo.data.storage.store import ParticleStore
from scalecryo.data.streaming.stream import sequential
from scalecryo.errors import ScalecryoError, StoreError
from tests.conftest import Seaweed

OPTIONS = {
    "data_dir": None,
    "box": None,
    "dtype": "float16",
    "workers": 2,
    "overwrite": False,
    "invert": False,
    "uninvert": True,
}
_MAIN = "from scalecryo.cli import main; main()"


def _convert(source: Path | str, store: Path | str, **options: object) -> None:
    convert_command.run(str(source), str(store), **{**OPTIONS, **options})  # type: ignore[arg-type]


def _stack(path: Path, count: int, seed: int = 0) -> Path:
    images = np.random.default_rng(seed).normal(3, 2, (count, 44, 44)).astype(np.float32)
    with StackWriter(str(path), len(images), 44, 1.5) as writer:
        writer.append(images)
    return path


def _local(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def _remote(url: str) -> dict[str, bytes]:
    fs = s3fs.S3FileSystem()
    fs.invalidate_cache()
    root = url.removeprefix("s3://")
    return {path.removeprefix(f"{root}/"): fs.cat_file(path) for path in fs.find(root)}


def _run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _MAIN, *arguments]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=600)


def test_same_store_as_on_disk(seaweed: Seaweed, tmp_path: Path) -> None:
    """Source and store on S3: the same objects byte for byte, read alike, sound; then particles are added."""
    source, more = _stack(tmp_path / "s.mrcs", 600), _stack(tmp_path / "m.mrcs", 300, seed=1)
    _convert(source, tmp_path / "store")
    fs = s3fs.S3FileSystem()
    fs.put_file(str(source), f"{seaweed.bucket}/same/s.mrcs")
    url = seaweed.url("same", "store")
    _convert(seaweed.url("same", "s.mrcs"), url)
    local, remote = _local(tmp_path / "store"), _remote(url)
    # They differ in where the source is.
    different = {key for key in local.keys() | remote.keys() if local.get(key) != remote.get(key)}
    assert different == {"zarr.json", "source/stacks.json", "_manifest/metadata.json"}
    stores = [ParticleStore.open(place) for place in (str(tmp_path / "store"), url)]
    assert stores[0].content_hash == stores[1].content_hash
    for ours, theirs in zip(*(sequential(store, 32, batch_size=70) for store in stores), strict=True):
        assert bool((ours.images == theirs.images).all())
    verify_command.run(url, full=True)
    _convert(more, url, add=True)
    assert ParticleStore.open(url).count == 900
    verify_command.run(url, full=True)
    fs.invalidate_cache()
    assert not [path for path in fs.find(f"{seaweed.bucket}/same/store") if "_append" in path or "_lock" in path]


def test_damage_on_s3_is_named(seaweed: Seaweed, tmp_path: Path) -> None:
    url = seaweed.url("damage", "store")
    _convert(_stack(tmp_path / "s.mrcs", 300), url)
    fs = s3fs.S3FileSystem()
    key = f"{seaweed.bucket}/damage/store/images/44/c/1/0/0"
    data = bytearray(fs.cat_file(key))
    data[100] ^= 4
    fs.pipe_file(key, bytes(data))
    fs.rm_file(f"{seaweed.bucket}/damage/store/particles/half/c/0")
    with pytest.raises(
        StoreError, match=r"(wrong CRC32C; damaged particles: 257 to 260|half/c/0 .*missing) \(and 1 more"
    ):
        verify_command.run(url, full=False)


def test_killed_and_resumed_on_s3(seaweed: Seaweed, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = _stack(tmp_path / "s.mrcs", 20_000)
    url = seaweed.url("killed", "store")
    command = [sys.executable, "-c", _MAIN, "convert", str(source), url, "--uninvert", "--workers", "1"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    fs = s3fs.S3FileSystem()
    folder = f"{seaweed.bucket}/killed/store/_manifest"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and running.poll() is None:
        fs.invalidate_cache()
        if fs.exists(folder) and len(fs.ls(folder)) > 3:
            break
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert running.returncode == -signal.SIGKILL, "it was done before it could be killed"
    done = len(urls.list_folder(f"{url}/_manifest"))
    with pytest.raises(StoreError, match="did not finish"):
        ParticleStore.open(url)
    capsys.readouterr()
    _convert(source, url)
    assert "going on after" in capsys.readouterr().err
    assert done > 3
    _convert(source, tmp_path / "whole")
    local, remote = _local(tmp_path / "whole"), _remote(url)
    assert local == remote


def test_no_credential_is_left_anywhere(seaweed: Seaweed, tmp_path: Path) -> None:
    secrets = [seaweed.env["AWS_ACCESS_KEY_ID"], seaweed.env["AWS_SECRET_ACCESS_KEY"]]
    source = _stack(tmp_path / "s.mrcs", 40)
    url = seaweed.url("secret", "store")
    good = _run("convert", str(source), url, "--uninvert", "--debug")
    wrong = _run("convert", str(source), seaweed.url("x", "y"), AWS_SECRET_ACCESS_KEY="not/the+one" * 4)
    assert [done.returncode for done in (good, wrong)] == [0, 1], wrong.stderr
    for done in (good, wrong):
        for secret in (*secrets, "not/the+one"):
            assert secret not in done.stdout + done.stderr
    assert len(wrong.stderr.strip().splitlines()) == 1
    assert wrong.stderr.startswith("scalecryo: ")
    for key, data in _remote(url).items():
        for secret in secrets:
            assert secret.encode() not in data, key
    # A table that carries them in its stacks' names would put them into the store.
    table = tmp_path / "p.star"
    for address in (f"s3://{secrets[0]}:pass@{seaweed.bucket}/s.mrcs", f"http://{secrets[0]}:pass@127.0.0.1:9/s.mrcs"):
        table.write_text(f"data_\n\nloop_\n_rlnImageName\n1@{address}\n")
        with pytest.raises(ScalecryoError) as caught:
            _convert(table, tmp_path / "store")
        assert secrets[0] not in str(caught.value)
    assert not (tmp_path / "store").exists()
