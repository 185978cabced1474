"""STAR syntax: every value where it stands, and no row shifted, filled up or dropped."""

import mmap
from pathlib import Path

import numpy as np
import pytest
import starfile
from hypothesis import given, settings
from hypothesis import strategies as st

from scalecryo.data.formats.relion import read_particles, syntax, write_rows
from scalecryo.data.formats.relion.syntax import StarText, small_table
from scalecryo.errors import InputError


def table(text: str) -> dict[str, dict[str, list[bytes]]]:
    found = StarText(text.encode(), "x.star")
    return {block.name: dict(small_table(found, block)) for block in found.blocks}


def test_blocks_in_any_form() -> None:
    text = (
        "# version 30001\n\ndata_general # why\n_rlnOne 1\n_rlnTwo 'two words'\n\n  data_\r\nloop_\r\n"
        "_rlnA #1 [note]\r\n\t_rlnB\r\n# a comment\r\n 1 a\r\n\r\n 2\tb # the rest\r\n# end\n"
        "# version 30001\ndata_last\n\nloop_\n_rlnC #1\n"
    )
    assert table(text) == {
        "general": {"rlnOne": [b"1"], "rlnTwo": [b"two words"]},
        "": {"rlnA": [b"1", b"2"], "rlnB": [b"a", b"b"]},
        "last": {"rlnC": []},
    }


def test_values_that_look_like_syntax() -> None:
    # A folder called data_…, and a # or a quote inside a name: pandas cuts the row at the #, others end the table.
    rows = "data_set1/mic.mrc 1@data_set1/a#1.mrcs\nloop_/m.mrc 2@it's.mrcs\n\"data_ \" '3@a b.mrcs'\n"
    found = table(f"data_particles\n\nloop_\n_rlnMicrographName #1\n_rlnImageName #2\n{rows}")["particles"]
    assert found["rlnImageName"] == [b"1@data_set1/a#1.mrcs", b"2@it's.mrcs", b"3@a b.mrcs"]
    assert found["rlnMicrographName"] == [b"data_set1/mic.mrc", b"loop_/m.mrc", b"data_ "]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no data_ block"),
        ("loop_\n_rlnA\n1\n", "no data_ block"),
        ("data_a\nloop_\n_rlnA\n_rlnB\n1 2\n3\n4 5\n", "row 2 of data_a has 1 values for 2 columns"),
        ("data_a\nloop_\n_rlnA\n_rlnB\n1 2 3\n4\n", "row 1 of data_a has 3 values for 2"),  # four values in all
        ("data_a\nloop_\n_rlnA\n_rlnA\n1 2\n", "column rlnA stands twice"),
        ("data_a\nwhat is this\n", "'what is this' stands outside any loop"),
        ("data_a\n_rlnA 1 2\n", "rlnA has 2 values, not one"),
    ],
)
def test_malformed_files_are_named(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        table(text)


def test_pieces_join_seamlessly(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "".join(f"{number:06d}@stack{number % 7}.mrcs {number * 1.5}\n" for number in range(1, 400))
    text = f"data_particles\n\nloop_\n_rlnImageName #1\n_rlnDefocusU #2\n{rows}\n# version 30001\n"
    whole = table(text)
    for piece in (50, 333, 4096):
        monkeypatch.setattr(syntax, "_PIECE", piece)
        monkeypatch.setattr(syntax, "_WINDOW", piece)
        assert table(text) == whole


def test_large_files_are_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "".join(f"{number:06d}@stack{number % 7}.mrcs {number * 1.5}\n" for number in range(1, 2000))
    path = tmp_path / "x.star"
    path.write_text(f"data_particles\n\nloop_\n_rlnImageName #1\n_rlnNothing #2\n{rows}\n")
    read = read_particles(str(path))
    monkeypatch.setattr(syntax, "_MAPPED", 1000)
    monkeypatch.setattr(syntax, "_PIECE", 5000)
    mapped = read_particles(str(path))
    assert isinstance(syntax.text_of(str(path)), mmap.mmap)
    assert mapped.image_names() == read.image_names()
    assert len(mapped) == 1999


_VALUES = st.text(
    st.characters(codec="ascii", min_codepoint=33, max_codepoint=126, exclude_characters="\"'#;"), min_size=1
)
# Words that starfile, by pandas' `read_csv`, takes for missing values, also where strings are asked for.
_MISSING = {"N/A", "n/a", "NA", "<NA>", "NULL", "null", "NaN", "-NaN", "nan", "-nan", "None"}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(_VALUES, st.floats(-1e9, 1e9).map(lambda x: f"{x:.6f}")), min_size=2, max_size=30))
def test_same_values_as_starfile(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> None:
    # Reference: the starfile package, on what both understand.
    rows = [row for row in rows if not row[0].startswith(("data_", "loop_", "_")) and row[0] not in _MISSING]
    text = "data_particles\n\nloop_\n_rlnName #1\n_rlnNumber #2\n" + "".join(f"{a}  {b}\n" for a, b in rows) + "\n"
    if len(rows) < 2:
        return
    path = tmp_path_factory.mktemp("star") / "x.star"
    path.write_text(text)
    ours = table(text)["particles"]
    theirs = starfile.read(path, parse_as_string=["rlnName", "rlnNumber"])
    for name in ("rlnName", "rlnNumber"):
        assert [value.decode() for value in ours[name]] == theirs[name].tolist()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.booleans(), min_size=4, max_size=4))
def test_selected_rows_keep_their_bytes(tmp_path_factory: pytest.TempPathFactory, keep: list[bool]) -> None:
    head = "# made by hand\n\ndata_optics\n\nloop_\n_rlnOpticsGroup #1\n 1\n\n\n"
    head += "data_particles\n\nloop_\n_rlnImageName #1\n"
    rows = [" 1@a.mrcs \n", "2@a.mrcs\n", "'3@b c.mrcs'  # note\n", "4@a.mrcs\r\n"]
    tail = "\n# version 50001\n\ndata_other\n\nloop_\n_rlnX #1\n7\n"
    path = tmp_path_factory.mktemp("rows") / "out.star"
    write_rows(str(path), (head + "".join(rows) + tail).encode(), np.array(keep))
    kept = "".join(row for row, stays in zip(rows, keep, strict=True) if stays)
    assert path.read_bytes().decode() == head + kept + tail


def test_rows_are_numbered_in_messages(tmp_path: Path) -> None:
    path = tmp_path / "x.star"
    path.write_text("data_\n\nloop_\n_rlnImageName\n_rlnRandomSubset\n1@a.mrcs 1\n2@a.mrcs 1_0\n")
    with pytest.raises(InputError, match="rlnRandomSubset of row 2 is '1_0', not a number"):
        read_particles(str(path))
