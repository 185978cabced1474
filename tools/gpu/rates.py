"""Training steps by box and batch, images a second of what a guided run does, and what short numbers cost."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from scalecryo.map.backprojection import Backprojection
from scalecryo.model.autoencoder import build_autoencoder
from scalecryo.physics.fft import fourier_pixels
from scalecryo.physics.image_formation import CtfWeightedImages
from scalecryo.physics.rotation import random_rotations
from scalecryo.physics.so3_grid import so3_grid
from scalecryo.pose.local_refinement import refine_poses
from scalecryo.pose.search import Posterior, grid_posterior, shift_grid, templates
from scalecryo.train.stages.gradient_descent import build_optimiser
from tools.bench.step import fresh, particles, settings, step
from tools.gpu.kernels import PADDING, Scene
from tools.gpu.session import Row, Session, roofline
from tools.step_memory import step_memory

PRECISIONS = {"float32": 4, "bfloat16": 2}  # bytes of an activation
KEEP = 64
NOISE_SHARE = 1.0  # variance of the noise over that of the signal: 0 dB


def steps(session: Session) -> Iterator[Row]:
    """A training step of the paper's encoder: seconds, images/s, and peak memory beside `tools/step_memory.py`."""
    for box in session.sizes.boxes:
        for batch in session.sizes.batches:
            for precision, each in PRECISIONS.items():
                predicted = step_memory(box, batch, bytes_each=each).peak
                row: Row = {"box": box, "batch": batch, "precision": precision}
                try:
                    taken, peak = _step(session, box, batch, precision)
                except torch.OutOfMemoryError:
                    yield row | {"ms": None, "images/s": None, "peak, GB": "out of memory",
                                 "predicted, GB": round(predicted / 1e9, 2)}  # fmt: skip
                    continue
                yield row | {
                    "ms": round(1e3 * taken, 3), "images/s": round(batch / taken),
                    "peak, GB": None if peak is None else round(peak / 1e9, 3),
                    "predicted, GB": round(predicted / 1e9, 3),
                }  # fmt: skip


def _step(session: Session, box: int, batch: int, precision: str) -> tuple[float, int | None]:
    config = settings(precision)
    model = build_autoencoder(config, box, 1).to(session.device)
    images = particles(box, batch, session.device)
    work = step(model, build_optimiser(config, model), lambda: model(fresh(images)).loss.sum())
    peak = session.peak_bytes(work)
    return session.seconds(work), peak


def guided(session: Session) -> Iterator[Row]:
    """Search of all rotations and shifts, local refinement and insertion, by box: images a second."""
    sizes, device, reach = session.sizes, session.device, roofline(session)
    for box in sizes.boxes:
        try:
            scene = Scene(box, min(sizes.images, 2**23 // box**2 + 1), device)
        except torch.OutOfMemoryError:
            yield {"box": box, "what": "out of memory"}
            continue
        count, pixels = len(scene.images), scene.pixels.prefix(sizes.radius)
        near, ctf = scene.images[:, : len(pixels)].contiguous(), scene.ctf[:, : len(pixels)].contiguous()
        grid = so3_grid(sizes.half_grid).to(device)
        shifts = shift_grid(3.0, 1.5).to(device)
        bank = templates(scene.volume, grid, pixels, scene.scale)

        def search(
            near: Tensor = near, ctf: Tensor = ctf, bank: Tensor = bank, pixels=pixels, shifts: Tensor = shifts
        ) -> Posterior:
            return grid_posterior(near, ctf, pixels.weight, bank, shifts, pixels, keep=min(KEEP, len(bank)))

        taken = session.seconds(search)
        # Two real products of images at every shift with every template.
        operations = 4.0 * count * len(shifts) * len(pixels) * len(bank)
        yield {
            "box": box, "images": count, "what": f"search, {2 * len(bank)} rotations × {len(shifts)} shifts",
            "images/s": round(count / taken), "TFLOP/s": round(operations / taken / 1e12, 3),
            "share of a TF32 product": round(operations / taken / reach.tf32, 3),
        }  # fmt: skip
        likelihood = scene.ctf, scene.pixels.weight, scene.pixels, scene.scale
        pose = scene.rotation, scene.shift
        taken = session.seconds(
            lambda scene=scene, pose=pose, likelihood=likelihood: refine_poses(  # type: ignore[misc]
                scene.volume, scene.images, *pose, *likelihood, passes=2
            )
        )
        yield {"box": box, "images": count, "what": "local refinement, 2 passes", "images/s": round(count / taken)}
        sums, half = Backprojection(box, PADDING, device), 1 + torch.arange(count, device=device) % 2
        weighted, ones = CtfWeightedImages(scene.images, scene.ctf), torch.ones(count, device=device)
        taken = session.seconds(
            lambda sums=sums, weighted=weighted, pose=pose, ones=ones, half=half, scene=scene: sums.add(  # type: ignore[misc]
                weighted, *pose, ones, half, scene.pixels
            )
        )
        yield {"box": box, "images": count, "what": "insertion into two half-maps", "images/s": round(count / taken)}


@contextmanager
def _single_precision() -> Iterator[None]:
    """The search's products without TF32: its own switch is made to do nothing."""
    from scalecryo.pose import search

    before = search.tensor_cores

    @contextmanager
    def nothing() -> Iterator[None]:
        yield

    search.tensor_cores = nothing
    try:
        yield
    finally:
        search.tensor_cores = before


def precision(session: Session) -> Iterator[Row]:
    """TF32 in the search, and bfloat16 in the encoder's convolutions, beside single precision."""
    sizes, device = session.sizes, session.device
    box = sizes.boxes[0]
    generator = torch.Generator().manual_seed(1)
    scene = Scene(box, min(sizes.images, 500), device)
    pixels = fourier_pixels(box).to(device).prefix(sizes.radius)
    clean, ctf = scene.images[:, : len(pixels)], scene.ctf[:, : len(pixels)].contiguous()
    spread = (clean[:, 1:].abs().square().mean() * NOISE_SHARE).sqrt()
    observed = clean + spread * torch.randn(clean.shape, generator=generator, dtype=torch.complex64).to(device)
    weight = pixels.weight / (spread**2 / 2) * (pixels.radius > 0)
    grid = random_rotations(sizes.half_grid, generator).to(device)
    bank, centred = templates(scene.volume, grid, pixels, scene.scale), torch.zeros(1, 2, device=device)
    wide = pixels.to(device, torch.float64)
    exact = grid_posterior(
        observed.to(torch.complex128), ctf.double(), weight.double(), bank.to(torch.complex128), centred.double(),
        wide, keep=2,
    )  # fmt: skip
    brief = grid_posterior(observed, ctf, weight, bank, centred, pixels, keep=2)
    with _single_precision():
        single = grid_posterior(observed, ctf, weight, bank, centred, pixels, keep=2)
    gap = (exact.log_likelihood[:, 0] - exact.log_likelihood[:, 1]).median()
    for name, found in (("search in float32", single), ("search as it runs: TF32 on a GPU", brief)):
        same = found.rotation_index[:, 0] == exact.rotation_index[:, 0]
        offset = (found.log_likelihood[:, 0] - exact.log_likelihood[:, 0])[same]
        yield {
            "what": name, "same best as in float64": round(float(same.float().mean()), 4),
            "rms error of the score over the gap of the best two": float(f"{float(offset.std() / gap):.2g}"),
        }  # fmt: skip
    yield from _encoder_precision(session, box)


def _encoder_precision(session: Session, box: int) -> Iterator[Row]:
    """Gradients of the paper's encoder with bfloat16 convolutions, beside those in single precision."""
    images = particles(box, session.sizes.kernel_batch, session.device)
    models = {name: build_autoencoder(settings(name), box, 1).to(session.device) for name in PRECISIONS}
    models["bfloat16"].load_state_dict(models["float32"].state_dict())
    loss, gradient = {}, {}
    for name, model in models.items():
        made = model(fresh(images)).loss.sum()
        gradient[name] = torch.autograd.grad(made, [p for p in model.parameters() if p.requires_grad])
        loss[name] = float(made)
    pairs = list(zip(gradient["bfloat16"], gradient["float32"], strict=True))
    difference = sum(float((a - b).square().sum()) for a, b in pairs) ** 0.5
    length = sum(float(b.square().sum()) for _, b in pairs) ** 0.5
    yield {
        "what": "encoder in bfloat16: gradient's difference over its length",
        "value": float(f"{difference / length:.2g}"),
    }
    yield {
        "what": "encoder in bfloat16: loss's difference over its value in float32",
        "value": float(f"{abs(loss['bfloat16'] / loss['float32'] - 1):.2g}"),
    }
