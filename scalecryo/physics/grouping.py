"""Rows of a batch by the group that each belongs to, at the price of one wait for the device."""

from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor


def rows_by_group(group: Int[Tensor, " b"], count: int) -> tuple[Int[Tensor, " _"], ...]:
    """The rows of groups 0 … count − 1, ascending within each; rows of other groups are in none.

    `(group == number).nonzero()` for each of them would wait for the device each time.
    """
    order = group.argsort(stable=True)
    limits = torch.arange(count + 1, dtype=group.dtype, device=group.device)
    ends = torch.searchsorted(group[order], limits).tolist()  # host sync
    return tuple(order[start:stop] for start, stop in pairwise(ends))
