"""cryoSPARC files: joined by uid, never executed, never allocated past their own length, written as they were."""

import io
from pathlib import Path

import numpy as np
import pytest

from scalecryo.data.formats import cryosparc, csrows
from scalecryo.errors import InputError

TABLE = "metadata/cs/cryosparc_P12_J24_001_particles.cs"


def rows_of(count: int = 4, **fields: np.ndarray) -> np.ndarray:
    base = {
        "uid": np.arange(10, 10 + count, dtype=np.uint64),
        "blob/path": np.array([b">J1/extract/a.mrc", b">J1/extract/b.mrc"] * count)[:count],
        "blob/idx": np.arange(count, dtype=np.uint32),
        "blob/psize_A": np.full(count, 1.5, np.float32),
        "blob/sign": np.full(count, -1, np.float32),
    }
    return csrows.build(count, {name: values for name, values in (base | fields).items() if values is not None})


def save(path: Path, rows: np.ndarray) -> str:
    path.write_bytes(csrows.encode(rows))
    return str(path)


def test_encode_is_what_numpy_reads() -> None:
    rows = rows_of()
    assert np.array_equal(np.load(io.BytesIO(csrows.encode(rows)), allow_pickle=False), rows)
    assert np.array_equal(csrows.decode(csrows.encode(rows), "x"), rows)
    assert len(cryosparc.table_of(csrows.decode(csrows.encode(rows[:0]), "x"), "x")) == 0


def test_passthrough_is_joined_by_uid(tmp_path: Path) -> None:
    # The job's own file has the poses; the one that it passed through has the images, in another order and more.
    own = csrows.build(3, {
        "uid": np.array([12, 10, 13], np.uint64),
        "alignments3D/pose": np.zeros((3, 3), np.float32),
        "alignments3D/shift": np.array([[1, 0], [2, 0], [3, 0]], np.float32),
    })  # fmt: skip
    first, second = save(tmp_path / "J2_particles.cs", own), save(tmp_path / "J2_passthrough.cs", rows_of()[::-1])
    with pytest.raises(InputError, match=r"field blob/path is missing; .* by --passthrough"):
        cryosparc.read_particles(first)
    table = cryosparc.read_particles(first, [second])
    assert table.columns["stack_index"].tolist() == [2, 0, 3]
    assert table.stacks == ("J1/extract/a.mrc", "J1/extract/b.mrc")
    assert table.columns["stack"].tolist() == [0, 0, 1]
    assert table.columns["shift"][:, 0].tolist() == [-1.5, -3, -4.5]
    group = "group:\n  type: particle\nresults:\n"
    for kind, name in (("blob", "J2_passthrough.cs"), ("alignments3D", "J2_particles.cs")):
        group += f"  {kind}:\n    metafile: '>{name}'\n    num_items: 3\n    type: particle.{kind}\n"
    (tmp_path / "J2.csg").write_text(group)
    again = cryosparc.read_particles(str(tmp_path / "J2.csg"))
    for name, values in table.columns.items():
        assert np.array_equal(values, again.columns[name]), name
    with pytest.raises(InputError, match="lacks 2 of 4 particles, the first with uid 12"):
        cryosparc.read_particles(save(tmp_path / "all.cs", rows_of()), [save(tmp_path / "few.cs", rows_of(2))])
    twice = save(tmp_path / "twice.cs", rows_of()[[0, 1, 2, 3, 3]])
    with pytest.raises(InputError, match="a uid stands there twice"):
        cryosparc.read_particles(first, [twice])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("results: [", "not a cryoSPARC group file"),
        ("a: 1", "not a cryoSPARC group file"),
        ("results: {}", "lists no results"),
        ("results: {blob: {metafile: '>../secret.cs'}}", "names ../secret.cs, which is not in the group's own folder"),
        ("results: {blob: {metafile: '/etc/passwd'}}", "names /etc/passwd"),
        ("results: {blob: {metafile: 's3://user:word@host/x.cs'}}", "names s3://host/x.cs"),
        ("results: {blob: {metafile: [a]}}", "a metafile that is no text"),
        ("a: &a {x: 1}\nresults: {blob: {<<: [*a, *a]}}", "grow without end"),
        ("[" * 5000, "not a cryoSPARC group file"),
        ("!!python/object/apply:os.system ['exit 1']", "not a cryoSPARC group file"),
    ],
)
def test_bad_groups(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "g.csg").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        csrows.read(str(tmp_path / "g.csg"))
    assert "word" not in str(caught.value)


def header(text: str) -> bytes:
    line = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(line).to_bytes(2, "little") + line


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x94CSDAT\x01", "cryosparc-tools' compressed format"),
        (b"PK\x03\x04 a zip", "not a cryoSPARC table"),
        (b"\x93NUMPY\x03\x00\x10\x00\x00\x00", "version 3 of the .npy format"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\x7f", "a header of 2147483647 bytes"),
        (header("{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (1,)}"), "pickled objects"),
        (header("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1000000000000,)}"), "truncated: 10000000"),
        (header("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (-1,)}"), "truncated: -1 rows"),
        (header("{'descr': [('a', '<V999999999')], 'fortran_order': False, 'shape': (3,)}"), "truncated"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (0,)}"), "fields are missing"),
        (header("__import__('os').system('exit 1')"), "not a cryoSPARC table"),
        (header("((((((((((" * 10), "not a cryoSPARC table"),
    ],
)
def test_hostile_headers(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        csrows.decode(data, "x.cs")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"blob/path": np.array([b"\xff\xfe"] * 4)}, "not UTF-8"),
        ({"blob/path": np.array([b">"] * 4)}, "empty blob/path"),
        ({"blob/path": np.zeros(4)}, "blob/path is float64, not text"),
        ({"blob/idx": np.full(4, 2**63, np.uint64)}, "blob/idx goes up to 9223372036854775808"),
        ({"blob/idx": np.array([0, -1, 0, 0])}, "stack index of row 2 is -1"),
        ({"blob/psize_A": np.array([1, np.nan, 1, 1])}, "blob/psize_A of row 2 is nan"),
        ({"blob/psize_A": np.zeros(4)}, "blob/psize_A of row 1 is 0, not positive"),
        ({"ctf/df1_A": np.ones(4)}, "ctf/df2_A is missing"),
        (
            {"alignments3D/pose": np.zeros((4, 2)), "alignments3D/shift": np.zeros((4, 2))},
            r"not numbers of shape \(3,\)",
        ),
        ({"alignments3D/split": np.full(4, 257, np.uint32)}, "half of row 1 is 258"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InputError, match=message):
        cryosparc.table_of(rows_of(**fields), "x.cs")


def test_blob_sign() -> None:
    assert cryosparc.sign_of(rows_of(), "x") == -1
    assert cryosparc.sign_of(rows_of(**{"blob/sign": None}), "x") is None
    with pytest.raises(InputError, match="−1 for 1 and 1 for 3 particles"):
        cryosparc.sign_of(rows_of(**{"blob/sign": np.array([1, -1, 1, 1.0])}), "x")


def test_many_exposure_groups() -> None:
    # 2^16 + 3 would be 3 in 16 bits.
    groups = np.array([65539, 3, 65539, 3], np.uint32)
    assert cryosparc.table_of(rows_of(**{"ctf/exp_group_id": groups}), "x").columns["optics_group"].tolist() == [
        2,
        1,
        2,
        1,
    ]


def test_round_trip_changes_poses_alone(shared_data: Path, tmp_path: Path) -> None:
    """Reference: a real refinement's own file. What is not a pose, half or confidence stays, bit by bit."""
    source = csrows.read(str(shared_data / TABLE))
    table = cryosparc.table_of(source, TABLE)
    rotation, shift = cryosparc.poses_of(source, TABLE)  # type: ignore[misc]
    shuffled = np.random.default_rng(0).permutation(len(source))
    path = tmp_path / "out.cs"
    cryosparc.write_with_poses(
        str(path), source, shuffled, rotation[shuffled], shift[shuffled], None, table.columns["half"][shuffled]
    )
    back = csrows.read(str(path))
    assert back.dtype == source.dtype
    changed = {"alignments3D/pose", "alignments3D/shift"}
    for name in set(source.dtype.names) - changed:
        assert np.array_equal(back[name], source[name]), name
    again, moved = cryosparc.poses_of(back, "back")  # type: ignore[misc]
    # A rotation vector near π keeps 2^-23 of it in single precision: 1e-5° in all.
    turn = np.degrees(2 * np.arcsin(np.linalg.norm(again - rotation, axis=(1, 2)) / np.sqrt(8)))
    assert turn.max() < 1e-5
    assert np.abs(moved - shift).max() < 1e-5

    few = shuffled[:10]
    cryosparc.write_with_poses(
        str(tmp_path / "few.cs"), source, few, rotation[few], shift[few], np.linspace(0, 1, 10),
        table.columns["half"][few],
    )  # fmt: skip
    kept = csrows.read(str(tmp_path / "few.cs"))
    assert np.array_equal(kept["uid"], source["uid"][np.sort(few)])
    assert kept["alignments3D/class_posterior"] == pytest.approx(np.linspace(0, 1, 10)[np.argsort(few)])
    with pytest.raises(InputError, match="the source table has 2019 rows"):
        cryosparc.write_with_poses(str(path), source, few + 2019, rotation[few], shift[few], None, np.ones(10))


def test_poses_are_added_where_there_were_none(shared_data: Path, tmp_path: Path) -> None:
    source = csrows.read(str(shared_data / "particles_real/empiar_10076/empiar_10076_7.cs"))
    rotation = np.stack([np.eye(3)] * 7)
    shift = np.arange(14.0).reshape(7, 2)
    cryosparc.write_with_poses(
        str(tmp_path / "x.cs"), source, np.arange(7), rotation, shift, np.ones(7), np.array([1, 2] * 3 + [1])
    )
    back = csrows.read(str(tmp_path / "x.cs"))
    for name in source.dtype.names:
        assert np.array_equal(back[name], source[name])
        assert back.dtype[name] == source.dtype[name]
    table = cryosparc.table_of(back, "x")
    assert table.columns["shift"] == pytest.approx(shift, abs=1e-5)
    assert table.columns["half"].tolist() == [1, 2, 1, 2, 1, 2, 1]
