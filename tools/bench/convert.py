"""How fast `convert` is against `cp` of the same bytes, and how much memory 10^5 particles take.

    python -m tools.bench convert FOLDER [--images 20000] [--box 128] [--many 100000]

Copy and conversion take turns on one disk, each from a source in the page cache; medians of the rounds are compared in
bytes of source a second. With `--sync` each must also have brought its output to the disk.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from scalecryo.data.conversion.convert import convert, plan
from tools.bench._shared import machine, write_noise


def _sync(path: Path) -> None:
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())


def _cpu_seconds() -> float:
    """Of this process and those it has waited for, the kernel's share included."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _timed(work: Callable[[Path], object], out: Path, sync: bool) -> tuple[float, float]:
    """Seconds by the clock, and of processor time."""
    start, used = time.perf_counter(), _cpu_seconds()
    work(out)
    if sync:
        _sync(out)
    seconds = time.perf_counter() - start, _cpu_seconds() - used
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    return seconds


def speed(folder: Path, count: int, box: int, rounds: int, sync: bool, dtype: str) -> None:
    """Print bytes a second of cp and of convert with one thread and with two, and their ratios."""
    source = folder / "bench.mrcs"
    write_noise(source, count, box)
    size = source.stat().st_size
    made = plan(str(source), dtype=dtype)

    def copy(out: Path) -> None:
        subprocess.run(["cp", "--reflink=never", str(source), str(out)], check=True)

    works: dict[str, Callable[[Path], object]] = {"cp": copy}
    for workers in (1, 2):
        works[f"convert, {workers} thread{'s' * (workers > 1)}"] = lambda out, workers=workers: convert(
            made, str(out), workers=workers
        )
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            taken = _timed(work, folder / "bench.out", sync)
            if turn:  # the first round warms the page cache and the memory behind it
                times[name].append(taken)
    source.unlink()
    kind = "brought to the disk" if sync else "left in the page cache"
    print(f"{count:,} images of {box} px, {size / 1e9:.2f} GB, to {dtype}, {kind}")
    copied = statistics.median(seconds for seconds, _ in times["cp"])
    for name, found in times.items():
        middle, used = (statistics.median(column) for column in zip(*found, strict=True))
        print(
            f"  {name:18s} {size / middle / 1e6:5.0f} MB/s {count / middle:7.0f} images/s {100 * copied / middle:4.0f} "
            f"% of cp, processor {1e6 * used / count:4.0f} µs an image ({min(found)[0]:.2f} to {max(found)[0]:.2f} s)"
        )


def memory(folder: Path, count: int, box: int) -> None:
    """Print the largest resident memory of one conversion of many particles, which repeat the images of one stack."""
    real = 4096
    write_noise(folder / "few.mrcs", real, box)
    names = "".join(f"{1 + row % real}@few.mrcs\n" for row in range(count))
    (folder / "many.star").write_text("data_\n\nloop_\n_rlnImageName\n" + names)
    code = "from scalecryo.cli import main; main()"
    out = folder / "many.zarr"
    command = [sys.executable, "-c", code, "convert", str(folder / "many.star"), str(out), "--workers", "2"]
    start = time.perf_counter()
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(running.pid, 0)
    seconds = time.perf_counter() - start
    attrs = json.loads((out / "zarr.json").read_text())["attributes"]
    if status or attrs["count"] != count or not attrs["complete"]:
        sys.exit(f"the conversion of {count} particles failed")
    peak = usage.ru_maxrss * 1024
    print(
        f"{count:,} particles of {box} px, 2 threads: at most {peak / 1e9:.2f} GB resident; {seconds:.0f} s with start"
    )
    shutil.rmtree(out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="on the disk to measure")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--box", type=int, default=128)
    parser.add_argument("--many", type=int, default=100_000, help="particles for the measurement of memory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float16")
    args = parser.parse_args()
    print(machine())
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as made:
        for sync in (False, True):
            speed(Path(made), args.images, args.box, args.rounds, sync, args.dtype)
        memory(Path(made), args.many, args.box)
