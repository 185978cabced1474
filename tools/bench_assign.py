"""What amortisation is for: assigning particles never seen, from the encoder's modes against exhaustive search.

    python tools/bench_assign.py RUN --truth DIR [--particles 1000] [--batch 250]

RUN is a finished guided run with unknown shifts, trained with `--train.rows` below the store's count: the particles
after those are assigned twice, in one process, by the same code and the same local refinement. Prints images a second
of both (the posing alone: reading and insertion are the same), their ratio, and the errors against truth.star.
"""

import argparse
import os
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
from scalecryo.train.batches import stream_columns
from scalecryo.train.guided_run import load_guided_poser
from scalecryo.train.stages.guided_poser import GuidedPoser


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
def timed(poser: GuidedPoser, batches: list[Batch]) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Images a second, rotations and shifts (Å); the first batch is posed once more beforehand, to warm up."""
    poser.pose(batches[0], pictures=False)
    start = time.perf_counter()
    posed = [poser.pose(batch, pictures=False) for batch in batches]
    rate = sum(len(batch.rows) for batch in batches) / (time.perf_counter() - start)
    return rate, torch.cat([p.rotation for p in posed]), torch.cat([p.shift for p in posed])


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
    poser = load_guided_poser(config, store, folder, torch.device("cpu"), same_store=True)
    first = min(config.train.rows or store.count, store.count - arguments.particles)
    batches = held_out(store, poser.level, first, arguments.particles, arguments.batch)
    truth = read_poses(str(arguments.truth / "truth.star"))
    final = read_poses(str(Path(arguments.run) / "particles.star"))
    true_rotation, found_rotation = (torch.from_numpy(poses.rotation).float() for poses in (truth, final))
    alignment = align_poses(found_rotation, true_rotation)
    symmetry = rotational_symmetry(torch.from_numpy(read_map(str(arguments.truth / "truth.mrc"))[0]))
    rows = torch.cat([batch.rows for batch in batches])
    print(f"{len(rows)} particles of {store.level_pixel_size(poser.level):g} Å/px at {poser.level} px, "
          f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")  # fmt: skip
    print("| from | images/s | rotation error, median / mean, ° |\n| --- | --- | --- |")
    rates = []
    for name, own in (("encoder", poser.fresh()), ("exhaustive search", poser.fresh(encoder=False))):
        rate, rotation, _ = timed(own, batches)
        rates.append(rate)
        errors = rotation_errors(alignment.rotations(rotation), true_rotation[rows], symmetry)
        print(f"| {name} | {rate:.1f} | {errors.median_deg:.3f} / {errors.mean_deg:.2f} |", flush=True)
    print(f"ratio: {rates[0] / rates[1]:.1f}")


if __name__ == "__main__":
    main()
