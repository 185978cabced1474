"""Step time and memory of training against the number of particles: virtual stores of 10^4 to 10^7.

    python -m tools.bench scale --work /tmp/bench
    python -m tools.bench scale --work /tmp/bench --s3      # from SeaweedFS, 20 ms away

The auto-encoder trains for some steps from a stream of each size: all in one process, step by step in turns, for the
step time; each in a process of its own for memory and CPU time, which count the reading threads. The stores repeat few
real shards (tests/support/virtual_store.py; on S3 the proxy repeats them), so what is measured is planning, metadata,
memory and handles, not the bandwidth of a disk.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

SIZES = (10**4, 10**5, 10**6, 10**7)
BOX, LEVEL, BATCH = 64, 32, 64
LATENCY = 0.020


def make_small(work: Path, count: int = 16384) -> Path:
    """A store of noise with CTF columns: 64 and 32 px, float16."""
    from scalecryo.data.conversion.convert import convert, plan
    from tools.bench._shared import write_noise

    store = work / "small.zarr"
    if not store.exists():
        write_noise(work / "s.mrcs", count, BOX, 2.0)
        names = ["ImageName", "DefocusU", "DefocusV", "DefocusAngle", "Voltage", "SphericalAberration",
                 "AmplitudeContrast", "DetectorPixelSize", "Magnification"]  # fmt: skip
        lines = [f"{row + 1}@s.mrcs {8000 + row % 9000} {7900 + row % 9000} {row % 180} 300 2.7 0.1 5 25000"
                 for row in range(count)]  # fmt: skip
        table = "\n".join(["data_", "loop_", *(f"_rln{name}" for name in names), *lines])
        (work / "p.star").write_text(table + "\n")
        convert(plan(str(work / "p.star")), str(store), workers=2)
        (work / "s.mrcs").unlink()
    return store


class Run:
    """Training from one store, a step at a time."""

    def __init__(self, url: str) -> None:
        import torch

        from scalecryo.config import load_config
        from scalecryo.data.storage.store import ParticleStore
        from scalecryo.distributed.gradients import Replica
        from scalecryo.distributed.world import World
        from scalecryo.model.autoencoder import build_autoencoder
        from scalecryo.runs.folder import RunFolder
        from scalecryo.train.particle_source import RunContext
        from scalecryo.train.stages.gradient_descent import build_optimiser

        torch.set_num_threads(1)
        settings = {
            "pose.source": "encoder",
            "encoder.network": "cnn",
            "train.batch_size": str(BATCH),
            "train.box": str(LEVEL),
        }
        config, store, run = load_config(None, settings), ParticleStore.open(url), RunFolder("")  # nothing is written
        self.context = RunContext.of(config, store, run, World(), torch.device("cpu"))
        model = build_autoencoder(config, LEVEL, self.context.rows)
        self.replica = Replica(model, World(), "float32", voxels=model.volume.voxels, window=model.volume.window)
        self.optimiser = build_optimiser(config, model)
        self.pixels, self.stream = self.context.pixels(LEVEL), self.context.stream(LEVEL, BATCH, 0)

    def step(self) -> float:
        """One step; the seconds it took."""
        from scalecryo.train.stages.gradient_descent import train_step

        begun = time.perf_counter()
        images = self.context.images(next(self.stream), self.pixels, padding=True)
        train_step(self.replica, self.optimiser, images, self.context.world, clip_norm=0.0)
        return time.perf_counter() - begun


def measure_alone(url: str, steps: int, warm: int) -> dict[str, float]:
    """One size in this process: CPU time a step over all threads, time spent waiting for data, the largest memory."""
    start = time.perf_counter()
    run = Run(url)
    run.step()
    first = time.perf_counter() - start
    for _ in range(warm):
        run.step()
    busy, waited = time.process_time(), run.stream.wait_seconds
    for _ in range(steps):
        run.step()
    busy, waited = time.process_time() - busy, run.stream.wait_seconds - waited
    memory = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    run.stream.close()
    return {"cpu": 1000 * busy / steps, "wait": 1000 * waited / steps, "rss": memory, "first": first}


def measure_together(urls: list[str], steps: int, warm: int) -> list[float]:
    """Median step time of every size, in ms: the sizes take turns step by step, so that all bear the same machine."""
    runs = [Run(url) for url in urls]
    times = [[run.step() for run in runs] for _ in range(warm + steps)][warm:]
    for run in runs:
        run.stream.close()
    return [1000 * statistics.median(column) for column in zip(*times, strict=True)]


def stores_on_disk(work: Path) -> dict[int, str]:
    """Virtual stores, by hard links."""
    from tests.support.virtual_store import make_virtual_store

    small = make_small(work)
    for count in SIZES:
        if not (work / f"virtual-{count}.zarr").exists():
            make_virtual_store(small, work / f"virtual-{count}.zarr", count)
    return {count: str(work / f"virtual-{count}.zarr") for count in SIZES}


def stores_on_s3(work: Path, stack: ExitStack) -> dict[int, str]:
    """The small store on SeaweedFS, which the proxy shows as large ones; read without credentials, since it renames."""
    import s3fs

    from scalecryo.data.storage.store import ParticleStore
    from tests.support.fault_proxy import serve_process, wait_for

    small = ParticleStore.open(str(make_small(work)))
    full = small.count // small.shard_rows
    ids = {"identities": [
        {"name": "writer", "credentials": [{"accessKey": "bench", "secretKey": "bench-only"}], "actions": ["Admin"]},
        {"name": "anonymous", "actions": ["Read:bench", "List:bench"]},
    ]}  # fmt: skip
    (work / "ids.json").write_text(json.dumps(ids))
    (work / "weed").mkdir(exist_ok=True)
    ports = {"s3": 28444, "master": 28333, "volume": 28080, "filer": 28888}
    flags = [f"-{name}.port={port}" for name, port in ports.items()]
    command = ["weed", "server", f"-dir={work}/weed", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3", *flags,
               f"-s3.config={work}/ids.json", "-s3.port.iceberg=0", "-s3.port.lance=0",
               "-volume.minFreeSpace=64MiB"]  # fmt: skip
    with open(work / "weed.log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    stack.callback(server.wait)
    stack.callback(server.terminate)
    fs = wait_for(lambda: s3fs.S3FileSystem(key="bench", secret="bench-only", endpoint_url="http://127.0.0.1:28444"))
    if not fs.exists("bench/small/zarr.json"):
        fs.put(str(work / "small.zarr"), "bench/small", recursive=True)
    urls = {}
    for count in SIZES:
        rows = max(1, round(count / small.shard_rows)) * small.shard_rows
        for path in (work / "small.zarr").rglob("zarr.json"):
            document = json.loads(path.read_text())
            if "shape" in document:
                document["shape"][0] = rows
            elif "count" in document.get("attributes", {}):
                document["attributes"]["count"] = rows
            key = f"bench/virtual-{rows}/{path.relative_to(work / 'small.zarr')}"
            fs.pipe_file(key, json.dumps(document).encode())
        urls[rows] = f"s3://bench/virtual-{rows}"
    stack.enter_context(serve_process("127.0.0.1:28444", 28555, LATENCY, full))
    return urls


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the stores, kept for the next time")
    parser.add_argument("--s3", action="store_true", help="read from SeaweedFS through a proxy that adds 20 ms")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warm", type=int, default=20)
    parser.add_argument("--part", nargs="+", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        together = len(args.part) > 1
        print(json.dumps(measure_together(args.part, args.steps, args.warm) if together
                         else measure_alone(args.part[0], args.steps, args.warm)))  # fmt: skip
        return
    args.work.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        urls = stores_on_s3(args.work, stack) if args.s3 else stores_on_disk(args.work)
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        if args.s3:
            env |= {"FSSPEC_S3_ANON": "true", "FSSPEC_S3_ENDPOINT_URL": "http://127.0.0.1:28555"}

        def part(*chosen: str) -> Any:
            command = [sys.executable, "-m", "tools.bench", "scale", "--work", str(args.work),
                       "--steps", str(args.steps), "--warm", str(args.warm), "--part", *chosen]  # fmt: skip
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
            return json.loads(done.stdout.splitlines()[-1])

        alone = [[part(url) for url in urls.values()] for _ in range(args.rounds)]
        together = part(*urls.values())
    middle = [
        {key: statistics.median(run[key] for run in runs) for key in runs[0]} for runs in zip(*alone, strict=True)
    ]
    report(dict(zip(urls, middle, strict=True)), together, args.s3)


def report(alone: dict[int, dict[str, float]], together: list[float], remote: bool) -> None:
    """The table, and on what it was made."""
    place = f"SeaweedFS, {1000 * LATENCY:.0f} ms away" if remote else "files"
    print(f"auto-encoder at {LEVEL} px, batches of {BATCH}, one thread, from {place}; {os.cpu_count()} cores, load "
          f"{os.getloadavg()[0]:.1f}, {platform.machine()}, Python {platform.python_version()}, "
          f"torch {version('torch')}\n")  # fmt: skip
    print("| particles | step, ms | ÷ first | CPU a step, ms | ÷ first | wait a step, ms | memory, MiB | ÷ first "
          "| first step after, s |\n" + "| --- " * 9 + "|")  # fmt: skip
    base = next(iter(alone.values()))
    for (count, values), step in zip(alone.items(), together, strict=True):
        print(f"| {count:,} | {step:.1f} | {step / together[0]:.3f} | {values['cpu']:.1f} "
              f"| {values['cpu'] / base['cpu']:.3f} | {values['wait']:.2f} | {values['rss']:.0f} "
              f"| {values['rss'] / base['rss']:.3f} | {values['first']:.2f} |")  # fmt: skip
