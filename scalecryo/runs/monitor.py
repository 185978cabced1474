"""What a run says after each pass: curves, pictures, errors where a truth is known, and a line of the log."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scalecryo.config import Config
from scalecryo.data.io import urls
from scalecryo.data.storage.store import ParticleStore
from scalecryo.runs.exported import exported_values, write_text_file
from scalecryo.runs.failure_report import Seen, write_failure_report
from scalecryo.runs.folder import RunFolder
from scalecryo.runs.pictures import Pairs
from scalecryo.runs.recorder import Recorder
from scalecryo.runs.truth import Truth

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PassReport:
    """What one pass of a stage came to.

    Attributes:
        message: for the log; empty: nothing.
        images: that this worker worked on.
        step: of the run's curves; 0: nothing is recorded.
        scalars: curves.
        histograms: values whose spread is recorded.
        density: the map as it stands, or None.
        mask: around it, or None.
        curves: correlations of the half-maps by shell, by name; the last one tells the resolution.
        rows, rotation: of some particles with their poses, or None.
        pairs: pictures, or None.
        checkpoint: whether the stage can be taken up here.
        score: of that checkpoint, larger for better.
        progress: share of the stage that is done, or None where nobody knows.
        figures: of the finished run, added to the last step's curves.
    """

    message: str
    images: int
    step: int = 0
    scalars: Mapping[str, float] = field(default_factory=dict)
    histograms: Mapping[str, Float[Tensor, " _"]] = field(default_factory=dict)
    density: Float[Tensor, "n n n"] | None = None
    mask: Float[Tensor, "n n n"] | None = None
    curves: Mapping[str, Float[Tensor, " s"]] = field(default_factory=dict)
    rows: Int[Tensor, " k"] | None = None
    rotation: Float[Tensor, "k 3 3"] | None = None
    pairs: Pairs | None = None
    checkpoint: bool = True
    score: float = 0.0
    progress: float | None = None
    figures: Mapping[str, float] = field(default_factory=dict)


class RunMonitor:
    """Writes what passes report. Worker 0 only."""

    def __init__(
        self,
        config: Config,
        store: ParticleStore,
        run: RunFolder,
        *,
        start_step: int,
        publish: Callable[[Mapping[str, float]], None] = lambda figures: None,
    ) -> None:
        """
        Args:
            config: of the run.
            store: that it reads.
            run: where curves go.
            start_step: that the run was taken up at; later curves are forgotten.
            publish: gets the figures of each pass, by their names in `runs.exported`.

        Raises:
            InputError, MissingInputError: see `Truth.load`.
        """
        self._store, self._folder_of_run = store, run
        self._run, self._publish, self._text_file = config.run.out, publish, config.monitor.prometheus
        self._figures: dict[str, float] = {}
        self._config, self._seen = config, Seen()
        self._ear = _Ear(self._seen.messages)
        logging.getLogger("scalecryo").addHandler(self._ear)
        self._truth: Truth | None = None
        if config.monitor.truth:  # before anything is opened that would have to be closed
            self._truth = Truth.load(config.monitor.truth, store, min(store.levels))
        self._recorder = Recorder(config, run, start_step=start_step)

    def after_pass(
        self, report: PassReport, rates: Mapping[str, float], by_worker: Float[Tensor, " w"], left: str = ""
    ) -> None:
        """Record one pass.

        Args:
            report: of the stage.
            rates: what all workers together took.
            by_worker: images/s of each.
            left: how long the run will still take, for the log.
        """
        if report.message:
            logger.info("%s, %.0f images/s%s", report.message, rates["images_per_second"], left)
        self._look(report)
        if report.figures:
            self._recorder.conclude(dict(report.figures))
        self._export({**rates, **report.scalars, **report.figures}, report.step)
        if not report.step:
            return
        values: dict[str, float | list[float]] = dict(report.scalars)
        if values:
            values |= rates
            self._recorder.histogram(report.step, "images_per_second_by_worker", by_worker)
        for name, spread in report.histograms.items():
            self._recorder.histogram(report.step, name, spread)
        if report.rotation is not None:
            tilt = torch.rad2deg(torch.arccos(report.rotation[:, 2, 2].clamp(-1, 1)))
            self._recorder.histogram(report.step, "poses/tilt_deg", tilt)
            self._recorder.views(report.step, report.rotation)
        if report.density is not None:
            self._recorder.volume(report.step, report.density)
            pixel_size = self._pixel_size(report.density)
            self._recorder.surface(report.step, report.density, pixel_size, report.mask, report.curves)
            if report.rows is not None and report.rotation is not None and len(report.rows):
                values |= self._errors(report.rows, report.rotation, report.density)
        if report.pairs is not None:
            self._recorder.pairs(report.step, *report.pairs)
        if values:
            self._recorder.scalars(report.step, values)

    def _export(self, curves: Mapping[str, float], step: int) -> None:
        """The last figures of every kind: those of the iterations stay while the final pass goes on."""
        self._figures |= exported_values({**curves, "step": step} if step else curves)
        self._publish(self._figures)
        if self._text_file:
            write_text_file(Path(self._text_file), self._figures, urls.redacted(self._run))

    def failed(self, error: Exception) -> None:
        """Leave a report that says why the run stopped, with what was seen until then."""
        write_failure_report(self._config, self._store, self._folder_of_run, error, self._seen)

    def _look(self, report: PassReport) -> None:
        """Remember what `failed` would show."""
        if report.message:
            self._seen.messages.append(report.message)
        if report.density is not None:
            self._seen.density = report.density.detach().cpu()
            self._seen.pixel_size = self._pixel_size(report.density)
        self._seen.pairs = report.pairs or self._seen.pairs

    def _pixel_size(self, density: Tensor) -> float:
        """Of a map that spans the store's box, Å."""
        return self._store.box_size * self._store.pixel_size / density.shape[-1]

    def close(self) -> None:
        """Flush the event file."""
        logging.getLogger("scalecryo").removeHandler(self._ear)
        self._recorder.close()

    def _errors(self, rows: Tensor, rotation: Tensor, density: Tensor) -> dict[str, float | list[float]]:
        """Errors against the truth; none where no truth is known."""
        if self._truth is None:
            return {}
        pixel_size = self._store.level_pixel_size(density.shape[-1])
        return self._truth.compare(rows.cpu(), rotation.cpu(), density.cpu(), pixel_size)


class _Ear(logging.Handler):
    """Keeps warnings for the report of a run that fails."""

    def __init__(self, heard: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self._heard.append(f"warning: {record.getMessage()}")
