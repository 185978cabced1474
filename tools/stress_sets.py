"""Simulated sets as a microscope makes them: what `tools/stress.py` runs.

Structures are files of `shared/data/structures`, parts of them by gemmi's selections, or maps of the folder beside it.
The first sets are each hard in a way of their own; those whose names begin with `m-` vary one condition at a time
(noise, signal, views, junk, scale, count) about a base, for five specimens.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gemmi
import mrcfile
import numpy as np

from scalecryo.commands import simulate

Structure = tuple[str, str]  # file, gemmi selection ("" for all)
Position = tuple[float, float, float]
SPIKE: Structure = ("6vxx.pdb", "")
DIMER: Structure = ("6vxx.pdb", "A,B")
CUT_DIMER: tuple[Structure, ...] = (("6vxx.pdb", "A"), ("6vxx.pdb", "B/300-2000"))
ADK: Structure = ("4ake.pdb", "")
GROEL: Structure = ("1mnf.pdb.gz", "")
# Twenty proteins of the ribosome that lie together.
COMPLEX: Structure = (
    "6zu5.cif.gz", "LB0,LDD,LH0,LMM,LP0,LPP,LR0,LU0,LV0,LW0,SE0,SEE,SG0,SI0,SJ0,SL0,SN0,SW0,SX0,SY0"
)  # fmt: skip
# Maps of real particles, with their noise: β-galactosidase (D2) and EMD-1832, a helicase.
GALACTOSIDASE: Structure = ("../maps/betagal_100.mrc", "")
HELICASE: Structure = ("../maps/emd_1832.map", "")


@dataclass(frozen=True)
class StressSet:
    """One simulated set.

    Attributes:
        says: what is hard about it.
        specimens: the densities, each of one or several parts.
        n, box, pixel_size, snr_db: particles, px, Å, dB.
        defocus_um, shift_a: µm; Å, standard deviation.
        added: further settings of `simulate`.
        centre: Å, where the centre of mass of each specimen is put; None: where its file has it.
        dark: the particles are dark.
        second: what a second optics group of as many particles has otherwise; None: there is one.
        quick: what a short form changes.
    """

    says: str
    specimens: tuple[tuple[Structure, ...], ...]
    n: int
    box: int
    pixel_size: float
    snr_db: float
    defocus_um: tuple[float, float] = (0.8, 2.0)
    shift_a: float = 4.0
    added: dict[str, Any] = field(default_factory=dict)
    centre: Position | None = None
    dark: bool = False
    second: dict[str, Any] | None = None
    quick: dict[str, Any] = field(default_factory=dict)

    def short(self) -> "StressSet":
        """Its short form."""
        return replace(self, **self.quick)

    def write(self, folder: Path, structures: Path, seed: int) -> None:
        """Simulate it."""
        if self.second is not None:
            halves = replace(self, n=self.n // 2, second=None), replace(self, n=self.n // 2, **self.second, second=None)
            halves[0].write(folder, structures, seed)
            halves[1].write(folder / "second", structures, seed + 1000)
            _append(folder, folder / "second", self.n // 2)
            return
        folder.mkdir(parents=True, exist_ok=True)
        paths = [
            structure_file(parts, structures, folder / f"specimen{i + 1}", centre=self.centre)
            for i, parts in enumerate(self.specimens)
        ]
        simulate.run(paths[0], str(folder), mix=paths[1:], n=self.n, box=self.box, pixel_size=self.pixel_size,
                     snr_db=self.snr_db, defocus_um=self.defocus_um, shift_a=self.shift_a, seed=seed,
                     **({"astigmatism_um": 0.05} | self.added))  # fmt: skip
        if self.dark:
            with mrcfile.mmap(folder / "particles.mrcs", "r+") as stack:
                stack.data[:] *= -1


def _append(folder: Path, second: Path, count: int) -> None:
    """Add a set of as many particles to another, as its second optics group."""
    stacks = [mrcfile.read(part / "particles.mrcs") for part in (folder, second)]
    with mrcfile.open(folder / "particles.mrcs", "r+") as stack:
        voxel_size = stack.voxel_size
        stack.set_data(np.concatenate(stacks))
        stack.voxel_size = voxel_size
    for name in ("particles.star", "truth.star"):
        lines = (folder / name).read_text().splitlines()
        optics = next(number for number, line in enumerate(lines) if line.startswith("1 opticsGroup1"))
        lines.insert(optics + 1, lines[optics].replace("1 opticsGroup1", "2 opticsGroup2", 1))
        more = (second / name).read_text().splitlines()
        column = next(int(line.split("#")[1]) - 1 for line in more[optics + 1 :] if line.startswith("_rlnOpticsGroup "))
        for line in more:
            if "@particles.mrcs" in line:
                words = line.replace("micrograph", "second").split()
                words[0], words[column] = f"{int(words[0].split('@')[0]) + count:06d}@particles.mrcs", "2"
                lines.append(" ".join(words))
        (folder / name).write_text("\n".join(lines) + "\n")


def structure_file(
    parts: tuple[Structure, ...], structures: Path, stem: Path, *, centre: Position | None = None
) -> str:
    """The file of a specimen; parts of structures are written as one, its centre of mass where it is asked for."""
    (name, selection), *others = parts
    if not selection and not others and centre is None:
        return str(structures / name)
    whole = gemmi.Model(1)
    for name, selection in parts:
        model = gemmi.read_structure(str(structures / name))[0]
        for chain in gemmi.Selection(selection).copy_model_selection(model) if selection else model:
            whole.add_chain(chain)
    if centre is not None:
        move = gemmi.Vec3(*centre) - gemmi.Vec3(*whole.calculate_center_of_mass().tolist())
        whole.transform_pos_and_adp(gemmi.Transform(gemmi.Mat33(), move))
    made = gemmi.Structure()
    made.add_model(whole)
    made.setup_entities()
    made.make_mmcif_document().write_file(f"{stem}.cif")
    return f"{stem}.cif"


HALF = {"colour": 0.5}
SCALED = {"scale_sd": 0.15, "gain_sd": 0.3}
# All that a microscope does at once.
SCOPE = HALF | SCALED | {"junk": 0.2, "prefer": (0.6, 30.0), "defocus_error_a": 100.0}
SMALL = {"n": 1500, "box": 64}

SETS: dict[str, StressSet] = {
    "toy": StressSet(
        "4AKE, a few particles: whether the tool works", ((ADK,),), 600, 32, 3.2, 3.0, (0.8, 1.6), 2.0, {"junk": 0.1}
    ),
    "sp128": StressSet(
        "6VXX, half of the noise low-pass, scale, gain, defocus error, dark", ((SPIKE,),), 8000, 128, 2.0, -10.0,
        (0.8, 2.5), 4.0, HALF | SCALED | {"defocus_error_a": 100.0}, dark=True,
        quick={"n": 2000, "box": 64, "pixel_size": 4.0},
    ),
    "small_white": StressSet(
        "6VXX, white noise", ((SPIKE,),), 5000, 64, 4.0, -10.0, (0.8, 2.5), 0.0, quick={"n": 1500}
    ),
    "small_spike": StressSet(
        "6VXX, half of the noise low-pass", ((SPIKE,),), 5000, 64, 4.0, -10.0, (0.8, 2.5), 0.0, HALF, quick={"n": 1500}
    ),
    "42kda": StressSet(
        "4AKE, coloured, 30 % junk, scale, gain, defocus error", ((ADK,),), 10_000, 128, 1.0, -8.0, (0.8, 2.0), 3.0,
        HALF | SCALED | {"junk": 0.3, "defocus_error_a": 100.0}, quick=SMALL | {"pixel_size": 2.0},
    ),
    "preferred": StressSet(
        "two chains of 6VXX, 85 % of the views within 25° of z", ((DIMER,),), 10_000, 96, 2.0, -10.0, (0.8, 2.0), 4.0,
        {"prefer": (0.85, 25.0), "colour": 1 / 3}, quick={"n": 2000, "box": 48, "pixel_size": 4.0},
    ),
    "low_snr": StressSet(
        "6VXX, -18 dB, half of the noise low-pass", ((SPIKE,),), 30_000, 64, 4.0, -18.0, (0.8, 2.5), 4.0, HALF,
        quick={"n": 6000},
    ),
    "thousand": StressSet(
        "part of 6ZU5, 1,000 images, -14 dB, large shifts", ((COMPLEX,),), 1000, 128, 3.0, -14.0, (0.5, 3.0), 12.0,
        quick={"box": 96, "pixel_size": 4.0},
    ),
    "groel": StressSet(
        "1MNF (about D7), half of the noise low-pass", ((GROEL,),), 4000, 64, 4.0, -10.0, (0.8, 2.5), 4.0, HALF,
        quick={"n": 1000},
    ),
    "micelle": StressSet(
        "two chains of 6VXX in a belt of detergent", ((DIMER,),), 6000, 64, 4.0, -10.0, (0.8, 2.5), 4.0,
        HALF | {"micelle": 0.6}, quick={"n": 1500},
    ),
    "neighbours": StressSet(
        "two chains of 6VXX, neighbours in 30 % of the images", ((DIMER,),), 6000, 64, 4.0, -10.0, (0.8, 2.5), 4.0,
        HALF | {"neighbours": 0.3}, quick={"n": 1500},
    ),
    "mixture": StressSet(
        "two chains of 6VXX, half of them without a domain", ((DIMER,), CUT_DIMER), 6000, 64, 4.0, -10.0, (0.8, 2.5),
        4.0, HALF, quick={"n": 1500},
    ),
    "two_groups": StressSet(
        "two chains of 6VXX, white; half of the images 6 dB worse and coloured; scale of each micrograph", ((DIMER,),),
        6000, 64, 4.0, -8.0, (0.8, 2.5), 4.0, {"scale_sd": 0.3},
        second={"snr_db": -14.0, "added": {"scale_sd": 0.3, "colour": 0.8}}, quick={"n": 1500},
    ),
    "c4": StressSet(
        "four copies of 4AKE about z", ((ADK,),), 4000, 64, 3.0, -8.0, (0.8, 2.0), 4.0, HALF | {"symmetry": "C4"},
        quick={"n": 1500},
    ),
    "galactosidase": StressSet(
        "a map of β-galactosidase (D2), all that a microscope does", ((GALACTOSIDASE,),), 6000, 100, 3.54, -10.0,
        added=SCOPE, quick={"n": 2000},
    ),
    "helicase": StressSet(
        "EMD-1832, all that a microscope does", ((HELICASE,),), 5000, 64, 5.7, -8.0, added=SCOPE, quick={"n": 1500}
    ),
}  # fmt: skip

_SPECIMENS: dict[str, tuple[tuple[tuple[Structure, ...], ...], float]] = {  # and the pixel size of 64 px, Å
    "6vxx": (((SPIKE,),), 4.0),
    "6zu5": (((COMPLEX,),), 4.0),
    "1mnf": (((GROEL,),), 4.0),
    "4ake": (((ADK,),), 2.0),
    "mixture": (((DIMER,), CUT_DIMER), 4.0),
}
_VARIED: dict[str, dict[str, Any]] = {
    "base": {},
    "colour": {"added": HALF},
    "colour-low": {"added": HALF, "snr_db": -15.0},
    "low": {"snr_db": -15.0},
    "views": {"added": {"prefer": (0.85, 25.0)}},
    "junk": {"added": {"junk": 0.3}},
    "scale": {"added": SCALED},
    "few": {"n": 1000},
    "all": {"added": SCOPE | {"junk": 0.3}},
}
for _name, (_parts, _pixel_size) in _SPECIMENS.items():
    for _what, _changes in _VARIED.items():
        _base = StressSet(f"{_name}: {_what}", _parts, 5000, 64, _pixel_size, -10.0, quick={"n": 1000})
        SETS[f"m-{_name}-{_what}"] = replace(_base, **_changes)
