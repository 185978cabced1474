"""One streamed pass that gives every particle a pose and accumulates two half-maps."""

import dataclasses
import logging
from collections.abc import Iterator
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.config import Config
from scalecryo.data.selection.subset import Subset
from scalecryo.data.storage.store import ParticleStore
from scalecryo.data.streaming.stream import Batch, sequential
from scalecryo.distributed.world import World
from scalecryo.map.halfmaps import HalfMaps
from scalecryo.physics.fft import FourierPixels, fourier_pixels, irfft2_centred, rfft2_centred
from scalecryo.physics.image_formation import CtfWeightedImages, ctf_weighted_on_padded_box, filtered
from scalecryo.physics.poses import Assignment
from scalecryo.runs.folder import RunFolder
from scalecryo.runs.results import write_results
from scalecryo.train.batches import chosen_weight, half_of, particle_inputs, stream_columns
from scalecryo.train.posed import Posed
from scalecryo.train.posed_parts import PosedParts

logger = logging.getLogger(__name__)
BATCH = 256
EXAMPLES = 8


class Poser(Protocol):
    """Finds poses of particles that stream by."""

    @property
    def level(self) -> int:
        """The box that it wants to see."""

    def pose(self, batch: Batch, *, pictures: bool) -> Posed:
        """Poses of a batch at that level; a few pictures where asked for."""


@torch.no_grad()
def assign_particles(
    config: Config,
    store: ParticleStore,
    poser: Poser,
    run: RunFolder,
    world: World,
    device: torch.device,
    *,
    identity: str,
    subset: Subset | None = None,
    learned: Tensor | None = None,
) -> None:
    """Pose every particle, reconstruct both halves at the full box, and let worker 0 write the results.

    A pass that was killed goes on where it stood, if it was one of the same identity.

    Args:
        identity: of what poses: the training data and the checkpoint's step.
        subset: the particles that enter the maps; the others are posed only.
        learned: a trained volume to write beside the reconstruction.
    """
    halves = HalfMaps(store.box_size, device=device)
    pixels = fourier_pixels(store.box_size).to(device)
    collector = _Collector()
    parts = PosedParts(run, identity, store.count)
    if parts.rows_before:
        logger.info("assign: %d particles were posed before", parts.rows_before)
    for small, full in _both_levels(store, poser.level, world, device):
        before = parts.posed(small.rows)
        # The first batch is posed in any case: its pictures are wanted.
        if before is not None and not collector.wants_pictures:
            posed = before
        else:
            posed = poser.pose(small, pictures=collector.wants_pictures)
        if before is None:
            parts.note(full.rows, posed)
        half = half_of(full, config.train.half > 0)
        weight = posed.weight * chosen_weight(subset, full.rows)
        images = _filtered(full, store, pixels)
        halves.add(images, posed.rotation, posed.shift / store.pixel_size, weight, half, pixels)
        collector.add(full.rows, posed, half)
    parts.flush()
    if world.size > 1:
        halves.reduce(world.all_reduce_, pixels.radius_limit)
    assignment = collector.gather(world)
    if assignment is not None:
        write_results(config, store, run, assignment, halves.solve(store.pixel_size), learned)
        parts.remove()


def _filtered(batch: Batch, store: ParticleStore, pixels: FourierPixels) -> CtfWeightedImages:
    """Full images times their CTF."""
    inputs = particle_inputs(batch, store, store.box_size)
    if inputs.ctf is not None:
        return ctf_weighted_on_padded_box(inputs.images, inputs.ctf, store.pixel_size, pixels)
    return filtered(pixels.pack(rfft2_centred(inputs.images)), None)


def _both_levels(store: ParticleStore, level: int, world: World, device: torch.device) -> Iterator[tuple[Batch, Batch]]:
    """This worker's particles at the poser's level and at the full box."""

    def read(box: int) -> Iterator[Batch]:
        columns = stream_columns(store)
        return sequential(
            store, box, rank=world.rank, world_size=world.size, batch_size=BATCH, columns=columns, device=device
        )

    if level == store.box_size:
        return ((batch, dataclasses.replace(batch, rows=batch.rows.clone())) for batch in read(level))
    return zip(read(level), read(store.box_size), strict=True)


def pictures_of(observed: Tensor, predicted: Tensor, pixels: FourierPixels) -> tuple[Tensor, Tensor]:
    """The first few images and predictions, packed, as real-space pictures."""
    first, second = (
        irfft2_centred(pixels.unpack(packed[:EXAMPLES]), pixels.box_size).cpu() for packed in (observed, predicted)
    )
    return first, second


def correlation(observed: Tensor, predicted: Tensor, weight: Float[Tensor, " p"]) -> Float[Tensor, " b"]:
    """Correlation of images with their predictions over packed Fourier pixels, clipped to 0 … 1."""
    weight = weight.clone()
    weight[0] = 0.0  # the mean carries no shape
    cross = (weight * (observed * predicted.conj()).real).sum(-1)
    power = (weight * observed.abs().square()).sum(-1) * (weight * predicted.abs().square()).sum(-1)
    return (cross / power.sqrt().clamp_min(1e-20)).clamp(0, 1)


class _Collector:
    """Gathers what the pass found, batch by batch, and in the end over the workers."""

    def __init__(self) -> None:
        self._rows = [torch.zeros(0, dtype=torch.long)]
        self._rotation = [torch.zeros(0, 3, 3)]
        self._shift = [torch.zeros(0, 2)]
        self._confidence = [torch.zeros(0)]
        self._half = [torch.zeros(0, dtype=torch.long)]
        self._pictures: tuple[Tensor, Tensor] | None = None

    @property
    def wants_pictures(self) -> bool:
        return self._pictures is None

    def add(self, rows: Tensor, posed: Posed, half: Tensor) -> None:
        self._rows.append(rows.cpu())
        self._rotation.append(posed.rotation.cpu())
        self._shift.append(posed.shift.cpu())
        self._confidence.append(posed.confidence.cpu())
        self._half.append(half.cpu())
        self._pictures = self._pictures or posed.pictures

    def gather(self, world: World) -> Assignment | None:
        """Every worker's findings, in the order of the rows, on worker 0; None elsewhere. Collective."""
        columns = (self._rows, self._rotation, self._shift, self._confidence, self._half)
        gathered = [world.gather(torch.cat(parts)) for parts in columns]
        if not world.is_leader:
            return None
        order = torch.cat(gathered[0]).argsort()
        rotation, shift, confidence, half = (torch.cat(parts)[order] for parts in gathered[1:])
        observed, predicted = self._pictures or (torch.zeros(0, 1, 1), torch.zeros(0, 1, 1))
        return Assignment(rotation, shift, confidence, half, observed, predicted)
