"""What the verbs say to a person: plain lines on standard output, notes on standard error."""

import logging
import sys


def say(text: str) -> None:
    """Write one line of a verb's result to standard output."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """Write one line of progress or advice to standard error, so that it never mixes with results."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def log_to_stderr() -> None:
    """Show the package's log on standard error, one line a message."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("scalecryo")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
