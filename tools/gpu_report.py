"""Everything that only a GPU can tell, in one command that can be cut and called again.

    python tools/gpu_report.py OUT [--minutes 8] [--device cuda|cpu] [--wheels DIR] [--work DIR] [--structure FILE]
                                   [--only PART …] [--rehearse] [--start fork|spawn]

Needs torch ≥ 2.11 with CUDA, numpy, scipy, numba and matplotlib, and what tools/gpu_wheels.txt names, as wheels in a
folder that `--wheels` installs from (nothing is fetched); no Ray. Parts run one after the other, the most telling
first, each in a process of its own (a fault of CUDA ends its part alone), within its own limit and that of `--minutes`;
what a part found before it was cut is kept. Called again with the same OUT, parts that are done for the same code,
device and versions are kept, and the others run. Writes OUT/report.json, OUT/report.md and pictures; data, runs and
logs lie in `--work` (default OUT/work). `--rehearse`, which `--device cpu` implies, does everything in sizes of
seconds.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LEAST_SECONDS = 5.0  # left, to begin another part


class Part(NamedTuple):
    """A part: where its function is, what it tells, and the seconds after which it is cut."""

    name: str
    function: str
    title: str
    limit: float


#: The most telling first.
PARTS = (
    Part("device", "device.device", "The device by itself", 40),
    Part("tests", "device.tests", "pytest -m gpu", 120),
    Part("D", "runs.dataset_d", "Dataset D, from star to final map", 120),
    Part("kernels", "kernels.kernels", "Kernels beside reference and roofline", 75),
    Part("iteration", "runs.iteration", "One iteration of the refinement under the profiler", 60),
    Part("guided", "rates.guided", "Search, local refinement, insertion", 45),
    Part("steps", "rates.steps", "Steps of the paper's encoder", 75),
    Part("G", "runs.dataset_g", "Dataset G, from star to final map", 120),
    Part("precision", "rates.precision", "TF32 and bfloat16", 30),
    Part("ribosome", "runs.ribosome", "80S ribosome at 256 px, from star to final map", 300),
)


def install(wheels: Path, target: Path) -> None:
    """What the wheels hold, into a folder that is looked at first; done once."""
    listed = sorted(wheels.glob("*.whl"))
    stamp = target / "installed.txt"
    names = "\n".join(path.name for path in listed)
    if not listed:
        raise SystemExit(f"{wheels}: holds no wheel: pip download -r tools/gpu_wheels.txt --no-deps -d {wheels}")
    if not stamp.exists() or stamp.read_text() != names:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade",
                   "--target", str(target), *map(str, listed)]  # fmt: skip
        subprocess.run(command, check=True)
        stamp.write_text(names)
    sys.path.insert(0, str(target))


def code_digest() -> str:
    """Of everything that a part runs."""
    digest = hashlib.sha256()
    for folder in ("scalecryo", "tools", "tests/gpu"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> str | None:
    """The checkout's commit, where it is one."""
    try:
        said = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, timeout=20)
    except OSError:
        return None
    return said.stdout.strip() or None


class Report:
    """What is known so far, on disk after every part."""

    def __init__(self, out: Path, work: Path) -> None:
        self.out, self.work = out, work
        self.path = out / "report.json"
        self.found: dict[str, Any] = {"identity": {}, "parts": {}}

    def begin(self, identity: dict[str, Any]) -> None:
        """Keep what an earlier call found of the same code on the same device."""
        if self.path.exists():
            before = json.loads(self.path.read_text())
            same = {key: before["identity"].get(key) for key in identity if key != "commit"}
            if same == {key: value for key, value in identity.items() if key != "commit"}:
                self.found = before
            else:
                self.path.rename(self.out / "report_before.json")
        self.found["identity"] = identity
        self.save()

    def status(self, part: Part) -> str | None:
        """What became of a part; None: it never ran."""
        found = self.found["parts"].get(part.name)
        return None if found is None else found["status"]

    def add(self, part: Part, status: str, seconds: float, rows: list[dict[str, Any]]) -> None:
        """Take in a part, and write everything anew."""
        date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        self.found["parts"][part.name] = {"title": part.title, "status": status, "seconds": round(seconds, 1),
                                          "date": date, "rows": rows}  # fmt: skip
        self.save()

    def save(self) -> None:
        """Write report.json."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.found, indent=1, ensure_ascii=False) + "\n")
        part.replace(self.path)


def child(function: str, session: Any, rows: Path, log: Path) -> None:
    """Run a part: its rows to a file as they come, what it says to a log."""
    import importlib

    os.setsid()  # its own processes end with it
    with log.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    module, name = function.split(".")
    run = getattr(importlib.import_module(f"tools.gpu.{module}"), name)
    with rows.open("a") as stream:
        for row in run(session):
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            stream.flush()
    sys.stdout.flush()
    os._exit(0)  # torch's and CUDA's own ends take seconds, and there is nothing to lose


def run_part(part: Part, session: Any, limit: float) -> tuple[str, float, list[dict[str, Any]]]:
    """Status, seconds and rows of a part that is cut after so many seconds."""
    folder = session.work / "log"
    folder.mkdir(parents=True, exist_ok=True)
    rows, log = folder / f"{part.name}.jsonl", folder / f"{part.name}.txt"
    for path in (rows, log):
        path.unlink(missing_ok=True)
    # Forked, as a rule: torch is imported once. This process never touches CUDA.
    process = multiprocessing.get_context(session.start).Process(target=child, args=(part.function, session, rows, log))
    start = time.monotonic()
    process.start()
    status = "done"
    try:
        process.join(limit)
    finally:  # a part has a session of its own, and would outlive a report that is ended
        if process.is_alive():
            end(process)
            status = f"cut after {limit:.0f} s"
    if status == "done" and process.exitcode:
        said = log.read_text().strip().splitlines()  # a traceback ends with the error
        status = f"failed ({process.exitcode}): {said[-1][:300] if said else 'without a word'}"
    found = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    return status, time.monotonic() - start, found


def end(process: BaseProcess) -> None:
    """A part and what it started."""
    assert process.pid is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.join()


def identity(session: Any) -> dict[str, Any]:
    """What figures hold for: code, device and versions; asked of a child, since CUDA stays out of this process."""
    part = Part("identity", "device.identity", "", 60)
    status, _, rows = run_part(part, session, part.limit)
    if status != "done":
        raise SystemExit(f"{session.device}: {status} (the whole story: {session.work / 'log' / 'identity.txt'})")
    return {"code": code_digest(), "commit": commit(), "rehearsal": session.rehearsal, **rows[0]}


def run_all(parts: Sequence[Part], session: Any, report: Report, deadline: float) -> None:
    """Every part that is not done: those that never ran first."""
    from tools.gpu.document import write

    waiting = [part for part in parts if report.status(part) != "done"]
    for part in sorted(waiting, key=lambda part: report.status(part) is not None):
        left = deadline - time.monotonic()
        if left < LEAST_SECONDS:
            break
        status, seconds, rows = run_part(part, session, min(part.limit, left))
        report.add(part, status, seconds, rows)
        print(f"{part.name}: {status}, {seconds:.0f} s", flush=True)
        write(report.found, parts, report.out)
    write(report.found, parts, report.out)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--structure", type=Path, default=ROOT.parent / "shared/data/structures/6zu5.cif.gz")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS])
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--start", choices=["fork", "spawn"], default="fork", help="of a part; spawn: seconds slower")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # as Ctrl-C does, by an exception
    work = (arguments.work or arguments.out / "work").resolve()
    for folder in (arguments.out, work):
        folder.mkdir(parents=True, exist_ok=True)
    if arguments.wheels:
        install(arguments.wheels, work / "site")
    sys.path.insert(0, str(ROOT))
    # Whoever asks while it is imported whether there is a GPU asks the driver, not CUDA, which does not survive a fork.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    # Imported once, before the forks: also that of `identity`, which would tell at once if CUDA did not survive them.
    from tools.gpu import device, kernels, rates, runs  # noqa: F401
    from tools.gpu.session import session_of

    rehearsal = arguments.rehearse or arguments.device == "cpu"
    structure = arguments.structure if arguments.structure.exists() else None
    session = session_of(arguments.device, work, structure, rehearsal=rehearsal, start=arguments.start)
    report = Report(arguments.out, work)
    report.begin(identity(session))
    parts = [part for part in PARTS if not arguments.only or part.name in arguments.only]
    run_all(parts, session, report, deadline)
    missing = [part.name for part in parts if report.status(part) != "done"]
    print(f"{arguments.out / 'report.md'}: {len(parts) - len(missing)} of {len(parts)} parts"
          + (f"; the same command again goes on with {', '.join(missing)}" if missing else ""))  # fmt: skip
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
