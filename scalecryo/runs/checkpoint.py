"""Checkpoints: one format for every stage, written whole, checked when read."""

import dataclasses
import hashlib
import io
import json
import logging
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from scalecryo.config import Config
from scalecryo.data.io import urls
from scalecryo.errors import CheckpointError
from scalecryo.runs.folder import RunFolder

FORMAT_VERSION = 2
_FIELDS = ("step", "recipe", "stage", "store_hash", "state")
_FINISHED = "finished.json"
_RESULTS = ("map.mrc", "half1.mrc", "half2.mrc", "mask.mrc", "particles.star")
_NAME = re.compile(r"step_(\d{10})\.pt$")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """Where a run stands.

    Attributes:
        step: of the run's curves; 0 before the first.
        recipe: of the configuration.
        stage: under way, by name.
        store_hash: of the particles trained on.
        state: the stage's `state_dict`: tensors, numbers, strings and containers of them.
    """

    step: int
    recipe: str
    stage: str
    store_hash: str
    state: Mapping[str, Any]


def save_checkpoint(run: RunFolder, checkpoint: Checkpoint, keep: int, *, score: float) -> None:
    """Write `checkpoints/step_<step>.pt`; remove all others but the newest `keep` and the best.

    Args:
        run: whose folder it is written to.
        checkpoint: what to write.
        keep: how many of the newest stay.
        score: how good it is, larger for better; `checkpoints/best.json` names the best so far.
    """
    buffer, step = io.BytesIO(), checkpoint.step
    fields = {name: getattr(checkpoint, name) for name in _FIELDS}
    torch.save({"format_version": FORMAT_VERSION, **fields}, buffer)
    urls.make_folder(run.path("checkpoints"))
    run.write(f"checkpoints/step_{step:010d}.pt", buffer.getvalue())
    best = best_checkpoint(run)
    if best is None or best[0] >= step or score > best[1]:  # a later one is of a run that was taken up before it
        best = step, score
        run.write("checkpoints/best.json", json.dumps({"step": step, "score": score}).encode())
    for number, name in _list(run)[:-keep]:
        if number != best[0]:
            urls.remove_tree(run.path("checkpoints", name))


def best_checkpoint(run: RunFolder) -> tuple[int, float] | None:
    """Step and score of the best checkpoint; None where there is none yet."""
    path = run.path("checkpoints", "best.json")
    if not urls.exists(path):
        return None
    found = json.loads(urls.read_text(path))
    return int(found["step"]), float(found["score"])


def load_checkpoint(
    run: RunFolder, *, store_hash: str | None, recipe: str, grown_from: Sequence[str] = ()
) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None where there is none at all.

    Args:
        run: whose folder is read.
        store_hash: of the particles, which must be those trained on; None: any.
        recipe: that must have written it.
        grown_from: hashes of the store before particles were appended to it, which do as well.

    Raises:
        CheckpointError: none of the checkpoints can be read, or the run was trained on another store or by another
            recipe or version.
    """
    names = _list(run)
    for step, name in reversed(names):
        found = _load(run, name)
        if found is None:
            logger.warning("checkpoint of step %d is damaged: falling back to the one before", step)
            continue
        # Past the colon is which of the store's particles were chosen.
        grown = found.store_hash.partition(":")[0] in grown_from
        if store_hash is not None and found.store_hash != store_hash and not grown:
            raise CheckpointError(
                f"{run.url}: its checkpoint was trained on another store (hash {found.store_hash}, this one "
                f"{store_hash}): name the store of the run with --data, or start a new run"
            )
        if found.recipe != recipe:
            raise CheckpointError(
                f"{run.url}: checkpoint {step} is of the recipe {found.recipe}, the settings are of {recipe}: "
                "give back pose.source and guided.start, or start a new run"
            )
        return found
    if names:
        raise CheckpointError(f"{run.url}: none of its {len(names)} checkpoints can be read: start the run anew")
    return None


def newest_step(run: RunFolder) -> int:
    """Step of the newest checkpoint, whole or not; 0 where there is none."""
    return max((step for step, _ in _list(run)), default=0)


def note_start(run: RunFolder) -> None:
    """Say that a run is under way, whatever it was before."""
    urls.remove_tree(run.path("checkpoints", _FINISHED))


def note_end(run: RunFolder, config: Config, store_hash: str) -> None:
    """Say that a run is finished: with these settings, these particles and its newest checkpoint."""
    urls.make_folder(run.path("checkpoints"))
    run.write(f"checkpoints/{_FINISHED}", json.dumps({"identity": _identity(run, config, store_hash)}).encode())


def is_finished(run: RunFolder, config: Config, store_hash: str) -> bool:
    """Whether a run has its final pass with these settings, but for those of [run], and these particles."""
    path = run.path("checkpoints", _FINISHED)
    if not urls.exists(path) or json.loads(urls.read_text(path)).get("identity") != _identity(run, config, store_hash):
        return False
    return config.train.final_pass and all(urls.exists(run.path(name)) for name in _RESULTS)


def _identity(run: RunFolder, config: Config, store_hash: str) -> str:
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key != "run"}
    text = json.dumps([settings, store_hash, newest_step(run)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _list(run: RunFolder) -> list[tuple[int, str]]:
    folder = run.path("checkpoints")
    names = urls.list_folder(folder) if urls.exists(folder) else []
    return sorted((int(match[1]), name) for name in names if (match := _NAME.search(name)))


def _load(run: RunFolder, name: str) -> Checkpoint | None:
    """A checkpoint, or None where it is damaged."""
    url = run.path("checkpoints", name)
    data = urls.read_bytes(url)
    try:
        # torch.load does not look at the archive's checksums.
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if archive.testzip() is not None:
                return None
    except zipfile.BadZipFile:
        return None
    found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if found["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{url}: format {found['format_version']}, this scalecryo reads {FORMAT_VERSION}: "
            "use the version that wrote it, or start the run anew"
        )
    return Checkpoint(**{name: found[name] for name in _FIELDS})
