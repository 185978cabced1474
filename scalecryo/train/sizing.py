"""Before a run on many GPUs: memory of each, hours and money, and what gives out first. Predicted, not measured.

A guided run is a start, `ITERATIONS` iterations and a final pass over all particles; the terms of an iteration are
`cost_model`'s. Nothing here was measured on a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from scalecryo.physics.fourier_slice import padded_box
from scalecryo.train.cost_model import (
    Hardware,
    accumulator_bytes,
    data_seconds,
    iteration_compute,
    map_reduction_seconds,
    pixels_of,
    poses_bytes,
    predict_iteration,
)

ITERATIONS = 8  # of a run; assumption
START_SECONDS = 30.0  # of the start on one GPU, which more GPUs hardly shorten; assumption (a core takes 16 to 64 s)
FINAL_BATCH = 256  # of each worker; the package's own
# Cones, post-processing, pictures and the alignment of the halves, by worker 0's processor, at 128 px; grows with the
# box's cube. Assumption.
HOST_SECONDS, HOST_BOX = 15.0, 128
PREFETCH_BYTES = 256 << 20  # stream.prefetch_mib
PROCESS_BYTES = 4 << 30  # Python, torch, CUDA's own and the pinned buffers; assumption
PARTS = 4  # sums of a half while all particles are searched
SEARCHED_BOX = 128  # the level of the iterations that search: up to about 28 Fourier pixels


@dataclass(frozen=True)
class RunPlan:
    """What a run is predicted to take.

    Attributes:
        gpus, box, particles: of the run.
        hardware: of each GPU.
        device_bytes: of one GPU at the fullest moment.
        host_bytes: of one worker.
        seconds: by part: start, iterations, final pass, reduction (in the two before it), results.
        saturates: what sets the pace of the final pass, or of the iterations where they take longer.
    """

    gpus: int
    box: int
    particles: int
    hardware: Hardware
    device_bytes: int
    host_bytes: int
    seconds: dict[str, float]
    saturates: str

    @property
    def hours(self) -> float:
        """Of the whole run."""
        return sum(self.seconds.values()) / 3600

    @property
    def dollars(self) -> float:
        """Of all GPUs."""
        return self.hours * self.gpus * self.hardware.dollars_hour

    @property
    def reduction_share(self) -> float:
        """Of the run's time that goes into sums over the workers."""
        return self.seconds["reduction"] / sum(self.seconds.values())


def device_bytes(box: int, batch: int) -> int:
    """Memory of one GPU: sums of both halves, both references, what solving one map needs, and a batch.

    Args:
        box: px, the largest level.
        batch: images of one GPU.
    """
    d = padded_box(box, 2.0)
    transform = d * d * (d // 2 + 1)
    sums = max(accumulator_bytes(box), PARTS * accumulator_bytes(min(box, SEARCHED_BOX)))
    # Numerator, weight, shells, floor, solution, and the inverse transform beside it.
    solving = (8 + 4 + 8 + 4 + 8 + 16) * transform
    pixels = pixels_of(box / 2 - 1)
    # Real space; observed, CTF, predicted, residual and their temporaries; the CTF on a padded box in the final pass.
    images = round(batch * (4 * box * box + 48 * pixels)) + FINAL_BATCH * 24 * box * box
    return sums + 2 * 8 * transform + solving + images


def plan(
    particles: int, box: int, gpus: int, hardware: Hardware, *, iteration_particles: int, batch_size: int
) -> RunPlan:
    """A guided run of so many particles.

    Args:
        particles: of the store.
        box: px, the largest level.
        gpus: one worker each.
        hardware: of them.
        iteration_particles, batch_size: settings of the run, over all workers.
    """
    read, batch = min(particles, iteration_particles), max(1, batch_size // gpus)
    one = predict_iteration(box, gpus, hardware, batch=batch, particles=read)
    device, _ = iteration_compute(box, FINAL_BATCH, hardware)
    batches, work = particles / (FINAL_BATCH * gpus), max(device, hardware.host_batch)
    data = data_seconds(FINAL_BATCH, box, gpus, hardware)
    reduced = map_reduction_seconds(box, gpus, hardware)
    poses = particles * hardware.row + (poses_bytes(particles) / hardware.network if gpus > 1 else 0.0)
    start = START_SECONDS
    seconds = {
        "start": start,
        "iterations": ITERATIONS * (one.seconds - one.terms["sum"]),
        "final pass": batches * max(work, data) + poses,
        "reduction": ITERATIONS * one.terms["sum"] + reduced,
        "results": HOST_SECONDS * (box / HOST_BOX) ** 3,
    }
    final = {"GPU": batches * device, "host": batches * hardware.host_batch, "storage": batches * data,
             "exchange of poses": poses, "reduction": seconds["reduction"], "checkpoints": ITERATIONS
             * one.terms["checkpoints"], "start": start, "results on one processor": seconds["results"]}  # fmt: skip
    held = round(PROCESS_BYTES + PREFETCH_BYTES + poses_bytes(particles) / 8)  # scratch files; the rest is paged out
    return RunPlan(
        gpus,
        box,
        particles,
        hardware,
        device_bytes(box, batch),
        held,
        seconds,
        max(final, key=lambda name: final[name]),
    )


def plan_lines(plans: Sequence[RunPlan]) -> list[str]:
    """Plans in words, for the console: one line a number of GPUs."""
    return [
        f"{one.gpus:,} {one.hardware.name}: {one.device_bytes / 1e9:.1f} GB of each GPU, {one.host_bytes / 1e9:.1f} GB "
        f"of each worker's memory, {_time(one.hours)}, ${one.dollars:,.2f}; reduction takes {one.reduction_share:.0%}; "
        f"what sets the pace: {one.saturates}"
        for one in plans
    ]


def plan_table(plans: Sequence[RunPlan]) -> list[str]:
    """The same in Markdown."""
    head = ["| particles × box | GPUs | memory of each | time | $ | reduction | what sets the pace |",
            "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    return head + [
        f"| {one.particles:,} × {one.box} px | {one.gpus} | {one.device_bytes / 1e9:.1f} GB | {_time(one.hours)} | "
        f"{one.dollars:,.2f} | {one.reduction_share:.0%} | {one.saturates} |"
        for one in plans
    ]


def _time(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"
