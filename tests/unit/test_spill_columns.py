"""Columns that outgrow memory are those that would have stayed in it."""

import numpy as np
import pytest

from scalecryo.data.formats.spill_columns import SpillColumns
from scalecryo.errors import OutputError


@pytest.mark.parametrize("kept_bytes", [0, 100, 5_000, 1 << 30])
def test_pieces_become_whole_columns(kept_bytes: int) -> None:
    rng = np.random.default_rng(0)
    growing = SpillColumns(kept_bytes)
    pieces = [
        {"angle": rng.normal(size=(count, 3, 3)).astype(np.float32), "row": rng.integers(0, 2**60, count)}
        for count in (7, 0, 50, 3)
    ]
    for piece in pieces:
        growing.add(piece)
    whole = growing.whole()
    for name in ("angle", "row"):
        expected = np.concatenate([piece[name] for piece in pieces])
        assert whole[name].dtype == expected.dtype
        assert np.array_equal(whole[name], expected)
        assert isinstance(whole[name], np.memmap) == (kept_bytes < 5_000)


def test_nothing_is_nothing() -> None:
    assert SpillColumns().whole() == {}


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full answers every write as a full disk does."""
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr("tempfile.TemporaryFile", lambda: full)
        growing = SpillColumns(0)
        with pytest.raises(OutputError, match="set TMPDIR to a larger disk"):
            growing.add({"row": np.arange(5)})
