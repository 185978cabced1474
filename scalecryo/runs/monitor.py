"""What an auto-encoder's run says while it trains: scalars, pictures and a line of progress. Worker 0 only."""

import logging
import time
from collections import deque

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.config import Config
from scalecryo.data.storage.store import ParticleStore
from scalecryo.data.streaming.stream import Batch, StreamMetrics
from scalecryo.distributed.world import World
from scalecryo.model.autoencoder import AutoEncoder, AutoEncoderOutput
from scalecryo.physics.fft import irfft2_centred
from scalecryo.runs.folder import RunFolder
from scalecryo.runs.recorder import Recorder
from scalecryo.runs.resources import memory_mib
from scalecryo.runs.truth import Truth

logger = logging.getLogger(__name__)
RECENT_POSES = 1024
EXAMPLES = 6


class Monitor:
    """Collects a run's scalars and pictures and writes them every so many steps."""

    def __init__(
        self,
        config: Config,
        store: ParticleStore,
        run: RunFolder,
        model: AutoEncoder,
        *,
        start_step: int,
        world: World,
    ) -> None:
        self.config = config
        self.model = model
        self._world = world
        box_size = model.volume.box_size
        self._truth = Truth.load(config.monitor.truth, store, box_size) if config.monitor.truth else None
        self._recorder = Recorder(config, run, start_step=start_step)
        self._recent: deque[tuple[Tensor, Tensor]] = deque()
        self._mark = (start_step, time.monotonic(), 0.0)
        self._started = time.monotonic()
        self._start_step = start_step
        self._reduced = (0.0, 0)

    def after_step(
        self, step: int, loss: Tensor, batch: Batch, output: AutoEncoderOutput, stream: StreamMetrics
    ) -> None:
        """Record one step; `loss` is the global mean."""
        self._recent.append((batch.rows[batch.weight > 0], output.rotation.detach()[batch.weight > 0]))
        while sum(len(rows) for rows, *_ in self._recent) > RECENT_POSES and len(self._recent) > 1:
            self._recent.popleft()
        last = step == self.config.train.steps
        if step % self.config.monitor.every == 0 or last:
            self._scalars(step, loss, output, stream)
        if step % self.config.monitor.pictures_every == 0 or last:
            self._pictures(step, output)

    def close(self) -> None:
        """Flush the event file."""
        self._recorder.close()

    def _scalars(self, step: int, loss: Tensor, output: AutoEncoderOutput, stream: StreamMetrics) -> None:
        before, then, waited = self._mark
        now = time.monotonic()
        seconds = max(now - then, 1e-9)
        self._mark = (step, now, stream.wait_seconds)
        values = {
            "loss": float(loss),  # host sync, as are those below: once in monitor.every steps
            "images_per_second": (step - before) * self.config.train.batch_size / seconds,
            "images_per_second_per_worker": (step - before) * self.config.train.batch_size / seconds / self._world.size,
            "data_wait_share": (stream.wait_seconds - waited) / seconds,
            "stream/retries": stream.retries,
            "stream/mib_read": stream.bytes_read / 2**20,
            "pose_spread": float(pose_spread(output.rotation.detach())),
            "gradient_norm/volume": _gradient_norm(self.model.volume),
            "gradient_norm/poses": _gradient_norm(self.model.pose_source),
            "world_size": self._world.size,
            **self._reductions(step - before),
            **memory_mib(output.rotation.device),
        }
        self._recorder.scalars(step, values)
        left = (self.config.train.steps - step) * (now - self._started) / max(step - self._start_step, 1)
        logger.info(
            "step %d of %d  loss %.4f  %.0f images/s  %.0f s left",
            step, self.config.train.steps, values["loss"], values["images_per_second"], left,
        )  # fmt: skip

    def _reductions(self, steps: int) -> dict[str, float]:
        """Seconds that this worker waited for the others' gradients, and what it sent, a step."""
        if self._world.size == 1:
            return {}
        timer = self._world.timer
        seconds, sent = timer.seconds.get("reduce", 0.0), timer.reduced_bytes
        before, self._reduced = self._reduced, (seconds, sent)
        return {
            "reduce/seconds_per_step": (seconds - before[0]) / max(steps, 1),
            "reduce/mib_per_step": (sent - before[1]) / 2**20 / max(steps, 1),
        }

    @torch.no_grad()
    def _pictures(self, step: int, output: AutoEncoderOutput) -> None:
        density = self.model.volume.density()
        self._recorder.volume(step, density)
        pixels = self.model.pixels(output.observed.device)
        observed, predicted = (
            irfft2_centred(pixels.unpack(packed[:EXAMPLES]), pixels.box_size)
            for packed in (output.observed, output.predicted)
        )
        self._recorder.pairs(step, observed, predicted)
        rotation = torch.cat([found for _, found in self._recent]).cpu()
        self._recorder.histogram(step, "poses/tilt_deg", torch.rad2deg(torch.arccos(rotation[:, 2, 2].clamp(-1, 1))))
        if self._truth is not None:
            rows, rotation = (torch.cat(parts).cpu() for parts in zip(*self._recent, strict=True))
            self._recorder.scalars(step, self._truth.compare(rows, rotation, density.cpu()))


def pose_spread(rotation: Float[Tensor, "b 3 3"]) -> Float[Tensor, ""]:
    """How far a batch's rotations spread: 1 - |mean R| / √3; 0 when all agree, near 1 when uniform on SO(3)."""
    return 1.0 - rotation.mean(0).square().sum().div(3.0).sqrt()


def _gradient_norm(module: torch.nn.Module) -> float:
    squares = [p.grad.square().sum() for p in module.parameters() if p.grad is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0
