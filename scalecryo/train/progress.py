"""How far a run is, from batch to batch: a line in a terminal, else one in the log now and then. Worker 0 only.

It looks at the host's clock and counts; the device is never waited for.
"""

import logging
import time

from scalecryo.runs.log import LiveLine
from scalecryo.train.forecast import Forecast, about

logger = logging.getLogger(__name__)
LOG_SECONDS = 30.0  # between two lines of a long pass where there is no terminal
FIRST_LOG_SECONDS = 10.0


class RunProgress:
    """Told of every stage, pass and batch."""

    def __init__(self, forecast: Forecast, line: LiveLine | None, workers: int) -> None:
        """
        Args:
            forecast: of the run.
            line: of the terminal; None: the log alone.
            workers: that share every batch.
        """
        self._forecast, self._workers = forecast, workers
        self._line = line if line is not None and line.visible else None
        self._stage = ""
        self.resumed = False
        """Whether the first stage was taken up in its middle."""
        self._reported, self._step = 0.0, 0.0  # share of the stage after its last pass, and what a pass adds to it
        self._batches, self._done, self._images, self._begun = 1, 0, 0, 0.0
        self._logged: float | None = None

    def begin_stage(self, name: str) -> None:
        """A stage begins, or goes on."""
        self._stage = name
        self._reported, self._step = 0.0, 1 / self._forecast.part(name).passes
        self._forecast.begin(name, time.monotonic(), resumed=self.resumed)
        self.resumed = False

    def begin_pass(self, batches: int) -> None:
        """A pass over so many batches of this worker begins."""
        self._batches, self._done, self._images, self._begun = max(batches, 1), 0, 0, time.monotonic()

    def batch(self, images: int) -> None:
        """One batch, of so many images of this worker, was given to the device."""
        self._done, self._images = self._done + 1, self._images + images
        now = time.monotonic()
        part = self._forecast.part(self._stage)
        busy = part.seconds / max(part.seconds + part.tail, 1e-9)  # the rest comes after the last batch
        self._forecast.at(self._reported + min(self._done / self._batches, 1) * self._step * busy, now)
        if self._line is not None:
            self._line.show(self._told(now))
        elif now - (self._logged or self._begun) >= (LOG_SECONDS if self._logged else FIRST_LOG_SECONDS):
            self._logged = now
            logger.info("%s", self._told(now))

    def end_pass(self, share: float | None, *, done: bool) -> str:
        """A pass ended, after which so much of the stage is done (None: not told). What is left of the run, in words.

        Args:
            share: 0 to 1.
            done: whether the stage ended.
        """
        now = time.monotonic()
        before, self._reported = self._reported, 1.0 if done else min(self._reported + self._step, 0.95)
        if share is not None and not done:
            self._reported = share
            self._step = max(share - before, 0.0) or self._step
        self._step = min(self._step, 1.0 - self._reported)
        self._forecast.at(self._reported, now)
        self._logged = now if self._logged else None
        left = self._forecast.left(now)
        return f", {about(left)} left" if left else ""

    def _told(self, now: float) -> str:
        rate = self._workers * self._images / max(now - self._begun, 1e-9)
        left = self._forecast.left(now)
        end = time.strftime("%H:%M", time.localtime(time.time() + left))
        what = f"{self._stage}: {self._done:,} of {self._batches:,} batches, {rate:,.0f} images/s"
        return f"{what}, {about(left)} left, ends about {end}"
