"""Where a run's words, curves and pictures go: the log, TensorBoard's event files and metrics.jsonl."""

import json
import time
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from scalecryo.config import Config, describe_run, flat_settings
from scalecryo.runs.folder import RunFolder, trim_metrics

RESULTS = ("halves/resolution_angstrom", "loss")


class Recorder:
    """Writes curves that go on after a resume: what came after the checkpoint is forgotten first. Worker 0 only."""

    def __init__(self, config: Config, run: RunFolder, *, start_step: int) -> None:
        run.fetch("metrics.jsonl")
        self._path = run.local / "metrics.jsonl"
        trim_metrics(self._path, start_step)
        self._writer = SummaryWriter(str(run.local / "tb"), purge_step=start_step + 1 if start_step else None)
        self._writer.add_text("config", describe_run(config), start_step)
        events = self._writer.file_writer
        if not start_step and events is not None:
            # TensorBoard's table of runs; add_hparams would open a run of its own.
            for summary in hparams(flat_settings(config), dict.fromkeys(RESULTS, 0.0)):
                events.add_summary(summary)

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        """The same scalars to the event file and to metrics.jsonl; lists of numbers to the latter alone."""
        for name, value in values.items():
            if value is not None and not isinstance(value, list):
                self._writer.add_scalar(name, value, step)
        with self._path.open("a") as handle:
            handle.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")

    def conclude(self, values: dict[str, float]) -> None:
        """Add figures of the finished run to the last step: every step stays one line of metrics.jsonl."""
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        row = json.loads(lines.pop()) if lines else {"step": 0, "time": time.time()}
        for name, value in values.items():
            self._writer.add_scalar(name, value, row["step"])
        self._path.write_text("".join(f"{line}\n" for line in [*lines, json.dumps(row | values)]))

    def picture(self, step: int, name: str, image: Float[Tensor, "y x"]) -> None:
        """One picture, scaled to its own range."""
        self._writer.add_image(name, _grey(image), step)

    def pairs(self, step: int, observed: Float[Tensor, "b y x"], predicted: Float[Tensor, "b y x"]) -> None:
        """Images in a row above what was predicted for them, each row scaled to its own range."""
        rows = [torch.cat(list(images), -1).cpu() for images in (observed, predicted)]
        spread = [row.std().clamp_min(1e-12) for row in rows]
        self.picture(
            step, "images/observed_above_predicted", torch.cat([r / s for r, s in zip(rows, spread, strict=True)])
        )

    def histogram(self, step: int, name: str, values: Float[Tensor, " n"]) -> None:
        """How some values are spread; nothing where there are none."""
        if len(values):
            self._writer.add_histogram(name, values, step)

    def volume(self, step: int, density: Float[Tensor, "n n n"]) -> None:
        """Central slices and projections of a map along its three axes."""
        for axis, name in enumerate(("z", "y", "x")):
            self.picture(step, f"slice/{name}", density.select(axis, density.shape[axis] // 2))
            self.picture(step, f"projection/{name}", density.sum(axis))

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()


def _grey(image: Float[Tensor, "y x"]) -> Float[Tensor, "1 y x"]:
    """An image scaled to 0…1 between its 1 % and 99 % quantiles, for TensorBoard."""
    low, high = torch.quantile(image.flatten()[:: max(1, image.numel() // 100_000)], image.new_tensor([0.01, 0.99]))
    return ((image - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)[None].cpu()
