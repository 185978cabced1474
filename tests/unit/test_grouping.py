"""Rows by group, against plain selection."""

import pytest
import torch

from scalecryo.physics.grouping import rows_by_group


@pytest.mark.parametrize("seed", range(3))
def test_rows_are_those_of_a_plain_selection(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(-1, 6, (50,), generator=generator)
    found = rows_by_group(group, 5)
    assert len(found) == 5
    for number, rows in enumerate(found):
        assert torch.equal(rows, (group == number).nonzero()[:, 0])


def test_groups_may_be_empty() -> None:
    assert [len(rows) for rows in rows_by_group(torch.empty(0, dtype=torch.long), 3)] == [0, 0, 0]
    assert [rows.tolist() for rows in rows_by_group(torch.tensor([2, 2]), 3)] == [[], [], [0, 1]]
