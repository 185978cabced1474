"""Checkpoints: model, optimiser and position in the sample order, written whole, checked when read."""

import io
import json
import logging
import re
import zipfile
from collections.abc import Collection, Mapping
from typing import Any

import torch

from scalecryo.data.io import urls
from scalecryo.errors import CheckpointError
from scalecryo.runs.folder import RunFolder

FORMAT_VERSION = 1
_NAME = re.compile(r"step_(\d{10})\.pt$")
logger = logging.getLogger(__name__)


def save_checkpoint(run: RunFolder, step: int, state: Mapping[str, Any], keep: int, *, score: float) -> None:
    """Write `checkpoints/step_<step>.pt`; remove all others but the newest `keep` and the best.

    Args:
        step: number of finished steps.
        state: tensors, numbers, strings and containers of them.
        score: how good it is, larger for better; `checkpoints/best.json` names the best so far.
    """
    save_state(run, f"step_{step:010d}.pt", {"step": step, **state})
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


def load_checkpoint(run: RunFolder, *, store_hash: str | None, wanted: Collection[str] = ()) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, or None where there is none at all.

    Args:
        store_hash: hash of the particle store, which must be the one trained on; None: any store.
        wanted: what it must hold beside the step and the hash.

    Raises:
        CheckpointError: none of the checkpoints can be read, or the run was trained on another store or by another
            recipe or version.
    """
    names = _list(run)
    for step, name in reversed(names):
        state = load_state(run, name)
        if state is None:
            logger.warning("checkpoint of step %d is damaged: falling back to the one before", step)
            continue
        if store_hash is not None and state["store_hash"] != store_hash:
            raise CheckpointError(
                f"{run.url}: its checkpoint was trained on another store (hash {state['store_hash']}, this one "
                f"{store_hash}): name the store of the run with --data, or start a new run"
            )
        missing = sorted(set(wanted) - state.keys())
        if missing:
            raise CheckpointError(
                f"{run.url}: checkpoint {step} holds no {', '.join(missing)}: another recipe (pose.source) or version "
                "of scalecryo wrote it: use that one, or start the run anew"
            )
        return state
    if names:
        raise CheckpointError(f"{run.url}: none of its {len(names)} checkpoints can be read: start the run anew")
    return None


def save_state(run: RunFolder, name: str, state: Mapping[str, Any]) -> None:
    """Write a file of tensors into `checkpoints`, whole."""
    buffer = io.BytesIO()
    torch.save({"format_version": FORMAT_VERSION, **state}, buffer)
    urls.make_folder(run.path("checkpoints"))
    run.write(f"checkpoints/{name}", buffer.getvalue())


def newest_step(run: RunFolder) -> int:
    """Step of the newest checkpoint, whole or not; 0 where there is none."""
    return max((step for step, _ in _list(run)), default=0)


def _list(run: RunFolder) -> list[tuple[int, str]]:
    folder = run.path("checkpoints")
    names = urls.list_folder(folder) if urls.exists(folder) else []
    return sorted((int(match[1]), name) for name in names if (match := _NAME.search(name)))


def load_state(run: RunFolder, name: str) -> dict[str, Any] | None:
    """The contents of a file in `checkpoints`, or None where it is damaged.

    Raises:
        CheckpointError: another format.
    """
    url = run.path("checkpoints", name)
    data = urls.read_bytes(url)
    try:
        # torch.load does not look at the archive's checksums.
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if archive.testzip() is not None:
                return None
    except zipfile.BadZipFile:
        return None
    state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if state["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{url}: format {state['format_version']}, this scalecryo reads {FORMAT_VERSION}: "
            "use the version that wrote it, or start the run anew"
        )
    return state
