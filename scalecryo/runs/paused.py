"""A pass that was left between two batches: what it had come to, beside the checkpoint that it began from.

Each worker writes its own sums; what is alike on all of them worker 0 writes, and last of all where the pass stood:
without that there is no pause. The next checkpoint removes it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from scalecryo.config import Config
from scalecryo.data.io import urls
from scalecryo.distributed.world import World
from scalecryo.runs.folder import RunFolder

FOLDER = "checkpoints/paused"
_PLACE = f"{FOLDER}/place.json"


@dataclass(frozen=True)
class Pause:
    """What the batches of a pass came to: tensors, numbers, strings and containers of them.

    Attributes:
        common: alike on every worker.
        own: this worker's: sums over its particles.
        reached: step of the run's curves, where it is all that was done since the newest checkpoint; None: it is what
            this pass added.
    """

    common: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)
    reached: int | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing has to be kept but what lies in the run's folder already."""
        return not self.common and not self.own


@dataclass(frozen=True)
class Place:
    """Which pass of a run it is.

    Attributes:
        step: of the newest checkpoint.
        reached: step that curves have come to.
        passes: to be made again from there, before it.
        stage: under way, by name.
        store_hash: of the particles.
        settings: digest of all but [run].
        workers: that share the particles.
    """

    step: int
    reached: int
    passes: int
    stage: str
    store_hash: str
    settings: str
    workers: int


def settings_digest(config: Config) -> str:
    """Of all settings that a pass depends on."""
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key != "run"}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def save_pause(run: RunFolder, world: World, place: Place, pause: Pause) -> None:
    """Write what a pass came to. Collective."""
    if world.is_leader:
        remove_pause(run)
        _write(run, "common", pause.common)
    world.all_gather_names([])  # the old one is gone
    if pause.own:
        _write(run, f"worker_{world.rank}", pause.own)
    world.all_gather_names([])  # all is written
    if world.is_leader:
        run.write(_PLACE, json.dumps(asdict(place)).encode())
    world.all_gather_names([])  # whoever looks now finds it


def paused_place(run: RunFolder) -> Place | None:
    """Where a pass was left; None where none was."""
    path = run.path(_PLACE)
    return Place(**json.loads(urls.read_text(path))) if urls.exists(path) else None


def load_pause(run: RunFolder, world: World) -> Pause:
    """What a pass had come to on this worker; `paused_place` says which."""
    own = f"worker_{world.rank}"
    return Pause(_read(run, "common"), _read(run, own) if urls.exists(run.path(FOLDER, f"{own}.pt")) else {})


def remove_pause(run: RunFolder) -> None:
    """Forget the pass that was left: where it stood first."""
    for name in (_PLACE, FOLDER):
        if urls.exists(run.path(name)):
            urls.remove_tree(run.path(name))


def _write(run: RunFolder, name: str, state: Mapping[str, Any]) -> None:
    # As it comes: sums are the largest thing in memory, and a copy of all of them might not fit.
    with urls.atomic_stream(run.path(FOLDER, f"{name}.pt")) as stream:
        torch.save(dict(state), stream)


def _read(run: RunFolder, name: str) -> dict[str, Any]:
    with urls.open_read(run.path(FOLDER, f"{name}.pt")) as stream:
        found: dict[str, Any] = torch.load(stream, map_location="cpu", weights_only=True)
    return found
