"""In and out again: through the store, through the other package's table, in part; and every strange file by name."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import zarr

from scalecryo.cli import main
from scalecryo.commands import export, select
from scalecryo.commands import verify as verify_command
from scalecryo.data.conversion.source import ReadOptions, read_source
from scalecryo.data.formats import cryosparc, csrows, relion
from scalecryo.data.formats.mrc import StackWriter, write_map
from scalecryo.data.formats.relion.syntax import StarText, small_table
from scalecryo.data.formats.relion.values import not_applied, particle_block
from scalecryo.data.storage.store import ParticleStore

POSE_COLUMNS = {
    "rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginX", "rlnOriginY", "rlnOriginXAngst", "rlnOriginYAngst",
    "rlnRandomSubset", "rlnMaxValueProbDistribution",
}  # fmt: skip
BETAGAL = "projections_relion/relion_proj_batch_pfac2.star"


def scalecryo(*arguments: str) -> int:
    """Exit code of the command line, run in this process."""
    try:
        main(list(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def angle_deg(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of the rotation between matrices, by the chord: precise near zero."""
    return np.degrees(2 * np.arcsin(np.linalg.norm(a - b, axis=(1, 2)) / np.sqrt(8)))


def outside_the_particles(text: bytes) -> bytes:
    """A STAR file without the lines of its particle block's rows and header."""
    found = StarText(text, "x")
    block = particle_block(found)
    return text[: block.start] + text[block.stop :]


def columns_of(text: bytes) -> dict[str, list[bytes]]:
    found = StarText(text, "x")
    return dict(small_table(found, particle_block(found)))


@pytest.mark.parametrize("name", [BETAGAL, "particles_real/aspire_sample/sample_particles_relion31.star"])
def test_relion_to_store_to_relion(shared_data: Path, tmp_path: Path, name: str) -> None:
    """Nothing changes but pose columns: every other value, block and comment is the same text."""
    source = shared_data / name
    folder = source.parent
    star_file = tmp_path / "source.star"
    text = source.read_bytes()
    star_file.write_bytes(text)
    if "aspire" in name:
        # The table's stack is not there; one of its size is.
        (stack,) = {value.split(b"@")[1].decode() for value in columns_of(text)["rlnImageName"]}
        path = tmp_path / "data" / Path(stack).name
        path.parent.mkdir()
        with StackWriter(str(path), 17, 32, 1.4) as writer:
            writer.append(np.random.default_rng(0).normal(size=(17, 32, 32)))
        folder = path.parent
    assert scalecryo("convert", str(star_file), str(tmp_path / "store"), "--data-dir", str(folder), "--uninvert") == 0
    store = ParticleStore.open(str(tmp_path / "store"))
    table = store.table()
    columns = table.columns
    out = tmp_path / "back.star"
    relion.write_with_poses(
        str(out), store.source_star(), table, columns["rotation"], columns["shift"], np.ones(len(table)),
        columns["half"] if columns["half"].any() else np.ones(len(table), np.int8),
    )  # fmt: skip
    back = out.read_bytes()
    assert outside_the_particles(back) == outside_the_particles(text)
    before, after = columns_of(text), columns_of(back)
    assert list(after)[: len(before)] == list(before)
    assert set(after) - set(before) <= POSE_COLUMNS
    for column in set(before) - POSE_COLUMNS:
        assert after[column] == before[column], column
    ours, theirs = relion.read_poses(str(out)), relion.read_poses(str(source))
    # Single precision in the store: 6e-8 in each of nine numbers.
    assert angle_deg(ours.rotation, theirs.rotation).max() < 1e-5
    assert theirs.shift is not None
    assert ours.shift is not None
    # Single precision of some 10 Å, and six decimals.
    assert np.abs(ours.shift - theirs.shift).max() < 2e-6


def test_relion_to_cryosparc_to_relion(shared_data: Path, tmp_path: Path) -> None:
    """The issue's bound: 1e-5° after single-precision rotation vectors and six decimals of a degree."""
    count = 2000
    rng = np.random.default_rng(0)
    rows = [
        f"{row + 1:06d}@a/{row % 3}.mrcs {1 + row % 2} {15000 + row} {14000 + row} {row % 180} {rot:.6f} {tilt:.6f} "
        f"{psi:.6f} {x:.6f} {y:.6f} {1 + row % 2} {row / count:.6f}\n"
        for row, (rot, tilt, psi, x, y) in enumerate(
            zip(rng.uniform(-180, 180, count), np.degrees(np.arccos(rng.uniform(-1, 1, count))),
                rng.uniform(-180, 180, count), *rng.normal(0, 5, (2, count)), strict=True)
        )
    ]  # fmt: skip
    rows[0] = rows[0].replace(rows[0].split()[6], "0.000000")
    rows[1] = rows[1].replace(rows[1].split()[6], "180.000000")
    names = ["ImageName", "OpticsGroup", "DefocusU", "DefocusV", "DefocusAngle", "AngleRot", "AngleTilt", "AnglePsi"]
    names += ["OriginXAngst", "OriginYAngst", "RandomSubset", "MaxValueProbDistribution"]
    optics = "_rlnOpticsGroup\n_rlnVoltage\n_rlnSphericalAberration\n_rlnAmplitudeContrast\n_rlnImagePixelSize\n"
    optics += "_rlnImageSize\n1 300 2.7 0.1 1.06 256\n2 200 1.4 0.07 1.06 256\n\n"
    head = f"data_optics\n\nloop_\n{optics}data_particles\n\nloop_\n" + "".join(f"_rln{name}\n" for name in names)
    (tmp_path / "in.star").write_text(head + "".join(rows))
    select.run(str(tmp_path / "in.star"), str(tmp_path / "through.cs"))
    select.run(str(tmp_path / "through.cs"), str(tmp_path / "out.star"))
    before, after = relion.read_poses(str(tmp_path / "in.star")), relion.read_poses(str(tmp_path / "out.star"))
    assert after.names == before.names
    assert angle_deg(after.rotation, before.rotation).max() < 1e-5
    assert after.shift is not None
    assert before.shift is not None
    # Single precision of up to 20 px: 2e-6 px of 1.06 Å, and half of the sixth decimal.
    assert np.abs(after.shift - before.shift).max() < 3e-6
    assert np.array_equal(after.half, before.half)
    assert after.confidence == pytest.approx(before.confidence, abs=1e-6)
    ours, theirs = (relion.read_particles(str(tmp_path / name)) for name in ("out.star", "in.star"))
    for name in cryosparc.CTF_COLUMNS:
        assert ours.columns[name] == pytest.approx(theirs.columns[name], rel=1e-6, abs=1e-4), name
    rows_written = csrows.read(str(tmp_path / "through.cs"))
    assert set(rows_written["blob/shape"].reshape(-1).tolist()) == {256}


def run_of(folder: Path, store: str, box_size: int, pixel_size: float) -> Path:
    """A finished run's files that export reads, with random poses."""
    opened = ParticleStore.open(store)
    table = opened.table()
    rng = np.random.default_rng(3)
    rotation = np.linalg.qr(rng.normal(size=(len(table), 3, 3)))[0]
    rotation *= np.linalg.det(rotation)[:, None, None]
    folder.mkdir()
    relion.write_with_poses(
        str(folder / "particles.star"), opened.source_star(), table, rotation, rng.normal(0, 3, (len(table), 2)),
        np.linspace(0, 1, len(table)), np.arange(len(table)) % 2 + 1, box_size=int(opened.attrs["source_box_size"]),
    )  # fmt: skip
    write_map(str(folder / "map.mrc"), rng.normal(size=(box_size,) * 3), pixel_size)
    (folder / "config.toml").write_text(f'[run]\ndata = "{store}"\n')
    return folder


def test_cryosparc_to_store_to_cryosparc(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "particles_real/empiar_10076/empiar_10076_7.cs"
    store = str(tmp_path / "store")
    assert scalecryo("convert", str(source), store, "--data-dir", str(source.parent), "--box", "64") == 0
    run = run_of(tmp_path / "run", store, 64, 1.31 * 5)
    for package in ("cryosparc", "cryodrgn"):
        export.run(str(run), format=package, out=str(tmp_path / package))
    before, after = csrows.read(str(source)), csrows.read(str(tmp_path / "cryosparc" / "particles.cs"))
    for name in before.dtype.names:
        assert after.dtype[name] == before.dtype[name]
        assert np.array_equal(after[name], before[name]), name
    poses = relion.read_poses(str(run / "particles.star"))
    rotation, shift = cryosparc.poses_of(after, "after")  # type: ignore[misc]
    assert angle_deg(rotation, poses.rotation).max() < 1e-5
    assert shift == pytest.approx(poses.shift, abs=1e-5)
    # The store's box was cropped to 64 px; cryoDRGN reads the source's 320 px, and takes fractions of them.
    _, translation = pickle.loads((tmp_path / "cryodrgn" / "poses.pkl").read_bytes())
    assert -translation * 320 * 1.31 == pytest.approx(poses.shift, abs=1e-4)
    ctf = pickle.loads((tmp_path / "cryodrgn" / "ctf.pkl").read_bytes())
    assert set(ctf[:, 0].tolist()) == {320}
    assert ctf[:, 1] == pytest.approx(1.31, abs=1e-5)


def test_contrast_by_the_tables_sign(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = shared_data / "particles_real/empiar_10076/empiar_10076_7.cs"
    assert scalecryo("convert", str(source), str(tmp_path / "s"), "--data-dir", str(source.parent)) == 0
    assert "contrast: turned (as blob/sign says)" in capsys.readouterr().out
    assert scalecryo("convert", str(source), str(tmp_path / "t"), "--data-dir", str(source.parent), "--uninvert") == 0
    assert ParticleStore.open(str(tmp_path / "t")).attrs["sign"] == 1


@pytest.mark.parametrize("kind", ["star", "cs"])
def test_two_pixel_sizes_in_one_stack(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One blob at the centre, 6 Å wide, by two microscopes: both images become the same, whatever the header says."""
    sizes = (1.0, 1.5)  # 72 px of 1 Å are 48 of 1.5 Å exactly
    y, x = np.mgrid[:72, :72] - 36
    blobs = [np.exp(-(x**2 + y**2) * size**2 / (2 * 6.0**2)) for size in sizes]
    with StackWriter(str(tmp_path / "a.mrcs"), 8, 72, 3.1) as writer:
        writer.append(np.stack([blobs[row % 2] for row in range(8)]).astype(np.float32))
    source = tmp_path / f"p.{kind}"
    if kind == "star":
        rows = "".join(f"{row + 1}@a.mrcs {1 + row % 2}\n" for row in range(8))
        source.write_text(
            "data_optics\n\nloop_\n_rlnOpticsGroup #1\n_rlnImagePixelSize #2\n_rlnImageSize #3\n1 1.0 72\n2 1.5 72\n"
            "\ndata_particles\n\nloop_\n_rlnImageName #1\n_rlnOpticsGroup #2\n" + rows
        )
    else:
        fields = [("uid", "u8"), ("blob/path", "S8"), ("blob/idx", "u4"), ("blob/shape", "u4", 2),
                  ("blob/psize_A", "f4"), ("ctf/exp_group_id", "u4")]  # fmt: skip
        rows = [(row + 1, b"a.mrcs", row, (72, 72), sizes[row % 2], row % 2) for row in range(8)]
        source.write_bytes(csrows.encode(np.array(rows, dtype=fields)))
    assert scalecryo("convert", str(source), str(tmp_path / "s")) == 1
    assert "pixel sizes from 1 to 1.5 Å; rescale" in capsys.readouterr().err
    assert scalecryo("convert", str(source), str(tmp_path / "s"), "--mixed-optics", "resample", "--uninvert") == 0
    said = capsys.readouterr()
    assert "8 particles in 1 stacks" in said.out
    assert "3.1 Å/px in the header of a.mrcs (the table: 1)" in said.err
    store = ParticleStore.open(str(tmp_path / "s"))
    assert (store.box_size, store.pixel_size, store.count) == (48, 1.5, 8)
    group = zarr.open_group(str(tmp_path / "s"), mode="r")
    images = group["images/48"][:].astype(np.float64)
    images = images * group["particles/image_scale"][:][:, None, None] + group["particles/image_mean"][:][:, None, None]
    # float16 keeps 11 bits of values up to the blob's height, 1.
    assert np.abs(images - blobs[1][12:60, 12:60]).max() < 1e-3
    verify_command.run(str(tmp_path / "s"), full=True)
    assert "sound" in capsys.readouterr().out


def test_mixed_pixel_sizes_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for name, box, size in (("fine", 72, 1.0), ("coarse", 48, 1.6)):
        with StackWriter(str(tmp_path / f"{name}.mrcs"), 8, box, size) as writer:
            writer.append(rng.normal(size=(8, box, box)))
    rows = "".join(f"{row % 8 + 1}@{'fine' if row < 8 else 'coarse'}.mrcs {1 + row // 8}\n" for row in range(16))
    star_file = tmp_path / "p.star"
    star_file.write_text(
        "data_optics\n\nloop_\n_rlnOpticsGroup #1\n_rlnImagePixelSize #2\n_rlnImageSize #3\n_rlnMagMat01 #4\n"
        "1 1.0 72 0.002\n2 1.6 48 0.0\n\ndata_particles\n\nloop_\n_rlnImageName #1\n_rlnOpticsGroup #2\n" + rows
    )
    store = str(tmp_path / "store")
    assert scalecryo("convert", str(star_file), store) == 1
    assert "--mixed-optics resample" in capsys.readouterr().err
    assert scalecryo("convert", str(star_file), store, "--mixed-optics", "resample", "--uninvert") == 0
    said = capsys.readouterr()
    # 72 px of 1 Å are 45 of 1.6 Å: the nearest even box is 44, 2.27 % off.
    assert "resampled to 1.6 Å; even boxes leave an error of the pixel size of up to 2.27 %" in said.out
    assert "not applied to the images: rlnMagMat01" in said.err
    opened = ParticleStore.open(store)
    assert (opened.box_size, opened.pixel_size, opened.count) == (44, 1.6, 16)
    verify_command.run(store, full=True)
    assert "sound" in capsys.readouterr().out
    run = run_of(tmp_path / "run", store, 44, 1.6)
    assert outside_the_particles((run / "particles.star").read_bytes()) == outside_the_particles(star_file.read_bytes())
    export.run(str(run), format="cryosparc", out=str(tmp_path / "cs"))
    back = csrows.read(str(tmp_path / "cs" / "particles.cs"))
    assert back["blob/shape"][:, 0].tolist() == [72] * 8 + [48] * 8
    assert back["blob/psize_A"] == pytest.approx([1.0] * 8 + [1.6] * 8)
    # The same of a table that the run had to make itself, as it does for particles from cryoSPARC.
    table = opened.table()
    columns = {**table.columns, "rotation": np.stack([np.eye(3)[[1, 2, 0]]] * 16), "shift": np.ones((16, 2))}
    relion.write_with_poses(
        str(tmp_path / "own.star"), None, table, columns["rotation"], columns["shift"], np.ones(16), np.ones(16), 44
    )
    own = relion.read_particles(str(tmp_path / "own.star"))
    assert own.stack_pixel_sizes == (1.0, 1.6)
    assert own.stack_boxes == (72, 48)
    assert own.columns["shift"].tolist() == [[1, 1]] * 16
    assert scalecryo("export", str(run), "--format", "cryodrgn", "--out", str(tmp_path / "drgn")) == 1
    assert "cryoDRGN takes one pixel size" in capsys.readouterr().err


def test_cryodrgn_inputs_end_to_end(shared_data: Path, tmp_path: Path) -> None:
    """cryoDRGN's toy set by its own files; reference: its poses and CTF as they stand in them."""
    toy = shared_data / "toy"
    store = str(tmp_path / "store")
    assert scalecryo("convert", str(toy / "toy_projections.mrcs"), store, "--poses", str(toy / "toy_rot_zerotrans.pkl"),
                     "--ctf", str(toy / "test_ctf.pkl"), "--uninvert") == 0  # fmt: skip
    columns = ParticleStore.open(store).table().columns
    rotation, _ = pickle.loads((toy / "toy_rot_zerotrans.pkl").read_bytes())
    assert np.array_equal(columns["rotation"], rotation.transpose(0, 2, 1))
    assert not columns["shift"].any()
    assert set(columns["phase_shift"].tolist()) == {90}
    bare = str(tmp_path / "bare")
    values = "voltage=200,spherical_aberration=1.4,amplitude_contrast=0.07,defocus_u=12000,defocus_v=11000"
    assert scalecryo("convert", str(toy / "toy_projections.mrcs"), bare, "--uninvert", f"--ctf={values}") == 0
    assert set(ParticleStore.open(bare).table().columns["defocus_v"].tolist()) == {11000}


# ------------------------------------------------------------- select


def test_select_from_star(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "particles_real/aspire_sample/sample_particles_relion31.star"
    text = source.read_bytes()
    voltage = relion.read_particles(str(source)).columns["voltage"]
    out = tmp_path / "few.star"
    select.run(str(source), str(out), query="voltage > 250 and rlnDefocusU > 0")
    kept = columns_of(out.read_bytes())
    for name, values in columns_of(text).items():
        assert kept[name] == [value for value, keep in zip(values, voltage > 250, strict=True) if keep]
    assert outside_the_particles(out.read_bytes()) == outside_the_particles(text)
    (tmp_path / "rows.txt").write_text("3\n1 # the second\n")
    select.run(str(source), str(tmp_path / "two.star"), index=str(tmp_path / "rows.txt"))
    assert columns_of((tmp_path / "two.star").read_bytes())["rlnImageName"] == [
        columns_of(text)["rlnImageName"][row] for row in (1, 3)
    ]


def test_select_from_cryosparc(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "metadata/cs/cryosparc_P12_J24_001_particles.cs"
    rows = csrows.read(str(source))
    select.run(str(source), str(tmp_path / "half.cs"), half=2)
    kept = csrows.read(str(tmp_path / "half.cs"))
    assert kept.dtype == rows.dtype
    assert np.array_equal(kept, rows[rows["alignments3D/split"] == 1])
    select.run(str(source), str(tmp_path / "all.star"))
    before = cryosparc.poses_of(rows, "x")
    after = relion.read_poses(str(tmp_path / "all.star"))
    assert before is not None
    assert angle_deg(after.rotation, before[0]).max() < 1e-5
    assert after.shift == pytest.approx(before[1], abs=1e-6)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--query", "voltage >"), 2, "--query"),
        (("--query", "__import__('os') > 1"), 2, "is not understood"),
        (("--query", "rlnNothing > 1"), 2, "no column rlnNothing"),
        (("--query", "voltage > 900"), 1, "none of 7 particles is selected"),
        (("--half", "1"), 1, "does not say which half"),
        (("--min-confidence", "0.5"), 1, "has no confidence"),
        (("--index", "none.txt"), 1, "no such file"),
    ],
)
def test_select_refusals(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple, code: int, message: str
) -> None:
    source = shared_data / "particles_real/empiar_10076/empiar_10076_7.star"
    assert scalecryo("select", str(source), str(tmp_path / "out.star"), *options) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.star").exists()


def test_select_names_its_files(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(shared_data / BETAGAL)
    (tmp_path / "there.star").write_text("mine")
    for target, code, message in (("there.star", 1, "exists already"), ("x.csv", 2, "name a .star or .cs file")):
        assert scalecryo("select", source, str(tmp_path / target)) == code
        assert message in capsys.readouterr().err
    assert scalecryo("select", str(shared_data / "tricky/ref_f32.mrcs"), str(tmp_path / "x.star")) == 1
    assert "give a .star, .cs or .csg table" in capsys.readouterr().err


# ------------------------------------------------------------- strange files


def test_every_tricky_file_is_taken_or_refused_in_one_line(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = {
        "header_nz_11029_but_1_image.mrcs": "ends after 1",
        "missing_voltage_and_amplitude.star": "rlnVoltage, rlnAmplitudeContrast is missing",
        "zero_pixel_size.mrcs": "give --pixel-size",
        "fei1_extended_header_crop256.mrc": None,  # a micrograph's crop: either way is right
    }
    for path in sorted((shared_data / "tricky").iterdir()):
        code = scalecryo("convert", str(path), str(tmp_path / path.name))
        said = capsys.readouterr().err
        message = refused.get(path.name, "")
        if message is None:
            assert code in (0, 1)
        elif not message:
            assert code == 0, (path.name, said)
        else:
            assert code == 1
            assert message in said
        if code:
            assert re.fullmatch(r"scalecryo: [^\n]+\n", said)
            assert not (tmp_path / path.name).exists()
    zero = str(shared_data / "tricky" / "zero_pixel_size.mrcs")
    assert scalecryo("convert", zero, str(tmp_path / "z"), "--pixel-size", "1.31") == 0
    assert json.loads((tmp_path / "z" / "zarr.json").read_text())["attributes"]["pixel_size"] == 1.31


def test_what_is_kept_but_not_applied(shared_data: Path) -> None:
    assert read_source(str(shared_data / BETAGAL), None, ReadOptions(pixel_size=3.54)).notes == ()
    text = (shared_data / "metadata/star/isecc_aberrations_relion31.star").read_bytes()
    assert not_applied(StarText(text, "x")) == ()  # it has a CTF, and all of them are applied
    assert set(not_applied(StarText(text.replace(b"_rlnDefocus", b"_unknownDefocus"), "x"))) == {
        "rlnOddZernike", "rlnEvenZernike", "rlnMagMat00", "rlnMagMat01", "rlnMagMat10", "rlnMagMat11",
    }  # fmt: skip
