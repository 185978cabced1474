"""A run that is told to end (SIGTERM): all workers stop between the same two batches, and what they did is kept.

Every few seconds the workers add up, beside their work, whether any was told, and look at the sum when the next one is
due.
"""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Protocol, runtime_checkable

import torch

from scalecryo.data.io import urls
from scalecryo.distributed.world import World
from scalecryo.errors import Stopped
from scalecryo.runs.folder import RunFolder
from scalecryo.runs.paused import Pause, Place, load_pause, paused_place, save_pause, settings_digest
from scalecryo.train.particle_source import BatchRequest, RunContext
from scalecryo.train.stage import Stage

logger = logging.getLogger(__name__)
ASK_SECONDS = 2.0  # between two questions whether anybody was told
MOST_BATCHES = 256  # between them, however short batches are
WORD, ANSWER = "checkpoints/end", "checkpoints/ended"  # files of a run: the driver's word to its workers, and theirs


class Notice:
    """Whether this process was told that the run should end."""

    def __init__(self) -> None:
        self.given = False

    def give(self) -> None:
        """Tell it."""
        self.given = True


@runtime_checkable
class Pausable(Protocol):
    """A stage that may be left between two batches of a pass."""

    def pause(self) -> Pause | None:
        """What the pass has come to, after a batch or between two passes; None: not here, but after a later batch.

        An empty pause: what is of use lies in the run's folder already. None, or not, on all workers alike.
        """

    def resume_pass(self, pause: Pause) -> BatchRequest:
        """In place of `request`: what is left of a pass, with what it had come to."""


@contextmanager
def notice_of_sigterm(tell: Callable[[], None]) -> Iterator[None]:
    """Meanwhile SIGTERM calls `tell`, once; a second one does what it did before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    def told(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, before)
        logger.warning("SIGTERM: ending after this batch; a second one ends at once")
        tell()

    signal.signal(signal.SIGTERM, told)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def ended_by_sigterm(during: str) -> Iterator[None]:
    """Meanwhile SIGTERM raises `Stopped`: there is nothing to save.

    Args:
        during: what is under way, for a person.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    def told(_number: int, _frame: FrameType | None) -> None:
        raise Stopped(f"stopped by SIGTERM {during}: --resume goes on from the newest checkpoint, if there is one")

    signal.signal(signal.SIGTERM, told)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is told:  # ray.init puts a handler of its own there, which stays
            signal.signal(signal.SIGTERM, before)


class DriversNotice(Notice):
    """Told to the driver, which leaves word to the workers of its run, wherever they are."""

    def __init__(self, run: RunFolder) -> None:
        super().__init__()
        self._run = run
        for name in (WORD, ANSWER):
            if urls.exists(run.path(name)):  # a word to an earlier run is not meant for this one
                urls.remove_tree(run.path(name))

    def give(self) -> None:
        """Leave word."""
        super().give()
        # From a thread of its own: a signal may come in the middle of a request.
        threading.Thread(target=self._run.write, args=(WORD, b""), name="word-to-end").start()

    def answer(self) -> str | None:
        """How the workers ended by the word; None: they did not."""
        there = self._run.path(ANSWER)
        return urls.read_bytes(there).decode() if urls.exists(there) else None


@contextmanager
def notice_of_word(run: RunFolder) -> Iterator[Notice]:
    """A notice that a thread gives once the word lies in the run's folder."""
    notice, over = Notice(), threading.Event()

    def watch() -> None:
        while not over.wait(ASK_SECONDS):
            if urls.exists(run.path(WORD)):
                notice.give()
                return

    watcher = threading.Thread(target=watch, name="word-to-end", daemon=True)
    watcher.start()
    try:
        yield notice
    finally:
        over.set()
        watcher.join()


class _Question:
    """Asks all workers, now and then, whether any was told. Each must call it after as many batches as the others."""

    def __init__(self, world: World, notice: Notice, device: torch.device) -> None:
        self._world, self._notice, self._device = world, notice, device
        self._asked = torch.zeros(2, dtype=torch.float64, device=device)
        """Number of workers that were told; seconds since the last question on worker 0."""
        self._settle: Callable[[], None] | None = None
        self.begin_pass()

    def begin_pass(self) -> None:
        """Ask soon: the batches of another pass take another time. A start's are a hundredth of a refinement's."""
        self._every, self._batches, self._begun = 1, 0, time.monotonic()

    def answer(self) -> bool:
        """Whether any was told, by the last question that is answered. Collective."""
        if self._world.size == 1:
            return self._notice.given
        self._batches += 1
        if self._batches < self._every:
            return False
        if self._settle is not None:
            self._settle()
            told, seconds = self._asked.tolist()  # host sync: every few seconds
            if told:
                return True
            # By worker 0's clock: all ask again at the same batch.
            self._every = int(min(max(ASK_SECONDS * self._batches / max(seconds, 1e-6), 1), MOST_BATCHES))
        now = time.monotonic()
        seconds = now - self._begun if self._world.is_leader else 0.0
        asked = torch.tensor([float(self._notice.given), seconds], dtype=torch.float64)
        self._asked = asked.to(self._device)  # NCCL reduces no tensor of the CPU
        self._settle, self._batches, self._begun = self._world.all_reduce_async(self._asked), 0, now
        return False


class Stopping:
    """Where a run stands between its batches, and whether it goes on there."""

    def __init__(self, context: RunContext, notice: Notice | None = None, *, step: int | None = None) -> None:
        """
        Args:
            context: of the run.
            notice: that tells this worker to end; None: nobody does.
            step: of the newest checkpoint, whose run may have been left within a pass; None: of no use, and nobody
                is asked.
        """
        self._context, self._question = context, _Question(context.world, notice or Notice(), context.device)
        self._step, self._passes, self._told = step or 0, 0, False
        self._asks = step is not None
        self._paused = None if step is None else paused_place(context.run)

    @property
    def reached(self) -> int:
        """Step of the run's curves that it goes on from."""
        return self._step if self._paused is None else max(self._step, self._paused.reached)

    def request(self, stage: Stage) -> BatchRequest:
        """What the next pass reads, or what is left of it.

        Raises:
            Stopped: the run was told to end.
        """
        if self._told and not self._passes:
            raise Stopped("stopped by SIGTERM, all that was done is saved: the same command with --resume goes on")
        if self._told:
            self._leave(stage)
        self._question.begin_pass()
        place, found = self._place(stage), self._paused
        if found is None or (found.stage, found.passes) != (place.stage, place.passes):
            return stage.request()
        self._paused = None
        if replace(found, reached=place.reached) != place or not isinstance(stage, Pausable):
            logger.info("%s: settings or workers are others than when it was stopped: the pass begins anew", stage.name)
            return stage.request()
        request = stage.resume_pass(load_pause(self._context.run, self._context.world))
        logger.info("%s: goes on within a pass, %s batches are left", stage.name, request.batches)
        return request

    def after_batch(self, stage: Stage) -> None:
        """Leave the pass here where the run was told to end. Collective.

        Raises:
            Stopped: so it was, and what the pass has come to is kept.
        """
        if self._asks:
            self._told = self._told or self._question.answer()
        if self._told:
            self._leave(stage)

    def after_pass(self, step: int | None) -> None:
        """A pass was made.

        Args:
            step: of the checkpoint that was written after it; None: none was.
        """
        self._passes += 1
        if step is not None:
            self._step, self._passes = step, 0

    def _leave(self, stage: Stage) -> None:
        """End here, or return where the stage cannot be left. Collective."""
        context, kept = self._context, isinstance(stage, Pausable)
        pause = stage.pause() if isinstance(stage, Pausable) else Pause()
        if pause is None:
            return
        if context.world.is_leader:
            context.run.sync()
        if not pause.empty:
            place = self._place(stage)
            if pause.reached is not None:
                place = replace(place, reached=pause.reached, passes=0)
            save_pause(context.run, context.world, place, pause)
        told = "where it stands is saved" if kept else "the pass that it was in will be made again"
        raise Stopped(f"stopped by SIGTERM in the {stage.name}, {told}: the same command with --resume goes on")

    def _place(self, stage: Stage) -> Place:
        context = self._context
        settings = settings_digest(context.config)
        return Place(self._step, self._step, self._passes, stage.name, context.data_hash, settings, context.world.size)
