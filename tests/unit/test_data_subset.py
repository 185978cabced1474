"""Subsets: which rows, in which order, and how little is read for them."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalecryo.config import TrainConfig
from scalecryo.data.conversion.convert import convert, plan
from scalecryo.data.formats.mrc import StackWriter
from scalecryo.data.selection.query import Query
from scalecryo.data.selection.subset import Subset, choose, read_index
from scalecryo.data.storage.store import ParticleStore
from scalecryo.data.streaming.order import BatchOrder
from scalecryo.data.streaming.stream import ParticleStream
from scalecryo.errors import ConfigError

KNOWN = ("defocus_u", "defocus_v", "half")


@st.composite
def chosen_orders(draw: st.DrawFn) -> BatchOrder:
    count = draw(st.integers(1, 500))
    share = draw(st.sampled_from([0.02, 0.3, 0.9, 1.0]))
    mask = np.random.default_rng(draw(st.integers(0, 99))).random(count) < share
    mask[draw(st.integers(0, count - 1))] = True
    return BatchOrder(
        count,
        draw(st.sampled_from([1, 3, 4, 16])),
        draw(st.sampled_from([1, 5, 12, 32])),
        seed=draw(st.integers(-(2**63), 2**64)),
        max_lanes=draw(st.integers(1, 32)),
        window_blocks=draw(st.integers(1, 5)),
        subset=Subset.from_mask(mask),
    )


def epoch_rows(order: BatchOrder, epoch: int) -> np.ndarray:
    return np.concatenate([order.rows(epoch, step) for step in range(order.steps_per_epoch)])


@settings(max_examples=30, deadline=None)
@given(order=chosen_orders(), epoch=st.integers(0, 3))
def test_every_chosen_row_once_and_every_block_once(order: BatchOrder, epoch: int) -> None:
    assert order.subset is not None
    rows = epoch_rows(order, epoch)
    chosen = order.subset.rows()
    assert np.array_equal(np.sort(rows[rows >= 0]), chosen)
    blocks = [
        block
        for lane in range(order.lanes)
        for window in range(order.lane_blocks(lane) + 1)
        for block in order.window_blocks_of(epoch, lane, window)
    ]
    # Each block that holds a chosen row once, the others never.
    assert sorted(blocks) == np.unique(chosen // order.block_rows).tolist()
    # Lanes end together, but for two blocks: few rows are padding.
    held = [order.lane_rows(lane) for lane in range(order.lanes)]
    assert max(held) - min(held) <= 2 * order.block_rows


@settings(max_examples=25, deadline=None)
@given(order=chosen_orders(), epoch=st.integers(0, 2), step=st.integers(0, 5))
def test_batches_of_a_subset_are_the_same_for_any_number_of_ranks(order: BatchOrder, epoch: int, step: int) -> None:
    step %= order.steps_per_epoch
    whole = order.rows(epoch, step)
    for world_size in (1, 2, 3, 5, 7, 16):
        if world_size <= order.lanes:
            parts = [order.rows(epoch, step, order.lane_range(rank, world_size)) for rank in range(world_size)]
            assert np.array_equal(np.concatenate(parts), whole)


@settings(max_examples=15, deadline=None)
@given(order=chosen_orders())
def test_a_step_of_a_subset_is_a_pure_function(order: BatchOrder) -> None:
    # Made anew, in any order of asking: nothing is remembered between steps.
    again = dataclasses.replace(order)
    steps = [(epoch, step) for epoch in range(2) for step in range(order.steps_per_epoch)]
    asked = {key: order.rows(*key) for key in steps}
    for key in reversed(steps):
        assert np.array_equal(again.rows(*key), asked[key])


def test_blocks_of_a_subset_change_places_between_epochs() -> None:
    mask = np.random.default_rng(0).random(24_000) < 0.5
    order = BatchOrder(24_000, 16, 256, seed=0, subset=Subset.from_mask(mask))
    first, second = epoch_rows(order, 0), epoch_rows(order, 1)
    # Two independent permutations of n agree at one place on average; classes of one block stay in place.
    assert ((first == second) & (first >= 0)).sum() < 100
    # Position and row are uncorrelated: σ = 1/√n, 4 σ allowed.
    filled = first[first >= 0]
    assert abs(np.corrcoef(np.arange(len(filled)), filled)[0, 1]) < 4 / np.sqrt(len(filled))
    # Nor does a block's fullness say when it comes.
    counts = order.subset.block_counts(16)[filled // 16]  # type: ignore[union-attr]
    assert abs(np.corrcoef(np.arange(len(filled)), counts)[0, 1]) < 0.1
    assert (first < 0).mean() < 0.05  # lanes end within two blocks of each other


@settings(max_examples=40, deadline=None)
@given(mask=st.lists(st.booleans(), min_size=1, max_size=200), block=st.integers(1, 20), data=st.data())
def test_bits_rows_and_counts_agree(mask: list[bool], block: int, data: st.DataObject) -> None:
    array = np.array(mask)
    subset = Subset.from_mask(array)
    rows = np.flatnonzero(array)
    assert subset.count == len(rows)
    assert np.array_equal(subset.rows(), rows)
    assert np.array_equal(subset.contains(np.arange(len(array))), array)
    start = data.draw(st.integers(0, len(mask)))
    assert np.array_equal(subset.rows(start), rows[rows >= start])
    counts = [array[first : first + block].sum() for first in range(0, len(array), block)]
    assert subset.block_counts(block).tolist() == counts
    again = Subset.from_rows(np.concatenate([rows[::-1], rows]), len(array))
    assert again.digest == subset.digest


def test_a_subset_of_another_size_is_refused() -> None:
    for subset in (Subset.from_mask(np.ones(9, bool)), Subset.from_mask(np.zeros(10, bool))):
        with pytest.raises(ConfigError, match="batch order: a subset of"):
            BatchOrder(10, 2, 4, seed=0, subset=subset)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("defocus_u < 20000", lambda u, v, h: u < 20000),
        ("10000 <= defocus_u < 20000 and half == 1", lambda u, v, h: (u >= 10000) & (u < 20000) & (h == 1)),
        ("not (half == 1 or defocus_u - defocus_v > 100)", lambda u, v, h: ~((h == 1) | (u - v > 100))),
        ("(defocus_u + defocus_v) / 2 >= 1.5e4", lambda u, v, h: (u + v) / 2 >= 1.5e4),
        ("-half * 2 != -2", lambda u, v, h: h != 1),
        ("defocus_u / (half - 1) > 0", lambda u, v, h: np.where(h == 1, u > 0, u > 0)),
    ],
)
def test_queries_mean_what_they_say(text: str, expected: object) -> None:
    rng = np.random.default_rng(0)
    u, v, h = rng.uniform(0, 30000, 200), rng.uniform(0, 30000, 200), rng.integers(1, 3, 200)
    columns = {"defocus_u": u, "defocus_v": v, "half": h.astype("i1")}
    query = Query.parse(text, KNOWN)
    assert set(query.columns) <= set(KNOWN)
    assert np.array_equal(query.evaluate(columns), expected(u, v, h))  # type: ignore[operator]


def test_nan_satisfies_nothing() -> None:
    columns = {"defocus_u": np.array([np.nan, 1.0])}
    assert Query.parse("defocus_u > 0", ["defocus_u"]).evaluate(columns).tolist() == [False, True]


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("confidence > 0.5", "no column confidence; there are defocus_u, defocus_v, half"),
        ("__import__('os').system('x') == 1", "is not understood"),
        ("half.__class__ == 1", "is not understood"),
        ("half[0] == 1", "is not understood"),
        ("half == 'a'", "is not understood"),
        ("half == True", "is not understood"),
        ("half ** 9 == 1", "is not understood"),
        ("(lambda: 1)() == half", "is not understood"),
        ("half", "not a condition on a column"),
        ("1 < 2", "not a condition on a column"),
        ("half and defocus_u", "`half` is not a condition"),
        ("(half == 1) + 1 > 0", "`half == 1` is not a number"),
        ("half == 1e999999 and half == " + "9" * 400, "too large"),
        ("half ==", "invalid syntax"),
        ("", "train.query"),
        ("half == 1; half == 2", "invalid syntax"),
        ("(" * 300 + "half" + ")" * 300 + " == 1", "train.query"),
        ("half == 1 or " * 300 + "half == 1", "characters long"),
        ("\0", "train.query"),
    ],
)
def test_queries_that_are_refused(text: str, fragment: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Query.parse(text, KNOWN)
    assert fragment in str(caught.value)


def test_index_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("# chosen\n3\n\n 1  # second\n7\n")
    assert read_index(str(tmp_path / "a.txt"), 8, 8).tolist() == [3, 1, 7]
    assert read_index(str(tmp_path / "a.txt"), 8, 4).tolist() == [3, 1]
    np.save(tmp_path / "b.npy", np.array([0, 5], dtype="u2"))
    assert read_index(str(tmp_path / "b.npy"), 8, 8).tolist() == [0, 5]
    for name, value, fragment in (
        ("c.txt", b"1\nx\n", "not row numbers"),
        ("d.txt", b"8\n", "row 8 is not in the store, whose rows are 0 to 7"),
        ("e.txt", b"-1\n", "row -1 is not in the store"),
        ("f.txt", b"\xff", "not row numbers"),
        ("g.npy", b"", "not row numbers"),
        ("h.txt", b"99999999999999999999999\n", "not row numbers"),
    ):
        (tmp_path / name).write_bytes(value)
        with pytest.raises(ConfigError, match=fragment):
            read_index(str(tmp_path / name), 8, 8)
    np.save(tmp_path / "i.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ConfigError, match="not row numbers"):
        read_index(str(tmp_path / "i.npy"), 8, 8)
    np.save(tmp_path / "j.npy", np.array([0.5]))
    with pytest.raises(ConfigError, match="holds float64"):
        read_index(str(tmp_path / "j.npy"), 8, 8)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ParticleStore:
    """1,003 images of 32 px with halves and defocus: blocks of 4, shards of 256."""
    folder = tmp_path_factory.mktemp("subset")
    rng = np.random.default_rng(1)
    with StackWriter(str(folder / "s.mrcs"), 1003, 32, 2.0) as writer:
        writer.append(rng.normal(size=(1003, 32, 32)))
    head = ["data_", "loop_", "_rlnImageName", "_rlnDefocusU", "_rlnDefocusV", "_rlnDefocusAngle", "_rlnVoltage",
            "_rlnSphericalAberration", "_rlnAmplitudeContrast", "_rlnRandomSubset", "_rlnDetectorPixelSize",
            "_rlnMagnification"]  # fmt: skip
    rows = [f"{n + 1}@s.mrcs {5000 + n} {5000 + n} 0 300 2.7 0.1 {1 + (n // 500) % 2} 5 25000" for n in range(1003)]
    (folder / "p.star").write_text("\n".join(head + rows) + "\n")
    convert(plan(str(folder / "p.star")), str(folder / "store"), workers=1)
    return ParticleStore.open(str(folder / "store"))


def test_choices_are_joined_and_the_first_rows_count(store: ParticleStore, tmp_path: Path) -> None:
    assert choose(TrainConfig(), store) is None
    assert choose(TrainConfig(rows=10), store) is None
    found = choose(TrainConfig(half=1, query="defocus_u >= 5100"), store)
    assert found is not None
    assert found.rows().tolist() == [*range(100, 500), *range(1000, 1003)]
    found = choose(TrainConfig(half=2, rows=700, optics_group=1), store)
    assert found is not None
    assert (found.store_rows, found.rows().tolist()) == (700, list(range(500, 700)))
    (tmp_path / "rows.txt").write_text("1002\n5\n600\n")
    found = choose(TrainConfig(half=1, index=str(tmp_path / "rows.txt")), store)
    assert found is not None
    assert found.rows().tolist() == [5, 1002]
    with pytest.raises(ConfigError, match=r"train.half = 2 and train.query = .*: no particle of .* is chosen"):
        choose(TrainConfig(half=2, query="defocus_u < 5001"), store)
    with pytest.raises(ConfigError, match=r"train.half = 3"):
        TrainConfig(half=3)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_stream_of_a_subset_reads_its_blocks_alone(store: ParticleStore, world_size: int) -> None:
    subset = choose(TrainConfig(half=2), store)
    assert subset is not None
    order = BatchOrder(store.count, store.block_rows(32), 30, seed=4, subset=subset)
    expected = store.read_images(32, 0, store.count)
    seen, bytes_read = [], 0
    for rank in range(world_size):
        with ParticleStream(store, 32, order, rank=rank, world_size=world_size, columns=["half"],
                            prefetch_bytes=1) as stream:  # fmt: skip
            for _ in range(order.steps_per_epoch):
                batch = next(stream)
                real = batch.weight > 0
                seen.append(batch.rows[real])
                assert (batch.columns["half"] == 2).all()
                rows = batch.rows[real].numpy()
                assert np.array_equal(batch.images[real].numpy(), expected[rows].astype(np.float32))
            bytes_read += stream.metrics.bytes_read
    assert np.array_equal(np.sort(np.concatenate(seen)), np.arange(500, 1000))
    # 125 blocks of 4; beside them indexes, columns and the next epoch's first windows, which are read ahead.
    assert bytes_read < 1.6 * 125 * 4 * 32 * 32 * 2
