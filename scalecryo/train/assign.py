"""One streamed pass that gives every particle a pose and accumulates two half-maps."""

import torch
from torch import Tensor

from scalecryo.config import Config
from scalecryo.data.store import ParticleStore
from scalecryo.data.stream import sequential
from scalecryo.map.halfmaps import HalfMaps
from scalecryo.model.autoencoder import AutoEncoder, AutoEncoderOutput
from scalecryo.physics.ctf import contrast_transfer
from scalecryo.physics.fft import fourier_pixels, irfft2_centred, rfft2_centred
from scalecryo.train.assignment import Assignment
from scalecryo.train.batches import half_of, particle_inputs, stream_columns, training_level
from scalecryo.train.results import write_results
from scalecryo.train.run_folder import RunFolder
from scalecryo.train.world import World

BATCH = 128
EXAMPLES = 8


@torch.no_grad()
def assign_particles(
    config: Config,
    store: ParticleStore,
    model: AutoEncoder,
    run: RunFolder,
    world: World,
    device: torch.device,
) -> None:
    """Pose every particle, reconstruct both halves at the full box, and let worker 0 write the results.

    The model sees the level that it was trained on; the maps are made from the full box. A pose table knows only
    the rows that it was trained on: the others stay out of the maps and get confidence 0.
    """
    level = training_level(store, config.train.box)
    halves = HalfMaps(store.box_size, device=device)
    pixels = fourier_pixels(store.box_size).to(device)
    posed_rows = config.train.rows if config.pose.source == "table" and config.train.rows else store.count
    collector = _Collector()
    own = {"rank": world.rank, "world_size": world.size, "batch_size": BATCH, "columns": stream_columns(store)}
    for small, full in zip(sequential(store, level, **own), sequential(store, store.box_size, **own), strict=True):
        batch, particles = small.to(device), full.to(device)
        usable = (batch.rows < posed_rows).float()
        batch.rows.clamp_(max=posed_rows - 1)
        output: AutoEncoderOutput = model(particle_inputs(batch, store, level))
        shift = output.shift_px * store.level_pixel_size(level)
        parameters = particle_inputs(particles, store, store.box_size).ctf
        ctf = None
        if parameters is not None:
            ctf = contrast_transfer(parameters, pixels.kx, pixels.ky, store.box_size, store.pixel_size)
        observed = pixels.pack(rfft2_centred(particles.images))
        half = half_of(particles)
        halves.add(observed, output.rotation, shift / store.pixel_size, ctf, usable, half, pixels)
        collector.add(particles.rows, output, shift, correlation(output, model) * usable, half, model)
    world.sum_(*halves.tensors())
    assignment = collector.gather(world)
    if assignment is not None:
        write_results(config, store, run, model, assignment, halves.solve(store.pixel_size))


def correlation(output: AutoEncoderOutput, model: AutoEncoder) -> Tensor:
    """Correlation of each image with its prediction over the compared Fourier pixels, clipped to 0 … 1."""
    weight = model.pixels(output.observed.device).weight.clone()
    weight[0] = 0.0  # the mean carries no shape
    cross = (weight * (output.observed * output.predicted.conj()).real).sum(-1)
    power = (weight * output.observed.abs().square()).sum(-1) * (weight * output.predicted.abs().square()).sum(-1)
    return (cross / power.sqrt().clamp_min(1e-20)).clamp(0, 1)


class _Collector:
    """Gathers what the pass found, batch by batch, and in the end over the workers."""

    def __init__(self) -> None:
        self._rows = [torch.zeros(0, dtype=torch.long)]
        self._rotation = [torch.zeros(0, 3, 3)]
        self._shift = [torch.zeros(0, 2)]
        self._confidence = [torch.zeros(0)]
        self._half = [torch.zeros(0, dtype=torch.long)]
        self._examples: tuple[Tensor, Tensor] | None = None

    def add(
        self,
        rows: Tensor,
        output: AutoEncoderOutput,
        shift: Tensor,
        confidence: Tensor,
        half: Tensor,
        model: AutoEncoder,
    ) -> None:
        self._rows.append(rows.cpu())
        self._rotation.append(output.rotation.cpu())
        self._shift.append(shift.cpu())
        self._confidence.append(confidence.cpu())
        self._half.append(half.cpu())
        if self._examples is None:
            pixels = model.pixels(output.observed.device)
            observed, predicted = (
                irfft2_centred(pixels.unpack(packed[:EXAMPLES]), pixels.box_size).cpu()
                for packed in (output.observed, output.predicted)
            )
            self._examples = observed, predicted

    def gather(self, world: World) -> Assignment | None:
        """Every worker's findings, in the order of the rows, on worker 0; None elsewhere. Collective."""
        columns = (self._rows, self._rotation, self._shift, self._confidence, self._half)
        gathered = [world.gather(torch.cat(parts)) for parts in columns]
        if not world.leads:
            return None
        rows, *values = (torch.cat(parts) for parts in gathered)
        order = rows.argsort()
        examples = self._examples or (torch.zeros(0, 1, 1), torch.zeros(0, 1, 1))
        return Assignment(*(value[order] for value in values), *examples)
