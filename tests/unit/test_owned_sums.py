"""Each map's sums come together on one worker, which solves it for all."""

import threading

import pytest
import torch
from torch import Tensor

from scalecryo.distributed.world import World
from scalecryo.map.backprojection import Backprojection
from scalecryo.physics.symmetry import PointGroup
from scalecryo.train.owned_sums import reduce_to_owners_, solve_by_owners
from tests.support.thread_world import ThreadWorld

BOX, RADIUS, PARTS = 12, 4.0, 2


def _sums(rank: int, classes: int) -> Backprojection:
    """Random sums up to the radius, and zero beyond it as after insertion."""
    sums, generator = Backprojection(BOX, classes=classes), torch.Generator().manual_seed(rank)
    kept = torch.zeros(sums.denominator[0, 0].numel())
    kept[sums.reached(RADIUS)] = 1.0
    kept = kept.view_as(sums.denominator[0, 0])
    sums.numerator += torch.randn(sums.numerator.shape, dtype=torch.complex64, generator=generator) * kept
    sums.denominator += torch.rand(sums.denominator.shape, generator=generator) * kept
    return sums


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("size", "classes"), [(1, 1), (2, 1), (3, 1), (2, 3)])
def test_maps_of_all_workers_sums(size: int, classes: int, symmetric: bool) -> None:
    """Reference: all sums added and solved in one place. Two parts a class, as an iteration that searches has.

    What a worker does not own is not a number (`ThreadWorld`).
    """
    others = PointGroup.of("C2").others
    whole = _sums(0, classes * PARTS)
    for rank in range(1, size):
        for total, more in zip(whole.tensors(), _sums(rank, classes * PARTS).tensors(), strict=True):
            total += more
    if symmetric:
        whole.symmetrise(others, RADIUS)
    expected = [whole.merged(PARTS).solve(), whole.merged(PARTS, without=0).solve()]
    worlds, found = [World()] if size == 1 else ThreadWorld.of(size), dict[int, list[Tensor]]()

    def work(rank: int) -> None:
        world = worlds[rank]
        sums = _sums(rank, classes * PARTS)
        mine = reduce_to_owners_(sums, world, RADIUS, together=PARTS)
        if symmetric:
            sums.symmetrise(others, RADIUS, mine)
        found[rank] = [
            solve_by_owners(sums.merged(PARTS), world),
            solve_by_owners(sums.merged(PARTS, without=0), world),
        ]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(size):
        for maps, reference in zip(found[rank], expected, strict=True):
            # Single precision; three addends may be added in another order.
            torch.testing.assert_close(maps, reference, rtol=1e-5, atol=1e-6 * float(reference.abs().max()))
