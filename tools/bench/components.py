"""Memory of a run with components: beside what was predicted, and at N and at 10 N particles.

    python -m tools.bench components --work /tmp/bench --count 100000         # tiny images: N and 10 N particles
    python -m tools.bench components --work /tmp/bench --box 64 --q 4         # 2,000 particles: beside the prediction

Each run in a process of its own, from known poses: final pass, components, coordinates, maps of states. What is counted
is memory that the kernel cannot take back (anonymous pages, looked at every 20 ms): columns by particle lie in files.
The stores of many particles repeat few real shards (tests/support/virtual_store.py).
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from importlib.resources import as_file, files
from pathlib import Path
from types import TracebackType

TINY, REAL, SIZE_A = 16, 2000, 102.4
MIB = 2**20


class AnonymousPeak:
    """The largest anonymous memory of this process since it was last asked."""

    def __init__(self) -> None:
        self._peak, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "AnonymousPeak":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def taken(self) -> int:
        """Bytes; begins anew."""
        found, self._peak = max(self._peak, _anonymous()), 0
        return found

    def _look(self) -> None:
        while not self._ended.wait(0.02):
            self._peak = max(self._peak, _anonymous())


def _anonymous() -> int:
    found = re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, "Linux tells it"
    return int(found[1]) << 10


def make_store(work: Path, box: int) -> Path:
    """Simulated particles with their poses; of two structures, so that there is something to learn."""
    from scalecryo.commands import convert, simulate

    store = work / f"real-{box}.zarr"
    if not store.exists():
        with as_file(files("scalecryo.data") / "4ake.pdb.gz") as structure:
            given = str(structure)
            simulate.run(given, str(work / f"data-{box}"), n=REAL, box=box, pixel_size=SIZE_A / box, snr_db=0.0,
                         defocus_um=None, astigmatism_um=0.0, shift_a=0.0, seed=1, hinge="A:0,1,1:60:2")  # fmt: skip
        convert.run(str(work / f"data-{box}" / "truth.star"), str(store), data_dir=None, box=None, dtype="float16",
                    workers=1, overwrite=False, invert=False, uninvert=True)  # fmt: skip
        shutil.rmtree(work / f"data-{box}")
    return store


def measure(url: str, out: str, q: int, passes: int) -> dict[str, float]:
    """One run in this process: bytes at the fullest moment of each stage, seconds, what was predicted."""
    import torch

    from scalecryo.config import load_config
    from scalecryo.data.storage.store import ParticleStore
    from scalecryo.distributed.world import World
    from scalecryo.runs.folder import RunFolder
    from scalecryo.train.loop import run_stages
    from scalecryo.train.memory import need_of
    from scalecryo.train.particle_source import RunContext
    from scalecryo.train.recipes import stages_of
    from scalecryo.train.stages import components

    torch.set_num_threads(1)
    components.PASSES = passes
    settings = {"pose.source": "known", "train.components": str(q), "run.data": url,
                "run.out": out, "train.steps": "1"}  # fmt: skip
    config, store, run = load_config(None, settings), ParticleStore.open(url), RunFolder(out)
    run.create(config, resume=False)
    context = RunContext.of(config, store, run, World(), torch.device("cpu"))
    stages, _ = stages_of(context)
    found, begun = {"predicted": float(need_of(config, store.levels).final)}, time.perf_counter()
    with AnonymousPeak() as memory:
        for stage in stages[1:]:
            run_stages([stage], context)
            found[stage.name] = float(memory.taken())
    return found | {"seconds": time.perf_counter() - begun}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the stores, kept for the next time")
    parser.add_argument("--count", type=int, default=0, help="N: runs of N and 10 N tiny images")
    parser.add_argument("--box", type=int, default=64, help="px, without --count")
    parser.add_argument("--q", type=int, default=4, help="components")
    parser.add_argument("--passes", type=int, default=4, help="at most, of the components")
    parser.add_argument("--alone", nargs=2, metavar=("STORE", "OUT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        print(json.dumps(measure(*given.alone, given.q, given.passes)))
        return
    from tests.support.virtual_store import make_virtual_store

    given.work.mkdir(parents=True, exist_ok=True)
    stores = {REAL: make_store(given.work, given.box)}
    if given.count:
        small, stores = make_store(given.work, TINY), {}
        for count in (given.count, 10 * given.count):
            stores[count] = given.work / f"tiny-{count}.zarr"
            if not stores[count].exists():
                make_virtual_store(small, stores[count], count)
    for count, store in stores.items():
        out = given.work / "run"
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", "tools.bench", "components", "--work", str(given.work), "--q", str(given.q),
                   "--passes", str(given.passes), "--alone", str(store), str(out)]  # fmt: skip
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        found = json.loads(told)
        seconds = found.pop("seconds")
        parts = ", ".join(f"{name} {value / MIB:,.0f} MiB" for name, value in found.items())
        print(f"{count:,} particles: {parts}; {seconds:.0f} s")
