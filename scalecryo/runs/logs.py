"""Where the package's log goes: one line a message on standard error, in every process of a run."""

import logging
import sys


def log_to_stderr() -> None:
    """Show the package's messages from INFO up, with the time; called again, it changes nothing."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("scalecryo")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
