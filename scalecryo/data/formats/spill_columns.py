"""Columns that arrive piece by piece: of any length, in bounded memory."""

import contextlib
import tempfile
from collections.abc import Iterator
from typing import IO

import numpy as np
import numpy.typing as npt

from scalecryo.data.particles import Columns
from scalecryo.errors import OutputError

KEPT_BYTES = 256 << 20  # about 2.5 million particles with poses


class SpillColumns:
    """Columns of equal length made of pieces. Beyond `KEPT_BYTES` they are kept in files without names, and mapped.

    Raises:
        OutputError: the folder for temporary files is full.
    """

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        self._kept_bytes = kept_bytes
        self._bytes = 0
        self._parts: dict[str, list[npt.NDArray]] = {}
        self._files: dict[str, IO[bytes]] = {}

    def add(self, columns: Columns) -> None:
        """Take in some more rows: the same columns in the same dtypes each time."""
        for name, array in columns.items():
            self._parts.setdefault(name, []).append(array)
            self._bytes += array.nbytes
        if self._bytes > self._kept_bytes:
            self._spill()

    def whole(self) -> Columns:
        """Every column, one at a time: its pieces go as soon as it is whole."""
        if not self._files:
            return {name: np.concatenate(self._parts.pop(name)) for name in list(self._parts)}
        like = {name: parts[0] for name, parts in self._parts.items()}
        self._spill()
        found: Columns = {}
        for name, handle in self._files.items():
            with handle, _disk_full():
                handle.flush()
                found[name] = np.memmap(handle, dtype=like[name].dtype, mode="r+").reshape(-1, *like[name].shape[1:])
        return found

    def _spill(self) -> None:
        """Move what is in memory to the files, but for one empty piece that tells dtype and shape."""
        with _disk_full():
            for name, parts in self._parts.items():
                handle = self._files.get(name)
                if handle is None:
                    handle = self._files[name] = tempfile.TemporaryFile()  # noqa: SIM115
                for part in parts:
                    handle.write(np.ascontiguousarray(part).data)
                self._parts[name] = [parts[0][:0].copy()]
        self._bytes = 0


@contextlib.contextmanager
def _disk_full() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{tempfile.gettempdir()}: a large table does not fit the folder for temporary files ({error.strerror}): "
            "free about 100 bytes per row there, or set TMPDIR to a larger disk"
        ) from error
