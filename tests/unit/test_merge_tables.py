"""Two tables as one: every column of both, and what each row's optics say, unchanged.

Reference: starfile and numpy read both tables and the merged one; each row must say there what it said before.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import starfile

from scalecryo.commands import convert as convert_command
from scalecryo.data.formats import cryosparc, csrows, relion
from scalecryo.data.formats.mrc import StackWriter
from scalecryo.data.formats.relion.merge import merge
from scalecryo.data.formats.relion.syntax import StarText
from scalecryo.data.storage.store import ParticleStore

OPTICS = "rlnOpticsGroupName rlnOpticsGroup rlnVoltage rlnSphericalAberration rlnAmplitudeContrast rlnImagePixelSize"
CTF = "rlnImageName rlnOpticsGroup rlnDefocusU rlnDefocusV rlnDefocusAngle"


def _star(columns: str, rows: list[str], optics_columns: str = "", optics: tuple[str, ...] = ()) -> bytes:
    text = "\n# version 30001\n\n"
    for name, names, lines in (("optics", optics_columns, list(optics)), ("particles", columns, rows)):
        if names:
            head = "".join(f"_{column} #{number + 1}\n" for number, column in enumerate(names.split()))
            text += f"data_{name}\n\nloop_\n{head}" + "".join(f"{line}\n" for line in lines) + "\n\n# version 30001\n\n"
    return text.encode()


def _rows(stack: str, count: int, more: str = "", group: int = 1) -> list[str]:
    return [f"{i + 1}@{stack}.mrcs {group} {10000 + i} 9000 0 {more}" for i in range(count)]


def _merged(tmp_path: Path, first: bytes, second: bytes) -> tuple[dict[str, pd.DataFrame], dict[int, int]]:
    found = merge(StarText(first, "a"), StarText(second, "b"), 1.5, 64)
    (tmp_path / "merged.star").write_bytes(found.text)
    return starfile.read(tmp_path / "merged.star", always_dict=True), dict(found.groups)


def _values(blocks: dict[str, pd.DataFrame], row: int, name: str) -> object:
    particle = blocks["particles"].iloc[row]
    if name in particle:
        return particle[name]
    return blocks["optics"].set_index("rlnOpticsGroup").loc[particle["rlnOpticsGroup"], name]


def test_texts_of_equal_numbers_are_one_group(tmp_path: Path) -> None:
    first = _star(CTF, _rows("a", 3), OPTICS, ("opticsGroup1 1 300.0 2.7 0.1 1.5",))
    second = _star(CTF, _rows("b", 2), OPTICS, ("opticsGroup1 1 300.000000 2.70 0.100000 1.50000",))
    blocks, groups = _merged(tmp_path, first, second)
    assert groups == {1: 1}
    assert len(blocks["optics"]) == 1
    assert (tmp_path / "merged.star").read_bytes().startswith(first.split(b"data_particles")[0])
    assert blocks["particles"]["rlnImageName"].tolist() == [f"{i + 1}@a.mrcs" for i in range(3)] + [
        "1@b.mrcs",
        "2@b.mrcs",
    ]


def test_groups_are_renumbered_and_named_apart(tmp_path: Path) -> None:
    first = _star(CTF, _rows("a", 2), OPTICS, ("opticsGroup1 1 300 2.7 0.1 1.5", "mine 2 300 0.01 0.1 1.5"))
    lines = ("opticsGroup1 1 200 2.7 0.1 1.5", "mine 2 300 0.010 0.1 1.5", "far 7 120 2.0 0.07 1.5")
    second = _star(CTF, [*_rows("b", 1), *_rows("b", 1, group=2), *_rows("b", 1, group=7)], OPTICS, lines)
    blocks, groups = _merged(tmp_path, first, second)
    assert groups == {1: 3, 2: 2, 7: 7}
    assert blocks["optics"]["rlnOpticsGroup"].tolist() == [1, 2, 3, 7]
    assert len(set(blocks["optics"]["rlnOpticsGroupName"])) == 4
    assert [_values(blocks, row, "rlnVoltage") for row in range(5)] == [300, 300, 200, 300, 120]
    assert [_values(blocks, row, "rlnAmplitudeContrast") for row in (2, 3, 4)] == [0.1, 0.1, 0.07]


def test_union_of_columns(tmp_path: Path) -> None:
    first = _star(CTF + " rlnMicrographName rlnCtfFigureOfMerit", _rows("a", 2, "mic.mrc 0.25"),
                  OPTICS + " rlnBeamTiltX rlnMagMat00 rlnEvenZernike",
                  ("opticsGroup1 1 300 2.7 0.1 1.5 0.3 1.01 [0.5,0,0.25]",))  # fmt: skip
    second = _star("rlnMicrographName " + CTF + " rlnClassNumber rlnMyText",
                   ['"a mic.mrc" ' + row for row in _rows("b", 2, "4 'two words'")],
                   OPTICS, ("opticsGroup1 1 300 2.7 0.1 1.5",))  # fmt: skip
    found = merge(StarText(first, "a"), StarText(second, "b"), 1.5, 64)
    assert found.filled == ("rlnClassNumber", "rlnMyText", "rlnCtfFigureOfMerit")
    blocks, groups = _merged(tmp_path, first, second)
    particles = blocks["particles"]
    assert particles["rlnMicrographName"].tolist() == ["mic.mrc", "mic.mrc", "a mic.mrc", "a mic.mrc"]
    assert particles["rlnCtfFigureOfMerit"].tolist() == [0.25, 0.25, 0, 0]
    assert particles["rlnClassNumber"].tolist() == [0, 0, 4, 4]
    assert particles["rlnMyText"].tolist() == ["None", "None", "two words", "two words"]
    # Other aberrations are other optics: none has a beam tilt of 0 and a magnification of 1.
    assert groups == {1: 2}
    assert [_values(blocks, row, "rlnBeamTiltX") for row in (0, 2)] == [0.3, 0]
    assert [_values(blocks, row, "rlnMagMat00") for row in (0, 2)] == [1.01, 1]
    assert [_values(blocks, row, "rlnEvenZernike") for row in (0, 2)] == ["[0.5,0,0.25]", "[0,0,0]"]


@pytest.mark.parametrize("old_first", [True, False])
def test_relion_3_0_and_3_1(tmp_path: Path, old_first: bool) -> None:
    own = "rlnImageName rlnDefocusU rlnDefocusV rlnDefocusAngle rlnVoltage rlnSphericalAberration rlnAmplitudeContrast"
    rows = [f"{i + 1}@a.mrcs {12000 + i} 9000 0 {200 + 100 * (i % 2)} 2.7 0.1 10000 1.5" for i in range(4)]
    old = _star(own + " rlnMagnification rlnDetectorPixelSize", rows)
    new = _star(CTF, _rows("b", 3), OPTICS, ("opticsGroup1 1 120 2.0 0.07 1.5",))
    _merged(tmp_path, *((old, new) if old_first else (new, old)))
    table = relion.read_particles(str(tmp_path / "merged.star"))
    parts = {"a": ([200, 300, 200, 300], 2.7, 0.1, 12000), "b": ([120] * 3, 2.0, 0.07, 10000)}
    row = 0
    for name in "ab" if old_first else "ba":
        voltage, cs, contrast, defocus = parts[name]
        rows = slice(row, row + len(voltage))
        assert table.image_names()[rows] == [f"{i + 1:06d}@{name}.mrcs" for i in range(len(voltage))]
        assert table.columns["voltage"][rows].tolist() == voltage
        assert table.columns["spherical_aberration"][rows] == pytest.approx(cs)
        assert table.columns["amplitude_contrast"][rows] == pytest.approx(contrast)
        assert table.columns["defocus_u"][rows].tolist() == [defocus + i for i in range(len(voltage))]
        row += len(voltage)
    assert table.pixel_size == pytest.approx(1.5)
    # RELION reads optics by group alone: its groups must say the same.
    blocks = starfile.read(tmp_path / "merged.star", always_dict=True)
    groups = blocks["optics"].set_index("rlnOpticsGroup")
    assert groups.loc[blocks["particles"]["rlnOpticsGroup"], "rlnVoltage"].tolist() == table.columns["voltage"].tolist()


def _cs(count: int, **fields: np.ndarray) -> np.ndarray:
    always = {"uid": np.arange(count, dtype=np.uint64), "blob/path": np.full(count, b"J1/a.mrc")}
    always |= {"blob/idx": np.arange(count, dtype=np.uint32), "blob/psize_A": np.full(count, 1.5, np.float32)}
    return csrows.build(count, {**always, **{name.replace("__", "/"): values for name, values in fields.items()}})


def test_cryosparc_rows_keep_every_field() -> None:
    first = _cs(2, location__micrograph_uid=np.array([7, 2**63 + 1], np.uint64), ctf__scale=np.full(2, 0.5, np.float32),
                mine=np.array([[1, 2], [3, 4]], np.float32), clash=np.ones(2, np.float32))  # fmt: skip
    second = _cs(3, blob__path=np.full(3, b"J2/imported/longer.mrc"), clash=np.ones((3, 2), np.float32),
                 pick_stats__power=np.arange(3, dtype=np.float32))  # fmt: skip
    second["uid"] += 2**63
    rows, filled = csrows.merge(first, second, {})
    assert rows["uid"].tolist() == first["uid"].tolist() + second["uid"].tolist()
    assert rows["blob/path"].tolist() == [b"J1/a.mrc"] * 2 + [b"J2/imported/longer.mrc"] * 3
    assert rows["location/micrograph_uid"].tolist() == [7, 2**63 + 1, 0, 0, 0]
    assert rows["ctf/scale"].tolist() == [0.5, 0.5, 1, 1, 1]  # a scale of 1 does nothing
    assert rows["mine"].tolist() == [[1, 2], [3, 4], [0, 0], [0, 0], [0, 0]]
    assert rows["pick_stats/power"].tolist() == [0, 0, 0, 1, 2]
    assert set(filled) == {"location/micrograph_uid", "ctf/scale", "mine", "clash", "pick_stats/power"}
    again = csrows.decode(csrows.encode(rows), "x")
    assert again.dtype == rows.dtype


def _append(source: Path, store: Path, add: bool) -> ParticleStore:
    convert_command.run(str(source), str(store), data_dir=None, box=None, dtype="float16", workers=0, overwrite=False,
                        invert=False, uninvert=True, add=add)  # fmt: skip
    return ParticleStore.open(str(store))


def test_tables_of_both_packages_and_bare_stacks(tmp_path: Path) -> None:
    """A .star after a .cs and the other way round, and a table after a bare stack: rows and own columns are there."""
    for number, name in enumerate("abc"):
        with StackWriter(str(tmp_path / f"{name}.mrcs"), 6, 32, 1.5) as writer:
            writer.append(np.random.default_rng(number).normal(3, 2, (6, 32, 32)))
    optics = ("opticsGroup1 1 300 2.7 0.1 1.5",)
    (tmp_path / "a.star").write_bytes(_star(CTF + " rlnMicrographName", _rows("a", 6, "mic_a.mrc"), OPTICS, optics))
    own = cryosparc.own_rows(relion.read_particles(str(tmp_path / "a.star")), 32, 1)
    fields = {name: own[name] for name in own.dtype.names or ()}
    fields |= {"location/micrograph_path": np.full(6, b"J0/mic_b.mrc"), "blob/path": np.full(6, b"b.mrcs")}
    rows = csrows.build(6, {**fields, "uid": np.arange(100, 106, dtype=np.uint64)})
    rows["ctf/accel_kv"] = 200
    (tmp_path / "b.cs").write_bytes(csrows.encode(rows))
    _append(tmp_path / "a.star", tmp_path / "one", False)
    star = _append(tmp_path / "b.cs", tmp_path / "one", True).source_star()
    (tmp_path / "one.star").write_bytes(bytes(star or b""))
    blocks = starfile.read(tmp_path / "one.star", always_dict=True)
    assert blocks["particles"]["rlnMicrographName"].tolist() == ["mic_a.mrc"] * 6 + ["J0/mic_b.mrc"] * 6
    assert [_values(blocks, row, "rlnVoltage") for row in (0, 6)] == [300, 200]
    _append(tmp_path / "b.cs", tmp_path / "two", False)
    found = csrows.decode(_append(tmp_path / "a.star", tmp_path / "two", True).source_cs() or b"", "two")
    assert found["uid"][:6].tolist() == list(range(100, 106))
    assert found["location/micrograph_path"].tolist() == [b"J0/mic_b.mrc"] * 6 + [b"mic_a.mrc"] * 6
    assert found["ctf/exp_group_id"].tolist() == [0] * 6 + [1] * 6
    assert found["ctf/accel_kv"].tolist() == [200] * 6 + [300] * 6
    _append(tmp_path / "c.mrcs", tmp_path / "three", False)
    (tmp_path / "plain.star").write_bytes(
        _star("rlnImageName rlnMicrographName", [f"{i + 1}@a.mrcs m" for i in range(6)])
    )
    three = _append(tmp_path / "plain.star", tmp_path / "three", True)
    (tmp_path / "three.star").write_bytes(bytes(three.source_star() or b""))
    assert relion.read_particles(str(tmp_path / "three.star")).image_names() == three.table().image_names()
