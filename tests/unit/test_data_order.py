"""The order of batches: properties that follow from its definition, for any sizes."""

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalecryo.data.permutation import permute
from scalecryo.data.streaming.order import BatchOrder
from scalecryo.errors import ConfigError

ORDERS = st.builds(
    BatchOrder,
    count=st.integers(1, 400),
    block_rows=st.sampled_from([1, 3, 4, 16, 64]),
    batch_size=st.sampled_from([1, 5, 12, 32, 64]),
    seed=st.integers(-(2**63), 2**64),
    max_lanes=st.integers(1, 32),
    window_blocks=st.integers(1, 5),
)


def _epoch(order: BatchOrder, epoch: int) -> np.ndarray:
    return np.concatenate([order.rows(epoch, step) for step in range(order.steps_per_epoch)])


@settings(max_examples=40, deadline=None)
@given(order=ORDERS, epoch=st.integers(0, 3))
def test_every_row_exactly_once_per_epoch(order: BatchOrder, epoch: int) -> None:
    rows = _epoch(order, epoch)
    assert sorted(rows[rows >= 0].tolist()) == list(range(order.count))
    assert len(rows) == order.steps_per_epoch * order.batch_size
    # The last batch is there because some row needs it.
    assert (order.rows(epoch, order.steps_per_epoch - 1) >= 0).any()


@settings(max_examples=25, deadline=None)
@given(order=ORDERS, epoch=st.integers(0, 2), step=st.integers(0, 5))
def test_batch_is_the_same_for_any_number_of_ranks(order: BatchOrder, epoch: int, step: int) -> None:
    step %= order.steps_per_epoch
    whole = order.rows(epoch, step)
    for world_size in (1, 2, 3, 5, 7, 16):
        if world_size > order.lanes:
            with pytest.raises(ConfigError, match=f"{world_size} ranks share {order.lanes} lanes"):
                order.lane_range(0, world_size)
            continue
        lanes = [order.lane_range(rank, world_size) for rank in range(world_size)]
        assert [lane for part in lanes for lane in part] == list(range(order.lanes))
        assert max(map(len, lanes)) - min(map(len, lanes)) <= 1
        parts = [order.rows(epoch, step, part) for part in lanes]
        assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 7, 16])
def test_ranks_never_share_a_row(world_size: int) -> None:
    order = BatchOrder(1200, 8, 96, seed=3)
    seen = [
        {int(row) for step in range(order.steps_per_epoch) for row in order.rows(0, step, lanes) if row >= 0}
        for lanes in (order.lane_range(rank, world_size) for rank in range(world_size))
    ]
    assert sum(map(len, seen)) == 1200
    assert len(set().union(*seen)) == 1200


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**64), epoch=st.integers(0, 9))
def test_permute_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    assert sorted(permute(np.arange(size), size, seed, epoch).tolist()) == list(range(size))


def test_windows_hold_the_rows_of_their_blocks() -> None:
    order = BatchOrder(1000, 8, 32, seed=1, window_blocks=3)
    for lane in range(order.lanes):
        window, slots = 0, 0
        while slots < order.lane_rows(lane):
            blocks = order.window_blocks_of(2, lane, window)
            rows = order.window_rows(2, lane, window)
            assert set(rows // 8) == set(blocks)
            assert order.window_of(lane, slots) == (window, slots)
            assert order.window_of(lane, slots + len(rows) - 1) == (window, slots)
            window, slots = window + 1, slots + len(rows)
        assert slots == order.lane_rows(lane)
        assert len(order.window_blocks_of(2, lane, window)) == 0


def test_epochs_and_seeds_differ_and_shuffle() -> None:
    order = BatchOrder(8000, 16, 256, seed=0)
    first, second = _epoch(order, 0), _epoch(order, 1)
    other = _epoch(BatchOrder(8000, 16, 256, seed=1), 0)
    for a, b in ((first, second), (first, other)):
        # Two independent permutations of n agree at one place on average.
        assert ((a == b) & (a >= 0)).sum() < 20
    # Position and row are uncorrelated: the correlation of n random pairs has σ = 1/√n, 4 σ allowed.
    filled = first[first >= 0]
    assert abs(np.corrcoef(np.arange(len(filled)), filled)[0, 1]) < 4 / np.sqrt(len(filled))
    # Neighbours rarely come from one block: a window mixes 4 blocks, a batch takes 8 rows from each of 32 lanes.
    assert np.mean(np.diff(filled // 16) == 0) < 0.4


def test_a_billion_particles_are_planned_at_once() -> None:
    small, large = BatchOrder(10_000, 64, 256, seed=0), BatchOrder(10**9, 64, 256, seed=0)
    times = {}
    for order in (small, large):
        order.rows(0, 0)
        start = time.perf_counter()
        for step in range(20):
            order.rows(7, order.steps_per_epoch - 1 - step)
        times[order.count] = time.perf_counter() - start
    # The same work but for a few more walks of the permutation; five times covers a busy machine.
    assert times[10**9] < 5 * times[10_000] + 0.05
    assert large.rows(3, 12345).max() < 10**9


@pytest.mark.parametrize("name", ["count", "block_rows", "batch_size", "max_lanes", "window_blocks"])
def test_sizes_below_one_are_refused(name: str) -> None:
    sizes = {"count": 9, "block_rows": 2, "batch_size": 4, "seed": 0, name: 0}
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        BatchOrder(**sizes)


def test_unknown_rank_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank 2 does not exist among 2 ranks"):
        BatchOrder(100, 4, 8, seed=0).lane_range(2, 2)


def test_a_billion_particles_take_no_memory() -> None:
    # What an order keeps does not grow with the number of particles: a few kB at most while a step is planned.
    peaks = {}
    for count in (10_000, 10**9):
        tracemalloc.start()
        order = BatchOrder(count, 64, 256, seed=0)
        order.rows(3, order.steps_per_epoch - 1)
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[10**9] < peaks[10_000] + 50_000


@settings(max_examples=30, deadline=None)
@given(order=ORDERS, epoch=st.integers(0, 2))
def test_every_block_is_read_once_an_epoch(order: BatchOrder, epoch: int) -> None:
    blocks = [
        block
        for lane in range(order.lanes)
        for window in range(order.lane_blocks(lane) + 1)
        for block in order.window_blocks_of(epoch, lane, window)
    ]
    assert sorted(blocks) == list(range(-(-order.count // order.block_rows)))


@settings(max_examples=30, deadline=None)
@given(order=ORDERS, world_size=st.sampled_from([1, 2, 3, 5, 7, 16]))
def test_ranks_take_equal_steps_and_weights_add_up(order: BatchOrder, world_size: int) -> None:
    if world_size > order.lanes:
        return
    # One row counts once over all ranks and steps: Σ weight = count, though ranks and steps hold different numbers.
    weights = [
        [(order.rows(1, step, order.lane_range(rank, world_size)) >= 0).sum() for step in range(order.steps_per_epoch)]
        for rank in range(world_size)
    ]
    assert {len(steps) for steps in weights} == {order.steps_per_epoch}
    assert np.sum(weights) == order.count
