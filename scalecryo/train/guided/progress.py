"""How far a guided run has come, in memory and in checkpoints."""

from dataclasses import dataclass
from typing import Any

import torch

from scalecryo.train.checkpoint import load_checkpoint, save_checkpoint
from scalecryo.train.guided.ladder import HalfReferences
from scalecryo.train.run_folder import RunFolder


@dataclass(frozen=True)
class Progress:
    """Where the ladder stands.

    Attributes:
        state: both half-maps, and what they share.
        rungs: finished so far.
        radius: of the next rung.
        settled: rungs in a row that brought no progress.
    """

    state: HalfReferences
    rungs: int
    radius: float
    settled: int


def is_settled(before: HalfReferences, after: HalfReferences) -> bool:
    """Whether a rung at the same level brought the halves no closer: less than half a percent of their correlation."""
    return len(before.curve) == len(after.curve) and float(after.curve.mean()) < 1.005 * float(before.curve.mean())


def save_progress(
    run: RunFolder, progress: Progress, teacher: dict[str, Any] | None, data_hash: str, keep: int
) -> None:
    """Write a checkpoint after a rung."""
    state = progress.state
    saved = {
        "store_hash": data_hash,
        "half_maps": torch.stack(state.half_maps).cpu(),
        "curve": state.curve.cpu(),
        "noise": state.noise.cpu(),
        "radius": state.radius,
        "moved": state.moved,
        "next_radius": progress.radius,
        "settled": progress.settled,
        "teacher": teacher,
    }
    save_checkpoint(run, progress.rungs, saved, keep)


def load_progress(
    run: RunFolder, data_hash: str | None, device: torch.device
) -> tuple[Progress | None, dict[str, Any] | None]:
    """The newest checkpoint's progress and its teacher's state; None where there is no checkpoint.

    Raises:
        CheckpointError: see `load_checkpoint`.
    """
    saved = load_checkpoint(run, store_hash=data_hash)
    if saved is None:
        return None, None
    maps = saved["half_maps"].to(device)
    curve, noise = saved["curve"].to(device), saved["noise"].to(device)
    state = HalfReferences((maps[0], maps[1]), curve, noise, saved["radius"], saved["moved"])
    return Progress(state, int(saved["step"]), float(saved["next_radius"]), int(saved["settled"])), saved["teacher"]
