"""Halves, parts and held-out sets: as large as they should be, and none follows from another."""

import itertools

import torch

from scalecryo.data.selection.partition import Partition

ROWS = torch.arange(200_000)


def test_shares_and_independence() -> None:
    # Binomial counts of 2·10⁵ rows: a share's standard deviation is at most 0.0011, so 0.006 is past five of them.
    partition = Partition()
    sets = {
        "half": partition.half(ROWS, torch.zeros_like(ROWS)) == 1,
        "part": partition.part(ROWS) < 2,
        "held out": partition.held_out(ROWS),
    }
    shares = {name: float(inside.float().mean()) for name, inside in sets.items()}
    for name, wanted in {"half": 0.5, "part": 0.5, "held out": 0.1}.items():
        assert abs(shares[name] - wanted) < 0.006
    for first, second in itertools.combinations(sets, 2):
        both = float((sets[first] & sets[second]).float().mean())
        assert abs(both - shares[first] * shares[second]) < 0.006
    # No pattern along the rows: neighbours, and rows a power of two apart, share a half as often as not.
    for step in (1, 2, 3, 64, 1024):
        assert abs(float((sets["half"][step:] == sets["half"][:-step]).float().mean()) - 0.5) < 0.006


def test_the_tables_halves_stand_unless_new_ones_are_asked_for() -> None:
    table = ROWS % 3
    assert torch.equal(Partition().half(ROWS, table)[table > 0], table[table > 0])
    anew = Partition(new_halves=True).half(ROWS, table)
    assert torch.equal(anew, Partition(new_halves=True).half(ROWS, table.flip(0)))
    assert set(anew.tolist()) == {1, 2}


def test_a_row_stays_where_it_is() -> None:
    # A run that is resumed by another version must hold out the same particles: the hash is part of the format.
    # Reference: SplitMix64's finaliser in Python's integers.
    def reference(row: int, key: int) -> int:
        mask = (1 << 64) - 1
        mixed = (row * 4 + key) * 0x9E3779B97F4A7C15 & mask
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & mask
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & mask
        return mixed >> 33

    rows = [0, 1, 2, 12345, 10**9, 2**40 + 7]
    partition = Partition()
    assert partition.part(torch.tensor(rows)).tolist() == [reference(row, 2) % 4 for row in rows]
    assert partition.held_out(torch.tensor(rows)).tolist() == [reference(row, 3) % 10 == 0 for row in rows]
