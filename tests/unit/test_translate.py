"""From cryoSPARC's tables to RELION's and back: micrographs, places, classes, beam tilt, names that RELION opens.

References: the fields' definitions. A fraction of a micrograph of known size is a place in pixels; Cs · sin(tilt) is a
length; the tables themselves are read by numpy and starfile.
"""

from pathlib import Path

import mrcfile
import numpy as np
import pytest
import starfile

from scalecryo.commands import select
from scalecryo.data.conversion.source import read_source
from scalecryo.data.formats import cryosparc, csrows
from scalecryo.data.formats.mrc import StackWriter
from scalecryo.data.particles import ABERRATION_COLUMNS

OPTICS = "data_optics\n\nloop_\n_rlnOpticsGroup\n_rlnVoltage\n_rlnSphericalAberration\n_rlnAmplitudeContrast\n"
OPTICS += "_rlnImagePixelSize\n_rlnImageSize\n_rlnBeamTiltX\n_rlnBeamTiltY\n1 300 2.7 0.1 1.5 32 0.25 -0.5\n\n"


def _cs(path: Path, **more: np.ndarray) -> np.ndarray:
    count = 6
    fields = {
        "uid": np.arange(1, count + 1, dtype=np.uint64), "blob/path": np.full(count, b">J1/extract/a.mrc"),
        "blob/idx": np.arange(count, dtype=np.uint32), "blob/shape": np.full((count, 2), 32, np.uint32),
        "blob/psize_A": np.full(count, 1.5, np.float32), "blob/sign": np.ones(count, np.float32),
        "ctf/exp_group_id": np.repeat([4, 9], 3).astype(np.uint32), "ctf/accel_kv": np.full(count, 300, np.float32),
        "ctf/cs_mm": np.full(count, 2.7, np.float32), "ctf/amp_contrast": np.full(count, 0.1, np.float32),
        "ctf/df1_A": np.full(count, 12000, np.float32), "ctf/df2_A": np.full(count, 11000, np.float32),
        "ctf/df_angle_rad": np.zeros(count, np.float32),
    }  # fmt: skip
    rows = csrows.build(count, {**fields, **{name.replace("__", "/"): values for name, values in more.items()}})
    path.write_bytes(csrows.encode(rows))
    return rows


def test_from_cryosparc_to_relion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fractions = np.linspace(0.1, 0.9, 6, dtype=np.float32)
    _cs(
        tmp_path / "p.cs", location__micrograph_path=np.full(6, b">J0/imported/mic.mrc"),
        location__center_x_frac=fractions, location__center_y_frac=fractions[::-1].copy(),
        location__micrograph_shape=np.tile(np.array([4000, 6000], np.uint32), (6, 1)),
        alignments3D__class=np.arange(6, dtype=np.uint32), ctf__trefoil_A=np.ones((6, 2), np.float32),
        ctf__tilt_A=np.repeat(np.array([[2.7e7 * 1e-4, 0], [0, -2.7e7 * 2e-4]], np.float32), 3, axis=0),
        ctf__bfactor=np.full(6, 12.5, np.float32), ctf__scale=np.ones(6, np.float32),
        pick_stats__power=np.ones(6, np.float32), ctf__anisomag=np.zeros((6, 4), np.float32),
    )  # fmt: skip
    select.run(str(tmp_path / "p.cs"), str(tmp_path / "p.star"), query="source_row != 1")
    blocks = starfile.read(tmp_path / "p.star", always_dict=True)
    particles, optics = blocks["particles"], blocks["optics"].set_index("rlnOpticsGroup")
    kept = [0, 2, 3, 4, 5]
    # RELION takes a stack by its ending, or with the format behind its name (rwMRC; tests/integration/test_relion.py).
    assert particles["rlnImageName"].tolist() == [f"{row + 1:06d}@J1/extract/a.mrc:mrcs" for row in kept]
    assert set(particles["rlnMicrographName"]) == {"J0/imported/mic.mrc"}
    assert particles["rlnCoordinateX"].to_numpy() == pytest.approx(6000 * fractions[kept], abs=1e-3)
    assert particles["rlnCoordinateY"].to_numpy() == pytest.approx(4000 * fractions[::-1][kept], abs=1e-3)
    assert particles["rlnClassNumber"].tolist() == [row + 1 for row in kept]
    assert particles["rlnCtfBfactor"].tolist() == [12.5] * 5
    assert "rlnCtfScalefactor" not in particles
    tilts = optics.loc[particles["rlnOpticsGroup"], ["rlnBeamTiltX", "rlnBeamTiltY"]].to_numpy()
    assert tilts == pytest.approx(np.array([[0.1, 0]] * 2 + [[0, -0.2]] * 3), rel=1e-6)  # mrad; fields are float32
    said = capsys.readouterr().err
    assert "RELION's tables have no place for them: ctf/trefoil_A, pick_stats/power" in said
    # And what was written is read again as the same images.
    (tmp_path / "J1" / "extract").mkdir(parents=True)
    with StackWriter(str(tmp_path / "J1/extract/a.mrc"), 6, 32, 1.5) as writer:
        writer.append(np.random.default_rng(0).normal(size=(6, 32, 32)))
    assert read_source(str(tmp_path / "p.star")).table.columns["stack_index"].tolist() == kept


def test_beam_tilt_of_both_packages_is_the_same_aberration(tmp_path: Path) -> None:
    """RELION's own phase of a beam tilt is checked against RELION itself in tests/numerics/test_aberrations.py."""
    rows = "".join(f"{i + 1}@a.mrcs 1 1e4 9e3 0\n" for i in range(3))
    names = "_rlnImageName\n_rlnOpticsGroup\n_rlnDefocusU\n_rlnDefocusV\n_rlnDefocusAngle\n"
    (tmp_path / "a.star").write_text(f"{OPTICS}data_particles\n\nloop_\n{names}{rows}\n")
    with StackWriter(str(tmp_path / "a.mrcs"), 3, 32, 1.5) as writer:
        writer.append(np.random.default_rng(0).normal(size=(3, 32, 32)))
    select.run(str(tmp_path / "a.star"), str(tmp_path / "a.cs"))
    ours, theirs = (read_source(str(tmp_path / name)) for name in ("a.star", "a.cs"))
    assert np.abs(ours.table.columns["odd_phase"]).max() > 1
    for name in ABERRATION_COLUMNS:  # the field is float32
        assert theirs.table.columns[name] == pytest.approx(ours.table.columns[name], rel=1e-6), name
    assert not any("tilt_A" in note for note in theirs.notes)
    select.run(str(tmp_path / "a.cs"), str(tmp_path / "again.star"))
    optics = starfile.read(tmp_path / "again.star", always_dict=True)["optics"]
    assert "rlnOddZernike" not in optics  # the tilt says it all
    again = read_source(str(tmp_path / "again.star")).table.columns["odd_phase"]
    assert again == pytest.approx(ours.table.columns["odd_phase"], rel=1e-6)


def test_two_dimensional_classes_are_no_poses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with StackWriter(str(tmp_path / "a.mrcs"), 6, 32, 1.5) as writer:
        writer.append(np.random.default_rng(0).normal(size=(6, 32, 32)))
    with mrcfile.new(tmp_path / "mic.mrc") as file:
        file.set_data(np.zeros((400, 600), np.float32))
    names = (
        "_rlnImageName\n_rlnOpticsGroup\n_rlnDefocusU\n_rlnDefocusV\n_rlnDefocusAngle\n_rlnAngleRot\n_rlnAngleTilt\n"
    )
    names += "_rlnAnglePsi\n_rlnOriginXAngst\n_rlnOriginYAngst\n_rlnMicrographName\n_rlnCoordinateX\n_rlnCoordinateY\n"
    names += "_rlnClassNumber\n_rlnLogLikeliContribution\n"
    rows = "".join(f"{i + 1}@a.mrcs 1 1e4 9e3 0 0 0 {60 * i} 3 -1.5 mic.mrc {60 * i} {40 * i} 3 7\n" for i in range(6))
    (tmp_path / "run_data.star").write_text(f"{OPTICS}data_particles\n\nloop_\n{names}{rows}\n")
    source = read_source(str(tmp_path / "run_data.star"))
    assert not source.table.has_pose
    assert any("2D" in note for note in source.notes)
    select.run(str(tmp_path / "run_data.star"), str(tmp_path / "out.cs"))
    found = np.load(tmp_path / "out.cs")
    assert not [name for name in found.dtype.names if name.startswith("alignments3D")]
    assert np.degrees(found["alignments2D/pose"]) == pytest.approx([60 * i for i in range(6)], rel=1e-6)
    assert found["alignments2D/shift"].tolist() == [[2, -1]] * 6  # px of 1.5 Å
    assert found["alignments2D/class"].tolist() == [2] * 6
    assert found["location/micrograph_path"].tolist() == [b"mic.mrc"] * 6
    assert found["location/micrograph_shape"].tolist() == [[400, 600]] * 6
    assert found["location/center_x_frac"] == pytest.approx([0.1 * i for i in range(6)])
    assert found["location/center_y_frac"] == pytest.approx([0.1 * i for i in range(6)])
    assert found["ctf/tilt_A"] == pytest.approx(np.array([[0.25, -0.5]] * 6) * 1e-3 * 2.7e7, rel=1e-6)
    assert "no place for them: rlnLogLikeliContribution" in capsys.readouterr().err
    # Back to RELION: the same angles in the plane, places and classes.
    select.run(str(tmp_path / "out.cs"), str(tmp_path / "again.star"))
    ours, before = (
        starfile.read(tmp_path / name, always_dict=True)["particles"] for name in ("again.star", "run_data.star")
    )
    for name in ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst", "rlnCoordinateX",
                 "rlnCoordinateY", "rlnClassNumber"):  # fmt: skip
        assert ours[name].to_numpy() == pytest.approx(before[name].to_numpy(), rel=1e-6, abs=1e-4), name


def test_rows_of_one_image_have_their_own_uids(tmp_path: Path) -> None:
    rows = "".join(f"{1 + i % 2}@a.mrcs 1\n" for i in range(6))
    (tmp_path / "p.star").write_text(f"{OPTICS}data_particles\n\nloop_\n_rlnImageName\n_rlnOpticsGroup\n{rows}\n")
    select.run(str(tmp_path / "p.star"), str(tmp_path / "p.cs"))
    uids = np.load(tmp_path / "p.cs")["uid"].tolist()
    assert len(set(uids)) == 6
    # The first of each has the number that it has where it stands once: exports agree.
    (tmp_path / "q.star").write_text((tmp_path / "p.star").read_text().replace(rows, "1@a.mrcs 1\n2@a.mrcs 1\n"))
    select.run(str(tmp_path / "q.star"), str(tmp_path / "q.cs"))
    assert np.load(tmp_path / "q.cs")["uid"].tolist() == uids[:2]
    joined = csrows.read(str(tmp_path / "p.cs"), [str(tmp_path / "p.cs")])
    assert joined["uid"].tolist() == uids


def test_an_alignment_without_a_pixel_size(tmp_path: Path) -> None:
    pose = {"alignments3D__pose": np.full((6, 3), 0.5, np.float32), "alignments3D__shift": np.ones((6, 2), np.float32)}
    _cs(tmp_path / "p.cs", **pose, alignments3D__psize_A=np.zeros(6, np.float32))
    shift = cryosparc.read_particles(str(tmp_path / "p.cs")).columns["shift"]
    assert shift.tolist() == [[-1.5, -1.5]] * 6  # in pixels of the image
