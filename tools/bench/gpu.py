"""Everything that only a GPU can tell, in one table: kernels beside the roofline, steps, images/s.

    python -m tools.bench gpu [--boxes 128 256 400] [--batches 8 32 128] [--rounds 20] [--device cuda]

Kernels at padding 2 with B = 32: time, the bytes that they cannot avoid (pixels once; of the volume the sectors that
samples touch, 4 lines of 32 bytes each, once to read, twice to add), and these bytes over the time as a share of the
bandwidth that a large copy reaches on the same device (more than 1: caches held the volume). Steps: the paper's encoder
in float32 and bfloat16. `--device cpu --boxes 16 --batches 2 --rounds 2` tries the script itself.
"""

import argparse
import time
from collections.abc import Callable

import torch

from scalecryo.map.backprojection import Backprojection
from scalecryo.model.autoencoder import build_autoencoder
from scalecryo.physics.fft import fourier_pixels, rfft3_centred
from scalecryo.physics.fourier_slice import fourier_slice
from scalecryo.physics.image_formation import CtfWeightedImages
from scalecryo.physics.rotation import random_rotations
from scalecryo.pose.local_refinement import evaluate_poses, refine_poses
from scalecryo.train.stages.gradient_descent import build_optimiser
from tools.bench.step import fresh, particles, settings, step
from tools.step_memory import step_memory

Work = Callable[[], object]
_PADDING = 2


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Work, device: torch.device, rounds: int) -> float:
    """Median of a few rounds, after two to warm up and compile."""
    times = []
    for number in range(rounds + 2):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        if number > 1:
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def bandwidth(device: torch.device, rounds: int) -> float:
    """Bytes a second of a copy that no cache holds, read and written."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**22, device=device)
    target = torch.empty_like(source)
    return 8 * source.numel() / seconds(lambda: target.copy_(source), device, rounds)


def kernels(box: int, batch: int, device: torch.device) -> dict[str, tuple[Work, int]]:
    """Each kernel, and the bytes that it cannot avoid."""
    generator, d = torch.Generator().manual_seed(0), _PADDING * box
    map_, pixels = torch.rand(box, box, box, generator=generator).to(device), fourier_pixels(box).to(device)
    volume = rfft3_centred(map_, d).requires_grad_()
    rotation, shift = random_rotations(batch, generator, device), torch.zeros(batch, 2, device=device)
    turned, moved = rotation.clone().requires_grad_(), shift.clone().requires_grad_()
    ctf = torch.ones(batch, len(pixels), device=device)
    geometry = pixels.kx, pixels.ky, float(_PADDING), box
    images = fourier_slice(volume, turned, moved, ctf, *geometry)
    observed = images.detach()
    sums = Backprojection(box, _PADDING, device)
    samples, transform = images.numel(), 8 * volume.numel()
    sectors = samples * 4 * 32
    with torch.no_grad():
        fixed = volume.detach()
    poses = rotation[:, None], shift[:, None]
    likelihood = ctf, pixels.weight, pixels, float(_PADDING)
    ones = torch.ones(batch, device=device)
    graph = {"retain_graph": True}
    parameter = map_.clone().requires_grad_()
    transformed = rfft3_centred(parameter, d)
    return {
        "slice forward": (lambda: fourier_slice(fixed, rotation, shift, ctf, *geometry), sectors + samples * 12),
        "slice backward, all": (
            lambda: torch.autograd.grad(images, (volume, turned, moved), observed, **graph),
            3 * sectors + samples * 12 + transform,
        ),
        "slice backward, pose": (
            lambda: torch.autograd.grad(images, (turned, moved), observed, **graph), sectors + samples * 12,
        ),
        "local refinement, 4 passes": (
            lambda: refine_poses(fixed, observed, rotation, shift, *likelihood, passes=4), 5 * (sectors + samples * 12),
        ),
        "cost of poses": (
            lambda: evaluate_poses(fixed, observed, *poses, *likelihood), sectors + samples * 12,
        ),
        "insertion": (
            lambda: sums.insert(CtfWeightedImages(observed, ctf), rotation, shift, ones, pixels),
            3 * sectors + samples * 12,
        ),
        "padded FFT": (lambda: rfft3_centred(map_, d), 4 * transform),
        "padded FFT backward": (
            lambda: torch.autograd.grad(transformed, parameter, fixed, **graph), 4 * transform,
        ),
    }  # fmt: skip


def training(box: int, batch: int, precision: str, device: torch.device, rounds: int) -> tuple[float, float]:
    """Seconds a step, and peak memory in GB (0 on a CPU)."""
    config = settings(precision)
    model, images = build_autoencoder(config, box, 1).to(device), particles(box, batch, device)
    work = step(model, build_optimiser(config, model), lambda: model(fresh(images)).loss.sum())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    taken = seconds(work, device, rounds)
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    return taken, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boxes", type=int, nargs="+", default=[128, 256, 400])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    device, rounds = torch.device(arguments.device), arguments.rounds
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    reach = bandwidth(device, rounds)
    print(f"{name}, torch {torch.__version__}, copies {reach / 1e9:.0f} GB/s")
    print("| box | batch | what | ms | images/s | share of the roofline | peak, GB | predicted, GB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for box in arguments.boxes:
        for what, (work, moved) in kernels(box, 32, device).items():
            taken = seconds(work, device, rounds)
            share = moved / taken / reach
            print(f"| {box} | 32 | {what} | {1e3 * taken:.3f} | {32 / taken:.0f} | {share:.2f} | | |", flush=True)
        for batch in arguments.batches:
            for precision in ("float32", "bfloat16"):
                predicted = step_memory(box, batch, bytes_each=4 if precision == "float32" else 2).peak / 1e9
                try:
                    taken, peak = training(box, batch, precision, device, rounds)
                except torch.OutOfMemoryError:
                    print(f"| {box} | {batch} | step, {precision} | out of memory | | | | {predicted:.1f} |")
                    continue
                print(f"| {box} | {batch} | step, {precision} | {1e3 * taken:.2f} | {batch / taken:.0f} | | "
                      f"{peak:.1f} | {predicted:.1f} |", flush=True)  # fmt: skip
