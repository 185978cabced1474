"""Data as a microscope makes them: from nothing beside from the true poses, on simulated sets (`stress_sets.py`).

    python tools/stress.py OUT [--only sp128 'm-4ake-*'] [--seeds 3] [--draw 0] [--quick] [--set guided.starts=8 …]

For each set: simulate and convert (once), train from nothing with every seed and once from the true poses (with the
defocus that a user is told, so that both runs have the same data), judge both against the truth, and print a table:
what is reached from nothing beside what the data allow. Goals: median pose error (modulo the map's symmetry) at most
1.5 times that from true poses or 0.3°, mean FSC at least 97 % of it, junk told from particles by the confidence with an
area under the curve of 0.99. A run that is finished and had the same settings is not run again, unless --again; --tag
keeps runs of several versions side by side. Without --only: the named sets, not the matrix (`m-*`) and not the toy.
"""

import argparse
import contextlib
import io
import json
import resource
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from stress_sets import SETS, StressSet

from scalecryo.commands import convert, evaluate, train
from scalecryo.config import SETTINGS
from scalecryo.data.formats.relion import read_particles, read_poses, write_with_poses
from scalecryo.data.storage.store import ParticleStore
from scalecryo.errors import ScalecryoError, Stopped

ROOT = Path(__file__).resolve().parents[1]
STRUCTURES = ROOT.parent / "shared" / "data" / "structures"
POSE_SHARE, POSE_DEG, FSC_SHARE, AUC = 1.5, 0.3, 0.97, 0.99
SCRATCH, KNOWN = "nothing", "poses"  # guided.start
Row = dict[str, Any]
R = TypeVar("R")


def simulated(wanted: StressSet, folder: Path, structures: Path, draw: int) -> Path:
    """The set's folder, simulated unless it is there, with posed.star: what a user is told, and the true poses."""
    data = folder / "particles"
    if not (data / "posed.star").exists():  # the last file
        shutil.rmtree(data, ignore_errors=True)
        wanted.write(data, structures, draw)
        told, true = read_particles(str(data / "particles.star")), read_poses(str(data / "truth.star"))
        assert true.shift is not None, "simulate writes shifts"
        count = len(told)
        write_with_poses(str(data / "posed.star"), (data / "particles.star").read_bytes(), told, true.rotation,
                         true.shift, np.ones(count), np.zeros(count, np.int64), wanted.box)  # fmt: skip
    return data


def converted(table: Path, store: Path, dark: bool) -> str:
    """The store of a table, made unless it is there and complete."""
    try:
        ParticleStore.open(str(store))
    except ScalecryoError:
        convert.run(str(table), str(store), data_dir=None, box=None, dtype="float16", workers=2, overwrite=True,
                    invert=dark, uninvert=not dark)  # fmt: skip
    return str(store)


def settings_for(start: str, seed: int, given: Mapping[str, str]) -> dict[str, str]:
    """The settings of a run: those given that its recipe reads."""
    recipe = "guided" if start == SCRATCH else "poses"
    own = {"guided.start": start, "train.seed": str(seed)}
    read = {key: value for key, value in given.items() if recipe in SETTINGS[key].metadata["recipes"]}
    return own | read


def run_one(
    wanted: StressSet,
    store: str,
    data: Path,
    run: Path,
    settings: dict[str, str],
    again: bool,
    symmetry: str | None = None,
) -> Row:
    """Train and judge (modulo a point group if it is given), unless that was done before with the same settings."""
    kept = run.with_suffix(".json")
    if kept.exists() and not again:
        row: Row = json.loads(kept.read_text())
        if row["settings"] == settings:
            return row
    shutil.rmtree(run, ignore_errors=True)
    row = {"settings": settings, "n": wanted.n}
    begun = time.monotonic(), time.process_time()

    def taken() -> Row:
        return {
            "seconds": round(time.monotonic() - begun[0], 1),
            "processor_seconds": round(time.process_time() - begun[1], 1),
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,  # of the process so far
        }

    try:
        train.run(None, data=store, out=str(run), workers="0", device="cpu", resume=False, overrides=settings)
        row |= taken()
        with contextlib.redirect_stdout(io.StringIO()):
            row |= evaluate.run(str(run), truth=str(data), symmetry=symmetry)
    except Stopped:  # by someone: no result
        raise
    except ScalecryoError as error:
        row |= taken() | {"error": str(error)}
    kept.write_text(json.dumps(row))
    return row


def pose_error(row: Row, what: str = "median") -> float:
    """Degrees, modulo the map's symmetry where it has one."""
    modulo = row[f"rotation_error_mod_pseudosymmetry_{what}_deg"]
    return float(row[f"rotation_error_{what}_deg"] if modulo is None else modulo)


def missed(scratch: Row, known: Row) -> list[str]:
    """Which goals a run from nothing misses."""
    if "error" in scratch:
        return ["refused"]
    if "error" in known:
        return ["no run from true poses"]
    found = []
    if pose_error(scratch) > max(POSE_SHARE * pose_error(known), POSE_DEG):
        found.append("pose")
    if scratch["fsc_mean"] < FSC_SHARE * known["fsc_mean"]:
        found.append("FSC")
    if scratch["junk_auc"] is not None and scratch["junk_auc"] < AUC:
        found.append("AUC")
    return found


def table(rows: Sequence[tuple[str, int, Row, Row]]) -> str:
    """Markdown: (set, seed, run from nothing, run from true poses); each figure from nothing / from true poses."""
    head = ("set", "seed", "pose error median (mean), °", "shift, px", "FSC 0.5, Å", "mean FSC", "share", "junk AUC",
            "s", "processor ms per image", "goals")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]

    def pair(scratch: Row, known: Row, text: Any) -> str:
        return " / ".join("-" if "error" in row else text(row) for row in (scratch, known))

    for name, seed, scratch, known in rows:
        both = scratch, known
        failed = missed(*both)
        share = "-"
        if "error" not in scratch and "error" not in known:
            share = f"{scratch['fsc_mean'] / known['fsc_mean']:.1%}"
        cells = [
            name,
            str(seed),
            pair(*both, lambda row: f"{pose_error(row):.2f} ({pose_error(row, 'mean'):.2f})"),
            pair(*both, lambda row: f"{row['shift_error_median_px']:.3f}"),
            pair(*both, lambda row: f"{row['fsc_0.5_angstrom']:.2f}"),
            pair(*both, lambda row: f"{row['fsc_mean']:.4f}"),
            share,
            pair(*both, lambda row: "-" if row["junk_auc"] is None else f"{row['junk_auc']:.4f}"),
            f"{scratch['seconds']:.0f} / {known['seconds']:.0f}",
            f"{1000 * scratch['processor_seconds'] / scratch['n']:.0f}",
            "met" if not failed else "missed: " + ", ".join(failed),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    errors = {f"{name}, seed {seed}: {row['error']}" for name, seed, *both in rows for row in both if "error" in row}
    return "\n".join([*lines, *([""] if errors else []), *sorted(errors)])


def stress(name: str, arguments: argparse.Namespace) -> Iterator[tuple[str, int, Row, Row]]:
    """One set: its run from true poses, and one from nothing for every seed."""
    wanted = SETS[name].short() if arguments.quick else SETS[name]
    folder = arguments.out / (name + ("-quick" if arguments.quick else "")) / f"draw{arguments.draw}"
    data = simulated(wanted, folder, arguments.structures, arguments.draw)
    posed = converted(data / "posed.star", folder / "posed.zarr", wanted.dark)
    store = converted(data / "particles.star", folder / "store.zarr", wanted.dark)
    tag = f"-{arguments.tag}" if arguments.tag else ""
    settings = settings_for(KNOWN, 0, arguments.set)
    known = run_one(wanted, posed, data, folder / f"poses{tag}", settings, arguments.again)
    for seed in range(arguments.seeds):
        settings = settings_for(SCRATCH, seed, arguments.set)
        yield name, seed, run_one(wanted, store, data, folder / f"scratch{seed}{tag}", settings, arguments.again), known


def setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    key = key.strip("-").replace("-", "_")
    if not equals or key not in SETTINGS:
        raise argparse.ArgumentTypeError(f"{text!r} is no setting: give section.key=value, e.g. guided.starts=8")
    return key, value


def parser_of(text: str, sets: Iterable[str], only: Sequence[str] = ("*",)) -> argparse.ArgumentParser:
    """What every script of sets asks for."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", default=only, metavar="NAME", help=f"{', '.join(sets)}; * and ? will do")
    parser.add_argument("--seeds", type=int, default=1, help="runs from nothing, of one draw of the data")
    parser.add_argument("--draw", type=int, default=0, help="seed of the simulation")
    parser.add_argument("--set", nargs="+", type=setting, default=[], metavar="KEY=VALUE", help="settings of training")
    parser.add_argument("--structures", type=Path, default=STRUCTURES, help="folder of the structures")
    return parser


def chosen(sets: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The sets that are asked for, in their own order."""
    return [name for name in sets if any(fnmatch(name, pattern) for pattern in patterns)]


def written(rows: Iterable[R], table: Callable[[list[R]], str], path: Path) -> list[R]:
    """All rows; their table is written and printed after each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done: list[R] = []
    for row in rows:
        done.append(row)
        path.write_text(table(done) + "\n")
        print(table(done), flush=True)
    return done


def main() -> None:
    parser = parser_of(__doc__, SETS, only=())
    parser.add_argument("--quick", action="store_true", help="short forms: fewer, smaller images")
    parser.add_argument("--tag", default="", help="of the runs' folders")
    parser.add_argument("--again", action="store_true", help="run again what is finished")
    arguments = parser.parse_args()
    arguments.set = dict(arguments.set)
    plain = [name for name in SETS if name != "toy" and not name.startswith("m-")]
    unknown = [pattern for pattern in arguments.only if not chosen(SETS, [pattern])]
    if unknown:
        parser.error(f"no set is called {', '.join(unknown)}")
    names = chosen(SETS, arguments.only) or plain
    each = (row for name in names for row in stress(name, arguments))
    rows = written(each, table, arguments.out / "stress.md")
    met = sum(not missed(scratch, known) for _, _, scratch, known in rows)
    print(f"{met} of {len(rows)} met their goals", flush=True)


if __name__ == "__main__":
    main()
