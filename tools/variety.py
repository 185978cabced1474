"""Continuous and compositional variety from true poses, measured as the public benchmark does.

    python tools/variety.py OUT [hinge random assemblies homogeneous] [--n 8000] [--components 6] [--section.key=value]
    python tools/variety.py OUT hinge-noise hinge-contrast hinge-views hinge-junk

Makes sets in the manner of CryoBench (Jeon et al. 2024) at 64 px, a tenth of its images: a chain of a two-chain protein
turned by a full circle in steps; the same turned at random; 16 sub-assemblies of a ribosome with that benchmark's
head-heavy counts; and one structure alone. SNR is −8 dB at 64 px: the signal of an image over the noise of a Fourier
coefficient is the benchmark's (SNR 0.01 at 256 px, cropped to 128 px). Trains with the true poses, and gives the mean
over conformations of the area under the FSC between the map at a conformation's mean place in the latent space and its
true map (x = shell / box from 0 to ½, so at most 0.5): of the map within its own mask, without a mask, and with both
within a mask around the true density. `--pose.source=guided` begins from nothing instead of the true poses: then also
with each map laid onto its truth by itself, as that benchmark does, for a frame that turns with the state is no error.
`unlike` is a hinge without like halves: a quarter of twenty proteins of a ribosome turns by a full circle;
`random-unlike`: it turns at random. `spike`: one of three like chains turns by 90°; `random-spike`: at random.
The sets `hinge-…` are the first one with one thing worse: −14 dB, contrast of micrographs that varies (σ of its
logarithm 0.3), 70 % of the views within 25° of an axis, 30 % junk.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import gemmi
import numpy as np
import torch
from stress_sets import COMPLEX, SCOPE, structure_file

from scalecryo.commands import convert, simulate
from scalecryo.config import load_config
from scalecryo.data.formats import relion
from scalecryo.data.formats.mrc import read_map
from scalecryo.data.io import urls
from scalecryo.data.storage.store import ParticleStore
from scalecryo.distributed.world import World
from scalecryo.evaluate.align import Alignment, align_poses
from scalecryo.evaluate.align_maps import align_maps, apply_alignment
from scalecryo.map.reference import ReferenceSet, c_ref
from scalecryo.physics.fsc import fsc, weight_shells
from scalecryo.physics.mask import mask_from_map
from scalecryo.runs.folder import RunFolder
from scalecryo.runs.monitor import PassReport
from scalecryo.train.loop import run_stages
from scalecryo.train.particle_source import RunContext
from scalecryo.train.recipes import stages_of
from scalecryo.train.stage import Learned
from scalecryo.train.stages.state_maps import LEAST_PARTICLES, StateMaps

STRUCTURES = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "structures"
BOX, SNR_DB, STEPS, MEASURED = 64, -8.0, 50, 25
# Images of each state of the benchmark's Ribosembly set.
COUNTS = (9076, 14378, 23547, 44366, 30647, 38500, 3915, 3980, 12740, 11975, 17988, 5001, 35367, 37448, 40540, 5772)
KERNEL_SHARE = 0.03  # of all particles, in a conformation's map, and no fewer than in a state's
# The hinge with one thing worse. (simulate's other settings.)
SPOILT: dict[str, dict[str, object]] = {
    "hinge-noise": {"snr_db": -14.0},
    "hinge-contrast": {"scale_sd": 0.3},
    "hinge-views": {"prefer": (0.7, 25.0)},
    "hinge-junk": {"junk": 0.3},
}


def make(name: str, folder: Path, count: int) -> str:
    """The set's store, made where it is not there."""
    store = folder / f"{name}.zarr"
    if not store.exists():
        protein = str(STRUCTURES / "4ake.pdb")
        how: dict[str, object] = {"pixel_size": 2.6, "snr_db": SNR_DB}
        if name.startswith("hinge"):
            how |= {"hinge": f"B:0,1,1:360:{STEPS}"} | SPOILT.get(name, {})
        elif name in ("unlike", "unlike-scope", "random-unlike"):
            protein = structure_file((COMPLEX,), STRUCTURES, folder / name)
            turn = f"random:180:{STEPS}" if name.startswith("random") else f"0,1,1:360:{STEPS}"
            how |= {"pixel_size": 4.8, "hinge": f"LDD,LP0,LU0,LV0,LW0:{turn}"}
            how |= SCOPE if name.endswith("scope") else {}
        elif name in ("spike", "random-spike"):
            protein = str(STRUCTURES / "6vxx.pdb")
            turn = f"random:180:{STEPS}" if name.startswith("random") else f"1,0,0:90:{STEPS}"
            how |= {"pixel_size": 4.0, "hinge": f"C:{turn}"}
        elif name == "random":
            how["hinge"] = f"B:random:180:{STEPS}"
        elif name == "assemblies":
            protein, *how["mix"] = assemblies(folder)  # type: ignore[list-item]
            how |= {"pixel_size": 5.4, "shares": COUNTS}
        simulate.run(protein, str(folder / name), n=count, box=BOX, defocus_um=(0.5, 2.5),
                     astigmatism_um=0.05, shift_a=3.0, seed=1, **how)  # type: ignore[arg-type]  # fmt: skip
        convert.run(str(folder / name / "truth.star"), str(store), data_dir=None, box=None, dtype="float16", workers=1,
                    overwrite=False, invert=False, uninvert=True)  # fmt: skip
    return str(store)


def assemblies(folder: Path) -> list[str]:
    """Sixteen sub-assemblies of a ribosome: the largest chain with ever more of the others, and two branches."""
    whole = gemmi.read_structure(str(STRUCTURES / "6zu5.cif.gz"))
    whole.remove_waters()
    chains = sorted(whole[0], key=lambda chain: -chain.count_atom_sites())
    core, rest = chains[0].name, np.array([chain.name for chain in chains[1:]])
    blocks = np.array_split(np.random.default_rng(3).permutation(rest), 8)
    paths = []
    for number in range(16):
        grown = blocks[: 1 + number // 2]
        kept = {core, *np.concatenate(grown).tolist()}
        if number % 2:  # the other branch lacks the block before the last, or the large second chain
            kept -= set((grown[-2] if len(grown) > 1 else grown[-1][: len(grown[-1]) // 2]).tolist())
        part = whole.clone()
        for chain in [chain.name for chain in part[0]]:
            if chain not in kept:
                part[0].remove_chain(chain)
        path = folder / f"assembly{number + 1}.cif"
        part.make_mmcif_document().write_file(str(path))
        paths.append(str(path))
    return [paths[-2], *paths[:-2], paths[-1]]  # the most complete one first: it gives the centre


class Told:
    """Logs what passes report."""

    def after_pass(self, report: PassReport, *_: object) -> None:
        logging.getLogger(__name__).info("%s", report.message)


def learn(store: str, out: Path, components: int, extra: dict[str, str]) -> tuple[RunContext, Learned]:
    """A run with the true poses."""
    settings = {"run.data": store, "run.out": str(out), "train.components": str(components)}
    if "pose.source" not in extra:
        settings |= {"pose.source": "known", "train.steps": "2"}
    config = load_config(None, {**settings, **extra})
    run = RunFolder(str(out))
    run.create(config, resume=False)
    context = RunContext.of(config, ParticleStore.open(store), run, World(), torch.device("cpu"))
    stages, learned = stages_of(context)
    for stage in stages:
        begun = time.perf_counter()
        run_stages([stage], context, Told())  # type: ignore[arg-type]
        logging.getLogger(__name__).info("%s: %.0f s", stage.name, time.perf_counter() - begun)
    return context, learned


def measure(
    context: RunContext, learned: Learned, truth: Path, share: float = KERNEL_SHARE
) -> dict[str, float | list[float]]:
    """AUC-FSC of maps at the conformations' mean places in the latent space."""
    own = relion.OwnColumns((truth / "truth.star").read_bytes(), str(truth))
    label = own.numbers(relion.CLASS).astype(int) if relion.CLASS in own.names else np.ones(context.store.count, int)
    coordinates = learned.coordinates
    assert coordinates is not None
    kinds = np.unique(label[label > 0])  # 0: junk
    kinds = kinds[:: max(1, len(kinds) // MEASURED)]
    centres = []
    for kind in kinds:
        mean = coordinates.z[label == kind].mean(0)
        centres.append(coordinates.z[np.square(coordinates.z - mean).sum(1).argmin()])
    particles = np.full(len(kinds), max(share * context.store.count, LEAST_PARTICLES))
    stage = StateMaps(context, learned, np.array(centres), particles)
    run_stages([stage], context)
    maps = stage.references
    laid = None if context.config.recipe == "known" else onto_truth(learned, truth, maps, kinds)
    areas, alone = [], []
    for number, kind in enumerate(kinds):
        true, found = true_map(truth, kind), weight_shells(maps.mean(number), c_ref(maps.curve(number)))
        mask, own = mask_from_map(true, maps.pixel_size), found * maps.mask[number]
        if laid is not None:
            by_itself = align_maps(own, true, [laid], search=False)
            alone.append(area(fsc(apply_alignment(own, by_itself), true)))
            found, own = apply_alignment(found, laid), apply_alignment(own, laid)
        pairs = ((found, true), (own, true), (found * mask, true * mask))
        areas.append([area(fsc(*pair)) for pair in pairs])
    raw, masked, within = np.array(areas).T
    more = {"auc_each_laid_by_itself": float(np.mean(alone))} if alone else {}
    return more | {
        "conformations": len(kinds), "auc": float(masked.mean()), "auc_sd": float(masked.std()),
        "auc_unmasked_map": float(raw.mean()), "auc_in_true_mask": float(within.mean()),
    }  # fmt: skip


def true_map(truth: Path, kind: int) -> torch.Tensor:
    """Of a conformation, from 1."""
    return torch.from_numpy(read_map(str(truth / ("truth.mrc" if kind == 1 else f"truth_{kind}.mrc")))[0])


def onto_truth(learned: Learned, truth: Path, maps: ReferenceSet, kinds: np.ndarray) -> Alignment:
    """How maps of poses found from nothing lie on the truth, hand included: one for all, by the mean of all maps."""
    posed = learned.posed
    assert posed is not None
    true = torch.from_numpy(relion.read_poses(str(truth / "truth.star")).rotation).float()
    start = align_poses(posed.all()[0].rotation, true)
    mean = torch.stack([true_map(truth, kind) for kind in kinds]).mean(0)
    return align_maps(maps.maps.mean((0, 1)), mean, [start], search=False)


def area(curve: torch.Tensor) -> float:
    """Under the FSC of shells 0 … n/2 − 1, the first taken to be 1, over shell / n."""
    box = 2 * (len(curve) - 1)
    values = np.concatenate([[1.0], curve[1 : box // 2].numpy()])
    return float(np.trapezoid(values, np.arange(box // 2) / box))


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("sets", nargs="*", default=["hinge", "random", "assemblies", "homogeneous"])
    parser.add_argument("--n", type=int, default=8000)
    parser.add_argument("--components", type=int, default=6)
    parser.add_argument("--share", type=float, default=KERNEL_SHARE)
    parser.add_argument("--tag", default="")
    given, rest = parser.parse_known_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    urls.make_folder(str(given.out))
    for name in given.sets:
        store = make(name, given.out, given.n)
        extra = dict(pair.removeprefix("--").split("=", 1) for pair in rest)
        begun = time.perf_counter()
        context, learned = learn(store, given.out / f"run-{name}{given.tag}", given.components, extra)
        seconds = time.perf_counter() - begun
        coordinates = learned.coordinates
        assert coordinates is not None
        found: dict[str, object] = {
            "set": name, "particles": context.store.count, "passing": coordinates.passing, "seconds": round(seconds),
            "states": 0 if coordinates.mixture is None else len(coordinates.mixture),
            "gain": [round(float(value), 3) for value in coordinates.gain],
        }  # fmt: skip
        if coordinates.passing and name != "homogeneous":
            found |= measure(context, learned, given.out / name, given.share)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
