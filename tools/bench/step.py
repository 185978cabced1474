"""A training step of the paper's encoder beside its stock composition, in one process.

    python -m tools.bench step [--box 128] [--batch 32] [--rounds 5]

Stock: float32, pad, rfftn and grid_sample under autograd, CTF and shift by tensors, Adam as it comes. Ours: the same
model built from the configuration, with float32 and with bfloat16 convolutions. First gradients are compared; then they
take turns (see slice.py for what a time is), beside the encoder without the rest: the bound of its precision.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from scalecryo.config import Config, config_from_dict
from scalecryo.model.autoencoder import AutoEncoder, build_autoencoder
from scalecryo.physics.ctf import CtfParameters
from scalecryo.physics.fft import fourier_pixels
from scalecryo.physics.fourier_slice import gridding_correction
from scalecryo.physics.image_formation import form_images
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.train.stages.gradient_descent import build_optimiser
from tools.bench._shared import machine, quick
from tools.bench.slice import grid_sampled

PIXEL_SIZE = 1.5  # Å


def particles(box: int, batch: int, device: torch.device | str = "cpu") -> ParticleImages:
    """Noise with CTF parameters."""
    one, generator = torch.ones(batch), torch.Generator().manual_seed(0)
    optics = CtfParameters(10_000 * one, 9_500 * one, 0 * one, 300 * one, 2.7 * one, 0.1 * one, 0 * one)
    rows, images = torch.arange(batch, device=device), torch.randn(batch, box, box, generator=generator)
    return ParticleImages(
        rows, 1 + rows % 2, one.to(device), 0 * rows, fourier_pixels(box).to(device), PIXEL_SIZE, optics.to(device),
        real=images.to(device),
    )  # fmt: skip


def fresh(images: ParticleImages) -> ParticleImages:
    """The same batch as it comes from the store: its transforms and CTF values are not made yet."""
    return replace(images)


def stock_loss(model: AutoEncoder, images: ParticleImages, correction: Tensor) -> Tensor:
    """The same loss by the composition that one would write first."""
    volume, pixels = model.volume, images.pixels
    n, d = volume.box_size, volume.padded_box
    padded = torch.nn.functional.pad(volume.density() * correction, [(d - n) // 2] * 6)
    transform = torch.fft.rfftn(torch.fft.ifftshift(padded))
    found = model.pose_source(images)
    scaled = pixels.kx * volume.scale, pixels.ky * volume.scale
    slices = grid_sampled(transform, found.rotation[:, 0], *scaled)
    shift_px = found.shift[:, 0] / images.pixel_size
    residual = form_images(slices, images.ctf, shift_px, pixels.kx, pixels.ky, n) - images.transforms
    return ((residual.abs() ** 2) * pixels.weight).sum() / n**4


def settings(precision: str) -> Config:
    return config_from_dict({"pose": {"source": "encoder"}, "encoder": {"network": "cnn", "precision": precision}})


def step(model: AutoEncoder, optimiser: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Callable[[], object]:
    def once() -> None:
        optimiser.zero_grad(set_to_none=True)
        loss().backward()
        optimiser.step()

    return once


def gradient_difference(ours: AutoEncoder, stock: AutoEncoder, images: ParticleImages, correction: Tensor) -> str:
    """Between the two compositions on the same parameters."""
    ours.load_state_dict(stock.state_dict())
    found = torch.autograd.grad(ours(images).loss.sum(), list(ours.parameters()))
    expected = torch.autograd.grad(stock_loss(stock, images, correction), list(stock.parameters()))
    pairs = list(zip(found, expected, strict=True))
    largest = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    length = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    return f"at most {largest:.1e} of a tensor's largest entry, {length:.1e} of its length"


def encoder_alone(model: AutoEncoder, images: ParticleImages) -> Callable[[], object]:
    """Forward and backward of the encoder and nothing else: what no step with these convolutions can be faster than."""

    def once() -> None:
        model.zero_grad(set_to_none=True)
        model.pose_source(images).rotation.sum().backward()

    return once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--box", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    images = particles(arguments.box, arguments.batch)
    print(f"{machine()}, box {arguments.box}, B = {arguments.batch}, padding 2")
    stock = build_autoencoder(settings("float32"), arguments.box, 1)
    correction = gridding_correction(arguments.box, stock.volume.scale)
    difference = gradient_difference(stock, stock, images, correction)
    print(f"gradients of the composition differ from the stock's by {difference}")
    # The stock encoder keeps its tensors in torch's own order.
    stock.pose_source.encoder.convolutions.to(memory_format=torch.contiguous_format)
    adam = torch.optim.Adam(stock.parameters())
    work = {"stock": step(stock, adam, lambda: stock_loss(stock, fresh(images), correction))}
    for precision in ("float32", "bfloat16"):
        config = settings(precision)
        model = build_autoencoder(config, arguments.box, 1)
        difference = gradient_difference(model, stock, images, correction)
        print(f"with convolutions in {precision}, channels last, by {difference}")
        optimiser = build_optimiser(config, model)
        work[f"ours, {precision}"] = step(model, optimiser, lambda m=model: m(fresh(images)).loss.sum())
        work[f"its encoder alone, {precision}"] = encoder_alone(model, images)
    found = quick(work, arguments.rounds)
    print("| step | ms | stock takes |\n| --- | --- | --- |")
    for name, value in found.items():
        print(f"| {name} | {value:.0f} | {found['stock'] / value:.2f} × |")
