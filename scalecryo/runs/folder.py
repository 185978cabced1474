"""The folder of a run: what lies where, on disk or at a URL.

Files that are appended to (event files, metrics.jsonl) need a disk: a run at a remote URL stages them locally and
`sync` uploads what changed. Everything else is written whole.
"""

import json
import re
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from scalecryo.config import Config, config_from_dict, config_to_toml
from scalecryo.data.io import urls
from scalecryo.errors import MissingInputError, OutputError, OutputExistsError

RESOLUTION = "final/resolution_angstrom"
_CLASS = re.compile(r"class\d+")


class RunFolder:
    """Paths and whole-file writes of one run."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._staging: tempfile.TemporaryDirectory[str] | None = None
        self._uploaded: dict[Path, tuple[int, int]] = {}

    def create(self, config: Config, *, resume: bool) -> None:
        """Start the folder with its resolved configuration.

        Raises:
            OutputExistsError: the folder already holds a run and `resume` was not asked for.
            OutputError: it cannot be written.
        """
        self.refuse_another(resume=resume)
        try:
            urls.make_folder(self.url)
            self.write("config.toml", config_to_toml(config).encode())
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise OutputError(
                f"run folder {urls.redacted(self.url)} cannot be written ({reason}): name another --out, or mend its "
                "permissions"
            ) from error

    def refuse_another(self, *, resume: bool) -> None:
        """
        Raises:
            OutputExistsError: the folder already holds a run and `resume` was not asked for.
        """
        if urls.exists(self.path("config.toml")) and not resume:
            raise OutputExistsError(f"run folder {self.url} already holds a run: add --resume, or name another --out")

    def config(self) -> Config:
        """The configuration that the run was made with.

        Raises:
            MissingInputError: there is no config.toml.
        """
        path = self.path("config.toml")
        if not urls.exists(path):
            raise MissingInputError(f"{self.url} holds no config.toml: name the folder of a run that train wrote")
        return config_from_dict(tomllib.loads(urls.read_text(path)))

    def path(self, *names: str) -> str:
        """URL of a file in the run."""
        return urls.join(self.url, *names)

    def class_folders(self) -> list[str]:
        """Names of the folders of single structures; none of a run that sought one, or before its final pass."""
        return list(filter(_CLASS.fullmatch, urls.list_folder(self.url)))

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; none where there is none yet."""
        path = self.path("metrics.jsonl")
        return [json.loads(line) for line in urls.read_text(path).splitlines()] if urls.exists(path) else []

    def final_resolution(self) -> float | None:
        """Å at which the final half-maps agree (FSC 0.143); None before the final pass."""
        found = [row[RESOLUTION] for row in self.metrics() if row.get(RESOLUTION) is not None]
        return float(found[-1]) if found else None

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file under a temporary name, then give it its own."""
        urls.write_bytes_atomic(self.path(name), data)

    @property
    def local(self) -> Path:
        """Folder on disk for files that grow: the run itself, or its staging copy."""
        if urls.is_local(self.url):
            return Path(urls.local_path(self.url))
        if self._staging is None:
            self._staging = tempfile.TemporaryDirectory(prefix="scalecryo-")
        return Path(self._staging.name)

    def fetch(self, name: str) -> None:
        """Bring a growing file of a remote run to its staging copy, so that it goes on where it ended."""
        if not urls.is_local(self.url) and urls.exists(self.path(name)):
            (self.local / name).write_bytes(urls.read_bytes(self.path(name)))

    def sync(self) -> None:
        """Upload every staged file that changed since the last time; nothing to do for a run on disk."""
        if urls.is_local(self.url):
            return
        for path in sorted(p for p in self.local.rglob("*") if p.is_file()):
            state = (path.stat().st_size, path.stat().st_mtime_ns)
            if self._uploaded.get(path) != state:
                self.write(path.relative_to(self.local).as_posix(), path.read_bytes())
                self._uploaded[path] = state

    def close(self) -> None:
        """Remove the staging copy; `sync` first, if what it holds is wanted."""
        if self._staging is not None:
            self._staging.cleanup()
            self._staging = None


def trim_metrics(path: Path, last_step: int) -> None:
    """Drop the lines of metrics.jsonl past a step, so that a resumed run writes each step once."""
    if not path.exists():
        return
    kept: list[dict[str, Any]] = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # a line cut by a kill in mid-write
        if row["step"] <= last_step:
            kept.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
