"""What the verbs say to a person: plain lines on standard output, notes on standard error."""

import sys
import time

from scalecryo.errors import UsageError
from scalecryo.runs.log import LiveLine
from scalecryo.settings import POINT_GROUP


def say(text: str) -> None:
    """Write one line of a verb's result to standard output."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """Write one line of progress or advice to standard error, so that it never mixes with results."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def check_conversion(*, invert: bool, uninvert: bool, append: bool, overwrite: bool, box: int | None) -> None:
    """Refuse options of `convert` that contradict each other, before anything heavy is imported.

    Raises:
        UsageError: they do.
    """
    if invert and uninvert:
        raise UsageError("convert takes --invert or --uninvert, not both")
    if append and (overwrite or box):
        raise UsageError("convert --append keeps the store's box and particles: leave out --box and --overwrite")


def check_group(name: str) -> None:
    """Refuse a point group that there is not.

    Raises:
        UsageError: names it.
    """
    if POINT_GROUP.fullmatch(name.strip().upper()) is None:
        raise UsageError(f"--symmetry {name}: no such point group: use C1, C7, D7, T, O, I or I1 to I4")


class Progress:
    """The rate and the time left: in a terminal a line that is rewritten, else a note every two seconds at most.

    The first call starts the clock.
    """

    def __init__(self, verb: str = "") -> None:
        self._verb = f"{verb} " if verb else ""
        self._start = self._told = time.monotonic()
        self._first: int | None = None
        self._line = LiveLine(sys.stderr)

    def __call__(self, done: int, total: int) -> None:
        """Note how many of all particles are done."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._start = done, now
            if done:
                note(f"going on after {done:,} of {total:,} particles")
            return
        if done < total and now - self._told < 2 and not self._line.visible:
            return
        self._told = now
        rate = (done - self._first) / max(now - self._start, 1e-9)
        left = (total - done) / rate if rate else float("inf")
        told = f"{self._verb}{done:,} of {total:,} particles, {rate:,.0f} images/s, {left:,.0f} s left"
        if done < total and self._line.visible:
            self._line.show(told)
        else:
            self._line.hide()
            note(told)
