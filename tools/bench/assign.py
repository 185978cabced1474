"""What amortisation is for: assigning particles never seen, from the encoder's modes against exhaustive search.

    python -m tools.bench assign RUN --truth DIR [--particles 1000] [--batch 250]

RUN is a finished guided run with unknown shifts, trained with `--train.rows` below the store's count: the particles
after those are assigned twice, in one process, by the same code and the same local refinement. Prints images a second
of both (the posing alone: reading and insertion are the same), their ratio, and the errors against truth.star.
"""

import argparse
import time
from pathlib import Path

import torch

from scalecryo.data.formats.mrc import read_map
from scalecryo.data.formats.relion import read_poses
from scalecryo.data.storage.store import ParticleStore
from scalecryo.data.streaming.stream import Batch, sequential
from scalecryo.evaluate.align import align_poses
from scalecryo.evaluate.align_maps import rotational_symmetry
from scalecryo.evaluate.metrics import rotation_errors
from scalecryo.runs.folder import RunFolder
from scalecryo.train.loop import load_trained
from scalecryo.train.particle_source import RunContext, stream_columns
from scalecryo.train.stages.final_poses import ReferencePoses
from tools.bench._shared import machine


def held_out(store: ParticleStore, level: int, first: int, count: int, batch: int) -> list[Batch]:
    """Batches of the particles from row `first` on."""
    chosen = []
    for found in sequential(store, level, batch_size=batch, columns=stream_columns(store)):
        keep = (found.rows >= first) & (found.rows < first + count)
        if keep.any():
            columns = {name: values[keep] for name, values in found.columns.items()}
            chosen.append(Batch(found.rows[keep], found.images[keep], found.weight[keep], columns))
    return chosen


@torch.no_grad()
def timed(context: RunContext, poses: ReferencePoses, batches: list[Batch]) -> tuple[float, torch.Tensor]:
    """Images a second, and rotations; the first batch is posed once more beforehand, to warm up."""
    poses.estimate(context.images(batches[0], poses.pixels))
    start = time.perf_counter()
    found = [poses.estimate(context.images(batch, poses.pixels)) for batch in batches]
    rate = sum(len(batch.rows) for batch in batches) / (time.perf_counter() - start)
    return rate, torch.cat([each.rotation for each in found])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--truth", type=Path, required=True)
    parser.add_argument("--particles", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=250)
    arguments = parser.parse_args()
    folder = RunFolder(arguments.run)
    config = folder.config()
    store = ParticleStore.open(config.run.data)
    context, learned = load_trained(config, store, folder, torch.device("cpu"), same_store=True)
    if learned.references is None or learned.encoder is None:
        raise SystemExit(f"{arguments.run}: needs a guided run with guided.encoder_steps >= 1")
    contenders = {
        "encoder": ReferencePoses(context, learned.references, None, learned.encoder),
        "exhaustive search": ReferencePoses(context, learned.references, None, None),
    }
    level = learned.references.level
    first = min(config.train.rows or store.count, store.count - arguments.particles)
    batches = held_out(store, level, first, arguments.particles, arguments.batch)
    truth = read_poses(str(arguments.truth / "truth.star"))
    final = read_poses(str(Path(arguments.run) / "particles.star"))
    true_rotation, found_rotation = (torch.from_numpy(poses.rotation).float() for poses in (truth, final))
    alignment = align_poses(found_rotation, true_rotation)
    symmetry = rotational_symmetry(torch.from_numpy(read_map(str(arguments.truth / "truth.mrc"))[0]))
    rows = torch.cat([batch.rows for batch in batches])
    print(f"{len(rows)} particles of {store.level_pixel_size(level):g} Å/px at {level} px, {machine()}")
    print("| from | images/s | rotation error, median / mean, ° |\n| --- | --- | --- |")
    rates = []
    for name, poses in contenders.items():
        rate, rotation = timed(context, poses, batches)
        rates.append(rate)
        errors = rotation_errors(alignment.rotations(rotation), true_rotation[rows], symmetry)
        print(f"| {name} | {rate:.1f} | {errors.median_deg:.3f} / {errors.mean_deg:.2f} |", flush=True)
    print(f"ratio: {rates[0] / rates[1]:.1f}")
