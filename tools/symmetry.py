"""Runs with a point group: what `train --symmetry` gains over C1, where it finds the axes, and what a wrong group gets.

    python tools/symmetry.py OUT [--only groel 'o*'] [--seeds 1] [--draw 0] [--set guided.starts=4 …]

For each set: simulate and convert (once), train from nothing without and with its group, and once with a wrong one.
Both are judged modulo the group. Goals: mean FSC no worse than without it, the axes of the truth within 0.2° of
RELION's (by the poses; the structure's chains, superposed by gemmi, say where the true axes are), processor time at
most 1.1 times as much, the wrong group refused.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gemmi
import numpy as np
import torch
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation
from stress import Row, chosen, converted, parser_of, run_one, simulated, written
from stress_sets import GROEL, HALF, SPIKE, Position, StressSet, Structure
from stress_sets import SETS as STRESS_SETS

from scalecryo.data.formats.relion import read_poses
from scalecryo.evaluate.align import align_poses
from scalecryo.physics.rotation import flip_hand
from scalecryo.physics.so3_grid import so3_grid
from scalecryo.physics.symmetry import PointGroup

AXIS_DEG, TIME_SHARE = 0.2, 1.1
UBIQUITIN: Structure = ("1ubi.pdb", "")
KINASE: Structure = ("4ake.pdb", "A")


@dataclass(frozen=True)
class SymmetricSet:
    """One set, its point group, and a wrong one; the chain whose copies show the axes (None: the group's, about
    RELION's axes)."""

    data: StressSet
    group: str
    wrong: str
    structure: Structure | None = None


def _assembled(part: Structure, group: str, distance: float, n: int, pixel_size: float) -> StressSet:
    """Copies of a structure about a group's axes, the first in the direction whose copies are furthest apart."""
    x, y, z = (distance * PointGroup.of(group).generic).tolist()
    centre: Position = x, y, z
    return StressSet(f"{len(PointGroup.of(group))} × {part[0]}, {group}", ((part,),), n, 64, pixel_size, -8.0,
                     added=HALF | {"symmetry": group}, centre=centre)  # fmt: skip


SETS = {
    "groel": SymmetricSet(STRESS_SETS["groel"], "D7", "D6", GROEL),
    "spike": SymmetricSet(STRESS_SETS["small_spike"], "C3", "C4", SPIKE),
    "spike-128": SymmetricSet(STRESS_SETS["sp128"], "C3", "C6", SPIKE),
    "tetrahedral": SymmetricSet(_assembled(UBIQUITIN, "T", 40.0, 2500, 2.0), "T", "O"),
    "d2": SymmetricSet(_assembled(KINASE, "D2", 40.0, 2500, 3.0), "D2", "D4"),
    "octahedral": SymmetricSet(_assembled(UBIQUITIN, "O", 50.0, 2500, 2.5), "O", "I"),
    "icosahedral": SymmetricSet(_assembled(KINASE, "I", 140.0, 2500, 6.0), "I", "O"),
}


def true_rotations(wanted: SymmetricSet, structures: Path) -> torch.Tensor:
    """The group's rotations about the axes of the true particle, the identity first.

    Chains of a structure that are not quite alike superpose about axes a degree apart: the group that is nearest to all
    of these rotations (least squares) is meant.
    """
    group = PointGroup.of(wanted.group)
    if wanted.structure is None:
        return group.rotations.double()
    chains = [chain.get_polymer() for chain in gemmi.read_structure(str(structures / wanted.structure[0]))[0]]
    longest = max(map(len, chains))
    first, *others = [chain for chain in chains if 2 * len(chain) > longest]  # no peptides
    laid = [gemmi.calculate_superposition(first, other, first.check_polymer_type(), gemmi.SupSelect.CaP)
            for other in others]  # fmt: skip
    found = torch.from_numpy(np.stack([np.array(one.transform.mat.tolist()) for one in laid]))

    def about(vector: np.ndarray) -> torch.Tensor:
        turn = torch.from_numpy(Rotation.from_rotvec(vector).as_matrix())
        return turn.mT @ group.rotations.double() @ turn

    def difference(vector: np.ndarray) -> np.ndarray:
        rotations = about(vector)
        nearest = torch.einsum("hij,gij->hg", found, rotations).argmax(1)
        return (rotations[nearest] - found).flatten().numpy()

    starts = Rotation.from_matrix(so3_grid(4608).double().numpy()).as_rotvec()
    begun = min(starts, key=lambda vector: float(np.square(difference(vector)).sum()))
    return about(least_squares(difference, begun).x)


def axis_error_deg(run: Path, data: Path, rotations: torch.Tensor, group: PointGroup) -> float:
    """Largest angle from an axis of the true particle, where the run's poses see it, to RELION's axis beside it."""
    found, true = read_poses(str(run / "particles.star")), read_poses(str(data / "truth.star"))
    row_of = {name: row for row, name in enumerate(true.names)}
    rows = [row_of[name] for name in found.names]
    laid = align_poses(torch.from_numpy(found.rotation), torch.from_numpy(true.rotation[rows]), rotations)
    seen = laid.rotation.mT @ rotations[1:] @ laid.rotation
    if laid.mirrored:
        seen = flip_hand(seen)
    others = group.others.double()
    nearest = others[torch.einsum("hij,gij->hg", seen, others).argmax(1)]
    axes = [Rotation.from_matrix(turns.numpy()).as_rotvec() for turns in (seen, nearest)]
    first, second = (axis / np.linalg.norm(axis, axis=1, keepdims=True) for axis in axes)
    # Half turns have no sense of rotation, and rounding decides the sign of their axes.
    return float(np.rad2deg(np.arcsin(np.linalg.norm(np.cross(first, second), axis=1).clip(0, 1))).max())


def missed(plain: Row, imposed: Row, wrong: Row) -> list[str]:
    """Which goals a set misses."""
    if "error" in plain or "error" in imposed:
        return ["refused"]
    found = []
    if imposed["fsc_mean"] < plain["fsc_mean"]:
        found.append("FSC")
    if imposed["axis_error_deg"] > AXIS_DEG:
        found.append("axis")
    if imposed["processor_seconds"] > TIME_SHARE * plain["processor_seconds"]:
        found.append("time")
    if "error" not in wrong:
        found.append("wrong group")
    return found


def table(rows: Sequence[tuple[str, int, Row, Row, Row]]) -> str:
    """Markdown: (set, seed, run without the group, with it, with a wrong one)."""
    head = ("set", "seed", "pose error median modulo the group, °", "FSC 0.5, Å", "mean FSC", "axes, °",
            "processor seconds", "goals")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    told = []
    for name, seed, plain, imposed, wrong in rows:
        both = plain, imposed
        failed = missed(plain, imposed, wrong)
        cells = [f"{name} ({SETS[name].group})", str(seed)]
        for key, digits in (("rotation_error_median_deg", 2), ("fsc_0.5_angstrom", 2), ("fsc_mean", 4)):
            cells.append(" / ".join("-" if "error" in row else f"{row[key]:.{digits}f}" for row in both))
        cells += [
            f"{imposed['axis_error_deg']:.3f}" if "axis_error_deg" in imposed else "-",
            " / ".join(f"{row['processor_seconds']:.0f}" for row in both),
            f"missed: {', '.join(failed)}" if failed else "met",
        ]
        lines.append("| " + " | ".join(cells) + " |")
        for group, row in (("C1", plain), (SETS[name].group, imposed), (SETS[name].wrong, wrong)):
            if "error" in row:
                told.append(f"{name}, seed {seed}, {group}: {row['error']}")
    return "\n".join([*lines, "", *dict.fromkeys(told)])


def symmetric_set(name: str, seed: int, arguments: argparse.Namespace) -> tuple[Row, Row, Row]:
    """Runs of a set without its group, with it, and with a wrong one (of the first seed)."""
    wanted = SETS[name]
    folder = arguments.out / name / f"draw{arguments.draw}"
    data = simulated(wanted.data, folder, arguments.structures, arguments.draw)
    store = converted(data / "particles.star", folder / "store.zarr", wanted.data.dark)

    def run(group: str, seed: int) -> tuple[Row, Path]:
        place = folder / f"{group}-{seed}"
        settings = {"train.symmetry": group, "train.seed": str(seed)} | arguments.set
        return run_one(wanted.data, store, data, place, settings, False, symmetry=wanted.group), place

    (plain, _), (imposed, place), (wrong, _) = run("C1", seed), run(wanted.group, seed), run(wanted.wrong, 0)
    if "error" not in imposed:
        rotations = true_rotations(wanted, arguments.structures)
        imposed["axis_error_deg"] = axis_error_deg(place, data, rotations, PointGroup.of(wanted.group))
    return plain, imposed, wrong


def main() -> None:
    parser = parser_of(__doc__, SETS)
    arguments = parser.parse_args()
    arguments.set = dict(arguments.set)
    names = chosen(SETS, arguments.only)
    if not names:
        parser.error(f"no set is called {', '.join(arguments.only)}")
    each = ((name, seed, *symmetric_set(name, seed, arguments)) for name in names for seed in range(arguments.seeds))
    written(each, table, arguments.out / "symmetry.md")


if __name__ == "__main__":
    main()
