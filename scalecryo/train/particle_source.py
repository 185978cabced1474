"""The training particles as one worker reads them: what a stage asks for, and the images that it gets."""

from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.config import Config
from scalecryo.data.io.retry import RetryPolicy
from scalecryo.data.particles import ABERRATION_COLUMNS, CTF_COLUMNS
from scalecryo.data.selection.partition import Partition
from scalecryo.data.selection.subset import Subset, choose
from scalecryo.data.storage.store import ParticleStore
from scalecryo.data.streaming.order import BatchOrder
from scalecryo.data.streaming.stream import Batch, ParticleStream, StreamMetrics, owned_rows, sequential
from scalecryo.distributed.world import World
from scalecryo.map.solvent import SolventMask
from scalecryo.physics.aberrations import ImageAberrations, corrected_images, corrected_shift
from scalecryo.physics.ctf import CtfParameters
from scalecryo.physics.fft import FourierPixels, fourier_pixels
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import Poses
from scalecryo.physics.symmetry import PointGroup
from scalecryo.pose.search import shift_grid
from scalecryo.runs.folder import RunFolder
from scalecryo.runs.solvent_mask import load_solvent_mask
from scalecryo.train.requirements import one_assembly, training_level

SHIFT_SHARE, LEAST_SHIFT_RADIUS = 0.05, 12.0  # of the box, and Å: farther, and the start's grid of shifts is too coarse
MOST_SHIFT_SHARE = 0.2  # of the box: a particle farther off is cut by its edge


@dataclass(frozen=True)
class BatchRequest:
    """What a stage wants to see in its next pass.

    Attributes:
        pixels: Fourier pixels of each level that is read; a batch is as many records of the same particles.
        batch_size: particles in a batch, of all workers where shuffled, of each worker where in order.
        shuffled: training rows in the sampler's order; else all rows in the store's.
        start: batch to begin with, counted over epochs (shuffled only).
        batches: in the pass; None: one epoch, or all.
        training_rows: only the first `train.rows` (always where shuffled).
        whole: whether every worker reads whole batches by itself (shuffled only); else its share of each.
        padding: whether padding rows are kept, so that every batch has the same shape.
    """

    pixels: tuple[FourierPixels, ...]
    batch_size: int
    shuffled: bool = True
    start: int = 0
    batches: int | None = None
    training_rows: bool = True
    whole: bool = False
    padding: bool = False


@dataclass(frozen=True)
class RunContext:
    """What a run works on: settings, store, folder, workers, device, and which particles take part."""

    config: Config
    store: ParticleStore
    run: RunFolder
    world: World
    device: torch.device
    subset: Subset | None
    partition: Partition

    @classmethod
    def of(
        cls,
        config: Config,
        store: ParticleStore,
        run: RunFolder,
        world: World,
        device: torch.device,
        *,
        same_store: bool = True,
    ) -> "RunContext":
        """With the particles that the configuration chooses; all of a store that the run was not trained on.

        Raises:
            ConfigError: it chooses none, or by something that cannot be read.
            StoreError: the store is damaged.
        """
        subset = choose(config.train, store) if same_store else None
        rows = min(config.train.rows or store.count, store.count) if same_store else store.count
        partition = Partition.of(store, subset, rows, device, new_halves=config.train.half > 0)
        return cls(config, store, run, world, device, subset, partition)

    @property
    def rows(self) -> int:
        """The first so many rows of the store may take part."""
        return min(self.config.train.rows or self.store.count, self.store.count)

    @property
    def count(self) -> int:
        """Number of particles that take part."""
        return self.rows if self.subset is None else self.subset.count

    @cached_property
    def data_hash(self) -> str:
        """What is trained on: the store, and which of its particles."""
        own = self.store.content_hash
        return own if self.subset is None else f"{own}:{self.subset.digest}"

    @cached_property
    def solvent(self) -> SolventMask | None:
        """Where the user says that the particle lies: train.mask and train.diameter_a; None: nothing was said.

        Raises:
            ConfigError, InputError, MissingInputError: see `load_solvent_mask`.
        """
        return load_solvent_mask(self.config.train, self.store)

    @cached_property
    def point_group(self) -> PointGroup | None:
        """train.symmetry; None: C1."""
        group = PointGroup.of(self.config.train.symmetry, self.device)
        return group if len(group) > 1 else None

    @property
    def levels(self) -> tuple[int, ...]:
        """The store's levels up to train.box."""
        box = self.config.train.box
        return tuple(level for level in self.store.levels if not box or level <= box)

    @property
    def training_level(self) -> int:
        """The level that train.box names.

        Raises:
            ConfigError: the store has no such level.
        """
        return training_level(self.config, self.store)

    @property
    def fit_shift(self) -> bool:
        """Whether shifts are unknown."""
        return not self.config.pose.centred

    @property
    def one_assembly(self) -> bool:
        """See `requirements.one_assembly`."""
        return one_assembly(self.config)

    def pixels(self, level: int, radius: float | None = None) -> FourierPixels:
        """Fourier pixels of a level on the run's device."""
        return fourier_pixels(level, radius).to(self.device)

    @property
    def shift_radius(self) -> float:
        """Largest shift that is searched at first, Å."""
        return self.config.guided.shift_radius_a or max(LEAST_SHIFT_RADIUS, SHIFT_SHARE * self._box_a)

    @property
    def most_shift_radius(self) -> float:
        """Largest shift that may be searched, Å: what the user says, or as far as the images suggest."""
        return self.config.guided.shift_radius_a or max(self.shift_radius, MOST_SHIFT_SHARE * self._box_a)

    @property
    def _box_a(self) -> float:
        level = max(self.store.levels)
        return level * self.store.level_pixel_size(level)

    def shift_grid_px(self, level: int, radius_a: float) -> Float[Tensor, "t 2"]:
        """Shift hypotheses in px of a level: none where particles are centred, else a disc, about 1.5 px apart."""
        if not self.fit_shift:
            return torch.zeros(1, 2, device=self.device)
        radius = radius_a / self.store.level_pixel_size(level)
        return shift_grid(radius, min(1.5, max(radius / 2, 0.5))).to(self.device)

    def order(self, level: int, batch_size: int) -> BatchOrder:
        """The order of shuffled batches: a pure function of the configuration, the store and the subset."""
        return BatchOrder(
            count=self.rows,
            block_rows=self.store.block_rows(level),
            batch_size=batch_size,
            seed=self.config.train.seed,
            max_lanes=self.config.stream.lanes,
            window_blocks=self.config.stream.window_blocks,
            subset=self.subset,
        )

    def stream(self, level: int, batch_size: int, start: int, *, whole: bool = False) -> ParticleStream:
        """This worker's stream of shuffled batches, or of its share of them, at a level from a global step on."""
        stream, world = self.config.stream, World() if whole else self.world
        return ParticleStream(
            self.store, level, self.order(level, batch_size), rank=world.rank, world_size=world.size,
            start_step=start, columns=stream_columns(self.store), threads=stream.threads, device=self.device,
            prefetch_bytes=stream.prefetch_mib << 20, patience=RetryPolicy(seconds=stream.retry_seconds),
        )  # fmt: skip

    def images(self, batch: Batch, pixels: FourierPixels, *, padding: bool = False) -> ParticleImages:
        """A batch of the store as images; padding rows are dropped unless they are asked for."""
        columns, rows, real, weight = batch.columns, batch.rows, batch.images, batch.weight
        pixel_size = self.store.level_pixel_size(pixels.box_size)
        if not padding:
            present = weight > 0
            if not bool(present.all()):  # host sync: the ragged end of an epoch
                columns = {name: values[present] for name, values in columns.items()}
                rows, real, weight = rows[present], real[present], weight[present]
        poses = Poses(columns["rotation"], columns["shift"]) if self.store.has_pose else None
        if self.store.has_aberrations:
            magnification = columns["magnification"]
            real = corrected_images(real, ImageAberrations(columns["odd_phase"], magnification), pixel_size)
            poses = poses and replace(poses, shift=corrected_shift(poses.shift, magnification))
        return ParticleImages(
            rows=rows,
            half=self.partition.half(rows, columns["half"]),
            weight=weight,
            optics_group=columns["optics_group"],
            pixels=pixels,
            pixel_size=pixel_size,
            optics=_optics(columns) if self.store.has_ctf else None,
            poses=poses,
            real=real,
            recorded_on=columns.get("micrograph"),
        )

    def chosen(self, rows: Tensor) -> Float[Tensor, " b"]:
        """1 for the rows that take part in the maps, else 0."""
        if self.subset is None:
            return torch.ones(len(rows), device=rows.device)
        at = rows.cpu().numpy()  # host sync
        inside = at < self.subset.store_rows
        chosen = inside & self.subset.contains(np.where(inside, at, 0))
        return torch.from_numpy(chosen).to(rows.device, torch.float32)


def stream_columns(store: ParticleStore) -> tuple[str, ...]:
    """The particle columns that images are made with."""
    ctf, pose = CTF_COLUMNS if store.has_ctf else (), ("rotation", "shift") if store.has_pose else ()
    micrograph = ("micrograph",) if "micrograph" in store.columns else ()
    return ("half", "optics_group", *micrograph, *ctf, *pose, *(ABERRATION_COLUMNS if store.has_aberrations else ()))


def _optics(columns: Mapping[str, Tensor]) -> CtfParameters:
    """What the CTF is made of; the even phase only where it does something."""
    even = columns.get("even_phase")
    if even is not None and not bool(even.any()):  # host sync
        even = None
    return CtfParameters(**{name: columns[name] for name in CTF_COLUMNS}, even_phase=even)


class ParticleReader:
    """Opens what stages ask for. A shuffled stream stays open while requests go on where it stands."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._stream: ParticleStream | None = None
        self._kind: tuple[int, int, bool] | None = None
        self._closed = StreamMetrics(0.0, 0, 0, 0, 0, 0)

    def batches(self, request: BatchRequest) -> Iterator[tuple[ParticleImages, ...]]:
        """The batches of one pass, this worker's share of each."""
        if request.shuffled:
            (pixels,) = request.pixels
            stream = self._shuffled(request)
            count = request.batches
            if count is None:
                count = self._context.order(pixels.box_size, request.batch_size).steps_per_epoch
            for _ in range(count):
                yield (self._context.images(next(stream), pixels, padding=request.padding),)
        else:
            read = [self._in_order(pixels, request) for pixels in request.pixels]
            for batches in zip(*read, strict=True):
                yield tuple(self._context.images(batch, p) for batch, p in zip(batches, request.pixels, strict=True))

    def count(self, request: BatchRequest) -> int:
        """How many batches a pass has for this worker."""
        context = self._context
        if request.batches is not None:
            return request.batches
        if request.shuffled:
            return context.order(request.pixels[0].box_size, request.batch_size).steps_per_epoch
        rows = context.rows if request.training_rows else context.store.count
        return -(-rows // (context.world.size * request.batch_size))

    def most(self, request: BatchRequest) -> int:
        """How many batches a pass has for the worker that has most of them."""
        if request.shuffled:
            return self.count(request)
        context = self._context
        limit, size = context.rows if request.training_rows else None, context.world.size
        owned = (len(owned_rows(context.store, rank, size, limit)) for rank in range(size))
        return max(-(-rows // request.batch_size) for rows in owned)

    @property
    def metrics(self) -> StreamMetrics:
        """What shuffled streams have done so far."""
        if self._stream is None:
            return self._closed
        return StreamMetrics(
            *(a + b for a, b in zip(astuple(self._closed), astuple(self._stream.metrics), strict=True))
        )

    def close(self) -> None:
        """Stop reading ahead."""
        if self._stream is not None:
            self._closed = replace(self.metrics, bytes_ahead=0, bytes_in_flight=0)
            self._stream.close()
        self._stream = None

    def _shuffled(self, request: BatchRequest) -> ParticleStream:
        level, size, whole = kind = (request.pixels[0].box_size, request.batch_size, request.whole)
        if self._stream is None or self._kind != kind or self._stream.step != request.start:
            self.close()
            self._stream, self._kind = self._context.stream(level, size, request.start, whole=whole), kind
        return self._stream

    def _in_order(self, pixels: FourierPixels, request: BatchRequest) -> Iterator[Batch]:
        context = self._context
        return sequential(
            context.store, pixels.box_size, rank=context.world.rank, world_size=context.world.size,
            batch_size=request.batch_size, columns=stream_columns(context.store),
            rows_limit=context.rows if request.training_rows else None, device=context.device,
        )  # fmt: skip
