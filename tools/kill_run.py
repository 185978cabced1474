"""Kill workers of a running `scalecryo train --workers 2` again and again, beside an undisturbed run.

    python tools/kill_run.py STORE OUT [--kills 20] [--seed 0] [--within 5] [-- --pose.source encoder …]

What follows `--` goes to `train` in both runs. Each kill -9 hits a random worker at a random moment within so many
seconds after the run's first checkpoint since the kill before; one in five hits a group that has just been started,
and the last one comes after the last step, while poses are assigned. A table shows every kill; then come the figures
to reach: all kills survived, FSC >= 0.999 between the two maps, 30 s from a kill to the next step, no more lost than a
checkpoint interval, 25 s from `fit` to the first step.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch

from scalecryo.data.formats.mrc import read_map
from scalecryo.physics.fsc import fsc
from scalecryo.runs.checkpoint import newest_step
from scalecryo.runs.folder import RunFolder

WORKERS, PATIENCE = 2, 300.0
LEAST_FSC, MOST_RECOVERY, MOST_START = 0.999, 30.0, 25.0
# Says when `fit` is called, whoever calls it.
_DRIVER = """
import sys, time
from ray.train.torch import TorchTrainer
from scalecryo.cli import main
marks, fit = sys.argv.pop(1), TorchTrainer.fit
def timed(self):
    with open(marks, "a") as handle:
        handle.write(f"{time.time()}\\n")
    return fit(self)
TorchTrainer.fit = timed
main()
"""


@dataclass
class Kill:
    """One kill: who and when, the newest step then, where the run went on, and the seconds until it did."""

    worker: str
    second: float
    step: int
    starting: bool
    went_on: int | None = None
    recovery: float | None = None


class Run:
    """A run in a process of its own, with a Ray of its own below it."""

    def __init__(self, store: str, out: Path, settings: list[str]) -> None:
        self.out, self.marks, self.log = out, out.with_suffix(".fit"), out.with_suffix(".log")
        env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        command = [sys.executable, "-c", _DRIVER, str(self.marks), "train", "--data", store, "--out", str(out),
                   "--workers", str(WORKERS), *settings]  # fmt: skip
        with self.log.open("wb") as log:
            self.driver = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)

    def rows(self) -> list[dict[str, float]]:
        """The scalars so far; a line that is being written does not count."""
        path = self.out / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def workers(self) -> list[psutil.Process]:
        """The processes that train now, that of worker 0 first."""
        try:
            below = psutil.Process(self.driver.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        found = []
        for process in below:
            try:
                if process.status() != psutil.STATUS_ZOMBIE and "TrainWorker" in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        # Event files are written by worker 0 alone and carry its process in their name.
        leaders = {int(path.name.split(".")[-2]) for path in (self.out / "tb").glob("events.*")}
        return sorted(found, key=lambda process: process.pid not in leaders)

    def wait(self, ready: Callable[[], bool], seconds: float = PATIENCE) -> bool:
        """Wait until `ready()` is true; false when the run ends before."""
        deadline = time.monotonic() + seconds
        while not ready():
            if self.driver.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise SystemExit(f"nothing happened for {seconds:g} s: see {self.log}")
            time.sleep(0.02)
        return True

    def has_row_after(self, moment: float) -> bool:
        """Whether a row was written after a moment."""
        return self.first_after(moment) is not None

    def reached(self, folder: RunFolder, step: int) -> bool:
        """Whether a checkpoint is at least so new."""
        return newest_step(folder) >= step

    def first_after(self, moment: float) -> dict[str, float] | None:
        """The first row that was written after a moment."""
        return next((row for row in self.rows() if row["time"] > moment), None)

    def seconds_to_first_step(self) -> float:
        """From the first `fit` to the end of the first step."""
        return min(row["time"] for row in self.rows()) - float(self.marks.read_text().split()[0])


def kill_one(run: Run, generator: random.Random, began: float, *, starting: bool) -> tuple[Kill, float] | None:
    """kill -9 of a random worker; returns it with the moment when its whole group was gone, None when none was left."""
    group = run.workers()
    if not group:
        return None
    place = generator.randrange(len(group))
    moment = time.time()
    try:
        group[place].kill()
    except psutil.NoSuchProcess:
        return None
    old = {process.pid for process in group}
    run.wait(lambda: not old & {process.pid for process in run.workers()})
    step = max((int(row["step"]) for row in run.rows()), default=0)
    name = "?" if starting else str(place)
    return Kill(name, moment - began, step, starting), time.time()


def disturb(run: Run, kills: int, within: float, last_step: int, seed: int) -> list[Kill]:
    """Kill workers until the run's end, at most so many times."""
    generator, began, done = random.Random(seed), time.time(), list[Kill]()
    gone, moment, saved = 0.0, began, 0
    folder = RunFolder(str(run.out))
    while len(done) < kills:
        last = len(done) == kills - 1
        starting = bool(done) and not last and not done[-1].starting and generator.random() < 0.2
        if starting:
            there = run.wait(lambda: len(run.workers()) == WORKERS)
        else:
            there = run.wait(partial(run.has_row_after, gone))
            note_recovery(run, done, gone, moment)
            # Without a new checkpoint between them, a few losses in a row rightly end a run.
            there = there and run.wait(partial(run.reached, folder, last_step if last else saved + 1))
        if not there:
            break
        time.sleep(generator.uniform(0, 0.5 if last else 2.0 if starting else within))
        saved = newest_step(folder)
        hit = kill_one(run, generator, began, starting=starting)
        if hit is not None:
            kill, gone = hit
            moment = began + kill.second
            done.append(kill)
            print(f"kill {len(done)} of {kills} at step {kill.step}", file=sys.stderr, flush=True)
        elif run.driver.poll() is not None:
            break
    run.driver.wait()
    note_recovery(run, done, gone, moment)
    return done


def note_recovery(run: Run, done: list[Kill], gone: float, moment: float) -> None:
    """Where the run went on after the newest kill, once it has."""
    row = run.first_after(gone)
    if done and done[-1].recovery is None and row is not None:
        done[-1].went_on, done[-1].recovery = int(row["step"]) - 1, row["time"] - moment


def finished(run: Run) -> bool:
    """Whether it ended well."""
    if run.driver.wait() == 0:
        return True
    print(f"{run.out} ended with {run.driver.returncode}:\n{run.log.read_text()[-2000:]}")
    return False


def table(done: list[Kill], last_step: int) -> str:
    """Every kill in a line."""
    head = "| kill | second | worker | step then | went on from | lost | s to next step |\n|" + " --- |" * 7
    lines = [head]
    for number, kill in enumerate(done, 1):
        if kill.went_on is None or kill.recovery is None:
            after = "– | – | killed again before" if number < len(done) else "– | – | never"
            if kill.step >= last_step:
                after = f"{last_step} | 0 | only poses were left"
        else:
            after = f"{kill.went_on} | {kill.step - kill.went_on} | {kill.recovery:.1f}"
        worker = f"{kill.worker} (starting)" if kill.starting else kill.worker
        lines.append(f"| {number} | {kill.second:.0f} | {worker} | {kill.step} | {after} |")
    return "\n".join(lines)


def compare(one: Run, other: Run) -> tuple[float, bool]:
    """The smallest FSC between the final maps over all shells, and whether all losses are the same bit for bit."""
    maps = [torch.from_numpy(np.array(read_map(str(run.out / "map.mrc"))[0])) for run in (one, other)]
    curves = [
        [(row["step"], row.get("loss", row.get("halves/fsc_mean"))) for row in run.rows()] for run in (one, other)
    ]
    return float(fsc(*maps).min()), curves[0] == curves[1]


def verdict(calm: Run, killed: Run, done: list[Kill], kills: int, every: int) -> bool:
    """Print the figures; whether all were reached."""
    least, same = compare(calm, killed)
    recoveries = [kill.recovery for kill in done if kill.recovery is not None]
    lost = [kill.step - kill.went_on for kill in done if kill.went_on is not None]
    start = max(calm.seconds_to_first_step(), 0.0)
    steps = [int(row["step"]) for row in killed.rows()]
    figures = [
        ("kills survived", f"{len(done)}", f"{kills}", len(done) == kills),
        ("smallest FSC between the maps", f"{least:.6f}", f"{LEAST_FSC}", least >= LEAST_FSC),
        ("longest recovery, s", f"{max(recoveries, default=0):.1f}", f"{MOST_RECOVERY:g}",
         max(recoveries, default=0) <= MOST_RECOVERY),
        ("most lost steps", f"{max(lost, default=0)}", f"{every}", max(lost, default=0) <= every),
        ("fit to first step, s", f"{start:.1f}", f"{MOST_START:g}", start <= MOST_START),
        ("each step once", f"{len(steps)} rows", f"{len(set(steps))}", len(steps) == len(set(steps))),
    ]  # fmt: skip
    print("\n| figure | measured | to reach | |\n| --- | --- | --- | --- |")
    for name, measured, wanted, reached in figures:
        print(f"| {name} | {measured} | {wanted} | {'yes' if reached else 'NO'} |")
    print(f"\nlosses of all steps identical bit for bit: {'yes' if same else 'no'}")
    return all(reached for *_, reached in figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("out", type=Path, help="a new folder for both runs")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--within", type=float, default=5.0, help="seconds after a step in which a kill comes")
    own, settings = sys.argv[1:], list[str]()
    if "--" in own:
        own, settings = own[: own.index("--")], own[own.index("--") + 1 :]
    args = parser.parse_args(own)
    args.out.mkdir(parents=True)
    calm = Run(args.store, args.out / "undisturbed", settings)
    if not finished(calm):
        sys.exit(1)
    killed = Run(args.store, args.out / "killed", settings)
    try:
        last_step = max(int(row["step"]) for row in calm.rows())
        done = disturb(killed, args.kills, args.within, last_step, args.seed)
    finally:
        killed.driver.kill()  # nothing where it has ended; Ray's processes end with it
    print(table(done, last_step))
    config = RunFolder(str(calm.out)).config()
    every = 1 if config.pose.source == "guided" else config.train.checkpoint_every
    reached = finished(killed) and verdict(calm, killed, done, args.kills, every)
    sys.exit(0 if reached else 1)


if __name__ == "__main__":
    main()
