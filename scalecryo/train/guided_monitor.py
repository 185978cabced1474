"""What a guided run says after each iteration. Worker 0 only."""

import logging
import time
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.config import Config
from scalecryo.data.storage.store import ParticleStore
from scalecryo.physics.fsc import resolution
from scalecryo.runs.folder import RunFolder
from scalecryo.runs.recorder import Recorder
from scalecryo.runs.truth import Truth
from scalecryo.train.particle_state import PoseMemory
from scalecryo.train.stages.refinement import HalfReferences, Iteration

logger = logging.getLogger(__name__)


class Rates(NamedTuple):
    """How fast an iteration went.

    Attributes:
        scalars: by name.
        by_worker: images a second of each.
    """

    scalars: dict[str, float]
    by_worker: Float[Tensor, " workers"]


class GuidedMonitor:
    """What a guided run says after each iteration."""

    def __init__(self, config: Config, store: ParticleStore, run: RunFolder, *, start_step: int) -> None:
        self._store = store
        self._truth_folder = config.monitor.truth
        self._rows = min(config.train.rows or store.count, store.count)
        self._recorder = Recorder(config, run, start_step=start_step)
        self._mark = time.monotonic()

    def after_iteration(
        self, number: int, iteration: Iteration, state: HalfReferences, memory: PoseMemory, rates: Rates
    ) -> None:
        """Record one iteration: radius, level, half-map resolution, rates, pictures, and errors where a truth is
        known."""
        plan = iteration.plan
        seconds, self._mark = time.monotonic() - self._mark, time.monotonic()
        level = state.half_maps[0].shape[-1]
        shell, angstrom = resolution(state.curve, level, self._store.level_pixel_size(level), 0.143)
        mean = (state.half_maps[0] + state.half_maps[1]) / 2
        values: dict[str, Any] = {
            "iteration/radius": plan.radius, "iteration/level": plan.level, "iteration/modes": plan.modes,
            "iteration/seconds": seconds, "iteration/moved_share": state.moved,
            "halves/fsc_0.143_shell": shell, "halves/resolution_angstrom": angstrom,
            "halves/fsc_mean": float(state.curve.mean()), "likelihood_gain_per_image": iteration.gain, **rates.scalars,
        }  # fmt: skip
        rows = torch.arange(self._rows)[:: max(1, self._rows // 4000)]
        rotation, _, confidence, seen = memory.read(rows)
        tilt = torch.rad2deg(torch.arccos(rotation[seen][:, 2, 2].clamp(-1, 1)))
        self._recorder.histogram(number, "poses/tilt_deg", tilt)
        self._recorder.histogram(number, "poses/confidence", confidence[seen])
        if self._truth_folder:
            truth = Truth.load(self._truth_folder, self._store, level)
            values |= truth.compare(rows[seen], rotation[seen], mean.cpu())
        self._recorder.scalars(number, values)
        self._recorder.volume(number, mean)
        self._recorder.histogram(number, "images_per_second_by_worker", rates.by_worker)
        shown = iteration.pictures()
        if shown is not None:
            self._recorder.pairs(number, *shown)
        logger.info(
            "iteration %d: refined to %.1f Å, the halves agree to %.2f Å, %.0f %% of the particles moved far, %.1f s",
            number, level * self._store.level_pixel_size(level) / plan.radius, angstrom, 100 * state.moved, seconds,
        )  # fmt: skip

    def close(self) -> None:
        """Flush the event file."""
        self._recorder.close()
