"""What a conversion reads: where stacks are found and where not, and what is given beside a table."""

import bz2
import gzip
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from scalecryo.data.conversion.resample import plan_resampling
from scalecryo.data.conversion.source import ReadOptions, read_source
from scalecryo.data.formats import csrows
from scalecryo.data.formats.mrc import Stack, StackWriter
from scalecryo.data.io import urls
from scalecryo.errors import InputError, MissingInputError

CTF = "voltage=300,spherical_aberration=2.7,amplitude_contrast=0.1,defocus_u=15000"


def stack(path: Path, count: int = 3, box: int = 8, pixel_size: float = 1.5, value: float = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with StackWriter(str(path), count, box, pixel_size) as writer:
        writer.append(np.random.default_rng(box).normal(value, 1, (count, box, box)))
    return path


def table(path: Path, *names: str, columns: str = "", values: str = "") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = "".join(f"{name} {values}\n" for name in names)
    path.write_text(f"data_\n\nloop_\n_rlnImageName #1\n{columns}{rows}\n")
    return str(path)


def test_stacks_outside_the_data_folder(tmp_path: Path) -> None:
    outside = stack(tmp_path / "secret" / "x.mrcs")
    inside = tmp_path / "project"
    stack(inside / "in.mrcs")
    (inside / "a").mkdir()
    for name in ("../secret/x.mrcs", str(outside), "a/../../secret/x.mrcs"):
        star = table(inside / "p.star", f"1@{name}")
        with pytest.raises(InputError, match=r"x\.mrcs is outside --data-dir .*; add --allow-outside"):
            read_source(star, str(inside))
        assert read_source(star, str(inside), ReadOptions(allow_outside=True)).stacks[0].count == 3
    # A symbolic link inside is the user's own doing, and a path may turn within the folder.
    (inside / "link.mrcs").symlink_to(outside)
    (inside / "sub").mkdir()
    for name in ("link.mrcs", "sub/../in.mrcs"):
        assert read_source(table(inside / "p.star", f"1@{name}"), str(inside)).stacks[0].count == 3
    # Without a folder the table's own paths are followed, as RELION's are.
    assert read_source(table(inside / "p.star", "1@../secret/x.mrcs")).stacks[0].count == 3


def test_a_stack_found_by_its_name_alone(tmp_path: Path) -> None:
    folder = tmp_path / "flat"
    stack(folder / "x.mrcs")
    found = read_source(table(tmp_path / "p.star", "1@Extract/job1/x.mrcs"), str(folder))
    assert found.stacks[0].url == str(folder / "x.mrcs")
    # Two stacks of one name in two folders are not one and the same.
    star = table(tmp_path / "p.star", "1@job1/x.mrcs", "1@job2/x.mrcs")
    with pytest.raises(InputError, match=r"job1/x\.mrcs and job2/x\.mrcs both lead to"):
        read_source(star, str(folder))
    assert len(read_source(table(tmp_path / "p.star", "1@x.mrcs", "2@./x.mrcs"), str(folder)).stacks) == 2


@pytest.mark.parametrize("absolute", ["/gpfs/old/project", "s3://bucket/old/project", "../../old/project"])
def test_a_project_that_was_moved(tmp_path: Path, absolute: str) -> None:
    """Names of another machine are found by their longest tail: the images are those of the stack that was meant."""
    here = tmp_path / "here" / "project"
    for number in (1, 2):
        stack(here / "Extract" / f"m{number}" / "p.mrcs", value=10.0 * number)
    stack(here / "p.mrcs", value=99)  # a shorter tail of both
    names = [f"1@{absolute}/Extract/m{number}/p.mrcs" for number in (1, 2)]
    star = table(tmp_path / "p.star", *names)
    for folder in (here, here / "Extract", tmp_path / "here"):
        found = read_source(star, str(folder))
        assert [round(float(part.read([0]).mean()), -1) for part in found.stacks] == [10, 20]
    # Where only the last part of both is left, they cannot be told apart.
    with pytest.raises(InputError, match=r"m1/p\.mrcs and .*m2/p\.mrcs both lead to .*; give a --data-dir that holds"):
        read_source(star, str(here / "Extract" / "m1"))
    if "://" in absolute:
        return
    # One is not below the folder: what is advised is no option that was given, nor one that would not help.
    with pytest.raises(MissingInputError) as caught:
        read_source(table(tmp_path / "q.star", f"1@{absolute}/Extract/m3/q.mrcs"), str(here))
    assert "name the folder that holds q.mrcs" in str(caught.value)
    assert "allow-outside" not in str(caught.value)


def test_the_full_name_and_a_tail_may_be_one_stack(tmp_path: Path) -> None:
    stack(tmp_path / "Extract" / "p.mrcs")
    star = table(tmp_path / "p.star", "1@Extract/p.mrcs", "2@/gpfs/old/Extract/p.mrcs", "3@/gpfs/old/./Extract//p.mrcs")
    assert {part.url for part in read_source(star, str(tmp_path)).stacks} == {str(tmp_path / "Extract" / "p.mrcs")}


@pytest.mark.parametrize("suffix", [":mrcs", ":mrc", ":MRCS"])
def test_the_format_behind_a_stacks_name(tmp_path: Path, suffix: str) -> None:
    stack(tmp_path / "a.mrc", value=5)
    found = read_source(table(tmp_path / "p.star", f"2@a.mrc{suffix}"))
    assert found.table.image_names() == ["000002@a.mrc"]
    assert found.stacks[0].url.endswith("/a.mrc")


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "gone.mrcs").symlink_to("/gpfs/old/gone.mrcs")
    (tmp_path / "Extract").symlink_to("/gpfs/old/Extract")
    for name, link in (("gone.mrcs", "gone.mrcs"), ("Extract/job1/x.mrcs", "Extract")):
        for folder in (None, str(tmp_path)):
            said = rf"{tmp_path}/{link} is a link to /gpfs/old/{link}, which is not there"
            with pytest.raises(MissingInputError, match=said):
                read_source(table(tmp_path / "p.star", f"1@{name}"), folder)
    with pytest.raises(MissingInputError, match="is a link to /gpfs/old/gone"):
        read_source(str(tmp_path / "gone.mrcs"))


@pytest.mark.parametrize("name", ["none.mrcs", "n" * 300 + ".mrcs", "simplecache::http://host/x.mrcs", "\u00e4.mrcs"])
def test_stacks_that_are_nowhere(tmp_path: Path, name: str) -> None:
    with pytest.raises((InputError, MissingInputError), match=r"p\.star: its stack"):
        read_source(table(tmp_path / "p.star", f"1@{name}"))


def test_credentials_are_not_shown(tmp_path: Path) -> None:
    star = table(tmp_path / "p.star", "1@memory://me:word@host/none.mrcs?sig=word")
    for folder in (None, str(tmp_path)):
        with pytest.raises((InputError, MissingInputError)) as caught:
            read_source(star, folder)
        assert "word" not in str(caught.value)


def test_remote_tables() -> None:
    project = "memory://remote-project"
    with StackWriter(f"{project}/Extract/job1/x.mrcs", 3, 8, 1.5) as writer:
        writer.append(np.random.default_rng(0).normal(size=(3, 8, 8)))
    url = f"{project}/Refine3D/job2/run_data.star"
    rows = "1@Extract/job1/x.mrcs\n3@Extract/job1/x.mrcs\n"
    urls.write_bytes_atomic(url, f"data_\n\nloop_\n_rlnImageName #1\n{rows}".encode())
    for folder in (None, project):
        assert read_source(url, folder).stacks[0].url == f"{project}/Extract/job1/x.mrcs"
    urls.write_bytes_atomic(url, b"data_\n\nloop_\n_rlnImageName #1\n1@../../Extract/job1/x.mrcs\n")
    with pytest.raises(InputError, match="is outside --data-dir memory://remote-project/Refine3D/job2"):
        read_source(url, f"{project}/Refine3D/job2")


@pytest.mark.timeout(60)
def test_pipes_and_devices_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mrcs")
    os.mkfifo(tmp_path / "pipe.star")
    with pytest.raises(InputError, match="not a regular file"):
        read_source(table(tmp_path / "p.star", "1@pipe.mrcs"))
    with pytest.raises(InputError, match="not a regular file"):
        read_source(str(tmp_path / "pipe.star"))
    (tmp_path / "zero.star").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="not a regular file"):
        read_source(str(tmp_path / "zero.star"))
    (tmp_path / "loop.mrcs").symlink_to(tmp_path / "loop.mrcs")
    with pytest.raises((InputError, MissingInputError)):
        read_source(table(tmp_path / "p.star", "1@loop.mrcs"))


def test_image_past_the_end_of_any_stack(tmp_path: Path) -> None:
    stack(tmp_path / "a.mrcs")
    stack(tmp_path / "b.mrcs", count=2)
    with pytest.raises(InputError, match=r"b\.mrcs: .*p\.star asks for image 3 but the stack holds 2"):
        read_source(table(tmp_path / "p.star", "3@a.mrcs", "1@b.mrcs", "3@b.mrcs", "2@a.mrcs"))


def test_stacks_of_another_box_than_the_table_says(tmp_path: Path) -> None:
    # A binned table beside the stacks before binning: its pixel size would be that of other images.
    stack(tmp_path / "a.mrcs", box=8)
    good = table(tmp_path / "p.star", "1@a.mrcs", columns="_rlnImagePixelSize #2\n_rlnImageSize #3\n", values="3.0 8")
    assert read_source(good).table.stack_boxes == (8,)
    # The table's pixel size counts; that the header has another is said.
    assert read_source(good).notes == ("1.5 Å/px in the header of a.mrcs (the table: 3)",)
    stale = table(tmp_path / "p.star", "1@a.mrcs", columns="_rlnImagePixelSize #2\n_rlnImageSize #3\n", values="3.0 4")
    assert read_source(stale).notes[0] == "rlnImageSize 4 (the stack a.mrcs has 8 px)"


# ------------------------------------------------------------- compressed files


def _header_only(count: int, box: int) -> bytes:
    header = np.zeros(256, "<i4")
    header[:4] = box, box, count, 2
    header[7:10] = box, box, 1
    header[52:54] = 0x2050414D, 0x4444
    return header.tobytes()


def test_compressed_bombs(tmp_path: Path) -> None:
    # 40 kB that unpack to 40 MB, of which the header announces 512 bytes: what it announces is what is unpacked.
    small = _header_only(2, 8) + bytes(40 << 20)
    for pack, name in ((gzip.compress, "bomb.mrcs.gz"), (bz2.compress, "bomb.mrcs.bz2")):
        (tmp_path / name).write_bytes(pack(small))
        opened = Stack.open(str(tmp_path / name))
        assert (opened.count, opened.unpacked_bytes) == (2, 1024 + 512)
    # And one whose header announces a tebibyte is refused by its header.
    (tmp_path / "huge.mrcs.gz").write_bytes(gzip.compress(_header_only(1 << 20, 512) + bytes(1000)))
    with pytest.raises(InputError, match=r"larger than 1 GiB when unpacked \(1,099,511,628,800 bytes\)"):
        Stack.open(str(tmp_path / "huge.mrcs.gz"))
    (tmp_path / "short.mrcs.gz").write_bytes(gzip.compress(_header_only(3, 8) + bytes(512)))
    with pytest.raises(InputError, match=r"truncated: the header says 3 images .* ends after 2"):
        Stack.open(str(tmp_path / "short.mrcs.gz"))
    damaged = bytearray(gzip.compress(_header_only(2, 8) + bytes(512)))
    damaged[-6] ^= 1
    (tmp_path / "crc.mrcs.gz").write_bytes(damaged)
    with pytest.raises(InputError, match="damaged compressed file"):
        Stack.open(str(tmp_path / "crc.mrcs.gz"))


def test_structure_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scalecryo.data.formats import structure

    monkeypatch.setattr(structure, "_UNPACKED_LIMIT", 1 << 20)
    (tmp_path / "x.pdb.gz").write_bytes(gzip.compress(b"REMARK \n" * (1 << 18)))
    with pytest.raises(InputError, match="holds more than 1 MiB when unpacked"):
        structure.read_structure(str(tmp_path / "x.pdb.gz"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: -8}, "not an MRC file"),
        ({2: 10**9}, "not an MRC file"),
        ({2: 10**7}, "truncated: the header says 10000000 images"),
        ({3: 4}, "MRC mode 4 is not supported"),
        ({23: -100}, "-100 bytes of extended header"),
        ({23: 2**31 - 1}, "truncated"),
    ],
)
def test_absurd_headers(tmp_path: Path, change: dict[int, int], message: str) -> None:
    header = np.frombuffer(_header_only(2, 8), "<i4").copy()
    for word, value in change.items():
        header[word] = value
    (tmp_path / "x.mrcs").write_bytes(header.tobytes() + bytes(512))
    with pytest.raises(InputError, match=message):
        Stack.open(str(tmp_path / "x.mrcs"))


def test_bytes_of_imod_and_byte_order_by_the_stamp(tmp_path: Path) -> None:
    pixels = np.arange(128, dtype=np.uint8).repeat(4).reshape(2, 16, 16) + np.uint8(100)
    header = np.frombuffer(_header_only(2, 16), "<i4").copy()
    header[3], header[38] = 0, 1146047817
    (tmp_path / "unsigned.mrcs").write_bytes(header.tobytes() + pixels.tobytes())
    assert np.array_equal(Stack.open(str(tmp_path / "unsigned.mrcs")).read(slice(None)), pixels)
    header[39] = 1  # IMOD's flag of signed bytes
    (tmp_path / "signed.mrcs").write_bytes(header.tobytes() + pixels.tobytes())
    assert np.array_equal(Stack.open(str(tmp_path / "signed.mrcs")).read(slice(None)), pixels.view(np.int8))
    # 256 px, big-endian, of bytes: read little-endian it says 65,536 px, which is no nonsense.
    big = np.frombuffer(_header_only(1, 256), "<i4").copy()
    big[3] = 0
    big = big.astype(">i4")
    big[53] = 0x11110000
    (tmp_path / "big.mrcs").write_bytes(big.tobytes() + bytes(256 * 256))
    assert (Stack.open(str(tmp_path / "big.mrcs")).count, Stack.open(str(tmp_path / "big.mrcs")).nx) == (1, 256)


# ------------------------------------------------------------- given beside the source


def test_ctf_and_poses_of_a_bare_stack(tmp_path: Path) -> None:
    bare = str(stack(tmp_path / "x.mrcs", pixel_size=0))
    with pytest.raises(InputError, match=r"no pixel size, .* or give --pixel-size"):
        read_source(bare)
    found = read_source(bare, None, ReadOptions(pixel_size=2.0, ctf=CTF + ",phase_shift=90"))
    assert found.pixel_size == 2
    columns = found.table.columns
    assert columns["defocus_v"].tolist() == [15000] * 3
    assert columns["phase_shift"].tolist() == [90] * 3
    assert columns["astigmatism_angle"].tolist() == [0] * 3
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3, 3)))[0]
    rotation *= np.linalg.det(rotation)[:, None, None]
    (tmp_path / "poses.pkl").write_bytes(pickle.dumps((rotation.astype(np.float32), np.full((3, 2), 0.25, np.float32))))
    (tmp_path / "ctf.pkl").write_bytes(pickle.dumps(np.tile([16, 1.0, 15000, 14000, 10, 300, 2.7, 0.1, 0], (3, 1))))
    options = ReadOptions(ctf=str(tmp_path / "ctf.pkl"), poses=str(tmp_path / "poses.pkl"))
    found = read_source(bare, None, options)
    # The CTF file speaks of 16 px of 1 Å: in 8 px the same field of view is 2 Å.
    assert found.pixel_size == 2
    assert found.table.columns["shift"].tolist() == [[-4, -4]] * 3  # −0.25 · 8 px · 2 Å
    assert found.table.columns["rotation"] == pytest.approx(rotation.transpose(0, 2, 1), abs=1e-6)
    (tmp_path / "few.pkl").write_bytes(pickle.dumps(rotation[:2]))
    with pytest.raises(InputError, match=r"few\.pkl: has 2 particles, .* has 3"):
        read_source(bare, None, ReadOptions(pixel_size=2.0, poses=str(tmp_path / "few.pkl")))
    with pytest.raises(InputError, match="states 1 Å at a box of 16 px"):
        read_source(bare, None, ReadOptions(pixel_size=1.5, ctf=str(tmp_path / "ctf.pkl")))


@pytest.mark.parametrize(
    ("ctf", "message"),
    [
        ("voltage=300", "lacks spherical_aberration, amplitude_contrast, defocus_u"),
        (CTF + ",volts=3", "'volts=3' is not understood"),
        (CTF + ",defocus_v=high", "'defocus_v=high' is not understood"),
        (CTF + ",voltage=200", "'voltage=200' is not understood"),
        (CTF.replace("0.1", "10"), "amplitude contrast of row 1 is 10.0"),
    ],
)
def test_bad_ctf_values(tmp_path: Path, ctf: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_source(str(stack(tmp_path / "x.mrcs")), None, ReadOptions(ctf=ctf))


def test_pixel_size_is_not_contradicted(tmp_path: Path) -> None:
    stack(tmp_path / "a.mrcs", pixel_size=3.0)
    stack(tmp_path / "b.mrcs", pixel_size=4.0)
    star = table(tmp_path / "p.star", "1@a.mrcs", "1@b.mrcs")
    with pytest.raises(InputError, match="headers state pixel sizes from 3 to 4 Å, and the table none"):
        read_source(star)
    assert read_source(star, None, ReadOptions(pixel_size=3.5)).pixel_size == 3.5
    stated = table(tmp_path / "q.star", "1@a.mrcs", columns="_rlnImagePixelSize #2\n", values="1.0")
    assert read_source(stated).pixel_size == 1  # the table goes before the header
    with pytest.raises(InputError, match="states a pixel size of 1 Å, not 3"):
        read_source(stated, None, ReadOptions(pixel_size=3.0))
    with pytest.raises(InputError, match="a pixel size is positive"):
        read_source(star, None, ReadOptions(pixel_size=-1.0))


def test_unknown_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "poses.pkl").write_bytes(b"")
    with pytest.raises(InputError, match=r"\.pkl files go with it by --poses and --ctf"):
        read_source(str(tmp_path / "poses.pkl"))
    with pytest.raises(InputError, match="--passthrough is for cryoSPARC's"):
        read_source(str(stack(tmp_path / "x.mrcs")), None, ReadOptions(passthrough=("x.cs",)))
    with pytest.raises(InputError, match=r"poses are given as cryoDRGN's \.pkl"):
        read_source(str(tmp_path / "x.mrcs"), None, ReadOptions(poses="x.star"))


# ------------------------------------------------------------- several pixel sizes


def test_plan_of_resampling() -> None:
    plans = plan_resampling([256, 256, 300], [1.06, 1.10, 0.55])
    # 256 · 1.06 / 1.1 = 246.7 and 300 · 0.55 / 1.1 = 150.
    assert [(how.fourier_box, how.box_size) for how in plans] == [(246, 150), (256, 150), (150, 150)]
    assert [how.error for how in plans] == pytest.approx([256 * 1.06 / 246 / 1.1 - 1, 0, 0])


def test_mixed_optics(tmp_path: Path) -> None:
    """Reference: one Gaussian drawn at two pixel sizes, of known width and place in Å."""
    for name, box, size in (("fine", 64, 1.0), ("coarse", 32, 2.0)):
        axis = (np.arange(box) - box // 2) * size
        image = np.exp(-((axis[None, :] - 6) ** 2 + (axis[:, None] + 4) ** 2) / (2 * 5.0**2))
        with StackWriter(str(tmp_path / f"{name}.mrcs"), 1, box, size) as writer:
            writer.append(image[None])
    star = tmp_path / "p.star"
    star.write_text(
        "data_optics\n\nloop_\n_rlnOpticsGroup #1\n_rlnImagePixelSize #2\n1 1.0\n2 2.0\n\ndata_particles\n\nloop_\n"
        "_rlnImageName #1\n_rlnOpticsGroup #2\n1@fine.mrcs 1\n1@coarse.mrcs 2\n"
    )
    with pytest.raises(InputError, match=r"pixel sizes from 1 to 2 Å; .* let --mixed-optics resample do it"):
        read_source(str(star))
    found = read_source(str(star), None, ReadOptions(mixed_optics="resample"))
    assert (found.box_size, found.pixel_size) == (32, 2.0)
    fine, coarse = (one.read([0])[0] for one in found.stacks)
    # Its transform falls to 4e-14 at the coarse Nyquist frequency, and it to 1e-6 at the edge.
    assert np.abs(fine - coarse).max() < 1e-5
    assert np.array_equal(found.stacks[0].read([0], np.empty((1, 32, 32), np.float32))[0], fine)


def test_mixed_optics_of_cryosparc(tmp_path: Path) -> None:
    for name, box in (("a", 16), ("b", 12)):
        stack(tmp_path / f"{name}.mrcs", box=box)
    rows = csrows.build(2, {
        "uid": np.arange(2, dtype=np.uint64),
        "blob/path": np.array([b">a.mrcs", b">b.mrcs"]),
        "blob/idx": np.zeros(2, np.uint32),
        "blob/psize_A": np.array([1.5, 2.0], np.float32),
        "alignments3D/pose": np.zeros((2, 3), np.float32),
        "alignments3D/shift": np.ones((2, 2), np.float32),
    })  # fmt: skip
    (tmp_path / "p.cs").write_bytes(csrows.encode(rows))
    found = read_source(str(tmp_path / "p.cs"), None, ReadOptions(mixed_optics="resample"))
    assert (found.box_size, found.pixel_size, found.sign) == (12, 2.0, None)
    assert found.table.columns["shift"].tolist() == [[-1.5, -1.5], [-2, -2]]
