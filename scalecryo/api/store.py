"""A particle store in Python: rows become images, CTF parameters and poses; and a data set for PyTorch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from scalecryo.data.io import urls
from scalecryo.data.particles import CTF_COLUMNS
from scalecryo.data.storage.store import ParticleStore
from scalecryo.errors import InputError

if TYPE_CHECKING:
    from scalecryo.api.torch_dataset import ParticleDataset

Rows = int | slice | Sequence[int] | NDArray[np.integer]
_GAP = 32  # rows between two that are wanted, up to which they are read in one go


@dataclass(frozen=True, eq=False)
class Particles:
    """Some particles of a store.

    Attributes:
        rows: in the store, (n,).
        images: (n, y, x) float32, protein-bright, normalised as the store says.
        pixel_size: Å.
        ctf: by name, (n,) each: defocus_u, defocus_v (Å), astigmatism_angle, phase_shift (degrees), voltage (kV),
            spherical_aberration (mm), amplitude_contrast; empty where the store has none.
        rotation: (n, 3, 3), image frame to volume frame; None where the source had no poses.
        shift: (n, 2), where the content sits, (x, y) in Å; None likewise.
        half: (n,), 1 or 2; 0: not assigned by the source.
        optics_group: (n,).
    """

    rows: NDArray[np.int64]
    images: NDArray[np.float32]
    pixel_size: float
    ctf: dict[str, NDArray[np.float32]]
    rotation: NDArray[np.float32] | None
    shift: NDArray[np.float32] | None
    half: NDArray[np.int8]
    optics_group: NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.rows)


class Store:
    """A particle store, opened for reading.

    `store[7]`, `store[10:20]` and `store[[3, 5]]` are `Particles` at the full box; `read` reads other levels.
    """

    def __init__(self, url: str) -> None:
        """
        Args:
            url: path or URL.

        Raises:
            MissingInputError, StoreError: see `open_store`.
        """
        self._store = ParticleStore.open(url)

    def __len__(self) -> int:
        return self._store.count

    def __getitem__(self, rows: Rows) -> Particles:
        return self.read(rows)

    def __repr__(self) -> str:
        store = self._store
        return (
            f"<Store {urls.redacted(store.url)}: {store.count:,} particles, {store.box_size} px, {self.pixel_size:g} Å>"
        )

    @property
    def url(self) -> str:
        """Address."""
        return self._store.url

    @property
    def box_size(self) -> int:
        """Of the full box, px."""
        return self._store.box_size

    @property
    def pixel_size(self) -> float:
        """At the full box, Å."""
        return self._store.pixel_size

    @property
    def levels(self) -> tuple[int, ...]:
        """Boxes that the images are stored at, px, the largest first."""
        return self._store.levels

    @property
    def has_ctf(self) -> bool:
        """Whether CTF parameters are stored."""
        return self._store.has_ctf

    @property
    def has_poses(self) -> bool:
        """Whether the source gave poses."""
        return self._store.has_pose

    def read(self, rows: Rows, level: int | None = None) -> Particles:
        """Some particles, in the order that was asked for.

        Args:
            rows: one row, a slice, or rows; negative ones count from the end.
            level: box, px, one of `levels`; None: the full box.

        Raises:
            InputError: there is no such row.
            StoreError: no such level, or a shard is missing or damaged.
        """
        store, wanted = self._store, self._rows(rows)
        box = store.box_size if level is None else level
        images = np.zeros((len(wanted), box, box), np.float32)
        names = [name for name in store.columns if name in (*CTF_COLUMNS, "rotation", "shift", "half", "optics_group")]
        parts: dict[str, NDArray] = {}
        for start, stop, at in _runs(wanted):
            images[at] = store.read_images(box, start, stop)[wanted[at] - start]
            for name, values in store.read_columns(start, stop, names).items():
                column = parts.setdefault(name, np.zeros((len(wanted), *values.shape[1:]), values.dtype))
                column[at] = values[wanted[at] - start]
        nothing = np.zeros(len(wanted), np.int8)
        ctf = {name: parts[name] for name in CTF_COLUMNS if name in parts}
        return Particles(
            wanted, images, store.level_pixel_size(box), ctf, parts.get("rotation"), parts.get("shift"),
            parts.get("half", nothing), parts.get("optics_group", nothing.astype(np.int16)),
        )  # fmt: skip

    def columns(self, *names: str) -> dict[str, NDArray]:
        """Whole columns by name, all of them by default: the table without its images.

        Raises:
            StoreError: there is no such column.
        """
        return self._store.read_columns(0, self._store.count, names or None)

    def torch_dataset(self, level: int | None = None, *, shuffle: bool = False, seed: int = 0) -> "ParticleDataset":
        """The particles for `torch.utils.data.DataLoader`, one block of the store after another.

        Args:
            level: box, px; None: the full box.
            shuffle: whether blocks come in random order, and rows within each.
            seed: of that order, with the epoch (`ParticleDataset.set_epoch`).
        """
        from scalecryo.api.torch_dataset import ParticleDataset

        return ParticleDataset(self.url, self.box_size if level is None else level, shuffle=shuffle, seed=seed)

    def _rows(self, rows: Rows) -> NDArray[np.int64]:
        if isinstance(rows, slice):
            return np.arange(len(self))[rows].astype(np.int64)
        found = np.atleast_1d(np.asarray(rows)).astype(np.int64)
        bad = found[(found < -len(self)) | (found >= len(self))]
        if len(bad):
            raise InputError(f"{urls.redacted(self.url)}: no row {bad[0]}: it holds {len(self):,} particles, from 0 on")
        return np.where(found < 0, found + len(self), found)


def open_store(url: str) -> Store:
    """Open a particle store that `scalecryo convert` made, on disk or object storage.

    Raises:
        MissingInputError: nothing is there.
        StoreError: it is no particle store, incomplete, or of another version.
    """
    return Store(url)


def _runs(rows: NDArray[np.int64]) -> list[tuple[int, int, NDArray[np.intp]]]:
    """Stretches to read, first and past the last row, and which of the rows lie in each."""
    order = np.argsort(rows, kind="stable")
    breaks = np.flatnonzero(np.diff(rows[order]) > _GAP) + 1
    parts = [part for part in np.split(order, breaks) if len(part)]
    return [(int(rows[part[0]]), int(rows[part[-1]]) + 1, part) for part in parts]
