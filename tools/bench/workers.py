"""Weak and strong scaling from one worker to two on this machine, and the step's model fitted to what was measured.

    python -m tools.bench workers --work /tmp/bench [--boxes 64 128] [--rounds 5] [--plot scaling.png]

Two processes of one thread each, joined by gloo as Ray Train joins its workers: Ray takes no part in a step, and would
add its own processes to the cores that are measured. Each kind of trial runs in every round, in turns, so that all bear
the same machine; figures are medians over rounds. `alone`: one worker, the other process asleep. `apart`: two workers
that do not talk, which is what the machine itself gives. `weak`: two joined ones, each with the batch of `alone`.
`strong`: two with half of it each. What is measured: the paper's auto-encoder, step by step, and iterations of the
guided method on particles whose poses are known, by `loop.train` itself. tools/scaling_model.py says what many GPUs
would do.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from scalecryo.config import load_config
from scalecryo.data.storage.store import ParticleStore
from scalecryo.distributed.gradients import Replica
from scalecryo.distributed.world import World
from scalecryo.model.autoencoder import build_autoencoder
from scalecryo.runs.folder import RunFolder
from scalecryo.train import loop
from scalecryo.train.particle_source import RunContext
from scalecryo.train.stages.gradient_descent import build_optimiser, train_step
from tools.bench._workers_report import (
    ITERATION_BATCH,
    LINK_BYTES,
    Figures,
    Result,
    report_fit,
    report_iteration_parts,
    report_rates,
    report_step_parts,
    total,
)  # fmt: skip
from tools.bench.scaling import plot, report

COUNT, BOX = 8192, 128
WARM = 3  # iterations: the encoder is trained from the third on


def make_store(work: Path) -> str:
    """Simulated particles of 4AKE with CTF, shifts and their poses, on levels of 128, 64 and 32 px."""
    from scalecryo.commands import convert, simulate

    store = work / "workers.zarr"
    if not store.exists():
        with as_file(files("scalecryo.data") / "4ake.pdb.gz") as structure:
            simulate.run(str(structure), str(work / "workers"), n=COUNT, box=BOX, pixel_size=0.8, snr_db=0.0,
                         defocus_um=(0.8, 1.6), astigmatism_um=0.05, shift_a=2.0, seed=3)  # fmt: skip
        convert.run(str(work / "workers" / "truth.star"), str(store), data_dir=None, box=None, dtype="float16",
                    workers=2, overwrite=False, invert=False, uninvert=True)  # fmt: skip
        shutil.rmtree(work / "workers")
    return str(store)


class Steps:
    """Steps of the paper's auto-encoder from a store; the parts are those of one step, in seconds."""

    def __init__(
        self, url: str, box: int, batch: int, world: World, seed: int, steps: int, reduce: bool = True
    ) -> None:
        """`reduce` False: gradients stay where they are, all else is the same."""
        settings = {
            "pose.source": "encoder",
            "encoder.network": "cnn",
            "train.batch_size": batch,
            "train.box": box,
            "train.seed": seed,
        }
        config, store = load_config(None, {key: str(value) for key, value in settings.items()}), ParticleStore.open(url)
        self.context = RunContext.of(config, store, RunFolder(""), world, torch.device("cpu"))  # nothing is written
        self.world, self.steps, self.batch = world, steps, batch // world.size
        model = build_autoencoder(config, box, self.context.rows)
        self.optimiser = build_optimiser(config, model)
        joined = world if reduce else World()
        self.replica = Replica(model, joined, "float32", voxels=model.volume.voxels, window=model.volume.window)
        self.pixels, self.stream = self.context.pixels(box), self.context.stream(box, batch, 0)

    def _step(self) -> None:
        images = self.context.images(next(self.stream), self.pixels, padding=True)
        train_step(self.replica, self.optimiser, images, self.world, clip_norm=0.0)

    def run(self) -> Figures:
        """Median of some steps."""
        times, timer = [], self.world.timer.seconds
        for number in range(1 + self.steps):
            begun = time.perf_counter()
            self._step()
            if number == 0:  # warms caches that another trial used
                busy, parts = time.process_time(), (timer.get("reduce", 0.0), self.stream.wait_seconds)
                robbed = stolen()
            else:
                times.append(time.perf_counter() - begun)
        return {"images": self.batch, "seconds": statistics.median(times),
                "mean": statistics.mean(times), "cpu": (time.process_time() - busy) / self.steps,
                "stolen": (stolen() - robbed) / self.steps,
                "reduce": (timer.get("reduce", 0.0) - parts[0]) / self.steps,
                "read": (self.stream.wait_seconds - parts[1]) / self.steps}  # fmt: skip

    def close(self) -> None:
        """Stop reading ahead."""
        self.stream.close()


class Iterations:
    """Iterations of the guided method by `loop.train`; the parts are those of an iteration past the first ones, in
    seconds."""

    def __init__(self, url: str, box: int, particles: int, world: World, iterations: int, rows: int) -> None:
        settings = {"guided.start": "poses", "guided.iterations": WARM + iterations - 1,
                    "guided.settled_iterations": 99, "guided.iteration_particles": particles,
                    "guided.batch_size": ITERATION_BATCH * world.size,
                    "guided.encoder_batch": 256 * world.size, "train.box": box, "train.final_pass": "false",
                    "train.rows": rows}  # fmt: skip
        self.config = load_config(None, {key: str(value) for key, value in settings.items()})
        self.url, self.world, self.particles = url, world, particles // world.size

    def run(self) -> Figures:
        """Medians over the iterations after the warm-up, from a run of its own folder."""
        world, stamps = World(self.world.rank, self.world.size), []
        folder = [tempfile.mkdtemp(prefix="workers-")]
        if world.size > 1:
            dist.broadcast_object_list(folder)

        def stamp(_: int) -> None:
            clocks = {"seconds": time.perf_counter(), "cpu": time.process_time(), "stolen": stolen()}
            stamps.append({**clocks, **world.timer.seconds})

        run = dataclasses.replace(self.config.run, data=self.url, out=folder[0], workers=str(world.size))
        config = dataclasses.replace(self.config, run=run)
        if world.is_leader:
            RunFolder(folder[0]).create(config, resume=False)
        loop.train(config, world, torch.device("cpu"), at_checkpoint=stamp)
        iterations = [{key: after[key] - before.get(key, 0.0) for key in after}
                 for before, after in itertools.pairwise(stamps[WARM - 2 :])]  # fmt: skip
        if world.is_leader:  # it writes, and may end last
            shutil.rmtree(folder[0], ignore_errors=True)
        return {
            "images": self.particles,
            **{key: statistics.median(r[key] for r in iterations) for key in iterations[0]},
        }

    def close(self) -> None:
        """Nothing is kept."""


Trials = dict[str, tuple[int, Callable[[], Figures]]]  # how many workers take part, and what each does


def step_trials(rank: int, url: str, box: int, args: argparse.Namespace) -> tuple[Trials, list[Steps]]:
    batch, steps = args.batch, args.steps
    own = Steps(url, box, batch, World(), rank, steps)
    half = Steps(url, box, batch // 2, World(), rank, steps)
    weak = Steps(url, box, 2 * batch, World(rank, 2), 0, steps)
    strong = Steps(url, box, batch, World(rank, 2), 0, steps)
    kept = Steps(url, box, 2 * batch, World(rank, 2), 0, steps, reduce=False)
    trials: Trials = {
        "alone": (1, own.run), "alone, half": (1, half.run), "apart": (2, own.run), "apart, half": (2, half.run),
        "weak": (2, weak.run), "strong": (2, strong.run), "all-reduce": (2, all_reduces),
        "weak, gradients kept": (2, kept.run),
    }  # fmt: skip
    return trials, [own, half, weak, strong, kept]


def iteration_trials(rank: int, url: str, box: int, args: argparse.Namespace) -> tuple[Trials, list[Iterations]]:
    count, iterations = args.iteration_particles, args.iterations
    own, half = (Iterations(url, box, part, World(), iterations, 2 * count) for part in (count, count // 2))
    weak, strong = (Iterations(url, box, part, World(rank, 2), iterations, 2 * count) for part in (2 * count, count))
    trials: Trials = {
        "alone": (1, own.run), "alone, half": (1, half.run), "apart": (2, own.run), "apart, half": (2, half.run),
        "weak": (2, weak.run), "strong": (2, strong.run), "all-reduce": (2, all_reduces),
    }  # fmt: skip
    return trials, [own, half, weak, strong]


def stolen() -> float:
    """Seconds that this process's first thread stood ready while others had its core (Linux's schedstat)."""
    return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9


def settle_on(cores: set[int]) -> None:
    """Move every thread of this process."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread), cores)


def all_reduces(rounds: int = 5) -> Figures:
    """Median seconds, by the clock and of CPU, of a bare all-reduce of few and of many bytes. Collective."""
    begun, found = time.perf_counter(), {}
    for size, moved in LINK_BYTES.items():
        tensor, clocks = torch.ones(moved // 4), []
        for _ in range(rounds):
            dist.barrier()
            before = time.perf_counter(), time.process_time()
            dist.all_reduce(tensor)
            clocks.append((time.perf_counter() - before[0], time.process_time() - before[1]))
        wall, cpu = (statistics.median(column) for column in zip(*clocks, strict=True))
        found |= {f"{size} seconds": wall, f"{size} cpu": cpu}
    return {"images": 0, "seconds": time.perf_counter() - begun, **found}


def take_turns(trials: Trials, rank: int, rounds: int) -> list[Result]:
    """Every trial once in each round, the first one another each time; both workers' figures, on worker 0."""
    results, names = [], list(trials)
    for number in range(rounds):
        result: Result = {}
        for name in names[number % len(names) :] + names[: number % len(names)]:
            size, work = trials[name]
            dist.barrier()
            found = work() if rank < size else None
            gathered: list[Figures | None] = [None, None]
            dist.gather_object(found, gathered if rank == 0 else None)
            result[name] = [figures for figures in gathered if figures is not None]
        results.append(result)
        if rank == 0:
            shown = ", ".join(f"{name} {total(each):.0f}" for name, each in result.items() if name != "all-reduce")
            print(f"round {number + 1} of {rounds}, load {os.getloadavg()[0]:.1f}, images/s: {shown}", file=sys.stderr)
    return results


def worker(rank: int, port: int, url: str, args: argparse.Namespace, out: str) -> None:
    """What each of the two processes does; the first one writes what was measured."""
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    try:
        for place in args.places:
            where = {cores[rank % len(cores)]} if place == "pinned" else set(cores)
            settle_on(where)
            kinds = [("step", box, step_trials) for box in args.boxes] if args.rounds else []
            kinds += (
                [("iteration", box, iteration_trials) for box in args.iteration_boxes] if args.iteration_rounds else []
            )
            for kind, box, make in kinds:
                trials, held = make(rank, url, box, args)
                settle_on(where)
                rounds = args.rounds if kind == "step" else args.iteration_rounds
                if kind == "step":
                    take_turns(trials, rank, 1)  # compiles, and fills the read-ahead
                found[f"{place}/{kind}/{box}"] = take_turns(trials, rank, rounds)
                for one in held:
                    one.close()
                if rank == 0:
                    Path(out).write_text(json.dumps(found))
    finally:
        dist.destroy_process_group()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the store and figures, kept")
    parser.add_argument("--boxes", type=int, nargs="+", default=[64, 128], help="of the auto-encoder's steps")
    parser.add_argument("--batch", type=int, default=32, help="of one worker")
    parser.add_argument("--steps", type=int, default=6, help="in a round")
    parser.add_argument("--rounds", type=int, default=5, help="0: no steps")
    parser.add_argument("--iteration-boxes", type=int, nargs="+", default=[64])
    parser.add_argument("--iteration-particles", type=int, default=4096, help="of one worker")
    parser.add_argument("--iterations", type=int, default=2, help="in a round")
    parser.add_argument("--iteration-rounds", type=int, default=3, help="0: no iterations")
    parser.add_argument("--places", nargs="+", choices=["pinned", "free"], default=["pinned", "free"],
                        help="each worker on its own core, or where the system puts it")  # fmt: skip
    parser.add_argument("--again", action="store_true", help="report what an earlier call measured")
    parser.add_argument("--plot", type=Path, help="a PNG of what many GPUs would do")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    out = args.work / "workers.json"
    if not args.again:
        url = make_store(args.work)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        loads = [os.getloadavg()[0]]
        mp.spawn(worker, args=(port, url, args, str(out)), nprocs=2)
        loads.append(os.getloadavg()[0])
        print(f"{os.cpu_count()} cores, load {loads[0]:.1f} before and {loads[1]:.1f} at the end (2 are ours), torch "
              f"{torch.__version__}; gloo, one thread a worker, batches of {args.batch} and iterations of "
              f"{args.iteration_particles} particles a worker; images/s")  # fmt: skip
    found = json.loads(out.read_text())
    report_rates(found)
    report_step_parts(found)
    report_iteration_parts(found)
    report_fit(found, args.batch, args.iteration_particles)
    report()
    if args.plot:
        plot(args.plot)
