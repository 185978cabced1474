"""Several structures at once: how many particles get the right label, and what each class reaches.

    python tools/classes.py OUT [--only two 'four-*'] [--seeds 1] [--draw 0] [--alone] [--cost] [--set …=…]

For each set: simulate and convert (once), train from nothing with the classes that the set asks for, compare with the
truth, and print a table. Goals: share of right labels; pose error of each class at most 1.5 times that of the same
particles alone (`--alone`: with one class); area under the curve of 0.99 that tells junk from particles. With more
classes than structures, purity stands for labels: a structure that is split is not mixed up. `--cost` runs the same
images with one class, too: K classes are to take at most K times the processor time, and 0.2 GB a class more memory at
128 px.
"""

import argparse
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from stress import AUC, POSE_SHARE, Row, chosen, converted, parser_of, pose_error, run_one, simulated, written
from stress_sets import COMPLEX, CUT_DIMER, DIMER, GROEL, SCOPE, SPIKE, StressSet, Structure

from scalecryo.commands import select
from scalecryo.data.formats.relion import CLASS, JUNK, OwnColumns, read_poses
from scalecryo.evaluate.metrics import junk_auc

OPEN: Structure = ("4ake.pdb", "A")
CLOSED: Structure = ("1ake_chainA.pdb", "")
PROTOMER: Structure = ("6vxx.pdb", "A")
LARGE_RNA: Structure = ("6zu5.cif.gz", "L50")
SMALL_RNA: Structure = ("6zu5.cif.gz", "S60")
HEAD: Structure = ("6zu5.cif.gz", "SD0,SP0,SQ0,SS0,ST0,SU0,SGG,SDD,SEE,SK0,SF0,SZ0")
EXIT: Structure = ("6zu5.cif.gz", "LA0,LE0,LF0,LC0,LG0,LL0,LN0,LO0,LAA,LEE,LFF,LQ0,LS0,LT0,LI0,LY0")
SUBUNITS: Structure = ("1mnf.pdb.gz", "A,B,C,D")
FOUR = ((SPIKE,), (PROTOMER,), (GROEL,), (COMPLEX,))
EIGHT = ((LARGE_RNA,), (SMALL_RNA,), (COMPLEX,), (DIMER,), (PROTOMER,), (SUBUNITS,), (HEAD,), (EXIT,))
TWO = ((DIMER,), CUT_DIMER)
GIB_A_CLASS, GIB_BOX = 0.2, 128  # memory of one class more, at this box
ORIGIN = (0.0, 0.0, 0.0)  # of unrelated structures, each by itself
OTHER_FOUR = ((DIMER,), (SUBUNITS,), (HEAD,), (EXIT,))
CUT_COMPLEX: Structure = ("6zu5.cif.gz", ",".join(name for name in COMPLEX[1].split(",") if name not in ("SE0", "SG0")))
CUT_OTHER: Structure = ("6zu5.cif.gz", ",".join(name for name in COMPLEX[1].split(",") if name not in ("LH0", "LR0")))
CUT_SPIKE: Structure = ("6vxx.pdb", "A,B,C/300-2000")
PARTS = (  # neighbours in 6ZU5, 100 to 200 kDa each
    "SDD,SK0,SD0,SU0,SP0,ST0,SS0,SQ0",
    "LY0,LHH,LLL,LC0,LJJ,LX0,LEE,LP0,LL0",
    "SG0,LW0,SI0,SY0,SE0,LV0,SL0,LB0",
    "LM0,LS0,LO0,LFF,LE0,LH0,LF0,LMM,LEE,LI0,LB0",
    "SBB,SN0,SH0,SW0,LCC,SV0,SA0,SAA,SB0",
    "LD0,LJ0,LT0,LBB,LOO,LI0,LNN,SS0,LAA",
    "LII,LN0,LG0,LL0,LOO,LAA,LJJ",
    "SJ0,SEE,SC0,SX0,SE0,SY0,SW0,SV0,SL0,SD0,SA0",
)
EIGHT_OTHER = tuple((("6zu5.cif.gz", chains),) for chains in PARTS)


@dataclass(frozen=True)
class ClassSet:
    """One set, and how it is to be sorted.

    Attributes:
        data: what is simulated.
        classes: of the run.
        accuracy: share of right labels to be reached; None: there is but one structure.
        settings: of the run.
    """

    data: StressSet
    classes: str
    accuracy: float | None
    settings: dict[str, str] = field(default_factory=dict)


DOCKED = {"train.class_mode": "docked"}
_two = StressSet("two chains of 6VXX, a third of one missing", TWO, 5000, 64, 4.0, -8.0)
_kinases = StressSet("adenylate kinase, open and closed", ((OPEN,), (CLOSED,)), 5000, 64, 1.6, 0.0)
_four = StressSet("6VXX, its chain, GroEL, 20 proteins of 6ZU5", FOUR, 10_000, 64, 4.0, -10.0, centre=ORIGIN)
_proteins = StressSet("20 proteins of 6ZU5, two of them missing", ((COMPLEX,), (CUT_COMPLEX,)), 5000, 64, 4.0, -8.0)
_other = StressSet("6VXX's A and B, GroEL's quarter, parts of 6ZU5", OTHER_FOUR, 10_000, 64, 4.0, -10.0, centre=ORIGIN)
_spikes = StressSet("6VXX, with and without its N-terminal domains", ((SPIKE,), (CUT_SPIKE,)), 5000, 64, 4.0, -8.0)
_groel = StressSet("GroEL, 30 % junk", ((GROEL,),), 5000, 64, 4.0, -8.0, added={"junk": 0.3})
_junk = StressSet("two chains of 6VXX, 30 % junk", ((DIMER,),), 5000, 64, 4.0, -8.0, added={"junk": 0.3})
_eight = StressSet("eight parts of 6ZU5, 6VXX and GroEL", EIGHT, 8000, 128, 3.0, -14.0, centre=ORIGIN)
_eight_other = StressSet("eight groups of proteins of 6ZU5", EIGHT_OTHER, 8000, 128, 3.0, -14.0, centre=ORIGIN)
_three = StressSet("20 proteins of 6ZU5, two, two others missing", ((COMPLEX,), (CUT_COMPLEX,), (CUT_OTHER,)), 6000, 64,
                   4.0, -8.0, added=SCOPE | {"shares": (50, 30, 20)})  # fmt: skip
SETS = {
    "two": ClassSet(_two, "2", 0.95, DOCKED),
    "two-80": ClassSet(replace(_two, added={"shares": (80, 20)}), "2", 0.95, DOCKED),
    "kinases": ClassSet(_kinases, "2", 0.9, DOCKED),
    "kinases-5": ClassSet(replace(_kinases, snr_db=-5.0), "2", 0.9, DOCKED),
    "proteins": ClassSet(_proteins, "2", 0.95, DOCKED),
    "four": ClassSet(_four, "4", 0.98),
    "four-other": ClassSet(_other, "4", 0.98),
    "four-k6": ClassSet(_four, "6", 0.98),
    "four-auto": ClassSet(_four, "auto", 0.98),
    "junk": ClassSet(_junk, "2", None),
    "spikes": ClassSet(_spikes, "2", 0.95, DOCKED | {"train.symmetry": "C3"}),
    "groel-junk": ClassSet(_groel, "2", None, {"train.symmetry": "D7"}),
    "two-scope": ClassSet(replace(_two, n=6000, added=SCOPE), "2", 0.95, DOCKED),
    "kinases-scope": ClassSet(replace(_kinases, n=6000, snr_db=-5.0, added=SCOPE), "2", 0.9, DOCKED),
    "four-scope": ClassSet(replace(_four, n=12_000, added=SCOPE), "5", 0.98),
    "three-scope": ClassSet(_three, "3", 0.95, DOCKED),
    "eight": ClassSet(_eight, "8", 0.95),
    "eight-other": ClassSet(_eight_other, "8", 0.95),
}


def missed(wanted: ClassSet, row: Row, alone: Sequence[Row], one: Row | None = None) -> list[str]:
    """Which goals a run misses, beside the runs of each structure alone and of the same images with one class."""
    if "error" in row:
        return ["refused"]
    found = []
    more = wanted.classes not in ("auto", str(len(wanted.data.specimens)))
    if wanted.accuracy is not None and row["class_purity" if more else "class_accuracy"] < wanted.accuracy:
        found.append("labels")
    if row["junk_auc"] is not None and row["junk_auc"] < AUC:
        found.append("AUC")
    for error, single in zip(row.get("class_rotation_error_median_deg", ()), alone, strict=False):
        if error is None or error > POSE_SHARE * pose_error(single):
            found.append("pose")
    if one is not None:
        if row["processor_seconds"] > int(wanted.classes) * one["processor_seconds"]:
            found.append("time")
        if gib_a_class(wanted, row, one) > GIB_A_CLASS * max(1.0, (wanted.data.box / GIB_BOX) ** 3):
            found.append("memory")
    return found


def gib_a_class(wanted: ClassSet, row: Row, one: Row) -> float:
    """Peak memory that one class more takes."""
    return float(row["peak_gib"] - one["peak_gib"]) / (int(wanted.classes) - 1)


def table(rows: Sequence[tuple[str, int, Row, Sequence[Row], Row | None]]) -> str:
    """Markdown: (set, seed, run, the run of each of its structures alone, that of the same images with one class)."""
    head = ("set", "seed", "labels", "purity", "confusion (true × found)", "pose error of each class (alone), °",
            "FSC 0.5, Å", "junk AUC", "processor seconds (one class)", "GiB a class", "goals")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name, seed, row, alone, one in rows:
        failed = ", ".join(missed(SETS[name], row, alone, one))
        cells = [name, str(seed)]
        if "error" in row:
            cells += [row["error"], *"-----"]
        elif row["class_accuracy"] is None:
            cells += [*"---", f"{pose_error(row):.2f}", f"{row['fsc_0.5_angstrom']:.2f}", _text(row["junk_auc"], 4)]
        else:
            errors = [_text(error, 2) for error in row["class_rotation_error_median_deg"]]
            beside = f" ({', '.join(f'{pose_error(single):.2f}' for single in alone)})" if alone else ""
            cells += [
                f"{row['class_accuracy']:.2%}", f"{row['class_purity']:.2%}",
                " / ".join(" ".join(map(str, of_class)) for of_class in row["class_confusion"]),
                ", ".join(errors) + beside,
                ", ".join(_text(reached, 2) for reached in row["class_fsc_0.5_angstrom"]), _text(row["junk_auc"], 4),
            ]  # fmt: skip
        single, memory = "", "-"
        if one is not None:
            single, memory = f" ({one['processor_seconds']:.0f})", f"{gib_a_class(SETS[name], row, one):.2f}"
        cells += [f"{row['processor_seconds']:.0f}{single}", memory, f"missed: {failed}" if failed else "met"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _text(value: Any, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def sorted_set(name: str, seed: int, arguments: argparse.Namespace) -> tuple[Row, list[Row], Row | None]:
    """The run of a set; those of each of its structures alone, and of the same images with one class, if asked for."""
    wanted = SETS[name]
    shared = next(key for key, other in SETS.items() if other.data == wanted.data)  # sets of the same particles
    folder = arguments.out / shared / f"draw{arguments.draw}"
    data = simulated(wanted.data, folder, arguments.structures, arguments.draw)
    store = converted(data / "particles.star", folder / "store.zarr", dark=False)
    tag = f"-{arguments.tag}" if arguments.tag else ""
    settings = {"train.classes": wanted.classes, "train.seed": str(seed)} | wanted.settings | arguments.set
    run = arguments.out / f"{name}-{arguments.draw}-{seed}{tag}"
    own = {"train.seed": str(seed)} | {key: value for key, value in wanted.settings.items() if key == "train.symmetry"}
    row, one = by_itself(wanted.data, store, data, run, settings), None
    if arguments.cost and wanted.classes != "auto":
        one = by_itself(wanted.data, store, data, run.with_name(f"{run.name}-one"), own)
    if row.get("junk_auc") is not None and len(wanted.data.specimens) == 1:
        row["junk_auc"] = junk_told(run, data)
    numbers = range(len(wanted.data.specimens)) if arguments.alone else ()
    return row, [single(wanted.data, number, folder, data, own) for number in numbers], one


def by_itself(data: StressSet, store: str, folder: Path, run: Path, settings: dict[str, str]) -> Row:
    """A run in a process of its own, for the peak of its memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(run_one, data, store, folder, run, settings, False).result()


def junk_told(run: Path, data: Path) -> float:
    """Area under the curve that tells junk from particles of one structure: by confidence, and by a class that is not
    that of these."""
    table, truth = run / "particles.star", data / "truth.star"
    own = OwnColumns(table.read_bytes(), str(table)).numbers(CLASS)
    particle = OwnColumns(truth.read_bytes(), str(truth)).numbers(JUNK) == 0
    confidence = read_poses(str(table)).confidence
    assert confidence is not None, "a run writes it"
    classes, counts = np.unique(own[particle], return_counts=True)
    return float(junk_auc(np.where(own == classes[counts.argmax()], confidence, 0.0), particle))


def single(several: StressSet, number: int, folder: Path, data: Path, settings: dict[str, str]) -> Row:
    """The set's own particles of one structure alone, with one class: the same images, as strong in the same noise."""
    place = folder / f"only{number + 1}"
    store = place / "store.zarr"
    if not store.exists():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        keep = OwnColumns((data / "truth.star").read_bytes(), "truth.star").numbers(CLASS) == number + 1
        np.save(place / "rows.npy", np.flatnonzero(keep))
        for name in ("particles.star", "truth.star"):
            select.run(str(data / name), str(place / name), index=str(place / "rows.npy"))
        truth = f"truth_{number + 1}.mrc" if number else "truth.mrc"
        for name, other in (("particles.mrcs", "particles.mrcs"), ("truth.mrc", truth)):
            (place / name).symlink_to((data / other).resolve())
    converted(place / "particles.star", store, dark=False)
    own = replace(several, n=int(np.load(place / "rows.npy").size))
    return by_itself(own, str(store), place, place / "run", settings)


def main() -> None:
    parser = parser_of(__doc__, SETS)
    parser.add_argument("--alone", action="store_true", help="each structure alone, too")
    parser.add_argument("--cost", action="store_true", help="the same images with one class, too")
    parser.add_argument("--tag", default="", help="of the runs' folders")
    arguments = parser.parse_args()
    arguments.set = dict(arguments.set)
    names = chosen(SETS, arguments.only)
    if not names:
        parser.error(f"no set is called {', '.join(arguments.only)}")
    each = ((name, seed, *sorted_set(name, seed, arguments)) for name in names for seed in range(arguments.seeds))
    written(each, table, arguments.out / "classes.md")


if __name__ == "__main__":
    main()
