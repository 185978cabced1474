"""Images a second of the stream, beside raw reads of the same blocks and other ways to read shuffled particles.

    python -m tools.bench stream --work /tmp/bench                 # files
    python -m tools.bench stream --work /tmp/bench --s3 URL        # the same store on S3, behind a latency of its own

Every way reads the same images in rounds that take turns; medians are printed, with their ratio to the raw reads. The
stream, which never ends, is timed over its second epoch: what it has read ahead at the start it has again at the end.
MosaicML Streaming runs in a virtual environment of its own, since it asks for another NumPy.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import zarr

from scalecryo.data.conversion.convert import convert, plan
from scalecryo.data.io.ranges import RangeReader
from scalecryo.data.storage.store import ParticleStore
from scalecryo.data.streaming.order import BatchOrder
from scalecryo.data.streaming.stream import ParticleStream, reading_threads
from tools.bench._shared import write_noise

BOX, BATCH = 128, 256
#: Reads all images once; calls its argument when the clock is to begin.
Way = Callable[[Callable[[], None]], None]
_MOSAIC = """
import json, shutil, sys, time
import numpy as np
from streaming import MDSWriter, StreamingDataset
source, folder, rounds, batch = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
images = np.load(source, mmap_mode="r")
shutil.rmtree(folder, ignore_errors=True)
with MDSWriter(out=folder, columns={"image": f"ndarray:float16:{images.shape[1]},{images.shape[2]}"}) as writer:
    for image in images:
        writer.write({"image": np.asarray(image)})
data = StreamingDataset(local=folder, shuffle=True, batch_size=batch)
rates = []
for _ in range(rounds + 1):
    start, held, count = time.perf_counter(), [], 0
    for sample in data:
        held.append(sample["image"])
        if len(held) == batch:
            np.stack(held).astype(np.float32)
            count, held = count + batch, []
    rates.append(count / (time.perf_counter() - start))
print(json.dumps(rates[1:]))
"""


def make_store(work: Path, count: int, box: int = BOX) -> ParticleStore:
    """Noise in float16, and the same images as one .npy."""
    if not (work / "store.zarr").exists():
        write_noise(work / "s.mrcs", count, box)
        convert(plan(str(work / "s.mrcs")), str(work / "store.zarr"), workers=2)
        (work / "s.mrcs").unlink()
    store = ParticleStore.open(str(work / "store.zarr"))
    if not (work / "images.npy").exists():
        held = np.lib.format.open_memmap(work / "images.npy", "w+", np.float16, (store.count, box, box))
        for start in range(0, store.count, 1024):
            held[start : start + 1024] = store.read_images(box, start, min(start + 1024, store.count))
        held.flush()
    return store


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache, as far as the system does so when asked."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def blocks_of(order: BatchOrder) -> list[int]:
    """First rows of an epoch's blocks, in the order in which the lanes' windows come."""
    starts: list[int] = []
    for window in range(max(order.lane_blocks(lane) for lane in range(order.lanes))):
        for lane in range(order.lanes):
            starts += (order.window_blocks_of(0, lane, window) * order.block_rows).tolist()
    return starts


def raw_reader(store: ParticleStore, order: BatchOrder, threads: int) -> Way:
    """The same blocks by bare positioned reads into buffers that are used again; nothing is checked or shuffled."""
    array, reader = store.image_array(BOX), RangeReader()
    length = array.block_bytes + 4
    wanted = []
    for start in blocks_of(order):
        shard, inside = divmod(start, array.shard_rows)
        wanted.append((array.shard_url(shard), inside // array.block_rows * length))
    buffers = [bytearray(length) for _ in range(threads)]
    local = "://" not in store.url

    def work(number: int) -> None:
        for url, offset in wanted[number::threads]:
            if local:
                descriptor = os.open(url, os.O_RDONLY)
                os.preadv(descriptor, [buffers[number]], offset)
                os.close(descriptor)
            else:
                reader.read(url, offset, offset + length)

    def run(begin: Callable[[], None]) -> None:
        begin()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(threads)))

    return run


def checked_reader(store: ParticleStore, order: BatchOrder, threads: int) -> Way:
    """The same blocks through the direct reader, checksums and all."""
    array = dataclasses.replace(store.image_array(BOX), reader=RangeReader())
    starts = blocks_of(order)
    held = threading.local()

    def read(start: int) -> None:
        if not hasattr(held, "block"):
            held.block = np.empty((order.block_rows, BOX, BOX), store.dtype)
        stop = min(start + order.block_rows, store.count)
        array.read(start, stop, held.block[: stop - start])

    def run(begin: Callable[[], None]) -> None:
        begin()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read, starts))

    return run


def zarr_reader(store: ParticleStore, order: BatchOrder, threads: int) -> Way:
    """The same blocks through zarr-python."""
    array = zarr.open_array(f"{store.url}/images/{BOX}", mode="r")
    starts = blocks_of(order)

    def run(begin: Callable[[], None]) -> None:
        begin()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda start: array[start : start + order.block_rows].shape, starts))

    return run


def stream_reader(store: ParticleStore, order: BatchOrder, cast: bool, threads: int, warm: int) -> Way:
    """An epoch of the stream, after `warm` of them; without `cast` the batches stay as stored, as they go to a GPU."""

    def run(begin: Callable[[], None]) -> None:
        with ParticleStream(store, BOX, order, threads=threads, columns=("half",)) as stream:
            for step in range((warm + 1) * order.steps_per_epoch):
                if step == warm * order.steps_per_epoch:
                    begin()
                if cast:
                    next(stream)
                else:
                    stream._coming.result()
                    stream._coming = stream._assembler.submit(stream._assemble, step + 1)

    return run


def memmap_reader(work: Path) -> Way:
    """Shuffled rows of one memory-mapped file, as float32 batches."""
    images = np.load(work / "images.npy", mmap_mode="r")
    rng = np.random.default_rng(0)

    def run(begin: Callable[[], None]) -> None:
        begin()
        rows = rng.permutation(len(images))
        for start in range(0, len(rows), BATCH):
            images[rows[start : start + BATCH]].astype(np.float32)

    return run


def mosaic_rates(work: Path, rounds: int) -> list[float] | str:
    """Images a second of MosaicML Streaming, shuffled, as float32 batches; or why there are none."""
    python = work / "mosaic" / "bin" / "python"
    if not python.exists():
        venv.create(work / "mosaic", with_pip=True)
        install = [python, "-m", "pip", "install", "-q", "mosaicml-streaming"]
        done = subprocess.run(install, capture_output=True, text=True)
        if done.returncode:
            return "pip could not install it"
    command = [python, "-c", _MOSAIC, work / "images.npy", work / "mds", str(rounds), str(BATCH)]
    done = subprocess.run(command, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else done.stderr.splitlines()[-1][:80]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the data, kept for the next time")
    parser.add_argument("--count", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--s3", default="", help="URL of the same store on S3 (copy WORK/store.zarr there)")
    parser.add_argument("--no-mosaic", action="store_true", help="leave MosaicML Streaming out")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    local = make_store(args.work, args.count)
    store = ParticleStore.open(args.s3) if args.s3 else local
    threads = reading_threads(store.url, 0)
    order = BatchOrder(store.count, store.block_rows(BOX), BATCH, seed=0)
    ways: dict[str, Way] = {
        "raw block reads": raw_reader(store, order, threads),
        "stream, as stored": stream_reader(store, order, False, threads, 1),
        "stream, float32": stream_reader(store, order, True, threads, 1),
        "direct reader, the same blocks": checked_reader(store, order, threads),
        "zarr-python, the same blocks": zarr_reader(store, order, threads),
    }
    if not args.s3:
        ways["np.memmap, shuffled rows"] = memmap_reader(args.work)
    rates: dict[str, list[float]] = {}
    busy: dict[str, list[float]] = {}  # CPU time of all threads, which other programs on the machine change little

    def measure(label: str, run: Way, keep: bool) -> None:
        begun = (0.0, 0.0)

        def begin() -> None:
            nonlocal begun
            begun = time.perf_counter(), time.process_time()

        run(begin)
        if keep:
            rates.setdefault(label, []).append(store.count / (time.perf_counter() - begun[0]))
            busy.setdefault(label, []).append(1e6 * (time.process_time() - begun[1]) / store.count)

    for number in range(args.rounds + 1):  # the first warms up
        for label, run in ways.items():
            measure(label, run, number > 0)
    if not args.s3:
        # From the stream's very start: a warm-up would read ahead what is to be read from the disk.
        ways |= {
            "stream, as stored": stream_reader(store, order, False, threads, 0),
            "stream, float32": stream_reader(store, order, True, threads, 0),
        }
        for _ in range(args.rounds):
            for label in ("raw block reads", "stream, as stored", "stream, float32"):
                forget(Path(store.url))
                measure(f"{label}, not in the page cache", ways[label], True)
        found = "not asked for" if args.no_mosaic else mosaic_rates(args.work, args.rounds)
        if isinstance(found, str):
            print(f"MosaicML Streaming left out: {found}", file=sys.stderr)
        else:
            rates["MosaicML Streaming, shuffled"] = found
    report(rates, busy, threads, store)


def report(rates: dict[str, list[float]], busy: dict[str, list[float]], threads: int, store: ParticleStore) -> None:
    """The table, and on what it was made."""
    middle = {label: statistics.median(values) for label, values in rates.items()}
    mib = BOX * BOX * 2 / 2**20
    print(f"{store.count:,} images of {BOX} px, {store.dtype}, blocks of {store.block_rows(BOX)}, {threads} reading "
          f"threads; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {platform.machine()}, Python "
          f"{platform.python_version()}, zarr {version('zarr')}, torch {version('torch')}\n")  # fmt: skip
    print("| way | images/s | MiB/s | ÷ raw | CPU an image, µs |\n| --- | --- | --- | --- | --- |")
    for label, rate in middle.items():
        cold = ", not in the page cache"
        base = middle["raw block reads" + (cold if label.endswith(cold) else "")]
        cpu = f"{statistics.median(busy[label]):.1f}" if label in busy else "–"
        print(f"| {label} | {rate:,.0f} | {rate * mib:,.0f} | {rate / base:.2f} | {cpu} |")
    pairs = (
        ("stream, float32", "MosaicML Streaming, shuffled"), ("stream, float32", "np.memmap, shuffled rows"),
        ("direct reader, the same blocks", "zarr-python, the same blocks"),
    )  # fmt: skip
    for one, other in pairs:
        if other in middle:
            print(f"\n{one} ÷ {other}: {middle[one] / middle[other]:.1f}")
