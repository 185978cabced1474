"""What is known of every particle: still while a pass runs, exchanged at its end, the same again after a resume."""

from pathlib import Path

import numpy as np
import pytest
import torch

from scalecryo.distributed.world import World
from scalecryo.errors import CheckpointError
from scalecryo.physics.poses import PoseEstimates
from scalecryo.physics.rotation import random_rotations
from scalecryo.runs.folder import RunFolder
from scalecryo.train import particle_state
from scalecryo.train.particle_state import ParticleState


def estimates_of(rows: list[int], seed: int = 0) -> tuple[torch.Tensor, PoseEstimates, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    count = len(rows)
    found = PoseEstimates(
        random_rotations(count, generator), torch.randn(count, 2, generator=generator),
        torch.randint(3, (count,), generator=generator), torch.rand(count, generator=generator),
        torch.rand(count, generator=generator), torch.rand(count, generator=generator), torch.zeros(count),
    )  # fmt: skip
    return torch.tensor(rows), found, 1 + torch.arange(count) % 2


def state_of(folder: Path, count: int = 50) -> ParticleState:
    return ParticleState(RunFolder(str(folder / "run")), count)


def same(first: PoseEstimates, second: PoseEstimates) -> bool:
    names = ("rotation", "shift", "class_index", "class_probability", "confidence", "particle_probability")
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in names)


def one_pass(state: ParticleState, name: str, rows: list[int], seed: int = 0) -> None:
    state.begin(name)
    state.note(*estimates_of(rows, seed))
    state.commit(World())


def test_noted_poses_are_read_only_after_the_pass(tmp_path: Path) -> None:
    state, noted = state_of(tmp_path), estimates_of([3, 49, 7])
    state.begin("iteration_0001")
    state.note(*noted)
    assert not state.read(torch.tensor([3, 49, 7]))[1].any()
    state.commit(World())
    found, seen = state.read(torch.tensor([49, 0, 7, 3]))
    assert seen.tolist() == [True, False, True, True]
    assert same(found.select(torch.tensor([0, 2, 3])), noted[1].select(torch.tensor([1, 2, 0])))
    before = list(state.parts)
    state.begin("iteration_0002")
    state.commit(World())
    assert state.parts == before  # nothing is noted twice


def test_a_resumed_state_is_the_one_that_was_left(tmp_path: Path) -> None:
    state, rows = state_of(tmp_path), torch.arange(50)
    for number, own in enumerate(([1, 5, 9], [5, 6], [19]), start=1):
        one_pass(state, f"iteration_{number:04d}", own, seed=number)
    resumed = state_of(tmp_path)
    resumed.load(state.parts)
    for left, found in zip(state.read(rows), resumed.read(rows), strict=True):
        assert torch.equal(left, found) if isinstance(left, torch.Tensor) else same(left, found)
    # An iteration that was begun but not finished before the kill counts for nothing.
    earlier = state_of(tmp_path)
    earlier.load(state.parts[:1])
    assert not earlier.read(torch.tensor([19]))[1].any()
    assert same(earlier.read(torch.tensor([5]))[0], estimates_of([1, 5, 9], seed=1)[1].select(slice(1, 2)))


def test_a_pass_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(particle_state, "PART_ROWS", 2)
    state = state_of(tmp_path)
    state.begin("final")
    state.note(*estimates_of([0, 1]))
    state.note(*estimates_of([2]))  # not yet written
    again = state_of(tmp_path)
    assert again.load_pass("final") == 2
    assert again.read(torch.arange(4))[1].tolist() == [True, True, False, False]
    again.remove_pass("final")
    assert not (tmp_path / "run" / "particles").exists()


@pytest.mark.parametrize("damage", ["cut", "gone", "other"])
def test_damaged_parts_are_named(tmp_path: Path, damage: str) -> None:
    state = state_of(tmp_path)
    one_pass(state, "iteration_0001", [1, 5, 9])
    path = tmp_path / "run" / state.parts[0]
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "gone":
        path.unlink()
    else:
        np.savez(path, rows=np.arange(3))
    with pytest.raises(CheckpointError, match="iteration_0001"):
        state_of(tmp_path).load(state.parts)
