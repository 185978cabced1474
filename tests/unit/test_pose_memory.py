"""Remembered poses: what is written is read, rows never seen say so, and many may open it at once."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from scalecryo.physics.rotation import random_rotations
from scalecryo.train.guided.memory import PoseMemory


def test_written_rows_are_read_back_by_another(tmp_path: Path) -> None:
    first, second = PoseMemory(tmp_path / "poses", 50), PoseMemory(tmp_path / "poses", 50)
    rows = torch.tensor([3, 49, 7])
    rotation, shift, confidence = (
        random_rotations(3, torch.Generator().manual_seed(0)),
        torch.randn(3, 2),
        torch.rand(3),
    )
    first.write(rows, rotation, shift, confidence)
    first.flush()
    found = second.read(torch.tensor([49, 0, 7, 3]))
    assert found[3].tolist() == [True, False, True, True]
    order = torch.tensor([1, 2, 0])
    keep = torch.tensor([0, 2, 3])
    assert torch.equal(found[0][keep], rotation[order])
    assert torch.equal(found[1][keep], shift[order])
    assert torch.equal(found[2][keep], confidence[order])


def test_opening_at_once_never_wipes_what_was_written(tmp_path: Path) -> None:
    # Every thread opens the memory and writes its own row at once; all rows must be there in the end.
    def work(row: int) -> None:
        memory = PoseMemory(tmp_path / "poses", 64)
        memory.write(torch.tensor([row]), torch.eye(3)[None], torch.full((1, 2), float(row)), torch.ones(1))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(64)))
    _, shift, _, seen = PoseMemory(tmp_path / "poses", 64).read(torch.arange(64))
    assert seen.all()
    assert torch.equal(shift[:, 0], torch.arange(64.0))
    assert len(list((tmp_path / "poses").iterdir())) == 4  # no temporary file stays
