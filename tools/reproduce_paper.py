"""Datasets A to G of Nashed et al. 2021, by the guided method and by the paper's own recipes.

    python tools/reproduce_paper.py OUT_DIR [--only D G] [--recipe guided s2s2 …] [--seeds 1] [--steps 3000] [--box 0]

For each dataset and recipe: simulate (once), convert, train, evaluate. Prints one table and writes it beside the
paper's Figures 2 (loss and pose error over time), 3 (FSC to the truth) and 4 (slices) as PNG. `known` reconstructs
with the true poses: the bound that the others are measured against. Times are wall-clock of convert + train.
"""

import argparse
import contextlib
import io
import json
import shutil
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from paper_datasets import DATASETS, TRAIN, write_dataset

from scalecryo.commands import convert, evaluate, train
from scalecryo.data.formats.mrc import read_map
from scalecryo.data.formats.relion import read_poses
from scalecryo.data.storage.store import ParticleStore
from scalecryo.data.streaming.stream import sequential
from scalecryo.evaluate.align import align_poses
from scalecryo.evaluate.align_maps import rotational_symmetry
from scalecryo.evaluate.metrics import rotation_errors
from scalecryo.evaluate.report import fsc_figure, slices_figure
from scalecryo.runs.folder import RunFolder
from scalecryo.train.loop import load_trained
from scalecryo.train.particle_source import stream_columns
from scalecryo.train.stages.final_poses import ReferencePoses

matplotlib.use("Agg")
CLAIMS = {"A": "1.6 Å", "B": "1.6 Å", "C": "1.6 Å", "D": "1.6 Å", "E": "-", "F": "better than 2.5 Å", "G": "1.6 Å"}
PLAIN = {"pose.source": "encoder", "pose.centred": "true"}
RECIPES: dict[str, dict[str, str]] = {
    "guided": {"pose.source": "guided", "pose.centred": "true"},
    "known": {"pose.source": "known"},
    "s2s2": PLAIN,
    "quaternion": PLAIN | {"pose.parameterisation": "quaternion"},
    "euler": PLAIN | {"pose.parameterisation": "euler"},
    "heads": PLAIN | {"pose.heads": "4", "pose.symmetric_loss": "true"},
    "table": {"pose.source": "table", "pose.centred": "true"},
}


def run_one(dataset: str, recipe: str, seed: int, steps: int, box: int, out: Path) -> dict[str, object]:
    """Convert, train and evaluate, unless that was done before; one row of the table."""
    data = out / dataset / "particles"
    if not (data / "particles.star").exists():  # the last file of a simulation
        shutil.rmtree(data, ignore_errors=True)
        write_dataset(dataset, data)
    folder = out / dataset / f"{recipe}-{seed}"
    if (folder / "row.json").exists():  # finished before
        return json.loads((folder / "row.json").read_text())
    shutil.rmtree(folder, ignore_errors=True)
    store = str(out / dataset / f"{recipe}-{seed}.zarr")
    table = "truth.star" if recipe == "known" else "particles.star"
    start = time.monotonic()
    convert.run(str(data / table), store, data_dir=None, box=None, dtype="float16", workers=2, overwrite=True,
                invert=False, uninvert=True)  # fmt: skip
    settings = RECIPES[recipe] | {"train.rows": str(TRAIN), "train.seed": str(seed)}
    if recipe == "known":  # the map comes from the true poses; the learnt volume is not looked at
        settings |= {"train.steps": "1", "train.box": "32"}
    elif recipe != "guided":
        settings |= {"monitor.truth": str(data), "train.box": str(box), "train.steps": str(steps)}
    train.run(None, data=store, out=str(folder), workers="0", device="cpu", resume=False, overrides=settings)
    seconds = time.monotonic() - start
    with contextlib.redirect_stdout(io.StringIO()):
        found = evaluate.run(str(folder), truth=str(data))
    row = {"dataset": dataset, "recipe": recipe, "seed": seed, "seconds": round(seconds, 1), **found}
    if recipe == "guided":
        row |= held_out_errors(folder, data)
    (folder / "row.json").write_text(json.dumps(row))
    return row


@torch.no_grad()
def held_out_errors(run: Path, data: Path) -> dict[str, float]:
    """Median errors on the 1,000 particles never trained on: the encoder alone, and the final poses."""
    folder = RunFolder(str(run))
    config = folder.config()
    store = ParticleStore.open(config.run.data)
    context, learned = load_trained(config, store, folder, torch.device("cpu"), same_store=True)
    assert learned.references is not None, "a finished guided run has references"
    poses = ReferencePoses(context, learned.references, learned.particles, learned.encoder)
    batches = sequential(store, poses.pixels.box_size, batch_size=250, columns=stream_columns(store))
    encoder = torch.cat([poses.encoder_rotation(context.images(batch, poses.pixels)) for batch in batches])
    truth, final = (torch.from_numpy(read_poses(str(path)).rotation).float()
                    for path in (data / "truth.star", run / "particles.star"))  # fmt: skip
    alignment = align_poses(final[:TRAIN], truth[:TRAIN])
    symmetry = rotational_symmetry(torch.from_numpy(read_map(str(data / "truth.mrc"))[0]))
    held = slice(TRAIN, None)
    errors = [rotation_errors(alignment.rotations(r[held]), truth[held], symmetry).median_deg for r in (encoder, final)]
    return {"encoder_only_test_median_deg": errors[0], "final_test_median_deg": errors[1]}


def table(rows: list[dict[str, object]]) -> str:
    """The rows in Markdown, with each figure's share of what the true poses give."""
    bound = {row["dataset"]: row for row in rows if row["recipe"] == "known"}
    lines = ["| set | recipe | seed | s | FSC 0.5 / 0.143, Å | shell 0.5, mean FSC | of the true poses' | pose error, "
             "modulo pseudo-symmetry / plain mean, ° | test: final / encoder alone, ° | paper |",
             "|" + " --- |" * 10]  # fmt: skip
    for row in rows:
        true = bound.get(row["dataset"])
        share = "-"
        if true is not None:
            share = f"{row['fsc_0.5_shell'] / true['fsc_0.5_shell']:.1%}, {row['fsc_mean'] / true['fsc_mean']:.1%}"
        test = "-"
        if "final_test_median_deg" in row:
            test = f"{row['final_test_median_deg']:.2f} / {row['encoder_only_test_median_deg']:.1f}"
        lines.append(
            f"| {row['dataset']} | {row['recipe']} | {row['seed']} | {row['seconds']:.0f} | "
            f"{row['fsc_0.5_angstrom']:.2f} / {row['fsc_0.143_angstrom']:.2f} | {row['fsc_0.5_shell']:.1f}, "
            f"{row['fsc_mean']:.3f} | {share} | {row['rotation_error_mod_pseudosymmetry_median_deg']:.2f} / "
            f"{row['rotation_error_mean_deg']:.2f} | {test} | {CLAIMS[str(row['dataset'])]} |"
        )
    return "\n".join(lines)


def figures(rows: list[dict[str, object]], out: Path) -> None:
    """The paper's Figures 2, 3 and 4 from the runs' folders."""
    from matplotlib.figure import Figure

    curves = Figure(figsize=(7, 7), layout="constrained")
    loss, error = curves.subplots(2, 1, sharex=True)
    for row in rows:
        metrics = out / str(row["dataset"]) / f"{row['recipe']}-{row['seed']}" / "metrics.jsonl"
        entries = [json.loads(line) for line in metrics.read_text().splitlines()]
        for axes, key in ((loss, "loss"), (error, "truth/rotation_error_mean_deg")):
            points = [(entry["step"], entry[key]) for entry in entries if key in entry]
            if points and row["recipe"] not in ("guided", "known"):
                axes.plot(*zip(*points, strict=True), label=f"{row['dataset']} {row['recipe']}")
    loss.set(ylabel="loss (squared residual a pixel)", yscale="log")
    error.set(ylabel="mean pose error (°)", xlabel="step")
    for axes in (loss, error):
        if axes.lines:
            axes.legend(fontsize=7)
    curves.savefig(out / "figure2.png", dpi=130)
    for row in rows:
        if row["recipe"] in ("guided", "known"):
            folder = out / str(row["dataset"]) / f"{row['recipe']}-{row['seed']}"
            volume, pixel_size, _ = read_map(str(folder / "map.mrc"))
            (folder / "figure4.png").write_bytes(slices_figure({str(row["dataset"]): volume}, pixel_size))
    shown = {}
    for row in rows:
        path = out / str(row["dataset"]) / f"{row['recipe']}-{row['seed']}" / "evaluate_fsc.csv"
        shown[f"{row['dataset']} {row['recipe']}"] = np.loadtxt(path, delimiter=",", skiprows=1)[:, 1]
    (out / "figure3.png").write_bytes(fsc_figure(shown, 128, 0.8, title="FSC to the truth"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--only", nargs="+", choices=sorted(DATASETS), default=sorted(DATASETS))
    parser.add_argument("--recipe", nargs="+", choices=sorted(RECIPES), default=["known", "guided"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3000, help="of the gradient recipes; the paper ran 10,000")
    parser.add_argument("--box", type=int, default=0, help="level that the gradient recipes train on; 0: the full box")
    arguments = parser.parse_args()
    rows = []
    for dataset in arguments.only:
        for recipe in arguments.recipe:
            for seed in range(arguments.seeds if recipe != "known" else 1):
                rows.append(run_one(dataset, recipe, seed, arguments.steps, arguments.box, arguments.out_dir))
                (arguments.out_dir / "table.md").write_text(table(rows) + "\n")
                print(table(rows), flush=True)
    figures(rows, arguments.out_dir)


if __name__ == "__main__":
    main()
