"""Where a run's words, curves and pictures go: the log, TensorBoard's event files and metrics.jsonl."""

import csv
import io
import json
import struct
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from tensorboard.compat.proto.summary_pb2 import (
    DATA_CLASS_BLOB_SEQUENCE,
    DATA_CLASS_SCALAR,
    Summary,
    SummaryMetadata,
)
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from scalecryo import __version__
from scalecryo.config import Config, describe_run, flat_settings
from scalecryo.data.io import urls
from scalecryo.evaluate.report import Surface, fsc_figure, surface_picture
from scalecryo.evaluate.report.figure import png_of_pixels
from scalecryo.evaluate.report.views import view_picture
from scalecryo.physics.fft import fourier_resize_3d
from scalecryo.physics.fsc import resolution
from scalecryo.physics.mask import soft_sphere
from scalecryo.runs.folder import RunFolder, trim_metrics
from scalecryo.runs.tags import COMPARED, COMPARED_OF_DESCENT, FINAL_FSC, PICTURES, Tag, tag_of

SURFACE_GRID, SURFACE_PICTURE = 64, 160  # voxels across the grid, pixels across each side
SURFACE_BOX = 96  # px, to which larger maps are cropped in Fourier space first
FINAL_PICTURES = ("surface", "slices", "fsc", "fsc_cones", "orientations", "projections", "confidence", "classes")


class Recorder:
    """Writes curves that go on after a resume: what came after the checkpoint is forgotten first. Worker 0 only.

    However many workers, and however often it was resumed, a run is one folder of event files: one curve.
    """

    def __init__(self, config: Config, run: RunFolder, *, start_step: int) -> None:
        run.fetch("metrics.jsonl")
        self._run, self._path = run, run.local / "metrics.jsonl"
        trim_metrics(self._path, start_step)
        self._writer = SummaryWriter(str(run.local / "tb"), purge_step=start_step + 1 if start_step else None)
        self._writer.add_text("config", describe_run(config), start_step)
        events = self._writer.file_writer
        if not start_step and events is not None:
            # TensorBoard's table of runs; add_hparams would open a run of its own.
            compared = COMPARED if config.recipe in ("guided", "poses") else COMPARED_OF_DESCENT
            for summary in hparams(_compared_settings(config), {tag_of(name).name: 0.0 for name in compared}):
                events.add_summary(summary)

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        """The same scalars to the event file and to metrics.jsonl; lists of numbers to the latter alone."""
        for name, value in values.items():
            if value is not None and not isinstance(value, list):
                self._scalar(step, tag_of(name), value)
        with self._path.open("a") as handle:
            handle.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")

    def conclude(self, values: dict[str, float]) -> None:
        """Add figures of the finished run to the last step: every step stays one line of metrics.jsonl.

        The report's pictures and the final correlation, by shell, are shown too.
        """
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        row = json.loads(lines.pop()) if lines else {"step": 0, "time": time.time()}
        step = int(row["step"])
        for name, value in values.items():
            self._scalar(step, tag_of(name), value)
        self._path.write_text("".join(f"{line}\n" for line in [*lines, json.dumps(row | values)]))
        for name in FINAL_PICTURES:
            if urls.exists(path := self._run.path(f"{name}.png")):
                self._png(step, Tag(f"final/{name}", name, "as in report.html"), urls.read_bytes(path))
        if urls.exists(path := self._run.path("fsc.csv")):
            for line in csv.DictReader(io.StringIO(urls.read_text(path))):
                self._scalar(int(line["shell"]), FINAL_FSC, float(line["fsc_corrected"]))

    def picture(self, step: int, tag: Tag, image: Float[Tensor, "y x"]) -> None:
        """One picture, scaled to its own range."""
        self._writer.add_image(tag.name, _grey(image), step)

    def pairs(self, step: int, observed: Float[Tensor, "b y x"], predicted: Float[Tensor, "b y x"]) -> None:
        """Images in a row above what was predicted for them, each row scaled to its own range."""
        rows = [torch.cat(list(images), -1).cpu() for images in (observed, predicted)]
        spread = [row.std().clamp_min(1e-12) for row in rows]
        both = torch.cat([r / s for r, s in zip(rows, spread, strict=True)])
        self.picture(step, PICTURES["pairs"], both)

    def histogram(self, step: int, name: str, values: Float[Tensor, " n"]) -> None:
        """How some values are spread; nothing where there are none."""
        if len(values):
            tag = PICTURES.get(name, Tag(name, name, ""))
            self._writer.add_histogram(tag.name, values, step)

    def volume(self, step: int, density: Float[Tensor, "n n n"]) -> None:
        """Central slices and projections of a map along its three axes."""
        for axis, name in enumerate(("z", "y", "x")):
            self.picture(step, Tag(f"slice/{name}", "", ""), density.select(axis, density.shape[axis] // 2))
            self.picture(step, Tag(f"projection/{name}", "", ""), density.sum(axis))

    def surface(
        self,
        step: int,
        density: Float[Tensor, "n n n"],
        pixel_size: float,
        mask: Float[Tensor, "n n n"] | None,
        curves: Mapping[str, Float[Tensor, " s"]],
    ) -> None:
        """The map from three sides, and the halves' correlation where there is one.

        Args:
            step: of the curves.
            density: mean of the halves.
            pixel_size: Å.
            mask: around it; None: the sphere that fits the box.
            curves: correlations by shell, by name; the map is low-passed to where the last one falls to 0.143.
        """
        finest, box_size, density = 0.0, density.shape[-1], density.detach().cpu().float()
        own = soft_sphere(box_size, box_size / 2 - 4) if mask is None else mask.cpu()
        if curves:
            _, finest = resolution(list(curves.values())[-1], box_size, pixel_size, 0.143)
            named = {name: curve.detach().cpu().numpy() for name, curve in curves.items()}
            self._png(step, PICTURES["fsc"], fsc_figure(named, box_size, pixel_size))
        if box_size > SURFACE_BOX:  # no finer than the picture
            shrink, pixel_size = (SURFACE_BOX / box_size) ** 2, pixel_size * box_size / SURFACE_BOX
            density = fourier_resize_3d(density, SURFACE_BOX) * shrink
            own = (fourier_resize_3d(own, SURFACE_BOX) * shrink).clamp(0, 1)
        surface = Surface.of_map(density, own, pixel_size, SURFACE_GRID, finest)
        self._png(step, PICTURES["surface"], surface_picture(surface, SURFACE_PICTURE))

    def views(self, step: int, rotation: Float[Tensor, "n 3 3"]) -> None:
        """Where particles were seen from."""
        if len(rotation):
            self._png(step, PICTURES["views"], png_of_pixels(view_picture(np.asarray(rotation.cpu()))))

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()

    def _scalar(self, step: int, tag: Tag, value: float) -> None:
        self._add(
            step, Summary.Value(tag=tag.name, simple_value=value, metadata=_metadata(tag, "scalars", DATA_CLASS_SCALAR))
        )

    def _png(self, step: int, tag: Tag, png: bytes) -> None:
        """A PNG as it is; its size stands in its header."""
        width, height = struct.unpack(">II", png[16:24])
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._add(
            step, Summary.Value(tag=tag.name, image=image, metadata=_metadata(tag, "images", DATA_CLASS_BLOB_SEQUENCE))
        )

    def _add(self, step: int, value: Summary.Value) -> None:
        events = self._writer.file_writer
        if events is not None:
            events.add_summary(Summary(value=[value]), step)


def _metadata(tag: Tag, plugin: str, data_class: int) -> SummaryMetadata:
    """TensorBoard shows title and help only of what names its plugin and class of data."""
    return SummaryMetadata(
        display_name=tag.title, summary_description=tag.help, data_class=data_class,
        plugin_data=SummaryMetadata.PluginData(plugin_name=plugin),
    )  # fmt: skip


def _compared_settings(config: Config) -> dict[str, bool | int | float | str]:
    """What runs differ by: settings but for places, the version, and first of all what is not as by default."""
    plain = flat_settings(Config())
    settings = {name: value for name, value in flat_settings(config).items() if not name.startswith("run.")}
    changed = " ".join(f"{name}={value}" for name, value in settings.items() if value != plain.get(name))
    # TensorBoard sorts by name and shows the first few.
    return {"changed": changed, "data": urls.redacted(config.run.data), "recipe": config.recipe,
            "version": __version__, **settings}  # fmt: skip


def _grey(image: Float[Tensor, "y x"]) -> Float[Tensor, "1 y x"]:
    """An image scaled to 0…1 between its 1 % and 99 % quantiles, for TensorBoard."""
    low, high = torch.quantile(image.flatten()[:: max(1, image.numel() // 100_000)], image.new_tensor([0.01, 0.99]))
    return ((image - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)[None].cpu()
