"""A training step of the paper's encoder beside its stock composition, in one process.

    python -m tools.bench step [--box 128] [--batch 32] [--rounds 5]

Stock: float32, pad, rfftn and grid_sample under autograd, CTF and shift by tensors, Adam as it comes. Ours: the same
model built from the configuration, with float32 and with bfloat16 convolutions. First gradients are compared; then they
take turns (see slice.py for what a time is), beside the encoder without the rest: the bound of its precision.
"""

import argparse
from collections.abc import Callable

import torch
from scalecryo.model.inputs import ParticleInputs
from torch import Tensor

from scalecryo.config import Config, config_from_dict
from scalecryo.model.autoencoder import AutoEncoder, build_autoencoder
from scalecryo.physics.ctf import CtfParameters, contrast_transfer
from scalecryo.physics.fft import rfft2_centred
from scalecryo.physics.fourier_slice import gridding_correction
from scalecryo.physics.image_formation import form_images
from scalecryo.train.loop import build_optimiser
from tools.bench._shared import machine, quick
from tools.bench.slice import grid_sampled


def particles(box: int, batch: int) -> ParticleInputs:
    one, generator = torch.ones(batch), torch.Generator().manual_seed(0)
    optics = CtfParameters(10_000 * one, 9_500 * one, 0 * one, 300 * one, 2.7 * one, 0.1 * one, 0 * one)
    return ParticleInputs(torch.randn(batch, box, box, generator=generator), torch.arange(batch), optics)


def stock_loss(model: AutoEncoder, inputs: ParticleInputs, correction: Tensor) -> Tensor:
    """The same loss by the composition that one would write first."""
    volume, pixels = model.volume, model.pixels(inputs.images.device)
    n, d = volume.box_size, volume.padded_box
    padded = torch.nn.functional.pad(volume.density() * correction, [(d - n) // 2] * 6)
    transform = torch.fft.rfftn(torch.fft.ifftshift(padded))
    found = model.pose_source(inputs)
    scaled = pixels.kx * volume.scale, pixels.ky * volume.scale
    slices = grid_sampled(transform, found.rotation[:, 0], *scaled)
    ctf = contrast_transfer(inputs.ctf, pixels.kx, pixels.ky, n, model.pixel_size)
    predicted = form_images(slices, ctf, found.shift_px[:, 0], pixels.kx, pixels.ky, n)
    residual = predicted - pixels.pack(rfft2_centred(inputs.images))
    return ((residual.abs() ** 2) * pixels.weight).sum() / n**4


def settings(precision: str) -> Config:
    return config_from_dict({"pose": {"source": "encoder"}, "encoder": {"precision": precision}})


def step(model: AutoEncoder, optimiser: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Callable[[], object]:
    def once() -> None:
        optimiser.zero_grad(set_to_none=True)
        loss().backward()
        optimiser.step()

    return once


def gradient_difference(ours: AutoEncoder, stock: AutoEncoder, inputs: ParticleInputs, correction: Tensor) -> str:
    """Between the two compositions on the same parameters."""
    ours.load_state_dict(stock.state_dict())
    found = torch.autograd.grad(ours(inputs).loss.sum(), list(ours.parameters()))
    expected = torch.autograd.grad(stock_loss(stock, inputs, correction), list(stock.parameters()))
    pairs = list(zip(found, expected, strict=True))
    largest = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    length = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    return f"at most {largest:.1e} of a tensor's largest entry, {length:.1e} of its length"


def encoder_alone(model: AutoEncoder, inputs: ParticleInputs) -> Callable[[], object]:
    """Forward and backward of the encoder and nothing else: what no step with these convolutions can be faster than."""

    def once() -> None:
        model.zero_grad(set_to_none=True)
        model.pose_source(inputs).rotation.sum().backward()

    return once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--box", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    inputs = particles(arguments.box, arguments.batch)
    print(f"{machine()}, box {arguments.box}, B = {arguments.batch}, padding 2")
    stock = build_autoencoder(settings("float32"), arguments.box, 1.5, 1)
    correction = gridding_correction(arguments.box, stock.volume.scale)
    difference = gradient_difference(stock, stock, inputs, correction)
    print(f"gradients of the composition differ from the stock's by {difference}")
    # The stock encoder keeps its tensors in torch's own order.
    stock.pose_source.encoder.convolutions.to(memory_format=torch.contiguous_format)
    work = {"stock": step(stock, torch.optim.Adam(stock.parameters()), lambda: stock_loss(stock, inputs, correction))}
    for precision in ("float32", "bfloat16"):
        config = settings(precision)
        model = build_autoencoder(config, arguments.box, 1.5, 1)
        difference = gradient_difference(model, stock, inputs, correction)
        print(f"with convolutions in {precision}, channels last, by {difference}")
        work[f"ours, {precision}"] = step(model, build_optimiser(config, model), lambda m=model: m(inputs).loss.sum())
        work[f"its encoder alone, {precision}"] = encoder_alone(model, inputs)
    found = quick(work, arguments.rounds)
    print("| step | ms | stock takes |\n| --- | --- | --- |")
    for name, value in found.items():
        print(f"| {name} | {value:.0f} | {found['stock'] / value:.2f} × |")
