"""A training step of the paper's encoder beside its stock composition, in one process.

    python tools/bench_step.py [--box 128] [--batch 32] [--rounds 5]

Stock: float32, pad, rfftn and grid_sample under autograd, CTF and shift by tensors, Adam as it comes. Ours: the same
model built from the configuration, with float32 and with bfloat16 convolutions. First the gradients of the two are
compared; then they take turns (see bench_slice.py for what a time is).
"""

import argparse
import os
from collections.abc import Callable

import torch
from bench_slice import grid_sampled, quick
from torch import Tensor

from scalecryo.config import Config, config_from_dict
from scalecryo.model.autoencoder import AutoEncoder, build_autoencoder
from scalecryo.model.inputs import ParticleInputs
from scalecryo.physics.ctf import CtfParameters, contrast_transfer
from scalecryo.physics.fft import rfft2_centred
from scalecryo.physics.image_formation import form_images
from scalecryo.train.loop import build_optimiser


def particles(box: int, batch: int) -> ParticleInputs:
    one, generator = torch.ones(batch), torch.Generator().manual_seed(0)
    optics = CtfParameters(10_000 * one, 9_500 * one, 0 * one, 300 * one, 2.7 * one, 0.1 * one, 0 * one)
    return ParticleInputs(torch.randn(batch, box, box, generator=generator), torch.arange(batch), optics)


def stock_loss(model: AutoEncoder, inputs: ParticleInputs) -> Tensor:
    """The same loss by the composition that one would write first."""
    volume, pixels = model.volume, model.pixels(inputs.images.device)
    n, d = volume.box_size, volume.padded_box
    padded = torch.nn.functional.pad(volume.density() * volume.correction, [(d - n) // 2] * 6)
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


def gradient_difference(model: AutoEncoder, inputs: ParticleInputs) -> float:
    """Largest difference between the two compositions' gradients, relative to each one's largest entry."""
    parameters = list(model.parameters())
    ours = torch.autograd.grad(model(inputs).loss.sum(), parameters)
    stock = torch.autograd.grad(stock_loss(model, inputs), parameters)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, stock, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--box", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    inputs, work = particles(arguments.box, arguments.batch), {}
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, "
          f"torch {torch.__version__}, box {arguments.box}, B = {arguments.batch}, padding 2")  # fmt: skip
    for name, precision in (("stock", "float32"), ("ours, float32", "float32"), ("ours, bfloat16", "bfloat16")):
        config = settings(precision)
        model = build_autoencoder(config, arguments.box, 1.5, 1)
        if name == "stock":
            print(f"gradients differ by at most {gradient_difference(model, inputs):.1e} of the largest entry")
            # The stock encoder keeps its tensors in torch's own order.
            model.pose_source.encoder.convolutions.to(memory_format=torch.contiguous_format)
            optimiser = torch.optim.Adam(model.parameters())
            work[name] = step(model, optimiser, lambda model=model: stock_loss(model, inputs))
        else:
            work[name] = step(model, build_optimiser(config, model), lambda model=model: model(inputs).loss.sum())
    found = quick(work, arguments.rounds)
    print("| step | ms | stock takes |\n| --- | --- | --- |")
    for name, value in found.items():
        print(f"| {name} | {value:.0f} | {found['stock'] / value:.2f} × |")


if __name__ == "__main__":
    main()
