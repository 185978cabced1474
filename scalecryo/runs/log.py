"""The log on standard error, and under it, in a terminal, one line that is rewritten. Imports no torch."""

import logging
import shutil
import sys
import time
from typing import TextIO

REDRAW_SECONDS = 0.25
_CLEAR = "\r\x1b[2K"


class LiveLine:
    """A line at the bottom of a terminal that says how far the work is; what is logged scrolls by above it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._text, self._drawn = stream, "", 0.0
        self.visible = stream.isatty()
        """Whether there is a terminal to draw in."""

    def show(self, text: str) -> None:
        """Replace the line, a few times a second at most."""
        now = time.monotonic()
        if self.visible and now - self._drawn >= REDRAW_SECONDS:
            self._text, self._drawn = text, now
            self._draw()

    def hide(self) -> None:
        """Take the line away."""
        if self._text:
            self._stream.write(_CLEAR)
            self._stream.flush()
        self._text, self._drawn = "", 0.0

    def write_above(self, text: str) -> None:
        """Write a line that stays, above."""
        self._stream.write((_CLEAR if self._text else "") + text + "\n")
        self._draw()

    def _draw(self) -> None:
        if self._text:
            columns = shutil.get_terminal_size().columns
            self._stream.write(_CLEAR + self._text[: columns - 1])
        self._stream.flush()


class _Above(logging.Handler):
    """Log records above a live line."""

    def __init__(self, line: LiveLine) -> None:
        super().__init__()
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; what goes wrong there is logging's own affair, as in every handler."""
        try:
            self._line.write_above(self.format(record))
        except (OSError, ValueError):  # a stream that is closed by now
            self.handleError(record)


def log_to_stderr() -> LiveLine:
    """Show the package's messages from INFO up, one line each, with the time; called again, it changes nothing.

    Returns:
        The line below them.
    """
    line = LiveLine(sys.stderr)
    handler = _Above(line)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("scalecryo")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    return line
