"""Bytes read over a guided run with the store's levels, and from the full box alone.

    python -m tools.bench levels --work /tmp/bench

The iterations are those that the guided run plans while the resolution rises. A stream counts what it reads of each
level; a run of 50,000 particles is made up of the bootstrap's batches and of whole passes, as the default settings say.
"""

import argparse
import os
import platform
from importlib.metadata import version
from pathlib import Path

from scalecryo.config import GuidedConfig
from scalecryo.data.storage.store import ParticleStore
from scalecryo.data.streaming.order import BatchOrder
from scalecryo.data.streaming.stream import ParticleStream
from scalecryo.train.stages.schedule import FIRST_RADIUS, IterationPlan, plan_iteration
from tools.bench.stream import make_store

BATCH = 512


def marched(levels: tuple[int, ...], factor: float) -> list[IterationPlan]:
    """Iterations of rising radius: each refines `factor` as far as the one before; two at the end."""
    limit, radius, plans = max(levels) / 2 - 2, FIRST_RADIUS, []
    while not plans or plans[-1].radius < limit:
        plans.append(
            plan_iteration(radius, levels, len(plans), searched="all" if len(plans) < 2 else "new", shifted=True)
        )
        radius = min(radius * factor, limit)
    return [*plans, plans[-1]]


def bytes_of_image(store: ParticleStore, level: int) -> float:
    """What a stream reads at a level, images, indexes and columns, for each particle of a pass."""
    order = BatchOrder(store.count, store.block_rows(level), BATCH, seed=0)
    with ParticleStream(store, level, order, columns=("half",), prefetch_bytes=1) as stream:
        for _ in range(order.steps_per_epoch):
            next(stream)
        return stream.metrics.bytes_read / store.count


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the data, kept for the next time")
    parser.add_argument("--count", type=int, default=2048)
    parser.add_argument("--box", type=int, default=256)
    args = parser.parse_args()
    work = args.work / f"levels-{args.box}"
    work.mkdir(parents=True, exist_ok=True)
    store = make_store(work, args.count, args.box)
    guided = GuidedConfig()
    image = {level: bytes_of_image(ParticleStore.open(store.url), level) / 2**20 for level in store.levels}
    first = guided.bootstrap_steps * guided.bootstrap_batch
    print(f"bytes measured on {store.count:,} particles of {args.box} px, levels {store.levels}; "
          f"{os.cpu_count()} cores, {platform.machine()}, zarr {version('zarr')}")  # fmt: skip
    print(f"a run: bootstrap {first:,} images, then {guided.iteration_particles:,} particles an iteration\n")
    print("| the radius rises by | levels | with levels, GiB | full box alone, GiB | ratio |")
    print("| --- | --- | --- | --- | --- |")
    for factor in (1.6, 1.3, 1.15):
        levels = [plan.level for plan in marched(store.levels, factor)]
        read = first * image[min(store.levels)] + guided.iteration_particles * sum(image[level] for level in levels)
        full = (first + guided.iteration_particles * len(levels)) * image[args.box]
        chosen = f"{min(store.levels)} (bootstrap) " + " ".join(map(str, levels))
        print(f"| {factor} | {chosen} | {read / 1024:.1f} | {full / 1024:.1f} | {read / full:.2f} |")
