"""What the verbs say to a person: plain lines on standard output, notes on standard error."""

import sys


def say(text: str) -> None:
    """Write one line of a verb's result to standard output."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """Write one line of progress or advice to standard error, so that it never mixes with results."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
