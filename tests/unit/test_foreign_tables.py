"""What other programs write into tables, and users into units: read rightly, or refused with what helps.

References: the same table without the oddity, or the number that was meant.
"""

import pickle
import warnings
from pathlib import Path

import mrcfile
import numpy as np
import pytest

from scalecryo.commands import select
from scalecryo.data.conversion.convert import convert, plan
from scalecryo.data.conversion.source import ReadOptions, read_source
from scalecryo.data.formats import cryosparc, csrows, relion
from scalecryo.data.formats.mrc import StackWriter
from scalecryo.data.selection.subset import read_index
from scalecryo.data.storage.store import ParticleStore
from scalecryo.errors import ConfigError, InputError

OPTICS = "data_optics\n\nloop_\n_rlnOpticsGroup\n_rlnVoltage\n_rlnSphericalAberration\n_rlnAmplitudeContrast\n"
OPTICS += "_rlnImagePixelSize\n{group} {kv} 2.7 0.1 3.0\n\n"
COLUMNS = "_rlnImageName\n_rlnOpticsGroup\n_rlnDefocusU\n_rlnDefocusV\n_rlnDefocusAngle\n"


def _star(path: Path, group: str = "1", kv: str = "300", defocus: str = "12000 11000 0", more: str = "",
          values: str = "", name: str = "a.mrcs") -> str:  # fmt: skip
    if not (path.parent / "a.mrcs").exists():
        with StackWriter(str(path.parent / "a.mrcs"), 4, 8, 3.0) as writer:
            writer.append(np.random.default_rng(0).normal(size=(4, 8, 8)))
    rows = "".join(f"{i + 1}@{name} 1 {defocus} {values}\n" for i in range(4))
    text = OPTICS.format(group=group, kv=kv) + f"data_particles\n\nloop_\n{COLUMNS}{more}{rows}\n"
    path.write_bytes(text.encode())
    return str(path)


def test_byte_order_mark(tmp_path: Path) -> None:
    plain = _star(tmp_path / "p.star")
    marked = tmp_path / "q.star"
    marked.write_bytes(b"\xef\xbb\xbf" + Path(plain).read_bytes())
    table = relion.read_particles(str(marked))
    assert table.pixel_size == 3.0  # of data_optics, which stands first
    assert table.columns["voltage"].tolist() == [300] * 4
    text = marked.read_bytes()
    relion.write_rows(str(tmp_path / "out.star"), text, np.ones(4, dtype=bool))
    assert (tmp_path / "out.star").read_bytes() == Path(plain).read_bytes()
    with pytest.raises(InputError, match="UTF-16 text; save it as UTF-8"):
        relion.read_particles("x.star", Path(plain).read_text().encode("utf-16"))


def test_group_numbers_with_a_point(tmp_path: Path) -> None:
    assert relion.read_particles(_star(tmp_path / "p.star", group="1.0")).columns["voltage"].tolist() == [300] * 4
    with pytest.raises(InputError, match="not a whole number"):
        relion.read_particles(_star(tmp_path / "q.star", group="1.5"))


def test_upper_case_ending(tmp_path: Path) -> None:
    assert len(read_source(_star(tmp_path / "P.STAR")).table) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [({"kv": "300000"}, "give kV, not V"), ({"defocus": "1.2 1.1 0"}, "give Å, not µm"),
     ({"defocus": "-1.2 -1.1 0"}, "give Å, not µm")],
)  # fmt: skip
def test_units(tmp_path: Path, change: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_source(_star(tmp_path / "p.star", **change))


def test_what_the_ctf_does_not_know_is_named(tmp_path: Path) -> None:
    found = read_source(_star(tmp_path / "p.star", more="_rlnCtfBfactor\n_rlnCtfScalefactor\n", values="50 0.8"))
    assert found.notes == ("rlnCtfBfactor", "rlnCtfScalefactor")
    assert (
        read_source(_star(tmp_path / "p.star", more="_rlnCtfBfactor\n_rlnCtfScalefactor\n", values="0 1.0")).notes == ()
    )


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ("_rlnTomoName\n_rlnTomoParticleId\n", "TS_01 1"),  # RELION 5 before extraction
        ("_rlnImageName\n_rlnTomoVisibleFrames\n", "Subtomograms/1_stack2d.mrcs [1,1]"),
        ("_rlnImageName\n_rlnCoordinateZ\n_rlnCtfImage\n", "subtomo/1.mrc 12 subtomo/1_ctf.mrc"),  # Warp
    ],
)
def test_subtomograms_are_called_so_at_once(tmp_path: Path, columns: str, row: str) -> None:
    (tmp_path / "p.star").write_text(f"data_particles\n\nloop_\n{columns}{row}\n\n")
    with pytest.raises(InputError, match=r"a table of subtomograms or tilt series .*with the program that wrote"):
        read_source(str(tmp_path / "p.star"))


def test_a_map_is_no_stack(tmp_path: Path) -> None:
    with mrcfile.new(tmp_path / "map.mrc") as file:
        file.set_data(np.random.default_rng(0).normal(size=(16, 16, 16)).astype(np.float32))
        file.voxel_size = 2.0
    with pytest.raises(InputError, match="a 3D map of 16³ voxels"):
        read_source(str(tmp_path / "map.mrc"))
    with mrcfile.open(tmp_path / "map.mrc", "r+") as file:
        file.set_image_stack()
    assert len(read_source(str(tmp_path / "map.mrc")).table) == 16


def test_queries_on_columns_with_nan(tmp_path: Path) -> None:
    star = tmp_path / "p.star"
    rows = [f"{i + 1}@a.mrcs {value}" for i, value in enumerate(["0.5", "nan", "inf", "-inf", "0.1", "NaN"])]
    star.write_text("data_particles\n\nloop_\n_rlnImageName\n_rlnCtfMaxResolution\n" + "\n".join(rows) + "\n\n")
    select.run(str(star), str(tmp_path / "out.star"), query="rlnCtfMaxResolution > 0.2")
    names = relion.read_particles(str(tmp_path / "out.star")).image_names()
    assert names == ["000001@a.mrcs", "000003@a.mrcs"]  # nan is not above anything
    star.write_text(star.read_text().replace("0.1", "mic.mrc"))
    with pytest.raises(InputError, match=r"'mic\.mrc', not a number"):
        select.run(str(star), str(tmp_path / "x.star"), query="rlnCtfMaxResolution > 0.2")


def test_headers_of_many_classes(tmp_path: Path) -> None:
    fields = {"uid": np.arange(3, dtype=np.uint64), "blob/path": np.full(3, b"a.mrc"), "blob/idx": np.arange(3)}
    for number in range(400):
        for name in ("pose", "shift", "class_posterior", "error", "alpha", "weight", "cross_cor", "class_ess"):
            fields[f"alignments_class3D_{number}/{name}"] = np.full(3, number, np.float32)
    rows = csrows.build(3, fields)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = csrows.encode(rows)
        assert int.from_bytes(data[8:12], "little") > 100_000
        found = csrows.decode(data, "x.cs")
    assert found.dtype == rows.dtype
    assert found.tolist() == rows.tolist()


@pytest.mark.parametrize("magic", [b"\x94CSDAT", b"\x95CSDAT"])
def test_compressed_tables_of_cryosparc_tools(magic: bytes) -> None:
    with pytest.raises(InputError, match="compressed format; save it with format=NUMPY_FORMAT"):
        csrows.decode(magic + bytes(100), "x.cs")


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", [np.array, list, tuple])
def test_rows_of_cryodrgn(tmp_path: Path, protocol: int, kind: type) -> None:
    """cryoDRGN's ind.pkl: an array of row numbers, or a list of them."""
    rows = [int(row) for row in np.random.default_rng(0).permutation(70_000)[:20_000]]
    (tmp_path / "ind.pkl").write_bytes(pickle.dumps(kind(rows), protocol=protocol))
    assert read_index(str(tmp_path / "ind.pkl"), 70_000, 70_000).tolist() == rows
    with pytest.raises(ConfigError, match=r"row \d+ is not in the store"):
        read_index(str(tmp_path / "ind.pkl"), 100, 100)


@pytest.mark.parametrize("value", [{1, 2}, [1.5], "rows", [[1]], (np.ones(2), np.ones(2)), None])
def test_pickles_of_no_rows(tmp_path: Path, value: object) -> None:
    (tmp_path / "ind.pkl").write_bytes(pickle.dumps(value))
    with pytest.raises((InputError, ConfigError)):
        read_index(str(tmp_path / "ind.pkl"), 100, 100)


@pytest.mark.parametrize("value", ["nan 11000 0", "12000 inf 0", "12000 11000 1e60"])
def test_rows_that_are_no_numbers_are_left_out(tmp_path: Path, value: str) -> None:
    star = Path(_star(tmp_path / "p.star"))
    star.write_text(star.read_text().replace("3@a.mrcs 1 12000 11000 0", f"3@a.mrcs 1 {value}"))
    with pytest.raises(InputError, match="row 3"):
        plan(str(star))
    made = plan(str(star), sign="uninvert", bad_images="exclude")
    assert made.source.table.columns["source_row"].tolist() == [0, 1, 3]
    assert [bad.source_row for bad in made.excluded] == [2]
    assert made.attrs["source_rows"] == 4
    convert(made, str(tmp_path / "store"))
    assert ParticleStore.open(str(tmp_path / "store")).table().image_names() == [f"{i:06d}@a.mrcs" for i in (1, 2, 4)]


def test_rows_of_cryosparc_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    table = relion.read_particles(_star(tmp_path / "p.star"))
    rows = cryosparc.own_rows(table, 8, 1)
    rows["ctf/df1_A"][1] = np.nan
    (tmp_path / "p.cs").write_bytes(csrows.encode(rows))
    with pytest.raises(InputError, match="df1_A of row 2 is nan"):
        plan(str(tmp_path / "p.cs"))
    made = plan(str(tmp_path / "p.cs"), bad_images="exclude")
    assert made.source.table.columns["source_row"].tolist() == [0, 2, 3]
    assert [(bad.source_row, bad.problem) for bad in made.excluded] == [(1, "ctf/df1_A is nan")]


def test_rows_of_cryodrgns_files_that_are_no_numbers(tmp_path: Path) -> None:
    """Named, or left out; rows of the file are those of the source, also where the table had to leave out its own."""
    star = Path(_star(tmp_path / "p.star"))
    star.write_text(star.read_text().replace("1@a.mrcs 1 12000", "1@a.mrcs 1 nan", 1))
    rotation = np.stack([np.eye(3)[order] for order in ([0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 1, 2])]).astype(np.float32)
    translation = np.arange(8, dtype=np.float32).reshape(4, 2) / 100
    translation[1, 0] = np.nan
    ctf = np.tile(np.array([8, 1.5, 13000, 12000, 10, 300, 2.7, 0.1, 0], np.float32), (4, 1))
    ctf[:, 2] += np.arange(4)
    for name, value in (("poses", (rotation, translation)), ("short", (rotation[:3], np.zeros((3, 2)))), ("ctf", ctf)):
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(value))
    poses, short = (ReadOptions(poses=str(tmp_path / f"{name}.pkl")) for name in ("poses", "short"))
    plain = Path(_star(tmp_path / "q.star"))
    with pytest.raises(InputError, match=r"poses\.pkl: the translations of row 2 are not finite; --bad-images exclude"):
        plan(str(plain), options=poses)
    made = plan(str(star), sign="uninvert", bad_images="exclude", options=poses)
    assert made.source.table.columns["source_row"].tolist() == [2, 3]
    assert [(bad.source_row, bad.problem) for bad in made.excluded][1] == (
        1,
        "the translations in poses.pkl are not finite",
    )
    assert made.source.table.columns["rotation"].tolist() == rotation[2:].transpose(0, 2, 1).tolist()
    width = 8 * made.source.pixel_size
    assert made.source.table.columns["shift"] == pytest.approx(-translation[2:] * width)
    for choice in ("refuse", "exclude"):
        with pytest.raises(InputError, match=r"short\.pkl: has 3 particles, .*q\.star has 4"):
            plan(str(plain), bad_images=choice, options=short)
    pixel = made.source.pixel_size
    ctf[:, 1] = pixel
    (tmp_path / "ctf.pkl").write_bytes(pickle.dumps(ctf))
    made = plan(str(star), sign="uninvert", bad_images="exclude", options=ReadOptions(ctf=str(tmp_path / "ctf.pkl")))
    assert made.source.table.columns["defocus_u"].tolist() == [13001, 13002, 13003]
    ctf[2, 5] = np.inf
    (tmp_path / "ctf.pkl").write_bytes(pickle.dumps(ctf))
    with pytest.raises(InputError, match=r"ctf\.pkl: the CTF parameters of row 3 are not finite"):
        plan(str(plain), options=ReadOptions(ctf=str(tmp_path / "ctf.pkl")))
    rotation[3] = 0
    (tmp_path / "poses.pkl").write_bytes(pickle.dumps(rotation))
    with pytest.raises(InputError, match=r"poses\.pkl: the matrix of row 4 is not a rotation"):
        plan(str(plain), options=poses)


def test_micrographs_are_numbered_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "particles.star"
    rows = "\n".join(f"00000{i + 1}@a.mrcs {name}" for i, name in enumerate(("b.mrc", "a.mrc", "b.mrc")))
    path.write_text(f"data_particles\n\nloop_\n_rlnImageName #1\n_rlnMicrographName #2\n{rows}\n")
    assert relion.read_particles(str(path)).columns["micrograph"].tolist() == [0, 1, 0]
    path.write_text("data_particles\n\nloop_\n_rlnImageName #1\n000001@a.mrcs\n")
    assert "micrograph" not in relion.read_particles(str(path)).columns
