"""Errors that reach a user: one line that says what, where, the value found and the repair.

Each class also subclasses the built-in that a caller would expect, so library users can catch either.
"""


class ScalecryoError(Exception):
    """Base of every error that scalecryo raises on purpose; the command line prints it as one line."""


class UsageError(ScalecryoError):
    """A command was called without what it needs; the command line exits with 2."""


class ConfigError(ScalecryoError, ValueError):
    """A setting, a query or a list of rows that cannot be used; the command line exits with 2."""


class MissingInputError(ScalecryoError, FileNotFoundError):
    """A file, stack or folder that was named does not exist."""


class InputError(ScalecryoError, ValueError):
    """A file exists but its contents cannot be used."""


class StoreError(ScalecryoError, ValueError):
    """A particle store is incomplete, damaged, or of another version."""


class OutputExistsError(ScalecryoError, FileExistsError):
    """Writing would replace something that exists, and nobody asked for that."""


class OutputError(ScalecryoError, OSError):
    """Writing failed: the disk is full, or somebody else is writing to the same place."""


class TrainingError(ScalecryoError, RuntimeError):
    """Training cannot start or go on."""


class CheckpointError(ScalecryoError, ValueError):
    """A checkpoint is missing, damaged, or does not fit the run."""


class Stopped(ScalecryoError):
    """The run was told to end, and did; not a fault of it."""
