"""Copies of one image: found whatever they are called, and kept in one half.

Reference: a plain union-find over rows, and the closed form that copies must share a half, a part and a held-out set.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scalecryo.config import TrainConfig
from scalecryo.data.conversion.append import append
from scalecryo.data.conversion.append_plan import plan_append
from scalecryo.data.conversion.convert import convert, plan
from scalecryo.data.conversion.copies import copies_table, first_of_image, same_files
from scalecryo.data.formats.mrc import StackWriter
from scalecryo.data.selection.partition import PARTS, Copies, Partition
from scalecryo.data.selection.subset import choose, unequal_halves
from scalecryo.data.storage.store import ParticleStore

CPU = torch.device("cpu")


def _stack(path: Path, images: np.ndarray) -> Path:
    with StackWriter(str(path), len(images), images.shape[-1], 2.0) as writer:
        writer.append(images)
    return path


def _noise(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(3, 2, (count, 32, 32)).astype(np.float32)


def _star(path: Path, names: list[str], half: list[int] | None = None) -> str:
    columns = "_rlnImageName\n_rlnImagePixelSize\n" + ("_rlnRandomSubset\n" if half else "")
    rows = "".join(f"{name} 2.0 {half[row] if half else ''}\n" for row, name in enumerate(names))
    path.write_text(f"data_particles\n\nloop_\n{columns}{rows}\n")
    return str(path)


def _converted(source: str, store: Path) -> ParticleStore:
    convert(plan(source, sign="uninvert"), str(store))
    return ParticleStore.open(str(store))


def _partition(store: ParticleStore, new_halves: bool = False) -> Partition:
    return Partition.of(store, None, store.count, CPU, new_halves=new_halves)


def _halves(store: ParticleStore, new_halves: bool = False) -> list[int]:
    rows = torch.arange(store.count)
    half = torch.from_numpy(store.read_columns(0, store.count, ["half"])["half"])
    return _partition(store, new_halves).half(rows, half).tolist()


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(0, 4)), max_size=25))
def test_against_a_union_of_names_and_pixels(rows: list[tuple[int, int, int]]) -> None:
    stack, index, pixels = (np.array([row[axis] for row in rows], dtype=np.int64) for axis in range(3))
    columns = {"stack": stack, "stack_index": index, "image_crc32c": pixels.astype(np.uint32)}
    columns |= {"image_mean": np.float32(1) * pixels, "image_scale": np.ones(len(rows), np.float32)}
    root = list(range(len(rows)))
    for _ in rows:
        for a, one in enumerate(rows):
            for b, other in enumerate(rows):
                if one[:2] == other[:2] or one[2] == other[2]:
                    root[a] = root[b] = min(root[a], root[b])
    assert first_of_image(columns, np.arange(3)).tolist() == root


def test_equal_checksums_of_unlike_images_are_no_copies() -> None:
    # A CRC32C repeats by chance once in 4·10⁹ pairs: mean and σ must agree too, but for the order of a sum.
    columns = {"stack": np.zeros(4, int), "stack_index": np.arange(4), "image_crc32c": np.full(4, 7, np.uint32)}
    columns |= {"image_mean": np.array([1, 1 + 1e-6, 2, 2], np.float32)}
    columns |= {"image_scale": np.array([1, 1, 1, 3], np.float32)}
    assert first_of_image(columns, np.arange(1)).tolist() == [0, 0, 2, 3]


def test_the_half_that_the_table_agrees_on() -> None:
    first = np.array([0, 1, 0, 3, 3, 5, 5, 5])
    half = np.array([1, 2, 2, 2, 0, 0, 0, 0])
    # Rows 0 and 2 are said to be in both; 3 and 4 in the second; nothing is said of 5 to 7.
    table = copies_table(first, half).tolist()
    assert table == [[0, 0, 0], [2, 0, 0], [3, 3, 2], [4, 3, 2], [5, 5, 0], [6, 5, 0], [7, 5, 0]]


def test_one_file_by_several_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"x")
    os.link("a", "hard")
    (tmp_path / "soft").symlink_to("a")
    paths = [str(tmp_path / "a"), "a", "./a", "hard", "soft", "b", "gone", str(tmp_path / "gone"), "s3://x/a//b/../c"]
    assert same_files([*paths, "s3://x/a/c"]).tolist() == [0, 0, 0, 0, 0, 1, 2, 2, 3, 3]


def test_copies_share_everything() -> None:
    rows = torch.arange(2000)
    columns = torch.from_numpy(copies_table(np.arange(2000) // 2 * 2, np.zeros(2000, int))).T.contiguous()
    for new_halves in (False, True):
        partition = Partition(new_halves, Copies(*columns))
        found = partition.half(rows, rows * 0), partition.part(rows), partition.held_out(rows)
        for drawn, values in zip(found, (2, PARTS, 2), strict=True):
            assert torch.equal(drawn[0::2], drawn[1::2])
            assert len(set(drawn.tolist())) == values
    # Whoever is no copy stays where it was.
    few = Partition(copies=Copies(*columns[:, :10].contiguous()))
    assert torch.equal(few.half(rows, rows * 0)[10:], Partition().half(rows, rows * 0)[10:])


def test_however_a_copy_is_named(tmp_path: Path) -> None:
    images = _noise(20, 0)
    _stack(tmp_path / "a.mrcs", images)
    _stack(tmp_path / "again.mrcs", images[::-1])  # the same pixels elsewhere, in another order
    (tmp_path / "link.mrcs").symlink_to("a.mrcs")
    (tmp_path / "sub").mkdir()
    names = ["a.mrcs", "./a.mrcs", "sub/../a.mrcs", str(tmp_path / "a.mrcs"), "link.mrcs"]
    rows = [f"{i + 1}@{name}" for i in range(20) for name in names] + [f"{i + 1}@again.mrcs" for i in range(20)]
    store = _converted(_star(tmp_path / "p.star", rows), tmp_path / "store")
    image = [i for i in range(20) for _ in names] + list(range(20))[::-1]
    first = [image.index(number) for number in image]
    assert store.copies()[:, :2].tolist() == [[row, of] for row, of in enumerate(first)]
    assert _partition(store).notes == ("120 particles show only 20 images: copies of one image share a half",)
    for new_halves in (False, True):
        half = _halves(store, new_halves)
        assert half == [half[row] for row in first]
        assert set(half) == {1, 2}


def test_the_tables_halves_hold_but_for_copies_in_both(tmp_path: Path) -> None:
    _stack(tmp_path / "a.mrcs", _noise(200, 0))
    names = [f"{i + 1}@a.mrcs" for i in range(200)] * 2
    agreed = [1 + i % 2 for i in range(200)] * 2
    store = _converted(_star(tmp_path / "p.star", names, agreed), tmp_path / "one")
    assert _halves(store) == agreed
    # Every image once in each: no half is the table's own any more.
    store = _converted(_star(tmp_path / "q.star", names, [1] * 200 + [2] * 200), tmp_path / "two")
    half = _halves(store)
    assert half[:200] == half[200:]
    assert 60 < half[:200].count(1) < 140  # 5.6 standard deviations of a fair draw


def test_copies_of_particles_that_were_there_before(tmp_path: Path) -> None:
    images = _noise(30, 0)
    _stack(tmp_path / "a.mrcs", images)
    _stack(tmp_path / "b.mrcs", np.concatenate([_noise(5, 1), images[10:15]]))
    _converted(_star(tmp_path / "a.star", [f"{i + 1}@a.mrcs" for i in range(30)]), tmp_path / "store")
    before = _halves(ParticleStore.open(str(tmp_path / "store")))
    append(plan_append(_star(tmp_path / "b.star", [f"{i + 1}@b.mrcs" for i in range(10)]), str(tmp_path / "store")))
    store = ParticleStore.open(str(tmp_path / "store"))
    assert sorted(store.copies()[:, 0].tolist()) == [*range(10, 15), *range(35, 40)]
    after = _halves(store)
    assert after[:30] == before
    assert after[35:] == before[10:15]


@pytest.mark.parametrize(
    ("counts", "unequal"),
    [
        ((0, 800, 0), True),  # cryoSPARC writes split 0 where a job had no halves
        ((0, 0, 2), True),
        ((0, 1500, 500), True),  # such a job merged with one that had halves
        ((1000, 1000, 0), True),
        ((10000, 100, 0), False),  # the others make up for it
        ((0, 530, 470), False),
        ((0, 3, 1), False),  # chance
        ((0, 1, 0), False),
        ((50, 0, 0), False),
    ],
)
def test_halves_that_are_none(counts: tuple[int, int, int], unequal: bool) -> None:
    assert unequal_halves(counts) == unequal


def test_one_half_set_is_as_none(tmp_path: Path) -> None:
    _stack(tmp_path / "a.mrcs", _noise(100, 0))
    names = [f"{i + 1}@a.mrcs" for i in range(100)]
    all_one = _converted(_star(tmp_path / "p.star", names, [1] * 100), tmp_path / "one")
    without = _converted(_star(tmp_path / "q.star", names), tmp_path / "none")
    assert _halves(all_one) == _halves(without)
    assert _partition(all_one).notes == (
        "the table's half-sets hold 100 and 0 of these particles: halves are made anew",
    )
    assert _partition(without).notes == ()
    # Good halves, of which a query takes one, or nearly.
    both = _converted(_star(tmp_path / "r.star", names, [1 + i % 2 for i in range(100)]), tmp_path / "two")
    assert _halves(both) == [1 + i % 2 for i in range(100)]
    subset = choose(TrainConfig(query="half == 2"), both)
    assert Partition.of(both, subset, 100, CPU, new_halves=False).new_halves
    subset = choose(TrainConfig(query="source_row < 50"), both)
    assert not Partition.of(both, subset, 100, CPU, new_halves=False).new_halves
