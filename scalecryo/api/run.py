"""A run in Python: its maps, poses, correlations, curves and settings."""

import csv
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from scalecryo.config import Config
from scalecryo.data.formats.mrc import read_map
from scalecryo.data.formats.relion import CLASS, CLASS_PROBABILITY, STATE, STATE_PROBABILITY, OwnColumns, read_poses
from scalecryo.data.io import urls
from scalecryo.errors import InputError, MissingInputError
from scalecryo.runs.folder import RunFolder

if TYPE_CHECKING:
    import pandas


class Table(dict[str, NDArray]):
    """Columns of one length by name."""

    def to_pandas(self) -> "pandas.DataFrame":
        """As a data frame; columns of more than one number a row as objects.

        Raises:
            InputError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise InputError(
                "pandas is not installed: install scalecryo[pandas], or use the columns as they are"
            ) from error
        return pandas.DataFrame({name: list(values) if values.ndim > 1 else values for name, values in self.items()})


@dataclass(frozen=True, eq=False)
class Map:
    """A density map.

    Attributes:
        density: [z, y, x], float32.
        pixel_size: Å.
        origin: position of voxel (0, 0, 0), Å, (x, y, z).
    """

    density: NDArray[np.float32]
    pixel_size: float
    origin: tuple[float, float, float]


class Run:
    """The folder of a run, finished or not."""

    def __init__(self, url: str) -> None:
        """
        Args:
            url: path or URL of the folder.

        Raises:
            MissingInputError: see `open_run`.
        """
        self._folder = RunFolder(url.rstrip("/") or url)
        self._config = self._folder.config()

    def __repr__(self) -> str:
        resolution = self.resolution
        reached = "not finished" if resolution is None else f"{resolution:.2f} Å"
        return f"<Run {urls.redacted(self.url)}: {self._config.recipe}, {reached}>"

    @property
    def url(self) -> str:
        """Address."""
        return self._folder.url

    @property
    def config(self) -> Config:
        """What it was trained with."""
        return self._config

    @property
    def resolution(self) -> float | None:
        """Of the final map, Å (FSC 0.143, masked, corrected); None before the final pass."""
        return self._folder.final_resolution()

    @property
    def classes(self) -> int:
        """Number of structures; of a run that was to find it, what it found: 1 before the final pass."""
        return self._config.train.classes or max(len(self._folder.class_folders()), 1)

    def map(self, name: str = "map", *, class_number: int | None = None) -> Map:
        """A map: `map`, `map_unsharpened`, `half1`, `half2`, `mask`, or `volume` of the paper's recipe.

        Args:
            name: without .mrc.
            class_number: from 1; None: the largest class, which is also the run's own.

        Raises:
            MissingInputError: the run has no such map.
        """
        folder = () if class_number is None else (f"class{class_number}",)
        return Map(*read_map(self._existing(*folder, f"{name}.mrc")))

    def poses(self) -> Table:
        """Every particle's image name, rotation (n, 3, 3), shift (n, 2) in Å, half and confidence; of several classes
        also `class` (from 1) and `class_probability`, of components `state` and `state_probability`. Rows are those of
        the store.

        Raises:
            MissingInputError: no particle was posed yet.
        """
        path = self._existing("particles.star")
        found = read_poses(path)
        table = Table(
            image=np.array(found.names), rotation=found.rotation,
            shift=np.zeros((len(found.names), 2)) if found.shift is None else found.shift, half=found.half,
        )  # fmt: skip
        if found.confidence is not None:
            table["confidence"] = found.confidence
        columns = OwnColumns(urls.read_bytes(path), urls.redacted(path))
        if CLASS_PROBABILITY in columns.names:
            table["class"] = columns.numbers(CLASS).astype(np.int64)
            table["class_probability"] = columns.numbers(CLASS_PROBABILITY)
        if STATE in columns.names:
            table["state"] = columns.numbers(STATE).astype(np.int64)
            table["state_probability"] = columns.numbers(STATE_PROBABILITY)
        return table

    def fsc(self, *, class_number: int | None = None) -> Table:
        """Correlations of the half-maps by shell: shell, resolution_angstrom, fsc_unmasked, fsc_masked, fsc_random,
        fsc_corrected.

        Raises:
            MissingInputError: there is none yet.
        """
        folder = () if class_number is None else (f"class{class_number}",)
        return self._csv(*folder, "fsc.csv")

    def fsc_cones(self) -> Table:
        """Resolution by direction: what fsc_cones.csv holds.

        Raises:
            MissingInputError: there is none yet.
        """
        return self._csv("fsc_cones.csv")

    def metrics(self) -> Table:
        """Every curve by step or iteration, in column `step`; NaN where a step has no value. Lists are left out."""
        rows = self._folder.metrics()
        names = dict.fromkeys(name for row in rows for name, value in row.items() if not isinstance(value, list))
        columns = {
            name: np.array([np.nan if row.get(name) is None else row[name] for row in rows], dtype=np.float64)
            for name in names
        }
        return Table({**columns, "step": np.array([row["step"] for row in rows], dtype=np.int64)})

    def _existing(self, *names: str) -> str:
        path = self._folder.path(*names)
        if not urls.exists(path):
            raise MissingInputError(
                f"{urls.redacted(path)} is not there: the run has none, or is not finished (scalecryo assign)"
            )
        return path

    def _csv(self, *names: str) -> Table:
        rows = list(csv.DictReader(io.StringIO(urls.read_text(self._existing(*names)))))
        return Table({name: np.array([float(row[name]) for row in rows]) for name in (rows[0] if rows else {})})


def open_run(url: str) -> Run:
    """Open the folder that `scalecryo train` wrote, on disk or object storage.

    Raises:
        MissingInputError: it holds no config.toml.
    """
    return Run(url)
