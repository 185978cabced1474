"""Remembered poses: still while an iteration runs, exchanged at its end, the same again after a resume."""

from pathlib import Path

import numpy as np
import pytest
import torch

from scalecryo.distributed.world import World
from scalecryo.errors import CheckpointError
from scalecryo.physics.rotation import random_rotations
from scalecryo.runs.folder import RunFolder
from scalecryo.train.particle_state import PoseMemory, load_found, save_found

Poses = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def poses_of(rows: list[int], seed: int = 0) -> Poses:
    generator = torch.Generator().manual_seed(seed)
    count = len(rows)
    return (torch.tensor(rows), random_rotations(count, generator), torch.randn(count, 2, generator=generator),
            torch.rand(count, generator=generator))  # fmt: skip


def resumed(run: RunFolder, iterations: int) -> PoseMemory:
    memory = PoseMemory(20)
    for iteration in range(1, iterations + 1):
        memory.remember(load_found(run, iteration))
    return memory


def test_noted_poses_are_read_only_after_the_rung() -> None:
    memory, noted = PoseMemory(50), poses_of([3, 49, 7])
    memory.note(*noted)
    assert not memory.read(torch.tensor([3, 49, 7]))[3].any()
    found = memory.settle(World())
    assert found.rows.tolist() == [3, 7, 49]
    rotation, shift, confidence, seen = memory.read(torch.tensor([49, 0, 7, 3]))
    assert seen.tolist() == [True, False, True, True]
    order, keep = torch.tensor([1, 2, 0]), torch.tensor([0, 2, 3])
    assert torch.equal(rotation[keep], noted[1][order])
    assert torch.equal(shift[keep], noted[2][order])
    assert torch.equal(confidence[keep], noted[3][order])
    assert len(memory.settle(World()).rows) == 0  # nothing is noted twice


def test_a_resumed_memory_is_the_one_that_was_left(tmp_path: Path) -> None:
    run, memory = RunFolder(str(tmp_path / "run")), PoseMemory(20)
    for iteration, rows in enumerate(([1, 5, 9], [5, 6], [19]), start=1):
        memory.note(*poses_of(rows, seed=iteration))
        save_found(run, iteration, memory.settle(World()))
    rows = torch.arange(20)
    for left, found in zip(memory.read(rows), resumed(run, 3).read(rows), strict=True):
        assert torch.equal(left, found)
    # An iteration that was begun but not finished before the kill counts for nothing.
    assert not resumed(run, 2).read(torch.tensor([19]))[3].any()
    assert torch.equal(resumed(run, 1).read(torch.tensor([5]))[0], poses_of([1, 5, 9], seed=1)[1][1:2])


@pytest.mark.parametrize("damage", ["cut", "gone", "other"])
def test_damaged_poses_are_named(tmp_path: Path, damage: str) -> None:
    run, memory = RunFolder(str(tmp_path / "run")), PoseMemory(20)
    memory.note(*poses_of([1, 5, 9]))
    save_found(run, 1, memory.settle(World()))
    path = tmp_path / "run" / "poses" / "rung_0001.npz"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "gone":
        path.unlink()
    else:
        np.savez(path, rows=np.arange(3))
    with pytest.raises(CheckpointError, match="iteration 1"):
        load_found(run, 1)
