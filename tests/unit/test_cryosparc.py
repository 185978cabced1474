"""cryoSPARC tables against cryoDRGN's conversion of a real refinement, and against RELION's table of one data set."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from scalecryo.data.formats import cryosparc, relion
from scalecryo.errors import InputError, MissingInputError

TABLE = "metadata/cs/cryosparc_P12_J24_001_particles.cs"


def angle_deg(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of the rotation between matrices, by the chord: precise near zero."""
    return np.degrees(2 * np.arcsin(np.linalg.norm(a - b, axis=(1, 2)) / np.sqrt(8)))


def test_poses_against_cryodrgn(shared_data: Path) -> None:
    table = cryosparc.read_particles(str(shared_data / TABLE))
    with open(shared_data / "metadata/cs/cryosparc_P12_J24_001.pose.pkl", "rb") as file:
        rotation, translation = pickle.load(file)
    # cryoDRGN keeps Rᵀ; both sides are single precision.
    assert angle_deg(table.columns["rotation"].transpose(0, 2, 1), rotation).max() < 1e-3
    # cryoDRGN keeps the origin (minus our shift) over the box of 180 px of 2.95 Å.
    np.testing.assert_allclose(-table.columns["shift"] / (180 * 2.95), translation, atol=1e-6)


def test_optics_against_cryodrgn(shared_data: Path) -> None:
    table = cryosparc.read_particles(str(shared_data / TABLE))
    with open(shared_data / "metadata/cs/cryosparc_P12_J24_001.ctf.pkl", "rb") as file:
        expected = pickle.load(file)
    assert table.pixel_size == pytest.approx(expected[0, 1])
    found = np.stack([table.columns[name] for name in cryosparc.CTF_COLUMNS], axis=1)
    np.testing.assert_allclose(found, expected[:, 2:], rtol=1e-6, atol=1e-5)
    assert len(table) == 2019
    assert len(table.stacks) == 50
    assert set(np.unique(table.columns["half"])) == {1, 2}


def test_same_particles_in_star_and_cs(shared_data: Path) -> None:
    folder = shared_data / "particles_real/empiar_10076"
    from_cs = cryosparc.read_particles(str(folder / "empiar_10076_7.cs"))
    from_star = relion.read_particles(str(folder / "empiar_10076_7.star"))
    assert from_cs.stacks == ("empiar_10076_7.mrc",)
    assert not from_cs.has_pose
    np.testing.assert_array_equal(from_cs.columns["stack_index"], from_star.columns["stack_index"])
    for name in ("defocus_u", "defocus_v"):
        # The STAR file prints one decimal.
        np.testing.assert_allclose(from_cs.columns[name], from_star.columns[name], atol=0.1)
    # An axis, so modulo 180°.
    turn = from_cs.columns["astigmatism_angle"] - from_star.columns["astigmatism_angle"]
    np.testing.assert_allclose((turn + 90) % 180 - 90, 0, atol=0.01)
    for name in ("voltage", "spherical_aberration", "amplitude_contrast"):
        np.testing.assert_allclose(from_cs.columns[name], from_star.columns[name], rtol=1e-6)


def test_what_is_written_is_what_cryosparc_had(shared_data: Path, tmp_path: Path) -> None:
    original = np.load(shared_data / TABLE)
    table = cryosparc.read_particles(str(shared_data / TABLE))
    path = tmp_path / "particles.cs"
    confidence = np.linspace(0, 1, len(table))
    cryosparc.write_particles(str(path), table, 180, sign=-1, confidence=confidence)
    written = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    assert set(written.dtype.names) - set(original.dtype.names) == {
        f"ctf/{name}" for name in ("shift_A", "tilt_A", "trefoil_A", "tetra_A", "anisomag", "bfactor")
    }
    for name in set(written.dtype.names) & set(original.dtype.names) - {"ctf/type"}:
        assert written.dtype[name].shape == original.dtype[name].shape, name
        assert written.dtype[name].base.kind == original.dtype[name].base.kind, name
    for name in ("blob/path", "blob/idx", "blob/shape", "blob/sign", "ctf/exp_group_id", "alignments3D/split"):
        np.testing.assert_array_equal(written[name], original[name], err_msg=name)
    for name in ("blob/psize_A", "ctf/accel_kv", "ctf/cs_mm", "ctf/amp_contrast", "ctf/df1_A", "ctf/df2_A"):
        np.testing.assert_allclose(written[name], original[name], rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(written["ctf/df_angle_rad"], original["ctf/df_angle_rad"], atol=1e-6)
    np.testing.assert_allclose(written["alignments3D/shift"], original["alignments3D/shift"], atol=1e-5)
    np.testing.assert_allclose(written["alignments3D/class_posterior"], confidence, atol=1e-6)
    # A rotation vector is one of several for the same rotation; compare what they do.
    again = cryosparc.read_particles(str(path)).columns["rotation"]
    assert angle_deg(again, table.columns["rotation"]).max() < 1e-3
    assert len(np.unique(written["uid"])) == len(written)


def test_group_file_names_the_table(shared_data: Path, tmp_path: Path) -> None:
    table = cryosparc.read_particles(str(shared_data / TABLE))
    cryosparc.write_particles(str(tmp_path / "particles.cs"), table, 180)
    cryosparc.write_group(str(tmp_path / "particles.csg"), "particles.cs")
    yaml = pytest.importorskip("yaml")
    group = yaml.safe_load((tmp_path / "particles.csg").read_text())
    assert group["group"]["type"] == "particle"
    assert set(group["results"]) == {"blob", "ctf", "alignments3D"}
    assert group["results"]["blob"] == {"metafile": ">particles.cs", "num_items": 2019, "type": "particle.blob"}


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError):
        cryosparc.read_particles(str(tmp_path / "none.cs"))
    (tmp_path / "text.cs").write_text("data_particles\n")
    np.save(tmp_path / "plain.npy", np.zeros(3))
    objects = np.array([{"a": 1}], dtype=object)
    np.save(tmp_path / "objects.npy", objects, allow_pickle=True)
    for name, message in (
        ("text.cs", "not a cryoSPARC table"),
        ("objects.npy", "not a cryoSPARC"),
        ("plain.npy", "blob/path"),
    ):
        with pytest.raises(InputError, match=message):
            cryosparc.read_particles(str(tmp_path / name))


def test_rotations_are_proper(shared_data: Path) -> None:
    rotation = torch.from_numpy(cryosparc.read_particles(str(shared_data / TABLE)).columns["rotation"])
    np.testing.assert_allclose(torch.linalg.det(rotation).numpy(), 1, atol=1e-5)
