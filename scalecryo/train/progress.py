"""How far a guided run has come, in memory and in checkpoints."""

import logging
from dataclasses import dataclass
from typing import Any

import torch

from scalecryo.data.io import urls
from scalecryo.runs.checkpoint import load_checkpoint, load_state, save_checkpoint, save_state
from scalecryo.runs.folder import RunFolder
from scalecryo.train.batches import data_hash
from scalecryo.train.particle_source import Particles
from scalecryo.train.stages.bootstrap import Bootstrap
from scalecryo.train.stages.refinement import HalfReferences

logger = logging.getLogger(__name__)
BOOTSTRAP, SAVE_EVERY = "bootstrap.pt", 20


@dataclass(frozen=True)
class Progress:
    """Where the ladder stands.

    Attributes:
        state: both half-maps, and what they share.
        iterations: finished so far.
        radius: of the next iteration.
        settled: iterations in a row that brought no progress.
    """

    state: HalfReferences
    iterations: int
    radius: float
    settled: int


class SavedBootstrap:
    """The bootstrap's own checkpoint, so that a kill costs `SAVE_EVERY` of its steps at most."""

    def __init__(self, particles: Particles, growing: Bootstrap) -> None:
        config = particles.config
        chosen = data_hash(particles.store, particles.subset)
        self._identity = f"{chosen} {config.train.rows} {config.train.seed} {config.guided} {config.pose.centred}"
        self._run, self._leads, self._growing = RunFolder(config.run.out), particles.world.is_leader, growing

    def load(self) -> int:
        """Bring the bootstrap to where it was; returns the number of finished steps."""
        found = load_state(self._run, BOOTSTRAP) if urls.exists(self._run.path("checkpoints", BOOTSTRAP)) else None
        if found is not None and found["identity"] == self._identity:
            self._growing.load(int(found["step"]), found["tensors"])
            logger.info("bootstrap: going on after step %d", found["step"])
        return self._growing.step

    def after_step(self) -> None:
        """Save now and then; every worker holds the same, and worker 0 writes it."""
        step = self._growing.step
        if self._leads and step % SAVE_EVERY == 0:
            tensors = [tensor.cpu() for tensor in self._growing.tensors()]
            save_state(self._run, BOOTSTRAP, {"identity": self._identity, "step": step, "tensors": tensors})


def is_settled(before: HalfReferences, after: HalfReferences) -> bool:
    """Whether an iteration at the same level brought the halves no closer: less than half a percent of their
    correlation."""
    return len(before.curve) == len(after.curve) and float(after.curve.mean()) < 1.005 * float(before.curve.mean())


def save_progress(
    run: RunFolder, progress: Progress, teacher: dict[str, Any] | None, store_hash: str, keep: int
) -> None:
    """Write a checkpoint after an iteration."""
    state = progress.state
    saved = {
        "store_hash": store_hash,
        "half_maps": torch.stack(state.half_maps).cpu(),
        "curve": state.curve.cpu(),
        "noise": state.noise.cpu(),
        "radius": state.radius,
        "moved": state.moved,
        "next_radius": progress.radius,
        "settled": progress.settled,
        "teacher": teacher,
    }
    # The halves' correlation, summed over shells: how much is resolved, and how well.
    save_checkpoint(run, progress.iterations, saved, keep, score=float(state.curve.sum()))
    if progress.iterations == 1:
        urls.remove_tree(run.path("checkpoints", BOOTSTRAP))


def load_progress(
    run: RunFolder, store_hash: str | None, device: torch.device
) -> tuple[Progress | None, dict[str, Any] | None]:
    """The newest checkpoint's progress and its teacher's state; None where there is no checkpoint.

    Raises:
        CheckpointError: see `load_checkpoint`.
    """
    saved = load_checkpoint(run, store_hash=store_hash, wanted=("half_maps", "next_radius", "settled", "teacher"))
    if saved is None:
        return None, None
    maps = saved["half_maps"].to(device)
    curve, noise = saved["curve"].to(device), saved["noise"].to(device)
    state = HalfReferences((maps[0], maps[1]), curve, noise, saved["radius"], saved["moved"])
    return Progress(state, int(saved["step"]), float(saved["next_radius"]), int(saved["settled"])), saved["teacher"]
