"""STAR files of RELION 3.0, 3.1 and 5, Scipion and others; poses and CTF against cryoDRGN's own conversion."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import starfile

from scalecryo.data.formats.relion import read_particles, read_poses, write_particles, write_with_poses
from scalecryo.data.particles import ParticleTable
from scalecryo.errors import InputError, MissingInputError

# name: rows, pixel size, stacks, has CTF, has poses (from the data's README and the files themselves)
TABLES = {
    "particles_real/empiar_10076/empiar_10076_7.star": (7, 1.31, 1, True, False),
    "particles_real/aspire_sample/sample_particles_relion30.star": (17, 1.338, 1, True, True),
    "particles_real/aspire_sample/sample_particles_relion31.star": (17, 1.4, 1, True, True),
    "particles_real/aspire_sample/sample_relion_symmetry_group_D4.star": (17, 1.338, 1, True, True),
    "metadata/star/isecc_aberrations_relion31.star": (1, 1.1, 1, True, True),
    "metadata/star/relion5.star": (17, 0.89, 2, True, True),
    "metadata/star/scipion_relion31_large.star": (2021, 3.0, 16, True, False),
    "projections_relion/relion_proj_batch_pfac2.star": (24, 3.54, 1, True, True),
    "projections_relion/rln_proj_65.star": (5, 0.0, 1, False, True),
    "projections_relion/rln_proj_65_centered.star": (4, 1.0, 1, False, True),
    "projections_relion/rln_proj_65_shifted.star": (4, 1.0, 1, False, True),
    "toy/toy_projections.star": (1000, 0.0, 1, True, False),
    "toy/toy_projections_13.star": (13, 1.035, 1, True, False),
    "tricky/crlf.star": (4, 1.31, 1, True, False),
    "tricky/zero_padded_reversed.star": (4, 1.31, 1, True, False),
    "tricky/relative_path.star": (4, 1.31, 1, True, False),
}
REFUSED = {
    "particles_real/aspire_sample/sample_incomplete_ctf_params.star": "column rlnVoltage is missing",
    "metadata/star/pfcrt_relion30.star": "column rlnAmplitudeContrast is missing",
    "metadata/star/run_model.star": "a RELION model file, not a particle table",
    "tricky/missing_voltage_and_amplitude.star": "column rlnVoltage, rlnAmplitudeContrast is missing",
}


def test_the_lists_above_hold_every_star_file(shared_data: Path) -> None:
    assert {str(path.relative_to(shared_data)) for path in shared_data.rglob("*.star")} == {*TABLES, *REFUSED}


@pytest.mark.parametrize("name", TABLES)
def test_tables(shared_data: Path, name: str) -> None:
    table = read_particles(str(shared_data / name))
    rows, pixel_size, stacks, has_ctf, has_pose = TABLES[name]
    assert (len(table), len(table.stacks), table.has_ctf, table.has_pose) == (rows, stacks, has_ctf, has_pose)
    # Magnifications are whole numbers: 10^4 · 5 / 38168 is 1.309998.
    assert table.pixel_size == pytest.approx(pixel_size, abs=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(shared_data: Path, name: str) -> None:
    with pytest.raises(InputError, match=REFUSED[name]) as caught:
        read_particles(str(shared_data / name))
    assert name.rpartition("/")[2] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_keep_their_order_and_duplicates(shared_data: Path) -> None:
    table = read_particles(str(shared_data / "toy" / "toy_projections_13.star"))
    named = [line.split("@")[0] for line in (shared_data / "toy" / "toy_projections_13.star").read_text().splitlines()]
    expected = [int(number) - 1 for number in named if number.isdigit()]
    assert table.columns["stack_index"].tolist() == expected
    assert len(set(expected)) == 12
    reverse = read_particles(str(shared_data / "tricky" / "zero_padded_reversed.star"))
    assert reverse.columns["stack_index"].tolist() == [3, 2, 1, 0]
    assert read_particles(str(shared_data / "tricky" / "relative_path.star")).stacks == ("../tricky/ref_f32.mrcs",)


def test_optics_by_row_and_by_group(shared_data: Path) -> None:
    folder = shared_data / "particles_real" / "aspire_sample"
    for name in ("sample_particles_relion30.star", "sample_particles_relion31.star"):
        voltage = read_particles(str(folder / name)).columns["voltage"]
        assert set(voltage.tolist()) == {200.0, 300.0}
    groups = read_particles(str(folder / "sample_particles_relion31.star")).columns
    assert np.array_equal(groups["voltage"], np.where(groups["optics_group"] == 1, 300, 200))
    scipion = read_particles(str(shared_data / "metadata" / "star" / "scipion_relion31_large.star")).columns
    assert set(scipion["voltage"].tolist()) == {300.0}


def test_poses_and_ctf_equal_cryodrgn(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "metadata" / "star"
    rotations, translations = pickle.loads((folder / "pfcrt_relion30.pose.pkl").read_bytes())
    ctf = pickle.loads((folder / "pfcrt_relion30.ctf.pkl").read_bytes())
    poses = read_poses(str(folder / "pfcrt_relion30.star"))
    # cryoDRGN keeps RELION's matrix A = Rᵀ, and RELION's origin, which is minus our shift, in fractions of 300 px.
    # Its files are float32.
    assert np.abs(poses.rotation - rotations.transpose(0, 2, 1)).max() < 1e-6
    assert poses.shift is not None
    assert np.abs(poses.shift + translations * 300 * 1.035).max() < 1e-4
    assert poses.names[0] == "000001@Extract/job012/FinalRefinement-OriginalParticles-PfCRT.mrcs"

    # The amplitude contrast that cryoDRGN was given by hand.
    blocks = starfile.read(folder / "pfcrt_relion30.star", always_dict=True)
    blocks["images"]["rlnAmplitudeContrast"] = 0.1
    starfile.write(blocks, tmp_path / "whole.star")
    table = read_particles(str(tmp_path / "whole.star"))
    columns = table.columns
    assert table.pixel_size == pytest.approx(ctf[0, 1], abs=1e-6)
    swapped = ctf[:, 2] < ctf[:, 3]
    assert swapped.all()
    expected = [ctf[:, 3], ctf[:, 2], ctf[:, 4] + 90, *ctf[:, 5:].T]
    names = ["defocus_u", "defocus_v", "astigmatism_angle", "voltage"]
    names += ["spherical_aberration", "amplitude_contrast", "phase_shift"]
    for name, values in zip(names, expected, strict=True):
        # Both are float32.
        assert columns[name] == pytest.approx(values, rel=1e-6, abs=1e-6)


def test_origins_in_pixels_and_in_angstroms(shared_data: Path) -> None:
    folder = shared_data / "projections_relion"
    shifted = read_particles(str(folder / "rln_proj_65_shifted.star"))  # pixels of 1 Å
    assert shifted.columns["shift"].tolist() == [[-6, -10], [-10, 5], [8, -11], [13, 3]]
    both = starfile.read(folder / "relion_proj_batch_pfac2.star")["particles"]
    angstrom = both[["rlnOriginXAngst", "rlnOriginYAngst"]].to_numpy()
    found = read_particles(str(folder / "relion_proj_batch_pfac2.star")).columns["shift"]
    assert found == pytest.approx(-angstrom, abs=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing here", "not a STAR file"),
        ("data_\n\nloop_\n_rlnMicrographName #1\na.mrc\n", "no block has the column rlnImageName"),
        ("data_\n\nloop_\n_rlnImageName #1\nfile.mrcs\n", "rlnImageName of row 1 is 'file.mrcs'; it must read number@"),
        ("data_\n\nloop_\n_rlnImageName #1\n0@a.mrcs\n", "row 1 is '0@a.mrcs'"),
        ("data_\n\nloop_\n_rlnImageName #1\n1@a.mrcs 7 8\n", "not a readable STAR file"),
        ("data_\n\nloop_\n_rlnImageName #1\n_rlnImagePixelSize #2\n1@a.mrcs 0\n", "pixel size 0 Å"),
        (
            "data_\n\nloop_\n_rlnImageName #1\n_rlnImagePixelSize #2\n1@a.mrcs big\n",
            "rlnImagePixelSize of row 1 is 'big'",
        ),
        (
            "data_optics\n\nloop_\n_rlnOpticsGroup #1\n1\n\ndata_particles\n\nloop_\n_rlnImageName #1\n"
            "_rlnOpticsGroup #2\n1@a.mrcs 2\n",
            "optics group 2 is used by a particle but not described",
        ),
        (
            "data_\n\nloop_\n_rlnImageName #1\n_rlnAngleRot #2\n_rlnAngleTilt #3\n_rlnAnglePsi #4\n_rlnOriginX #5\n"
            "_rlnOriginY #6\n1@a.mrcs 0 0 0 1 2\n",
            "origins are in pixels but there is no pixel size",
        ),
    ],
)
def test_bad_tables_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.star"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_particles(str(path))
    assert "bad.star" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="no such file"):
        read_particles(str(tmp_path / "none.star"))


def _random_table(count: int, with_ctf: bool = True) -> ParticleTable:
    rng = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(rng.normal(size=(count, 3, 3)))
    rotation *= np.linalg.det(rotation)[:, None, None]
    columns = {
        "stack": rng.integers(0, 2, count),
        "stack_index": np.arange(count),
        "source_row": np.arange(count),
        "optics_group": np.ones(count),
        "half": rng.integers(1, 3, count),
        "rotation": rotation,
        "shift": rng.normal(0, 3, (count, 2)),
    }
    if with_ctf:
        columns |= {
            "defocus_u": rng.uniform(1.5e4, 2e4, count),
            "defocus_v": rng.uniform(1e4, 1.5e4, count),
            "astigmatism_angle": rng.uniform(0, 180, count),
            "voltage": np.where(np.arange(count) % 2, 300.0, 200.0),
            "spherical_aberration": np.full(count, 2.7),
            "amplitude_contrast": np.full(count, 0.1),
            "phase_shift": rng.uniform(0, 90, count),
        }
    return ParticleTable(1.25, ("a/x.mrcs", "b/y.mrcs"), columns)


@pytest.mark.parametrize("with_ctf", [True, False])
def test_written_table_comes_back(tmp_path: Path, with_ctf: bool) -> None:
    table = _random_table(20, with_ctf)
    path = str(tmp_path / "out.star")
    write_particles(path, table.image_names(), table, with_poses=True, box_size=64)
    back = read_particles(path)
    assert back.pixel_size == 1.25
    assert back.image_names() == table.image_names()
    for name in set(table.columns) - {"stack", "optics_group"}:
        # Six decimals of degrees and Å, and float32 of 2e4 Å.
        assert back.columns[name] == pytest.approx(table.columns[name], abs=2e-6, rel=1e-6)
    optics = starfile.read(path)["optics"]
    assert len(optics) == (2 if with_ctf else 1)
    assert set(optics["rlnImageSize"]) == {64}
    write_particles(path, table.image_names(), table, with_poses=False)
    assert not read_particles(path).has_pose


@pytest.mark.parametrize(
    "name",
    [
        "particles_real/aspire_sample/sample_particles_relion30.star",
        "particles_real/aspire_sample/sample_particles_relion31.star",
        "particles_real/empiar_10076/empiar_10076_7.star",
        "metadata/star/relion5.star",
        "metadata/star/isecc_aberrations_relion31.star",
        "projections_relion/relion_proj_batch_pfac2.star",
        "toy/toy_projections_13.star",
        "tricky/zero_padded_reversed.star",
    ],
)
def test_new_poses_in_the_source_table(shared_data: Path, tmp_path: Path, name: str) -> None:
    source = shared_data / name
    table = read_particles(str(source))
    count = len(table)
    new = _random_table(count, with_ctf=False).columns
    shuffled = np.random.default_rng(1).permutation(count)
    path = str(tmp_path / "posed.star")
    write_with_poses(
        path,
        source.read_bytes(),
        table.select(shuffled),
        new["rotation"][shuffled],
        new["shift"][shuffled],
        np.linspace(0, 1, count)[shuffled],
        new["half"][shuffled],
    )
    poses = read_poses(path)
    assert poses.names == starfile.read(source, always_dict=True)[_block(source)]["rlnImageName"].tolist()
    # Six decimals of a degree: 1e-6 · π / 180 and float32 rounding of the matrices.
    assert np.abs(poses.rotation - new["rotation"]).max() < 1e-6
    assert poses.shift is not None
    assert poses.shift == pytest.approx(new["shift"], abs=1e-6)
    assert poses.half.tolist() == new["half"].tolist()
    assert poses.confidence == pytest.approx(np.linspace(0, 1, count), abs=1e-6)

    back = read_particles(path)
    assert back.pixel_size == pytest.approx(table.pixel_size, abs=1e-6)
    for column in set(table.columns) - {"half", "rotation", "shift", "optics_group"}:
        assert back.columns[column] == pytest.approx(table.columns[column], rel=1e-6)
    changed = {"rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginX", "rlnOriginY", "rlnOriginXAngst"}
    changed |= {"rlnOriginYAngst", "rlnRandomSubset", "rlnMaxValueProbDistribution"}
    before, after = (_verbatim(file) for file in (source, Path(path)))
    assert "optics" in after
    for kept in set(before[_block(source)]) - changed:
        assert after["particles"][kept].tolist() == before[_block(source)][kept].tolist(), kept
    if "optics" in before:
        assert after["optics"].equals(before["optics"])


def _block(path: Path) -> str:
    return next(name for name, block in starfile.read(path, always_dict=True).items() if "rlnImageName" in block)


def _verbatim(path: Path) -> dict:
    names = {name for block in starfile.read(path, always_dict=True).values() for name in block}
    return starfile.read(path, always_dict=True, parse_as_string=sorted(names))


def test_new_poses_without_a_source_table(tmp_path: Path) -> None:
    table = _random_table(6)
    path = str(tmp_path / "posed.star")
    rotation, shift = table.columns["rotation"][::-1], table.columns["shift"][::-1]
    write_with_poses(path, None, table, rotation, shift, np.ones(6), table.columns["half"])
    back = read_particles(path)
    assert back.columns["rotation"] == pytest.approx(rotation, abs=1e-6)
    assert back.columns["defocus_u"] == pytest.approx(table.columns["defocus_u"], rel=1e-6)


def test_poses_of_other_particles_are_refused(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "tricky" / "crlf.star"
    table = read_particles(str(source))
    arrays = (np.broadcast_to(np.eye(3), (4, 3, 3)), np.zeros((4, 2)), np.ones(4), np.ones(4))
    for rows in ([0, 1, 2, 4], [0, 1, 2, 2]):
        other = ParticleTable(table.pixel_size, table.stacks, table.columns | {"source_row": np.array(rows)})
        with pytest.raises(InputError, match="has 4 rows, the poses are for 4 others"):
            write_with_poses(str(tmp_path / "x.star"), source.read_bytes(), other, *arrays)
    assert not (tmp_path / "x.star").exists()


def test_rows_without_a_pose_are_left_out(shared_data: Path, tmp_path: Path) -> None:
    # Images that could not be stored have no pose; the others keep their lines.
    source = shared_data / "tricky" / "crlf.star"
    table = read_particles(str(source)).select(np.array([3, 1]))
    shift = np.array([[3.0, -4.0], [1.0, 2.0]])
    write_with_poses(
        str(tmp_path / "x.star"), source.read_bytes(), table, np.stack([np.eye(3)] * 2), shift, np.ones(2), np.ones(2)
    )
    poses = read_poses(str(tmp_path / "x.star"))
    assert [name.split("@")[0].lstrip("0") for name in poses.names] == ["2", "4"]
    assert poses.shift is not None
    assert poses.shift.tolist() == [[1, 2], [3, -4]]


OPTICS = (
    "data_optics\n\nloop_\n_rlnOpticsGroup #1\n_rlnImagePixelSize #2\n_rlnVoltage #3\n_rlnSphericalAberration #4\n"
    "_rlnAmplitudeContrast #5\n7 1.0 300 2.7 0.1\n3 1.25 200 1.4 0.07\n\n"
)
PARTICLES = (
    "data_particles\n\nloop_\n_rlnImageName #1\n_rlnOpticsGroup #2\n_rlnDefocusU #3\n_rlnDefocusV #4\n"
    "_rlnDefocusAngle #5\n_rlnAngleRot #6\n_rlnAngleTilt #7\n_rlnAnglePsi #8\n_rlnOriginX #9\n_rlnOriginY #10\n"
    "1@a.mrcs 7 15000 14000 10 1 2 3 4 0\n1@b.mrcs 3 15000 14000 10 1 2 3 4 0\n2@a.mrcs 7 15000 14000 10 1 2 3 -4 1\n\n"
)


@pytest.mark.parametrize("text", [OPTICS + PARTICLES, PARTICLES + OPTICS])
def test_several_pixel_sizes(tmp_path: Path, text: str) -> None:
    (tmp_path / "mixed.star").write_text(text)
    table = read_particles(str(tmp_path / "mixed.star"))
    assert (table.pixel_size, table.stacks, table.stack_pixel_sizes) == (1.25, ("a.mrcs", "b.mrcs"), (1.0, 1.25))
    assert table.columns["voltage"].tolist() == [300, 200, 300]
    # Origins in pixels are of each image's own size.
    assert table.columns["shift"].tolist() == [[-4, 0], [-5, 0], [4, -1]]
    assert table.pixel_sizes().tolist() == [1, 1.25, 1]
    columns = table.columns
    write_with_poses(
        str(tmp_path / "out.star"), text.encode(), table, columns["rotation"], columns["shift"] * 2, np.ones(3),
        np.array([1, 2, 1]),
    )  # fmt: skip
    out = starfile.read(tmp_path / "out.star")["particles"]
    assert out["rlnOriginX"].tolist() == [8, 8, -8]
    assert out["rlnOriginXAngst"].tolist() == [8, 10, -8]


def test_two_pixel_sizes_in_one_stack(tmp_path: Path) -> None:
    """It stands twice, with the rows of each pixel size; images keep their names, origins are of their own size."""
    path = tmp_path / "x.star"
    path.write_text((OPTICS + PARTICLES).replace("1@b.mrcs", "7@a.mrcs"))
    table = read_particles(str(path))
    assert (table.stacks, table.stack_pixel_sizes) == (("a.mrcs", "a.mrcs"), (1.0, 1.25))
    assert table.pixel_sizes().tolist() == [1, 1.25, 1]
    assert table.columns["stack"].tolist() == [0, 1, 0]
    assert table.image_names()[1] == "000007@a.mrcs"
    assert table.columns["shift"].tolist() == [[-4, 0], [-5, 0], [4, -1]]


def test_a_table_without_rows(tmp_path: Path) -> None:
    (tmp_path / "x.star").write_text("data_\n\nloop_\n_rlnImageName\n\n")
    assert len(read_particles(str(tmp_path / "x.star"))) == 0


def test_a_stack_of_too_many_pixel_sizes_is_refused(tmp_path: Path) -> None:
    rows = "".join(f"{row + 1}@a.mrcs {1 + row / 100}\n" for row in range(40))
    (tmp_path / "x.star").write_text(f"data_\n\nloop_\n_rlnImageName\n_rlnImagePixelSize\n{rows}")
    with pytest.raises(InputError, match=r"x\.star: more than 32 pixel sizes in one stack"):
        read_particles(str(tmp_path / "x.star"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("_rlnOriginY ", "_rlnOther "), "rlnOriginY is missing"),
        (("_rlnAnglePsi ", "_rlnOther "), "rlnAnglePsi is missing"),
        (("1@b.mrcs", "1e0@b.mrcs"), "row 2 is '1e0@b.mrcs'"),
        (("1@b.mrcs", "18446744073709551617@b.mrcs"), "row 2 is '18446744073709551617@b.mrcs'"),
        (("1@b.mrcs", "1@"), "row 2 is '1@'"),
        (("1@b.mrcs 3 ", "1@b.mrcs 3.5 "), "rlnOpticsGroup of row 2 is 3.5"),
        (("_rlnVoltage", "_rlnCtfDataAreCtfPremultiplied #9\n_rlnVoltage"), "values for 6 columns"),
        (("1.25 200", "0 200"), "pixel size 0 Å of row 2"),
        (("1.25 200", "1.25 1e400"), "rlnVoltage of optics group 3 is '1e400'"),
        (("3 1.25", "7 1.25"), "describes an optics group twice"),
        (("3 1.25", "x 1.25"), "not a whole number"),
    ],
)
def test_silent_mistakes_are_refused(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "x.star"
    path.write_text((OPTICS + PARTICLES).replace(*change))
    with pytest.raises(InputError, match=message):
        read_particles(str(path))


def test_images_that_no_ctf_here_fits_are_refused(tmp_path: Path) -> None:
    text = (OPTICS + PARTICLES).replace("_rlnVoltage #3", "_rlnCtfDataAreCtfPremultiplied #3")
    path = tmp_path / "x.star"
    path.write_text(text.replace("1.0 300", "1.0 0").replace("1.25 200", "1.25 1"))
    with pytest.raises(InputError, match="CTF-premultiplied; extract them again without"):
        read_particles(str(path))


def test_large_group_numbers_do_not_wrap_around(tmp_path: Path) -> None:
    path = tmp_path / "x.star"
    path.write_text((OPTICS + PARTICLES).replace("\n3 1.25", "\n65543 1.25").replace("mrcs 3 ", "mrcs 65543 "))
    # 65543 = 2^16 + 7 is 7 in 16 bits.
    assert read_particles(str(path)).columns["optics_group"].tolist() == [1, 2, 1]


def test_poses_or_ctf_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.star"
    path.write_text("data_\n\nloop_\n_rlnImageName\n_rlnAngleRot\n_rlnAngleTilt\n_rlnAnglePsi\n1@a.mrcs 10 20 30\n")
    table = read_particles(str(path))
    assert (table.has_ctf, table.has_pose) == (False, True)
    assert table.columns["shift"].tolist() == [[0, 0]]
    # psi alone, as 2D classification leaves it, is no pose.
    path.write_text("data_\n\nloop_\n_rlnImageName\n_rlnAnglePsi\n_rlnOriginXAngst\n1@a.mrcs 10 20\n")
    assert not read_particles(str(path)).has_pose
