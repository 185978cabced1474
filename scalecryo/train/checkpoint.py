"""Checkpoints: model, optimiser and position in the sample order, written whole, checked when read."""

import io
import logging
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import torch

from scalecryo.data import files
from scalecryo.errors import CheckpointError
from scalecryo.train.run_folder import RunFolder

FORMAT_VERSION = 1
_NAME = re.compile(r"step_(\d{10})\.pt$")
logger = logging.getLogger(__name__)


def save_checkpoint(run: RunFolder, step: int, state: Mapping[str, Any], keep: int) -> None:
    """Write `checkpoints/step_<step>.pt` and remove all but the newest `keep`.

    Args:
        step: number of finished steps.
        state: tensors, numbers, strings and containers of them.
    """
    buffer = io.BytesIO()
    torch.save({"format_version": FORMAT_VERSION, "step": step, **state}, buffer)
    files.make_folder(run.path("checkpoints"))
    run.write(f"checkpoints/step_{step:010d}.pt", buffer.getvalue())
    for _, name in _list(run)[:-keep]:
        files.remove_tree(run.path("checkpoints", name))


def load_checkpoint(run: RunFolder, *, store_hash: str | None) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, or None where there is none at all.

    Args:
        store_hash: hash of the particle store, which must be the one trained on; None: any store.

    Raises:
        CheckpointError: none of the checkpoints can be read, or the run was trained on another store.
    """
    names = _list(run)
    for step, name in reversed(names):
        state = _read(run.path("checkpoints", name))
        if state is None:
            logger.warning("checkpoint of step %d is damaged: falling back to the one before", step)
            continue
        if store_hash is not None and state["store_hash"] != store_hash:
            raise CheckpointError(
                f"{run.url}: its checkpoint was trained on another store (hash {state['store_hash']}, this one "
                f"{store_hash}): name the store of the run with --data, or start a new run"
            )
        return state
    if names:
        raise CheckpointError(f"{run.url}: none of its {len(names)} checkpoints can be read: start the run anew")
    return None


def newest_step(run: RunFolder) -> int:
    """Step of the newest checkpoint, whole or not; 0 where there is none."""
    return max((step for step, _ in _list(run)), default=0)


def _list(run: RunFolder) -> list[tuple[int, str]]:
    folder = run.path("checkpoints")
    names = files.list_folder(folder) if files.exists(folder) else []
    return sorted((int(match[1]), name) for name in names if (match := _NAME.search(name)))


def _read(url: str) -> dict[str, Any] | None:
    """A checkpoint's contents, or None where the file is damaged."""
    data = files.read_bytes(url)
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
