"""What was found for each particle, remembered on disk: its next visit starts there.

One flat file a column, rows as in the store, mapped and never read whole: memory does not grow with the number of
particles. Each worker keeps the rows that it visited; a particle that another worker saw last, or that nobody saw,
starts from the search or the encoder.
"""

import contextlib
import os
import uuid
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_COLUMNS = {"rotation": ("f4", (3, 3)), "shift": ("f4", (2,)), "confidence": ("f4", ()), "seen": ("u1", ())}


def _make(folder: Path, count: int) -> None:
    """Make empty columns where there are none; several workers may try at once, and one of them does."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (dtype, shape) in _COLUMNS.items():
        path = folder / f"{name}.npy"
        if path.exists():
            continue
        new = folder / f".{name}.{uuid.uuid4().hex}"
        # The file is sparse: rows never written take no space.
        np.lib.format.open_memmap(new, mode="w+", dtype=dtype, shape=(count, *shape)).flush()
        with contextlib.suppress(FileExistsError):
            os.link(new, path)  # unlike a rename, it never replaces what another worker made
        new.unlink()


class PoseMemory:
    """Poses by row; shifts in Å so that they hold at every level."""

    def __init__(self, folder: Path, count: int) -> None:
        _make(folder, count)
        self._columns = {name: np.lib.format.open_memmap(folder / f"{name}.npy", mode="r+") for name in _COLUMNS}

    def read(
        self, rows: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b 3 3"], Float[Tensor, "b 2"], Float[Tensor, " b"], Bool[Tensor, " b"]]:
        """Rotation, shift (Å), confidence and whether the particle was seen before."""
        at = rows.cpu().numpy()
        found = {name: torch.from_numpy(column[at]).to(rows.device) for name, column in self._columns.items()}
        return found["rotation"], found["shift"], found["confidence"], found["seen"].bool()

    def write(
        self,
        rows: Int[Tensor, " b"],
        rotation: Float[Tensor, "b 3 3"],
        shift: Float[Tensor, "b 2"],
        confidence: Float[Tensor, " b"],
    ) -> None:
        """Remember poses; shifts in Å."""
        at = rows.cpu().numpy()
        self._columns["rotation"][at] = rotation.cpu().numpy()
        self._columns["shift"][at] = shift.cpu().numpy()
        self._columns["confidence"][at] = confidence.cpu().numpy()
        self._columns["seen"][at] = 1

    def flush(self) -> None:
        """Bring what was written to the disk."""
        for column in self._columns.values():
            column.flush()
