"""What is known of every particle: one store of columns by row, on each worker's disk and in files of the run.

A pass notes what it finds; parts of it are written whole into the run's folder as it goes. At its end the workers tell
each other which parts there are, and all take them in: only then are they read. So a run that goes on after a kill, on
whichever machine and with however many workers, knows the same as one that was never disturbed, and memory does not
grow with the number of particles.
"""

import io
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from scalecryo.data.io import urls
from scalecryo.data.storage.store import ParticleStore
from scalecryo.distributed.world import World
from scalecryo.errors import CheckpointError
from scalecryo.physics.aberrations import corrected_shift
from scalecryo.physics.poses import PoseEstimates
from scalecryo.runs.folder import RunFolder

FOLDER = "particles"
PART_ROWS = 20_000
SCHEMA: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "rotation": (3, 3),  # image frame to volume frame
        "shift": (2,),  # Å, (x, y), where the content sits
        "class_index": (),
        "class_probability": (),
        "confidence": (),
        "particle_probability": (),
        "half": (),  # 1 or 2
    }
)


class RowColumns:
    """Columns of float32 values by row of the store, and which rows have them."""

    def __init__(self, run: RunFolder, count: int, schema: Mapping[str, tuple[int, ...]]) -> None:
        """
        Args:
            run: in whose folder parts are written.
            count: particles in the store.
            schema: shape of each column's values.
        """
        self._run, self._schema = run, schema
        self._columns = {name: _scratch((count, *shape), "f4") for name, shape in schema.items()}
        self._written = _scratch((count,), "u1")
        self._noted: list[dict[str, Tensor]] = []
        self._new: list[str] = []
        self._pass = ""
        self.parts: list[str] = []
        """Every part that was taken in, in this order."""

    def columns(self) -> dict[str, NDArray[np.float32]]:
        """Every particle's values, without copies."""
        return dict(self._columns)

    def begin(self, name: str) -> None:
        """Start a pass: what it notes is kept in parts under its name."""
        self._pass, self._new = name, []
        self._noted.clear()

    def note_columns(self, rows: Int[Tensor, " b"], columns: Mapping[str, Tensor]) -> None:
        """Keep what a pass found; it cannot be read before the pass is committed."""
        # On their device until a part is whole: no batch waits for its own to come over.
        self._noted.append({"rows": rows, **columns})
        if sum(len(part["rows"]) for part in self._noted) >= PART_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what was noted since the last time as a part."""
        if sum(len(part["rows"]) for part in self._noted):
            names = ("rows", *self._schema)
            whole = {name: torch.cat([part[name] for part in self._noted]).cpu().numpy() for name in names}
            whole = {name: values if name == "rows" else values.astype(np.float32) for name, values in whole.items()}
            # No two workers note the same row, so no two parts have the same name.
            name = f"{FOLDER}/{self._pass}/from_{whole['rows'][0]:010d}.npz"
            urls.make_folder(self._run.path(FOLDER, self._pass))
            self._run.write(name, _to_bytes(whole))
            self._new.append(name)
        self._noted.clear()

    def noted(self) -> list[str]:
        """The parts that hold what this worker noted in the pass so far, all of it."""
        self.flush()
        return list(self._new)

    def note_parts(self, parts: Iterable[str]) -> None:
        """Go on with a pass that has such parts."""
        self._new = list(parts)

    def commit(self, world: World) -> None:
        """End a pass: take in the parts of all workers. Collective; a barrier."""
        self.flush()
        self.load(world.all_gather_names(self._new))

    def load(self, parts: Iterable[str]) -> None:
        """Take in parts of the run's folder.

        Raises:
            CheckpointError: one is missing or damaged.
        """
        for name in parts:
            columns = _from_bytes(self._run.path(name), self._schema)
            rows = columns["rows"]
            for column, values in self._columns.items():
                values[rows] = columns[column]
            self._written[rows] = 1
            self.parts.append(name)

    def load_pass(self, name: str) -> int:
        """Take in what a pass that was killed had written so far; returns the number of particles."""
        folder = self._run.path(FOLDER, name)
        found = sorted(urls.list_folder(folder)) if urls.exists(folder) else []
        self.load(f"{FOLDER}/{name}/{part}" for part in found)
        return int(np.count_nonzero(self._written))

    def remove_pass(self, name: str = "") -> None:
        """Remove a pass's parts, the last one's where none is named: they are of no use any more."""
        name = name or self._pass
        for folder in (self._run.path(FOLDER, name), self._run.path(FOLDER)):
            if urls.exists(folder) and (folder.endswith(name) or not urls.list_folder(folder)):
                urls.remove_tree(folder)


class ParticleState(RowColumns):
    """Last pose, class and confidence of every particle, by row of the store."""

    def __init__(self, run: RunFolder, count: int) -> None:
        """
        Args:
            run: in whose folder parts are written.
            count: particles in the store.
        """
        super().__init__(run, count, SCHEMA)

    def read(self, rows: Int[Tensor, " b"]) -> tuple[PoseEstimates, Bool[Tensor, " b"]]:
        """What is known of some particles, and of which of them anything is."""
        at = rows.cpu().numpy()  # host sync
        column = {name: torch.from_numpy(values[at]).to(rows.device) for name, values in self._columns.items()}
        return _estimates(column), torch.from_numpy(self._written[at] != 0).to(rows.device)

    def all(self) -> tuple[PoseEstimates, Int[Tensor, " n"]]:
        """Estimates and half of every particle, without copies."""
        column = {name: torch.from_numpy(values) for name, values in self._columns.items()}
        return _estimates(column), column["half"].long()

    def note(self, rows: Int[Tensor, " b"], found: PoseEstimates, half: Int[Tensor, " b"]) -> None:
        """Keep what a pass found; `read` does not see it before the pass is committed."""
        columns = {name: getattr(found, name) for name in SCHEMA if name != "half"} | {"half": half}
        self.note_columns(rows, columns)

    def load_table(self, store: ParticleStore) -> None:
        """Take in the poses that came with the particles, shard by shard."""
        for start in range(0, store.count, store.shard_rows):
            rows = slice(start, min(start + store.shard_rows, store.count))
            optics = ("magnification",) if store.has_aberrations else ()
            columns = store.read_columns(rows.start, rows.stop, ("rotation", "shift", *optics))
            if optics:  # the table's origins are of images as recorded
                shift, matrix = (torch.from_numpy(columns.pop(name)) for name in ("shift", *optics))
                columns["shift"] = corrected_shift(shift, matrix).numpy()
            for name, values in columns.items():
                self._columns[name][rows] = values
            for name in ("class_probability", "confidence", "particle_probability"):
                self._columns[name][rows] = 1
            self._written[rows] = 1


def _estimates(column: Mapping[str, Tensor]) -> PoseEstimates:
    return PoseEstimates(
        rotation=column["rotation"],
        shift=column["shift"],
        class_index=column["class_index"].long(),
        class_probability=column["class_probability"],
        confidence=column["confidence"],
        particle_probability=column["particle_probability"],
        log_likelihood=torch.zeros_like(column["confidence"]),
    )


def _scratch(shape: tuple[int, ...], dtype: str) -> NDArray:
    """Zeros in a file without a name, which goes with the process; rows never written take no space."""
    with tempfile.TemporaryFile() as handle:
        return np.memmap(handle, dtype=dtype, mode="w+", shape=shape)


def _to_bytes(arrays: Mapping[str, NDArray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _from_bytes(url: str, schema: Mapping[str, tuple[int, ...]]) -> dict[str, NDArray]:
    try:
        with np.load(io.BytesIO(urls.read_bytes(url)), allow_pickle=False) as archive:
            return {name: archive[name] for name in ("rows", *schema)}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{urls.redacted(url)}: cannot be read ({reason}): remove the run's checkpoints that came after it to go "
            "on before it, or start the run anew"
        ) from None
