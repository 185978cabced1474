"""Reading blocks of a store: the own range reader against tensorstore, the same blocks, equal arrays.

    python -m tools.bench reader [--rounds 7] [--rows 2048] [--s3 BUCKET]

On a warm disk, and with --s3 from the server of AWS_ENDPOINT_URL behind a proxy that adds 20 ms; one block at a time,
and as the stream does, several under way. Wall and processor seconds of this process, the median of the rounds.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import zarr

from scalecryo.data.io import urls
from scalecryo.data.storage.arrays import ImageArray
from tests.support.fault_proxy import serve_process

BOX, BLOCKS_IN_SHARD, UNDER_WAY = 128, 64, 16
Read = Callable[[int, int, np.ndarray], object]


def own_reader(url: str, rows: int, block_rows: int) -> Read:
    array = ImageArray(url, "images", rows, BOX, "float16", block_rows, BLOCKS_IN_SHARD * block_rows)
    return lambda start, stop, out: array.read(start, stop, out)


def tensorstore_reader(url: str, rows: int, block_rows: int) -> Read:
    import tensorstore  # of the extra dev: --help does without

    place: dict[str, object] = {"driver": "file", "path": url}
    if url.startswith("s3://"):
        bucket, _, path = url.removeprefix("s3://").partition("/")
        place = {"driver": "s3", "bucket": bucket, "path": path, "endpoint": os.environ["AWS_ENDPOINT_URL"],
                 "aws_region": "us-east-1"}  # fmt: skip
    # The pool keeps the shards' indices; every round opens anew and reads each block once.
    context = {"cache_pool": {"total_bytes_limit": 1 << 30}, "data_copy_concurrency": {"limit": 2},
               "file_io_concurrency": {"limit": UNDER_WAY}, "s3_request_concurrency": {"limit": UNDER_WAY}}  # fmt: skip
    array = tensorstore.open({"driver": "zarr3", "kvstore": place, "context": context}, open=True).result()

    def read(start: int, stop: int, out: np.ndarray) -> None:
        out[:] = array[start:stop].read().result()

    return read


def one_round(read: Read, starts: list[int], block_rows: int, threads: int) -> tuple[float, float, np.ndarray]:
    """Wall and processor seconds, and what was read."""
    out = np.empty((len(starts), block_rows, BOX, BOX), np.float16)
    out[:] = 0  # its pages are there
    jobs = [(start, start + block_rows, part) for start, part in zip(starts, out, strict=True)]
    with ThreadPoolExecutor(threads) as pool:
        wall, busy = time.perf_counter(), time.process_time()
        if threads == 1:
            for job in jobs:
                read(*job)
        else:
            list(pool.map(lambda job: read(*job), jobs))
        return time.perf_counter() - wall, time.process_time() - busy, out


def compare(where: str, url: str, rows: int, block_rows: int, threads: int, rounds: int) -> None:
    starts = (block_rows * np.random.default_rng(0).permutation(rows // block_rows)).tolist()
    seconds: dict[str, list[tuple[float, float]]] = {"own": [], "tensorstore": []}
    for _ in range(rounds + 1):  # the first warms up
        outs = []
        for name, make in (("own", own_reader), ("tensorstore", tensorstore_reader)):
            wall, busy, out = one_round(make(url, rows, block_rows), starts, block_rows, threads)
            seconds[name].append((wall, busy))
            outs.append(out)
        assert np.array_equal(outs[0].view(np.uint16), outs[1].view(np.uint16))
    size = rows * BOX * BOX * 2 / 1e6
    (own, own_busy), (other, other_busy) = (
        tuple(statistics.median(part) for part in zip(*found[1:], strict=True)) for found in seconds.values()
    )
    print(f"{where:5} {block_rows * BOX * BOX * 2 >> 10:5} KiB × {len(starts):4}, {threads:2} under way: "
          f"own {size / own:6.0f} MB/s ({own_busy:.2f} s CPU), "
          f"tensorstore {size / other:6.0f} MB/s ({other_busy:.2f} s CPU), "
          f"own is {other / own:.2f} × as fast, {other_busy / own_busy:.2f} × by CPU", flush=True)  # fmt: skip


def write(folder: Path, rows: int, block_rows: int) -> Path:
    """A sharded array as conversion lays it out."""
    place = folder / f"blocks{block_rows}"
    shard_rows = min(BLOCKS_IN_SHARD * block_rows, rows)
    array = zarr.create_array(
        str(place), shape=(rows, BOX, BOX), dtype="float16", chunks=(block_rows, BOX, BOX),
        shards=(BLOCKS_IN_SHARD * block_rows, BOX, BOX), compressors=[zarr.codecs.Crc32cCodec()],
    )  # fmt: skip
    rng = np.random.default_rng(1)
    for start in range(0, rows, shard_rows):
        count = min(shard_rows, rows - start)
        array[start : start + count] = rng.normal(size=(count, BOX, BOX)).astype(np.float16)
    return place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--s3", metavar="BUCKET", default="")
    arguments = parser.parse_args()
    rows, rounds = arguments.rows, arguments.rounds
    with tempfile.TemporaryDirectory() as folder:
        places = {block_rows: write(Path(folder), rows, block_rows) for block_rows in (8, 64)}
        for block_rows, place in places.items():
            for threads in (1, UNDER_WAY):
                compare("disk", str(place), rows, block_rows, threads, rounds)
        if not arguments.s3:
            return
        addresses = {}
        for block_rows, place in places.items():
            addresses[block_rows] = f"s3://{arguments.s3}/bench-reader/{place.name}"
            for path in place.rglob("*"):
                if path.is_file():
                    with urls.atomic_stream(f"{addresses[block_rows]}/{path.relative_to(place)}") as stream:
                        stream.write(path.read_bytes())
        upstream = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
        for latency in (0.0, 0.02):
            with serve_process(upstream, 28446, latency, 0) if latency else nullcontext():
                if latency:
                    os.environ["AWS_ENDPOINT_URL"] = "http://127.0.0.1:28446"
                for block_rows, url in addresses.items():
                    for threads in (1, UNDER_WAY):
                        few = min(rows, 1024) if threads == 1 else rows
                        compare(f"S3 {1000 * latency:.0f}ms", url, few, block_rows, threads, max(3, rounds // 2))


if __name__ == "__main__":
    main()
