"""What a run says while it trains: TensorBoard, metrics.jsonl and a line of progress. Worker 0 only."""

import json
import logging
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from scalecryo.config import Config, describe_run
from scalecryo.data.store import ParticleStore
from scalecryo.data.stream import Batch
from scalecryo.model.autoencoder import AutoEncoder, AutoEncoderOutput
from scalecryo.physics.fft import irfft2_centred
from scalecryo.physics.fsc import resolution
from scalecryo.train.ladder import HalfReferences, RungPlan
from scalecryo.train.memory import PoseMemory
from scalecryo.train.run_folder import RunFolder, trim_metrics
from scalecryo.train.truth import Truth

logger = logging.getLogger(__name__)
RECENT_POSES = 1024
EXAMPLES = 6


class Monitor:
    """Collects a run's scalars and pictures and writes them every so many steps."""

    def __init__(
        self, config: Config, store: ParticleStore, run: RunFolder, model: AutoEncoder, *, start_step: int
    ) -> None:
        self.config = config
        self.run = run
        self.model = model
        run.fetch("metrics.jsonl")
        self._metrics_path = run.local / "metrics.jsonl"
        trim_metrics(self._metrics_path, start_step)
        self._writer = SummaryWriter(str(run.local / "tb"), purge_step=start_step + 1 if start_step else None)
        self._writer.add_text("config", describe_run(config), start_step)
        box_size = model.volume.box_size
        self._truth = Truth.load(config.monitor.truth, store, box_size) if config.monitor.truth else None
        self._recent: deque[tuple[Tensor, Tensor]] = deque()
        self._mark = (start_step, time.monotonic(), 0.0)
        self._started = time.monotonic()
        self._start_step = start_step

    def after_step(self, step: int, loss: Tensor, batch: Batch, output: AutoEncoderOutput, wait_seconds: float) -> None:
        """Record one step; `loss` is the global mean, `wait_seconds` the total time spent waiting for data."""
        self._recent.append((batch.rows[batch.weight > 0], output.rotation.detach()[batch.weight > 0]))
        while sum(len(rows) for rows, *_ in self._recent) > RECENT_POSES and len(self._recent) > 1:
            self._recent.popleft()
        last = step == self.config.train.steps
        if step % self.config.monitor.every == 0 or last:
            self._scalars(step, loss, output, wait_seconds)
        if step % self.config.monitor.pictures_every == 0 or last:
            self._pictures(step, output)

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()

    def _scalars(self, step: int, loss: Tensor, output: AutoEncoderOutput, wait_seconds: float) -> None:
        before, then, waited = self._mark
        now = time.monotonic()
        seconds = max(now - then, 1e-9)
        self._mark = (step, now, wait_seconds)
        values = {
            "loss": float(loss),  # host sync, as are those below: once in monitor.every steps
            "images_per_second": (step - before) * self.config.train.batch_size / seconds,
            "data_wait_share": (wait_seconds - waited) / seconds,
            "pose_spread": float(pose_spread(output.rotation.detach())),
            "gradient_norm/volume": _gradient_norm(self.model.volume),
            "gradient_norm/poses": _gradient_norm(self.model.pose_source),
        }
        _write_values(self._writer, self._metrics_path, step, values)
        left = (self.config.train.steps - step) * (now - self._started) / max(step - self._start_step, 1)
        logger.info(
            "step %d of %d  loss %.4f  %.0f images/s  %.0f s left",
            step, self.config.train.steps, values["loss"], values["images_per_second"], left,
        )  # fmt: skip

    @torch.no_grad()
    def _pictures(self, step: int, output: AutoEncoderOutput) -> None:
        density = self.model.volume.density()
        half = density.shape[-1] // 2
        for axis, name in enumerate(("z", "y", "x")):
            self._writer.add_image(f"slice/{name}", _grey(density.select(axis, half)), step)
            self._writer.add_image(f"projection/{name}", _grey(density.sum(axis)), step)
        pixels = self.model.pixels(output.observed.device)
        observed, predicted = (
            irfft2_centred(pixels.unpack(packed[:EXAMPLES]), pixels.box_size)
            for packed in (output.observed, output.predicted)
        )
        pairs = torch.cat([torch.cat(list(images), -1) for images in (observed, predicted)], -2)
        self._writer.add_image("images/observed_above_predicted", _grey(pairs), step)
        if self._truth is not None:
            rows, rotation = (torch.cat(parts).cpu() for parts in zip(*self._recent, strict=True))
            _write_values(self._writer, self._metrics_path, step, self._truth.compare(rows, rotation, density.cpu()))


class GuidedMonitor:
    """What a guided run says after each rung."""

    def __init__(self, config: Config, store: ParticleStore, run: RunFolder, *, start_step: int) -> None:
        self._store = store
        self._truth_folder = config.monitor.truth
        self._rows = min(config.train.rows or store.count, store.count)
        run.fetch("metrics.jsonl")
        self._path = run.local / "metrics.jsonl"
        trim_metrics(self._path, start_step)
        self._writer = SummaryWriter(str(run.local / "tb"), purge_step=start_step + 1 if start_step else None)
        self._writer.add_text("config", describe_run(config), start_step)
        self._mark = time.monotonic()

    def after_rung(
        self, number: int, plan: RungPlan, state: HalfReferences, memory: PoseMemory, rates: dict[str, float]
    ) -> None:
        """Record one rung: radius, level, half-map resolution, rates, and errors where a truth is known."""
        seconds, self._mark = time.monotonic() - self._mark, time.monotonic()
        level = state.half_maps[0].shape[-1]
        shell, angstrom = resolution(state.curve, level, self._store.level_pixel_size(level), 0.143)
        mean = (state.half_maps[0] + state.half_maps[1]) / 2
        values: dict[str, Any] = {
            "rung/radius": plan.radius, "rung/level": plan.level, "rung/modes": plan.modes, "rung/seconds": seconds,
            "rung/moved_share": state.moved,
            "halves/fsc_0.143_shell": shell, "halves/resolution_angstrom": angstrom,
            "halves/fsc_mean": float(state.curve.mean()), **rates,
        }  # fmt: skip
        if self._truth_folder:
            rows = torch.arange(self._rows)[:: max(1, self._rows // 4000)]
            rotation, _, _, seen = memory.read(rows)
            truth = Truth.load(self._truth_folder, self._store, level)
            values |= truth.compare(rows[seen], rotation[seen], mean.cpu())
        _write_values(self._writer, self._path, number, values)
        half = level // 2
        for axis, name in enumerate(("z", "y", "x")):
            self._writer.add_image(f"slice/{name}", _grey(mean.select(axis, half)), number)
            self._writer.add_image(f"projection/{name}", _grey(mean.sum(axis)), number)
        logger.info(
            "rung %d: polished to %.1f Å, the halves agree to %.2f Å, %.0f %% of the particles moved far, %.1f s",
            number, level * self._store.level_pixel_size(level) / plan.radius, angstrom, 100 * state.moved, seconds,
        )  # fmt: skip

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()


def _write_values(writer: SummaryWriter, path: Path, step: int, values: dict[str, Any]) -> None:
    """The same scalars to the event file and to metrics.jsonl."""
    for name, value in values.items():
        if value is not None:
            writer.add_scalar(name, value, step)
    with path.open("a") as handle:
        handle.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")


def pose_spread(rotation: Float[Tensor, "b 3 3"]) -> Float[Tensor, ""]:
    """How far a batch's rotations spread: 1 - |mean R| / √3; 0 when all agree, near 1 when uniform on SO(3)."""
    return 1.0 - rotation.mean(0).square().sum().div(3.0).sqrt()


def _gradient_norm(module: torch.nn.Module) -> float:
    squares = [p.grad.square().sum() for p in module.parameters() if p.grad is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def _grey(image: Float[Tensor, "y x"]) -> Float[Tensor, "1 y x"]:
    """An image scaled to 0…1 between its 1 % and 99 % quantiles, for TensorBoard."""
    low, high = torch.quantile(image.flatten()[:: max(1, image.numel() // 100_000)], image.new_tensor([0.01, 0.99]))
    return ((image - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)[None].cpu()
