"""Columns by row of the store on a worker's own disk: memory does not grow with the number of particles."""

import io
import tempfile
import zipfile
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from scalecryo.data.io import urls
from scalecryo.errors import CheckpointError


class RowColumns:
    """Values by row, in scratch files that are mapped and never read whole; a row never written says so."""

    def __init__(self, count: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.names = tuple(shapes)
        self._values = {name: _scratch((count, *shape), "f4") for name, shape in shapes.items()}
        self._written = _scratch((count,), "u1")

    def read(self, rows: NDArray[np.int64]) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.bool_]]:
        """The values of some rows, and which of them were ever written."""
        return {name: column[rows] for name, column in self._values.items()}, self._written[rows] != 0

    def write(self, rows: NDArray[np.int64], values: Mapping[str, NDArray]) -> None:
        """Take in the values of some rows."""
        for name, column in self._values.items():
            column[rows] = values[name]
        self._written[rows] = 1


def _scratch(shape: tuple[int, ...], dtype: str) -> NDArray:
    """Zeros in a file without a name, which goes with the process; rows never written take no space."""
    with tempfile.TemporaryFile() as handle:
        return np.memmap(handle, dtype=dtype, mode="w+", shape=shape)


def arrays_to_bytes(arrays: Mapping[str, NDArray]) -> bytes:
    """Arrays as an .npz archive."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def read_arrays(url: str, names: tuple[str, ...], repair: str) -> dict[str, NDArray]:
    """Arrays of an .npz archive.

    Raises:
        CheckpointError: the file is missing or damaged; the message ends with the repair.
    """
    try:
        with np.load(io.BytesIO(urls.read_bytes(url)), allow_pickle=False) as archive:
            return {name: archive[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{urls.redacted(url)}: cannot be read ({reason}): {repair}") from None
