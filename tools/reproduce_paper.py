"""Datasets A to G of Nashed et al. 2021, by the guided method, the auto-encoder, and the paper's own recipes.

    python tools/reproduce_paper.py OUT_DIR [--only D G] [--recipe guided s2s2 …] [--seeds 1] [--steps 3000] [--box 0]
    python tools/reproduce_paper.py OUT_DIR --only D --figures [--seeds 10]

For each dataset and recipe: simulate (once), convert, train, evaluate. Prints one table and writes it beside the
paper's Figures 2 (loss and pose error against steps, with the spread over seeds), 3 (FSC to the truth; on the left
as it grows, every 200 steps) and 4 (slices) as PNG. `known` reconstructs with the true poses: the bound that the
others are measured against. `s2s2`, `quaternion` and `euler` are the auto-encoder, `refined` the first of them with
the refinement after it; `paper-s2s2` and `paper-copies` the paper's own network, as printed and with eight copies.
`--figures` runs what Figure 2 compares, one random start each, and looks every 20 steps. Times are wall-clock of
convert + train.
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
from paper_datasets import BOX, DATASETS, PIXEL_SIZE, TRAIN, write_dataset

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
ENCODER = {"pose.source": "encoder", "pose.centred": "true"}
PLAIN = ENCODER | {"encoder.network": "cnn"}
RECIPES: dict[str, dict[str, str]] = {
    "guided": {"pose.source": "guided", "pose.centred": "true"},
    "known": {"pose.source": "known"},
    "refined": ENCODER | {"autoencoder.refine": "true"},
    "s2s2": ENCODER,
    "quaternion": ENCODER | {"pose.parameterisation": "quaternion"},
    "euler": ENCODER | {"pose.parameterisation": "euler"},
    "paper-s2s2": PLAIN,
    "paper-copies": PLAIN | {"pose.heads": "4", "pose.copies": "8"},
    "table": {"pose.source": "table", "pose.centred": "true"},
}
FIGURE_2 = ("s2s2", "quaternion", "euler", "volume", "table")
FIGURE_STEPS = 400  # of `volume` and `table`, as of the auto-encoder
POSED = ("known", "volume")  # from the true poses
RECIPES["volume"] = {"pose.source": "known"}  # the paper's «known»: the voxels learnt at true poses
AUTOENCODERS = ("refined", "s2s2", "quaternion", "euler")
EVERY_20 = {"monitor.every": "20", "monitor.pictures_every": "20"}


def settings_of(recipe: str, seed: int, steps: int, box: int, data: Path, *, figures: bool) -> dict[str, str]:
    """What a run is started with."""
    settings = RECIPES[recipe] | {"train.rows": str(TRAIN), "train.seed": str(seed)}
    if recipe == "known":  # the map comes from the true poses; the learnt volume is not looked at
        return settings | {"train.steps": "1", "train.box": "32"}
    if recipe == "guided":
        return settings
    settings["monitor.truth"] = str(data)
    if settings["pose.source"] != "encoder" or "encoder.network" in settings:
        settings |= {"train.box": str(box), "train.steps": str(FIGURE_STEPS if figures else steps)}
    if figures:
        settings |= EVERY_20 | {"train.box": "32"}
        if settings["pose.source"] == "encoder":
            settings |= {"autoencoder.starts": "1", "autoencoder.start_steps": "1"}
    return settings


def run_name(recipe: str, seed: int, *, figures: bool) -> str:
    """The folder of a run."""
    return f"{recipe}-{seed}-steps" if figures else f"{recipe}-{seed}"


def run_one(
    dataset: str, recipe: str, seed: int, steps: int, box: int, out: Path, *, figures: bool = False
) -> dict[str, object]:
    """Convert, train and evaluate, unless that was done before; one row of the table."""
    data = out / dataset / "particles"
    if not (data / "particles.star").exists():  # the last file of a simulation
        shutil.rmtree(data, ignore_errors=True)
        write_dataset(dataset, data)
    folder = out / dataset / run_name(recipe, seed, figures=figures)
    if (folder / "row.json").exists():  # finished before
        return json.loads((folder / "row.json").read_text())
    shutil.rmtree(folder, ignore_errors=True)
    table = "truth.star" if recipe in POSED else "particles.star"
    store = str(out / dataset / f"{table.partition('.')[0]}.zarr")
    start = time.monotonic()
    convert.run(str(data / table), store, data_dir=None, box=None, dtype="float16", workers=2, overwrite=True,
                invert=False, uninvert=True)  # fmt: skip
    settings = settings_of(recipe, seed, steps, box, data, figures=figures)
    train.run(None, data=store, out=str(folder), workers="0", device="cpu", resume=False, overrides=settings)
    seconds = time.monotonic() - start
    with contextlib.redirect_stdout(io.StringIO()):
        found = evaluate.run(str(folder), truth=str(data))
    row = {"dataset": dataset, "recipe": recipe, "seed": seed, "seconds": round(seconds, 1), **found}
    if recipe == "guided" or (recipe in AUTOENCODERS and not figures):
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


def entries_of(folder: Path) -> list[dict[str, object]]:
    """What a run's metrics.jsonl says, step by step."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def figure_2(runs: dict[str, list[Path]], out: Path, name: str = "figure2.png") -> None:
    """Loss and pose error against steps: the median over seeds, and how far they spread."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 7), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    keys = ("loss", "truth/rotation_error_mod_pseudosymmetry_median_deg")
    for label, folders in runs.items():
        for axes, key in zip(panels, keys, strict=True):
            curves = [[(entry["step"], entry[key]) for entry in entries_of(f) if key in entry] for f in folders]
            length = min(map(len, curves), default=0)
            if not length:
                continue
            steps = [step for step, _ in curves[0][:length]]
            values = np.array([[value for _, value in curve[:length]] for curve in curves])
            (line,) = axes.plot(steps, np.median(values, 0), label=f"{label} ({len(curves)})")
            axes.fill_between(steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.15)
    panels[0].set(ylabel="loss (residual, as a share or a pixel)", yscale="log")
    panels[1].set(ylabel="median pose error modulo the two-fold (°)", xlabel="step", yscale="log")
    for axes in panels:
        if axes.lines:
            axes.legend(fontsize=7)
    figure.savefig(out / name, dpi=130)


def figure_3_left(folder: Path, out: Path) -> None:
    """The FSC of the learnt map with the truth, every 200 steps, against spatial frequency."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    for entry in entries_of(folder):
        if "truth/fsc" in entry and int(str(entry["step"])) % 200 == 0:
            curve = np.array(entry["truth/fsc"])[1:]
            axes.plot(np.arange(1, len(curve) + 1) / (BOX * PIXEL_SIZE), curve, label=f"step {entry['step']}")
    axes.axhline(0.5, color="grey", lw=0.8)
    axes.set(xlabel="spatial frequency (1/Å)", ylabel="FSC to the truth", ylim=(-0.05, 1.02))
    if len(axes.lines) > 1:
        axes.legend(fontsize=7)
    figure.savefig(out / "figure3_left.png", dpi=130)


def figures(rows: list[dict[str, object]], out: Path) -> None:
    """The paper's Figures 2, 3 and 4 from the runs' folders."""
    runs: dict[str, list[Path]] = {}
    shown = {}
    for row in rows:
        folder = out / str(row["dataset"]) / f"{row['recipe']}-{row['seed']}"
        label = f"{row['dataset']} {row['recipe']}"
        if row["recipe"] not in ("guided", "known"):
            runs.setdefault(label, []).append(folder)
        volume, pixel_size, _ = read_map(str(folder / "map.mrc"))
        (folder / "figure4.png").write_bytes(slices_figure({str(row["dataset"]): volume}, pixel_size))
        shown[label] = np.loadtxt(folder / "evaluate_fsc.csv", delimiter=",", skiprows=1)[:, 1]
        if row["recipe"] in AUTOENCODERS:
            figure_3_left(folder, out)
    figure_2(runs, out)
    (out / "figure3.png").write_bytes(fsc_figure(shown, BOX, PIXEL_SIZE, title="FSC to the truth"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--only", nargs="+", choices=sorted(DATASETS), default=sorted(DATASETS))
    parser.add_argument("--recipe", nargs="+", choices=sorted(RECIPES), default=["known", "guided"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--figures", action="store_true", help="what Figure 2 compares, step by step, and nothing else")
    parser.add_argument("--steps", type=int, default=3000, help="of the gradient recipes; the paper ran 10,000")
    parser.add_argument("--box", type=int, default=0, help="level that the gradient recipes train on; 0: the full box")
    arguments = parser.parse_args()
    out = arguments.out_dir
    if arguments.figures:
        for dataset in arguments.only:
            runs = {}
            for recipe in FIGURE_2:
                for seed in range(arguments.seeds):
                    run_one(dataset, recipe, seed, arguments.steps, arguments.box, out, figures=True)
                    runs.setdefault(recipe, []).append(out / dataset / run_name(recipe, seed, figures=True))
                    figure_2(runs, out / dataset)
        return
    rows = []
    for dataset in arguments.only:
        for recipe in arguments.recipe:
            for seed in range(arguments.seeds if recipe != "known" else 1):
                rows.append(run_one(dataset, recipe, seed, arguments.steps, arguments.box, out))
                (out / "table.md").write_text(table(rows) + "\n")
                print(table(rows), flush=True)
    figures(rows, out)


if __name__ == "__main__":
    main()
