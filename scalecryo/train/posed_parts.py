"""What an assignment has posed so far, in files of the run: one that was killed goes on where it stood.

Posing is the expensive part, so that is what is kept; the half-maps are summed up anew from the images in the same
order. A file holds some thousand rows of one worker and is written whole, whoever reads it later.
"""

import hashlib

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from scalecryo.data.io import urls
from scalecryo.runs.folder import RunFolder
from scalecryo.train.columns import RowColumns, arrays_to_bytes, read_arrays
from scalecryo.train.posed import Posed

FOLDER = "assigning"
PART_ROWS = 20_000
_SHAPES = {"rotation": (3, 3), "shift": (2,), "confidence": (), "weight": ()}


class PosedParts:
    """Poses of the rows that were posed before a kill, and files for those that are posed now.

    Args:
        run: where the files lie until the assignment is finished.
        identity: of store and checkpoint; files of another one count for nothing.
        count: particles in the store.
    """

    def __init__(self, run: RunFolder, identity: str, count: int) -> None:
        self._run = run
        # Hashed: an identity may hold what no file name can, and cut short it would forget a subset.
        self._folder = f"{FOLDER}/{hashlib.sha256(identity.encode()).hexdigest()[:24]}"
        self._columns = RowColumns(count, _SHAPES)
        self._noted: list[dict[str, np.ndarray]] = []
        folder = run.path(self._folder)
        self.rows_before = 0
        for name in sorted(urls.list_folder(folder)) if urls.exists(folder) else []:
            part = read_arrays(urls.join(folder, name), ("rows", *_SHAPES), "remove it to pose its particles again")
            self._columns.write(part["rows"], part)
            self.rows_before += len(part["rows"])

    def posed(self, rows: Int[Tensor, " b"]) -> Posed | None:
        """Poses of a batch, if all of it was posed before."""
        values, written = self._columns.read(rows.cpu().numpy())
        if not written.all():
            return None
        rotation, shift, confidence, weight = (torch.from_numpy(values[name]).to(rows.device) for name in _SHAPES)
        return Posed(rotation, shift, confidence, weight, None)

    def note(self, rows: Int[Tensor, " b"], posed: Posed) -> None:
        """Keep a batch that was posed now."""
        arrays = {name: getattr(posed, name).cpu().numpy() for name in _SHAPES}
        self._noted.append({"rows": rows.cpu().numpy(), **arrays})
        if sum(len(part["rows"]) for part in self._noted) >= PART_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what was noted since the last time."""
        if not self._noted:
            return
        whole = {name: np.concatenate([part[name] for part in self._noted]) for name in ("rows", *_SHAPES)}
        self._noted.clear()
        urls.make_folder(self._run.path(self._folder))
        # No two workers have the same row, so no two files the same name.
        self._run.write(f"{self._folder}/from_{whole['rows'][0]:010d}.npz", arrays_to_bytes(whole))

    def remove(self) -> None:
        """Remove the files: the assignment is finished."""
        if urls.exists(self._run.path(FOLDER)):
            urls.remove_tree(self._run.path(FOLDER))
