"""Names with characters that are patterns elsewhere: only what is named is touched, on a real S3 server."""

import http.server
import json
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import s3fs
import torch
import zarr

from scalecryo.commands import convert as convert_command
from scalecryo.commands import info as info_command
from scalecryo.commands import verify as verify_command
from scalecryo.data.formats.mrc import StackWriter
from scalecryo.data.io import lock, urls
from scalecryo.data.io.filesystem import filesystem
from scalecryo.data.io.objects import ObjectFiles, remote_files
from scalecryo.data.storage.store import ParticleStore
from scalecryo.data.storage.zarr_layout import ZarrRows
from scalecryo.errors import InputError, MissingInputError, OutputError, StoreError
from scalecryo.runs.checkpoint import Checkpoint, save_checkpoint
from scalecryo.runs.folder import RunFolder
from tests.conftest import Seaweed
from tests.support.fault_proxy import Fault, FaultProxy

PATTERNS = ["run?", "run*", "run[1]", "run[!a]", "**"]
NAMES = [*PATTERNS, "run%31", "run#1", "run 1", "rün{1}~|^"]


def contents(url: str) -> dict[str, bytes]:
    """Every object below an address as another client finds it."""
    fs = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    keys = [key.removeprefix(f"{bucket}/") for key in fs.find(bucket)]
    return {
        key.removeprefix(f"{prefix}/"): fs.cat_file(f"{bucket}/{key}") for key in keys if key.startswith(f"{prefix}/")
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["s3", "memory", "local"])
def test_a_name_is_no_pattern(seaweed: Seaweed, tmp_path: Path, place: str, name: str) -> None:
    root = {"s3": seaweed.url("exact", name), "memory": f"memory://exact/{name}", "local": str(tmp_path)}[place]
    own, neighbour = f"{root}/{name}", f"{root}/run1"
    for key in ("a", "b/c"):
        urls.write_bytes_atomic(f"{neighbour}/{key}", b"theirs")
    assert not urls.exists(own)
    assert not urls.is_folder(own)
    assert urls.list_folder(own) == []
    for read in (urls.read_bytes, urls.size):
        with pytest.raises(MissingInputError) as caught:
            read(f"{own}/a")
        assert f"{own}/a" in str(caught.value), "shown whole"
    with pytest.raises(MissingInputError):
        urls.read_many([f"{own}/a"])
    urls.remove_tree(own)
    assert urls.read_many([f"{neighbour}/a", f"{neighbour}/b/c"]) == [b"theirs"] * 2

    urls.write_bytes_atomic(f"{own}/a", b"own")
    with urls.atomic_path(f"{own}/b/c") as path:
        path.write_bytes(b"own too")
    assert urls.exists(own)
    assert urls.is_folder(own)
    assert urls.list_folder(own) == ["a", "b"]
    assert sorted(urls.list_folder(root)) == sorted([name, "run1"])
    assert urls.read_many([f"{own}/a", f"{own}/b/c"]) == [b"own", b"own too"]
    assert urls.read_range(f"{own}/b/c", 4, 7) == b"too"
    urls.remove_tree(f"{own}/b")
    assert not urls.exists(f"{own}/b")  # SeaweedFS lists emptied folders for a while
    assert urls.read_many([f"{own}/a"]) == [b"own"]
    urls.remove_tree(own)
    assert not urls.exists(own)
    assert urls.read_many([f"{neighbour}/a", f"{neighbour}/b/c"]) == [b"theirs"] * 2


def test_the_same_keys_as_other_clients_write(seaweed: Seaweed) -> None:
    for name in NAMES:
        urls.write_bytes_atomic(seaweed.url("same-keys", name), name.encode())
    assert contents(seaweed.url("same-keys")) == {name: name.encode() for name in NAMES}


def test_names_that_no_object_can_have(seaweed: Seaweed) -> None:
    for name in ("a//b", "a/../b", "./a"):
        assert not urls.exists(seaweed.url(name))
        with pytest.raises(MissingInputError, match="no object has such a name"):
            urls.write_bytes_atomic(seaweed.url(name), b"x")
    with pytest.raises(OutputError, match="names a bucket"):
        urls.write_bytes_atomic(seaweed.url(), b"x")
    for url in ("s3://no-such-bucket", "s3://no-such-bucket/x"):
        assert not urls.exists(url)
        assert urls.list_folder(url) == []
    with pytest.raises(InputError, match="holds credentials"):
        urls.exists("s3://key:word@bucket/x")


def _stack(path: Path, seed: int) -> str:
    images = np.random.default_rng(seed).normal(3, 2, (40, 44, 44)).astype(np.float32)
    with StackWriter(str(path), len(images), 44, 1.5) as writer:
        writer.append(images)
    return str(path)


def _convert(source: str, store: str, overwrite: bool = False) -> None:
    convert_command.run(source, store, data_dir=None, box=None, dtype="float16", workers=1, overwrite=overwrite,
                        invert=False, uninvert=True)  # fmt: skip


@pytest.mark.parametrize("name", [*PATTERNS[:3], "run%31", "run#1", "run 1"])
def test_overwriting_leaves_the_neighbour(seaweed: Seaweed, tmp_path: Path, name: str) -> None:
    first, second = _stack(tmp_path / "a.mrcs", 0), _stack(tmp_path / "b.mrcs", 1)
    folder = seaweed.url("overwrite", f"beside {NAMES.index(name)}")
    neighbour, own = f"{folder}/run1.zarr", f"{folder}/{name}.zarr"
    _convert(first, neighbour)
    before = contents(neighbour)
    _convert(first, own)
    assert "_lock" not in contents(own)
    _convert(second, own, overwrite=True)
    assert contents(neighbour) == before
    verify_command.run(own, full=True)
    assert ParticleStore.open(own).attrs["source"].endswith("b.mrcs")
    # A layout of other codecs goes through zarr-python.
    assert ZarrRows(f"{own}/particles/stack_index").read(3, 5).tolist() == [3, 4]


def test_pruning_leaves_the_neighbours_checkpoints(seaweed: Seaweed) -> None:
    runs = [RunFolder(seaweed.url("runs", name)) for name in ("run3", "run[3]")]
    for run in runs:
        for step in range(1, 5):
            checkpoint = Checkpoint(step, "guided", "refinement", "x", {"x": torch.zeros(1)})
            save_checkpoint(run, checkpoint, 4 if run is runs[0] else 1, score=float(step))
    kept = [[name for name in urls.list_folder(run.path("checkpoints")) if name.endswith(".pt")] for run in runs]
    assert [len(names) for names in kept] == [4, 1]


def test_the_file_system_for_other_libraries(seaweed: Seaweed) -> None:
    for name in ("run3", "run[3]"):
        urls.write_bytes_atomic(seaweed.url("fs", name, "ray", "state.json"), name.encode())
    fs, path = filesystem(seaweed.url("fs", "run[3]"))
    assert fs.cat_file(f"{path}/ray/state.json") == b"run[3]"
    with fs.open(f"{path}/ray/more", "wb") as stream:
        stream.write(b"more")
    fs.rm(f"{path}/ray", recursive=True)
    assert set(contents(seaweed.url("fs"))) == {"run3/ray/state.json"}


def test_claims(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    own, neighbour = seaweed.url("claims", "run[1]"), seaweed.url("claims", "run1")
    with lock.writing(neighbour, "a") as renew_neighbour:
        with lock.writing(own, "b") as renew:
            renew()
            with (
                pytest.raises(OutputError, match=r"claims/run\[1\]: another conversion is writing"),
                lock.writing(own, "c"),
            ):
                pass
            with lock.writing(own, "b"):  # the same plan writes the same bytes
                renew()
            renew()
            monkeypatch.setattr(lock, "_SILENT_SECONDS", 0.0)  # silent for long: a killed one
            with lock.writing(own, "c"), pytest.raises(OutputError, match="another conversion is writing"):
                renew()
        assert list(contents(seaweed.url("claims"))) == ["run1/_lock"]
        renew_neighbour()
    assert not contents(seaweed.url("claims"))
    urls.write_bytes_atomic(f"{own}/_lock", b'{"plan_h')  # of a server that lost the rest
    with lock.writing(own, "d"):
        assert json.loads(urls.read_text(f"{own}/_lock"))["plan_hash"] == "d"


def test_of_many_that_claim_at_once_one_gets_it(seaweed: Seaweed) -> None:
    for trial in range(5):
        url, got, lost = seaweed.url("race", str(trial)), [], []
        ready, done = threading.Barrier(8), threading.Barrier(8)

        def claim(number: int, url: str = url, got: list = got, lost: list = lost,
                  ready: threading.Barrier = ready, done: threading.Barrier = done) -> None:  # fmt: skip
            ready.wait()
            try:
                with lock.writing(url, str(number)):
                    got.append(number)
                    done.wait()
            except OutputError:
                lost.append(number)
                done.wait()

        threads = [threading.Thread(target=claim, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert (len(got), len(lost)) == (1, 7)


@pytest.mark.parametrize("where", ["credentials", "config"])
def test_profiles(seaweed: Seaweed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Keys, region and endpoint of a profile, and nothing in the environment but its name."""
    urls.write_bytes_atomic(seaweed.url("profile", "x"), b"found")
    keys = (f"aws_access_key_id = {seaweed.env['AWS_ACCESS_KEY_ID']}\n"
            f"aws_secret_access_key = {seaweed.env['AWS_SECRET_ACCESS_KEY']}\n")  # fmt: skip
    place = f"region = us-east-1\nendpoint_url = {seaweed.endpoint}\n"
    heading = "[lab]\n" if where == "credentials" else ""
    (tmp_path / "credentials").write_text(heading + keys if where == "credentials" else "")
    (tmp_path / "config").write_text("[profile lab]\n" + place + (keys if where == "config" else ""))
    for name in seaweed.env:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    assert urls.read_bytes(seaweed.url("profile", "x")) == b"found"
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(InputError, match=r"profile/x: .*profile \(nobody\) could not be found"):
        urls.read_bytes(seaweed.url("profile", "x"))


def test_refusals_are_one_line(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-one")
    for call in (urls.read_bytes, urls.exists, urls.list_folder, urls.remove_tree):
        with pytest.raises(StoreError, match="cannot be read or written") as caught:
            call(seaweed.url("run[1]"))
        assert "\n" not in str(caught.value)
        assert "not-the-one" not in str(caught.value)
        assert seaweed.url("run[1]") in str(caught.value)


def test_connections_are_shared(seaweed: Seaweed) -> None:
    first, second = (remote_files(seaweed.url(name))[0] for name in ("a", "b"))
    assert first is second
    assert isinstance(first, ObjectFiles)


def test_a_server_without_conditional_writes(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    host, _, port = seaweed.endpoint.removeprefix("http://").partition(":")
    proxy = FaultProxy((host, int(port)))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    puts: list[str] = []

    def refuse_every_other(method: str, path: str, number: int) -> Fault:
        if method == "PUT":
            puts.append(path)
        return Fault(status=501 if method == "PUT" and len(puts) % 2 else 0)

    proxy.faults = refuse_every_other
    with lock.writing(seaweed.url("plain", "x"), "a") as renew:
        renew()
        with pytest.raises(OutputError, match="another conversion"), lock.writing(seaweed.url("plain", "x"), "b"):
            pass
    assert len(puts) == 4
    proxy.down()


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """A plain web server that answers ranges, as all but Python's own do."""

    def do_GET(self) -> None:
        path, asked = Path(self.translate_path(self.path)), self.headers.get("Range")
        if not asked or not path.is_file():
            super().do_GET()
            return
        start, _, stop = asked.removeprefix("bytes=").partition("-")
        data = path.read_bytes()[int(start) : int(stop) + 1]
        self.send_response(206 if data else 416)
        self.send_header("Content-Range", f"bytes {start}-{int(start) + len(data) - 1}/{path.stat().st_size}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def test_a_store_behind_a_web_server(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    name = "run[1] a%20b.zarr"
    _convert(_stack(tmp_path / "a b[1].mrcs", 0), str(tmp_path / name))
    handler = partial(RangeHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        verify_command.run(f"{url}/{name}", full=True)
        info_command.run(f"{url}/{name}")
        assert "40 particles, box 44 px" in capsys.readouterr().out
        store, local = ParticleStore.open(f"{url}/{name}"), ParticleStore.open(str(tmp_path / name))
        assert np.array_equal(store.read_images(44, 5, 30), local.read_images(44, 5, 30))
        _convert(f"{url}/a b[1].mrcs", str(tmp_path / "again"))
        assert ParticleStore.open(str(tmp_path / "again")).content_hash == local.content_hash
        assert not urls.exists(f"{url}/nothing")
        assert urls.list_folder(f"{url}/{name}") == []
        server.shutdown()


def test_what_s3_needs_is_named(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(InputError, match=r"s3://elsewhere/x: cannot be reached: s3:// needs boto3: pip install"):
        urls.exists("s3://elsewhere/x")


def test_zarr_reads_any_name(seaweed: Seaweed) -> None:
    for name in NAMES:
        files, key = remote_files(seaweed.url("zarr", name))
        assert isinstance(files, ObjectFiles)
        array = zarr.create_array(zarr.storage.ObjectStore(files.store), name=key, shape=(4,), dtype="f4")
        array[:] = np.arange(4)
        assert ZarrRows(seaweed.url("zarr", name)).read(1, 3).tolist() == [1, 2]
