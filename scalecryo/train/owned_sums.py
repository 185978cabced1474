"""Sums that several workers inserted into: each map's are added on one worker, which solves it for all."""

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.distributed.world import World
from scalecryo.map.backprojection import Backprojection


def reduce_to_owners_(sums: Backprojection, world: World, radius: float, *, together: int = 1) -> list[int]:
    """Add what several workers inserted, each map's on its owner alone: half the bytes of an all-reduce. Collective.

    Args:
        sums: of this worker; what it does not own is lost.
        world: all workers.
        radius: Fourier pixels up to which images were inserted.
        together: neighbouring classes that one worker needs all of.

    Returns:
        2 class + half - 1 of the sums that this worker owns.
    """
    pairs = [(number, half) for number in range(sums.classes) for half in (0, 1)]
    mine = [2 * number + half for number, half in pairs if _owner(number // together, half, world) == world.rank]
    if world.size == 1:
        return mine
    where = sums.reached(radius)
    for number, half in pairs:
        owner = _owner(number // together, half, world)
        for grid in sums.tensors():
            own = grid[number, half].view(-1)
            part = own.index_select(0, where)
            world.reduce_(part, owner)
            if owner == world.rank:
                own.index_copy_(0, where, part)
    return mine


def solve_by_owners(sums: Backprojection, world: World) -> Float[Tensor, "classes 2 n n n"]:
    """The maps of every class and half, each solved by its owner, on every worker. Collective.

    Args:
        sums: after `reduce_to_owners_`; those of classes that stayed together are merged to one.
        world: all workers.
    """
    shape = (sums.classes, 2, *[sums.box_size] * 3)
    maps = torch.empty(shape, dtype=torch.float32, device=sums.denominator.device)
    pairs = [(number, half) for number in range(sums.classes) for half in (0, 1)]
    for number, half in pairs:
        if _owner(number, half, world) == world.rank:
            maps[number, half] = sums.solve_one(number, half + 1)
    for number, half in pairs:
        world.broadcast_(maps[number, half], _owner(number, half, world))
    return maps


def _owner(class_index: int, half: int, world: World) -> int:
    return (2 * class_index + half) % world.size
