"""What was found for each particle: its next visit starts there.

While an iteration runs, the memory stands still: what the iteration finds is noted, exchanged between the workers at
its end, kept as one small file in the run's folder, and only then remembered. So a run that goes on after a kill, on
whichever machine and with however many workers, reads the same poses as one that was never disturbed. A particle never
seen starts from the search or the encoder.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from scalecryo.data.io import urls
from scalecryo.distributed.world import World
from scalecryo.runs.folder import RunFolder
from scalecryo.train.columns import RowColumns, arrays_to_bytes, read_arrays

FOLDER = "poses"


class Found(NamedTuple):
    """Poses of some particles, by row of the store; shifts in Å so that they hold at every level."""

    rows: NDArray[np.int64]
    rotation: NDArray[np.float32]
    shift: NDArray[np.float32]
    confidence: NDArray[np.float32]


class PoseMemory:
    """Poses by row, on this worker's disk."""

    def __init__(self, count: int) -> None:
        self._columns = RowColumns(count, {"rotation": (3, 3), "shift": (2,), "confidence": ()})
        self._noted: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def read(
        self, rows: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b 3 3"], Float[Tensor, "b 2"], Float[Tensor, " b"], Bool[Tensor, " b"]]:
        """Rotation, shift (Å), confidence and whether the particle was seen before."""
        values, seen = self._columns.read(rows.cpu().numpy())
        found = {name: torch.from_numpy(column).to(rows.device) for name, column in values.items()}
        return found["rotation"], found["shift"], found["confidence"], torch.from_numpy(seen).to(rows.device)

    def note(
        self,
        rows: Int[Tensor, " b"],
        rotation: Float[Tensor, "b 3 3"],
        shift: Float[Tensor, "b 2"],
        confidence: Float[Tensor, " b"],
    ) -> None:
        """Keep what an iteration found, shifts in Å, until `settle`; `read` does not see it yet."""
        self._noted.append((rows.cpu(), rotation.cpu(), shift.cpu(), confidence.cpu()))

    def settle(self, world: World) -> Found:
        """Exchange what all workers noted, remember it and return it, sorted by row. Collective."""
        empty = (torch.zeros(0, dtype=torch.long), torch.zeros(0, 3, 3), torch.zeros(0, 2), torch.zeros(0))
        own = [torch.cat(parts) for parts in zip(empty, *self._noted, strict=True)]
        self._noted.clear()
        rows, *columns = (torch.cat(world.all_gather(tensor)).numpy() for tensor in own)
        order = np.argsort(rows, kind="stable")
        found = Found(rows[order], *(column[order] for column in columns))
        self.remember(found)
        return found

    def remember(self, found: Found) -> None:
        """Take in poses of some particles."""
        self._columns.write(found.rows, found._asdict())


def save_found(run: RunFolder, iteration: int, found: Found) -> None:
    """Write what an iteration found into the run's folder."""
    urls.make_folder(run.path(FOLDER))
    run.write(_name(iteration), arrays_to_bytes(found._asdict()))


def load_found(run: RunFolder, iteration: int) -> Found:
    """What an iteration found.

    Raises:
        CheckpointError: its file is missing or damaged.
    """
    repair = f"remove the checkpoints from iteration {iteration} on to go on before it, or start the run anew"
    return Found(**read_arrays(run.path(_name(iteration)), Found._fields, repair))


def _name(iteration: int) -> str:
    return f"{FOLDER}/rung_{iteration:04d}.npz"
