"""A step of the auto-encoder: images/s at each level, and where the time goes.

    python -m tools.bench autoencoder [--batch 64] [--rounds 20]

Defaults of the settings, halves apart beyond the search radius, CTFs and shifts; the maps are solved as often as in
training. Images are noise: the arithmetic is the same. One thread where OMP_NUM_THREADS=1; the processor's time.
"""

import argparse

import torch

from scalecryo.config import Config
from scalecryo.distributed.world import World
from scalecryo.map.background_noise import BackgroundNoise
from scalecryo.map.running_maps import RunningMaps
from scalecryo.model.circle_encoder import CircleEncoder, CircleTransform
from scalecryo.physics.ctf import CtfParameters
from scalecryo.physics.fft import fourier_pixels
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.train.autoencoder_training import AutoEncoderTrainer, StepPlan, Whitening
from scalecryo.train.march import REFRESH
from scalecryo.train.stages.autoencoder import PADDING
from tools.bench._shared import machine, quick

LEVELS = (32, 64, 128)
PARTS = ("encoder", "candidates", "slices", "insert", "solve")


def batch_of(box: int, count: int) -> ParticleImages:
    one, rows = torch.ones(count), torch.arange(count)
    optics = CtfParameters(10_000 * one, 9_000 * one, 0 * one, 300 * one, 2.7 * one, 0.1 * one, 0 * one)
    return ParticleImages(
        rows=rows, half=1 + rows % 2, weight=one, optics_group=rows * 0, pixels=fourier_pixels(box), pixel_size=2.0,
        optics=optics, real=torch.randn(count, box, box),
    )  # fmt: skip


def time_level(box: int, count: int, rounds: int) -> tuple[float, dict[str, float]]:
    """Milliseconds of a step, and each part's share of the time."""
    config, images, world = Config(), batch_of(box, count), World()
    settings = config.encoder
    encoder = CircleEncoder(settings.circles, 256, 4, 16, parameterisation="s2s2", centred=False)
    trainer = AutoEncoderTrainer(
        encoder, CircleTransform(settings.circles), fourier_pixels(32, 13.0), 2.0, rate=1e-3,
        search_radius=config.autoencoder.search_radius, world=world, reduce_dtype="float32",
    )  # fmt: skip
    noise = BackgroundNoise(images.pixels, "cpu")
    noise.add(images.real, images.optics_group, images.weight)
    white = Whitening(noise)
    trainer.set_maps(RunningMaps(box, PADDING, "cpu"))
    trainer.insert_at_random(white(images), torch.Generator())
    radius, every = box / 2 - 1, REFRESH[box // LEVELS[0]]
    norm = white.image_power(images.pixels, radius)

    def steps() -> None:
        for number in range(every):
            for made in ("transforms", "ctf"):  # images come without
                images.__dict__.pop(made, None)
            trainer.step(images, white(images), StepPlan(radius, 1e-3, 0.97, refresh=number == 0), norm)

    steps()
    world.timer.seconds.clear()
    milliseconds = quick({"steps": steps}, rounds)["steps"] / every
    total = sum(world.timer.seconds.get(part, 0.0) for part in PARTS)
    return milliseconds, {part: world.timer.seconds.get(part, 0.0) / total for part in PARTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    print(f"{machine()}; batches of {arguments.batch}\n")
    print(f"| px | ms a step | images/s | {' | '.join(PARTS)} |\n|{' --- |' * (3 + len(PARTS))}")
    for box in LEVELS:
        milliseconds, shares = time_level(box, arguments.batch, arguments.rounds)
        parts = " | ".join(f"{shares[part]:.0%}" for part in PARTS)
        print(f"| {box} | {milliseconds:.1f} | {1e3 * arguments.batch / milliseconds:,.0f} | {parts} |", flush=True)


if __name__ == "__main__":
    main()
