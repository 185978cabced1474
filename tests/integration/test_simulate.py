"""`scalecryo simulate` and `scalecryo evaluate`, as called by the command line."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest
import starfile
from scipy.spatial.transform import Rotation

from scalecryo.commands import evaluate, simulate
from scalecryo.data.formats import relion
from scalecryo.data.formats.structure import Atoms, potential_map, read_structure
from scalecryo.data.particles import ParticleTable
from scalecryo.errors import InputError, MissingInputError, OutputExistsError

BOX, PIXEL_SIZE = 64, 1.6
F = np.diag([1.0, 1.0, -1.0])
DEFAULTS: dict[str, Any] = {
    "n": 8, "box": 48, "pixel_size": 1.5, "snr_db": None, "defocus_um": None, "astigmatism_um": 0.0, "shift_a": 0.0,
    "seed": 0,
}  # fmt: skip


def make(structure: Path, out: Path, **settings: Any) -> Path:
    simulate.run(str(structure), str(out), **(DEFAULTS | settings))
    return out


@pytest.fixture(scope="module")
def ubiquitin(shared_data: Path) -> Path:
    return shared_data / "structures" / "1ubi.pdb"


@pytest.fixture(scope="module")
def particles(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 particles of 4AKE with everything that can vary."""
    return make(
        shared_data / "structures" / "4ake.pdb",
        tmp_path_factory.mktemp("simulated") / "4ake",
        n=600, box=BOX, pixel_size=PIXEL_SIZE, snr_db=0.0, defocus_um=(0.5, 1.5), astigmatism_um=0.05, shift_a=4.0,
    )  # fmt: skip


def test_outputs_are_what_other_programs_read(particles: Path) -> None:
    assert sorted(path.name for path in particles.iterdir()) == [
        "particles.mrcs", "particles.star", "truth.mrc", "truth.star",
    ]  # fmt: skip
    for name in ("particles.mrcs", "truth.mrc"):
        assert mrcfile.validate(particles / name)
        with mrcfile.open(particles / name) as file:
            assert float(file.voxel_size.x) == pytest.approx(PIXEL_SIZE)
    with mrcfile.open(particles / "particles.mrcs") as file:
        assert file.is_image_stack()
        assert file.data.shape == (600, BOX, BOX)
        assert np.isfinite(file.data).all()
    given, truth = (starfile.read(particles / name, always_dict=True) for name in ("particles.star", "truth.star"))
    assert not {name for name in given["particles"] if name.startswith(("rlnAngle", "rlnOrigin"))}
    assert {"rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginXAngst", "rlnDefocusU"} <= set(truth["particles"])
    assert given["particles"]["rlnImageName"].tolist() == truth["particles"]["rlnImageName"].tolist()
    assert given["particles"]["rlnImageName"][0] == "000001@particles.mrcs"
    optics = given["optics"].iloc[0]
    assert optics["rlnImagePixelSize"] == PIXEL_SIZE
    assert optics["rlnImageSize"] == BOX
    assert (optics["rlnVoltage"], optics["rlnSphericalAberration"], optics["rlnAmplitudeContrast"]) == (300, 2.7, 0.1)


def test_truth_map_lies_on_the_structure(particles: Path, shared_data: Path) -> None:
    atoms = read_structure(str(shared_data / "structures" / "4ake.pdb"))
    with mrcfile.open(particles / "truth.mrc") as file:
        origin = np.array([file.header.origin[axis] for axis in "xyz"])
        index = np.round((atoms.positions - origin) / PIXEL_SIZE).astype(int)
        at_atoms = file.data[tuple(index.T[::-1])].mean()
        assert (at_atoms - file.data.mean()) / file.data.std() > 5


def test_images_are_projections_of_the_truth(ubiquitin: Path, tmp_path: Path) -> None:
    """Noise-free and in focus: each image is the closed-form projection of the atoms, made as a map turned by Rᵀ."""
    out = make(ubiquitin, tmp_path / "out", n=3, shift_a=3.0)
    poses = relion.read_poses(str(out / "truth.star"))
    assert poses.shift is not None
    atoms = read_structure(str(ubiquitin))
    images = mrcfile.read(out / "particles.mrcs")
    for image, rotation, shift in zip(images, poses.rotation, poses.shift, strict=True):
        seen = (atoms.positions - atoms.centre_of_mass) @ rotation + [*shift, 0]
        expected = potential_map(Atoms(seen, atoms.elements, atoms.b_factor), 48, 1.5, centre=np.zeros(3)).sum(0)
        # The corners of the transform, beyond |k| = 23, are left out of the images.
        transform = np.fft.fft2(expected)
        k = np.fft.fftfreq(48, 1 / 48)
        transform[np.hypot(k[:, None], k) > 23] = 0
        expected = np.fft.ifft2(transform).real
        # Measured 1.1 %, all of it near Nyquist, where these sharp atoms at 1.5 Å/px are cut off: the box holds only
        # part of the ringing. 4AKE at 0.8 Å/px: 0.05 %.
        assert np.linalg.norm(image - expected) < 0.015 * np.linalg.norm(expected)


def test_noise_is_white_and_of_the_strength_asked_for(ubiquitin: Path, tmp_path: Path) -> None:
    clean = mrcfile.read(make(ubiquitin, tmp_path / "clean", n=70) / "particles.mrcs").astype(np.float64)
    noisy = mrcfile.read(make(ubiquitin, tmp_path / "noisy", n=70, snr_db=-10.0) / "particles.mrcs").astype(np.float64)
    noise = noisy - clean
    # 160,000 pixels: the variance is known to 0.4 %.
    assert noise.var() / clean.var() == pytest.approx(10, rel=0.02)
    power = (np.abs(np.fft.fft2(noise)) ** 2).mean(0) / noise.var() / 48**2
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(48), np.fft.fftfreq(48)))
    for ring in (radius < 0.2, (radius > 0.2) & (radius < 0.4), radius > 0.4):
        assert power[ring].mean() == pytest.approx(1, abs=0.03)


def test_a_seed_decides_everything(ubiquitin: Path, tmp_path: Path) -> None:
    settings = {"snr_db": 0.0, "defocus_um": (0.5, 1.0), "shift_a": 2.0}
    first, again, other = (
        make(ubiquitin, tmp_path / name, seed=seed, **settings) for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    images = [mrcfile.read(folder / "particles.mrcs") for folder in (first, again, other)]
    np.testing.assert_array_equal(images[0], images[1])
    assert np.abs(images[0] - images[2]).max() > 0
    assert relion.read_poses(str(first / "truth.star")).names == relion.read_poses(str(again / "truth.star")).names


def test_a_map_can_be_the_structure(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "maps" / "betagal_100.mrc"
    out = make(source, tmp_path / "same", box=100, pixel_size=3.54, n=2)
    np.testing.assert_array_equal(mrcfile.read(out / "truth.mrc"), mrcfile.read(source))
    binned = mrcfile.read(make(source, tmp_path / "binned", box=64, pixel_size=5.31, n=2) / "truth.mrc")
    assert binned.shape == (64, 64, 64)


IMPERFECT: dict[str, Any] = {
    "n": 250, "snr_db": -5.0, "defocus_um": (0.8, 1.6), "shift_a": 2.0, "colour": 0.5, "scale_sd": 0.15, "gain_sd": 0.3,
    "junk": 0.2, "neighbours": 0.3, "prefer": (0.85, 25.0), "defocus_error_a": 100.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def imperfect(ubiquitin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(ubiquitin, tmp_path_factory.mktemp("imperfect") / "out", **IMPERFECT)


def test_the_truth_says_what_was_done_and_the_particles_what_is_told(imperfect: Path) -> None:
    given, truth = (starfile.read(imperfect / name)["particles"] for name in ("particles.star", "truth.star"))
    assert given["rlnMicrographName"].tolist() == truth["rlnMicrographName"].tolist()
    assert given["rlnMicrographName"].value_counts().tolist() == [100, 100, 50]
    assert set(truth) - set(given) == {
        "rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst", "rlnClassNumber",
        "scalecryoJunk", "scalecryoNeighbour", "rlnGroupScaleCorrection", "rlnNormCorrection", "scalecryoOffset",
    }  # fmt: skip
    assert truth["scalecryoJunk"].value_counts().to_dict() == {0: 200, 1: 25, 2: 25}
    assert (truth["rlnClassNumber"] == (truth["scalecryoJunk"] == 0)).all()
    error = given["rlnDefocusU"] - truth["rlnDefocusU"]
    # Written to six decimals, held in single precision.
    np.testing.assert_allclose(error, given["rlnDefocusV"] - truth["rlnDefocusV"], atol=0.01)
    assert error.std() == pytest.approx(100, rel=4 / np.sqrt(500))
    # 85 % were drawn within 25° of +z, and so were a twentieth of the rest.
    assert 0.85 <= (truth["rlnAngleTilt"] <= 25.001).mean() < 0.90
    # The gain is what images scatter by: 30 % beside the few per cent that the signal brings at -5 dB.
    spread = mrcfile.read(imperfect / "particles.mrcs").std(axis=(1, 2))
    assert np.corrcoef(np.log(spread), np.log(truth["rlnNormCorrection"]))[0, 1] > 0.9


def test_options_that_are_off_change_nothing(ubiquitin: Path, tmp_path: Path) -> None:
    """Poses, defoci and white noise of an imperfect set are those of the ideal one of its seed."""
    settings = {"n": 30, "snr_db": 0.0, "defocus_um": (0.8, 1.6), "shift_a": 2.0}
    ideal = make(ubiquitin, tmp_path / "ideal", **settings)
    other = make(ubiquitin, tmp_path / "junk", **settings, junk=0.4, neighbours=0.0, defocus_error_a=50.0)
    truths = [starfile.read(folder / "truth.star")["particles"] for folder in (ideal, other)]
    assert truths[1][list(truths[0])].equals(truths[0])
    particle = truths[1]["scalecryoJunk"].to_numpy() == 0
    images = [mrcfile.read(folder / "particles.mrcs")[particle] for folder in (ideal, other)]
    np.testing.assert_array_equal(*images)


def test_a_mixture_keeps_its_structures_in_one_frame(ubiquitin: Path, shared_data: Path, tmp_path: Path) -> None:
    """Two halves of ubiquitin by chain order: their maps add up to the whole one's, and images show their class's."""
    atoms = ubiquitin.read_text().splitlines()
    atoms = [line for line in atoms if line.startswith("ATOM")]
    halves = []
    for number, lines in enumerate((atoms[:300], atoms[300:])):
        halves.append(tmp_path / f"half{number}.pdb")
        halves[-1].write_text("\n".join([*lines, "END", ""]))
    whole = tmp_path / "whole.pdb"
    whole.write_text("\n".join([*atoms, "END", ""]))
    out = make(whole, tmp_path / "out", mix=[str(half) for half in halves], n=40)
    first, second, third = (mrcfile.read(out / name) for name in ("truth.mrc", "truth_2.mrc", "truth_3.mrc"))
    # The transforms of atoms add up; each map is rounded to single precision.
    np.testing.assert_allclose(second + third, first, atol=1e-4 * first.max())
    truth = starfile.read(out / "truth.star")["particles"]
    assert set(truth["rlnClassNumber"]) == {1, 2, 3}
    images = mrcfile.read(out / "particles.mrcs")
    # In focus and without noise the mean of an image is that of its map's projection, to 1 %: what one band limit or
    # the other leaves out has none.
    means = {number: volume.sum() / 48**2 for number, volume in enumerate((first, second, third), start=1)}
    for image, number in zip(images, truth["rlnClassNumber"], strict=True):
        assert image.mean() == pytest.approx(means[number], rel=0.01)


@pytest.mark.parametrize(("group", "turn"), [("C4", (1, 2)), ("D2", None), ("O", (0, 1))])
def test_a_symmetric_map_is_the_sum_of_copies(group: str, turn: Any, ubiquitin: Path, tmp_path: Path) -> None:
    """Turned about RELION's axes by quarters or halves, which are exact on the grid, it is itself."""
    out = make(ubiquitin, tmp_path / "out", box=64, symmetry=group)
    volume = mrcfile.read(out / "truth.mrc")
    inner = volume[1:, 1:, 1:]  # centred
    # Atoms are moved in double precision; gemmi cuts each off at 1e-6 of its peak, and sums in single precision.
    tolerance = 1e-4 * volume.max()
    if turn:
        np.testing.assert_allclose(np.rot90(inner, axes=turn), inner, atol=tolerance)
    np.testing.assert_allclose(inner[:, ::-1, ::-1], inner, atol=tolerance)
    if group != "C4":
        np.testing.assert_allclose(inner[::-1, ::-1], inner, atol=tolerance)
    else:
        assert np.abs(inner[::-1, ::-1] - inner).max() > 0.1 * volume.max()
    # The origin in the header puts the first copy on the structure's own coordinates.
    atoms = read_structure(str(ubiquitin))
    with mrcfile.open(out / "truth.mrc") as file:
        origin = np.array([file.header.origin[axis] for axis in "xyz"])
    index = np.round((atoms.positions - origin) / 1.5).astype(int)
    assert (volume[tuple(index.T[::-1])].mean() - volume.mean()) / volume.std() > 3


def test_a_map_is_summed_where_it_lies(shared_data: Path, tmp_path: Path) -> None:
    """The map's own box and pixel size: half-turns about x, y and z are flips of its voxels."""
    source = shared_data / "maps" / "1ake_chainA_64.mrc"
    with mrcfile.open(source) as file:
        volume, pixel_size = file.data.astype(np.float64), float(file.voxel_size.x)
    out = make(source, tmp_path / "out", box=64, pixel_size=pixel_size, n=1, symmetry="D2")

    def half_turn(*axes: int) -> np.ndarray:
        return np.roll(np.flip(volume, axes), 1, axes)

    transform = np.fft.fftn(volume + half_turn(1, 2) + half_turn(0, 1) + half_turn(0, 2))
    k = np.fft.fftfreq(64, 1 / 64)
    transform[k[:, None, None] ** 2 + k[:, None] ** 2 + k**2 > 31**2] = 0  # as in projections
    expected = np.fft.ifftn(transform).real
    # Cubic splines on a twice padded transform: measured 0.1 % of the projections of blobs.
    assert np.linalg.norm(mrcfile.read(out / "truth.mrc") - expected) < 3e-3 * np.linalg.norm(expected)


@pytest.mark.skipif(shutil.which("relion_star_handler") is None, reason="RELION is not installed")
def test_relion_reads_the_tables(imperfect: Path, tmp_path: Path) -> None:
    for name, column, kept in (("truth.star", "rlnClassNumber", 200), ("particles.star", "rlnDefocusU", 250)):
        command = ["relion_star_handler", "--i", imperfect / name, "--o", tmp_path / name, "--select", column,
                   "--minval", "0.5", "--maxval", "1e9"]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
        table = starfile.read(tmp_path / name)["particles"]
        assert len(table) == kept
        assert ("scalecryoJunk" in table) == (name == "truth.star")


def test_junk_has_no_pose_to_be_judged(imperfect: Path, tmp_path: Path) -> None:
    """A table in which junk's poses are wrong and its confidence low: no error, and an area under the curve of 1."""
    poses = relion.read_poses(str(imperfect / "truth.star"))
    assert poses.shift is not None
    junk = starfile.read(imperfect / "truth.star")["particles"]["scalecryoJunk"].to_numpy() > 0
    rotation = poses.rotation.copy()
    rotation[junk] = Rotation.random(int(junk.sum()), random_state=0).as_matrix()
    table = relion.read_particles(str(imperfect / "particles.star"))
    confidence = np.where(junk, 0.1, 0.9)
    for path, values in ((tmp_path / "good.star", confidence), (tmp_path / "blind.star", np.full(len(junk), 0.5))):
        relion.write_particles(str(path), poses.names, table, True, confidence=values, pose=(rotation, poses.shift))
    line = evaluate.run(str(tmp_path / "good.star"), truth=str(imperfect))
    assert line["images"] == 200
    # Six decimals of angles in the file.
    assert line["rotation_error_mean_deg"] < 1e-3
    assert line["junk_auc"] == 1.0
    assert evaluate.run(str(tmp_path / "blind.star"), truth=str(imperfect))["junk_auc"] == 0.5


def test_nothing_is_replaced_and_nothing_half_done_stays(ubiquitin: Path, tmp_path: Path, monkeypatch: Any) -> None:
    out = make(ubiquitin, tmp_path / "out")
    before = (out / "particles.mrcs").stat().st_mtime_ns
    with pytest.raises(OutputExistsError, match=r"particles\.mrcs"):
        make(ubiquitin, out)
    assert (out / "particles.mrcs").stat().st_mtime_ns == before

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(simulate, "write_particles", full_disk)
    with pytest.raises(OSError, match="No space"):
        make(ubiquitin, tmp_path / "failed")
    assert list((tmp_path / "failed").iterdir()) == []


def test_settings_that_cannot_be_used(ubiquitin: Path, tmp_path: Path, shared_data: Path) -> None:
    for settings, message in (
        ({"box": 49}, "even"),
        ({"box": 16}, "at least"),
        ({"n": 0}, "at least one"),
        ({"pixel_size": -1.0}, "pixel size"),
        ({"snr_db": float("nan")}, "dB"),
        ({"defocus_um": (2.0, 1.0)}, "defocus"),
        ({"defocus_error_a": 10.0}, "CTF"),
        ({"colour": 0.5}, "noise"),
        ({"symmetry": "Q3"}, "point group"),
        ({"symmetry": "O", "micelle": 0.5}, "micelle"),
    ):
        with pytest.raises(InputError, match=message):
            make(ubiquitin, tmp_path / "out", **settings)
    with pytest.raises(MissingInputError):
        make(tmp_path / "none.pdb", tmp_path / "out")
    with pytest.raises(InputError, match="pixel size"):
        make(shared_data / "projections_relion" / "pointmass.mrc", tmp_path / "out", box=64, pixel_size=3.54)
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def judged(capsys: pytest.CaptureFixture[str], path: Path, truth: Path) -> dict[str, Any]:
    evaluate.run(str(path), truth=str(truth))
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    line: dict[str, Any] = json.loads(out)
    assert (line["box_size"], line["pixel_size"]) == (BOX, PIXEL_SIZE)
    return line


@pytest.fixture(scope="module")
def finished(particles: Path, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as training might leave it: other frame, other hand, other origin, errors, a third in the symmetry-related
    pose."""
    generator = np.random.default_rng(7)
    run = tmp_path_factory.mktemp("run")
    q = Rotation.random(random_state=generator).as_matrix()
    u = np.array([3.0, -2.0, 1.0])
    truth = relion.read_particles(str(particles / "truth.star"))
    atoms = read_structure(str(shared_data / "structures" / "4ake.pdb"))
    first, second = (half - half.mean(0) for half in np.split(atoms.positions, 2))
    symmetry = Rotation.align_vectors(first, second)[0].as_matrix()
    rotation = truth.columns["rotation"].astype(np.float64)
    rotation[::3] = symmetry @ rotation[::3]
    # What explains an image with the moved map, at the pose that the run has for it.
    shift = truth.columns["shift"] + np.einsum("nji,j->ni", rotation, u)[:, :2]
    rotation = rotation @ Rotation.from_rotvec(np.radians(1.5) * generator.normal(size=(600, 3))).as_matrix()
    rotation = F @ (q.T @ rotation) @ F
    # A table in another order, with the stack named by another folder.
    rows = generator.permutation(600)[:500]
    columns = truth.columns | {"rotation": rotation, "shift": shift + 0.5 * generator.normal(size=(600, 2))}
    table = ParticleTable(PIXEL_SIZE, ("Extract/job007/particles.mrcs",), columns).select(rows)
    relion.write_particles(str(run / "particles.star"), table.image_names(), table, with_poses=True)
    moved = Atoms((atoms.positions - atoms.centre_of_mass - u) @ q @ F, atoms.elements, atoms.b_factor)
    volume = potential_map(moved, BOX, PIXEL_SIZE, centre=np.zeros(3))
    volume = volume + volume.std() * generator.normal(size=volume.shape).astype(np.float32)
    with mrcfile.new(run / "map.mrc") as file:
        file.set_data(volume.astype(np.float32))
        file.voxel_size = PIXEL_SIZE
    return run


def test_evaluate_a_run(finished: Path, particles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = judged(capsys, finished, particles)
    assert line["images"] == 500
    assert line["hand"] == "mirrored"
    # 1.5° an axis: the angle is Maxwell distributed, median 1.54 σ; two thirds of the particles are right, and the
    # median over all of them is the 75th percentile of those: 2.03 σ.
    assert line["rotation_error_median_deg"] == pytest.approx(1.5 * 2.03, abs=0.5)
    assert line["rotation_error_mean_deg"] == pytest.approx(180 / 3, abs=8)
    # The symmetry by atoms and the symmetry by maps differ by two degrees.
    assert line["rotation_error_mod_pseudosymmetry_median_deg"] == pytest.approx(1.5 * 1.54, abs=0.6)
    assert line["rotation_error_mod_pseudosymmetry_mean_deg"] < 4
    assert line["rotation_error_frobenius2_median"] == pytest.approx(
        8 * np.sin(np.radians(line["rotation_error_median_deg"]) / 2) ** 2, rel=0.02
    )
    # 0.5 Å in each of two axes: Rayleigh distributed, median 1.18 σ; poses off by 3° add little to an origin of 4 Å.
    assert line["shift_error_median_px"] == pytest.approx(1.18 * 0.5 / PIXEL_SIZE, abs=0.1)
    assert 3.2 < line["fsc_0.143_angstrom"] < line["fsc_0.5_angstrom"] < 10
    for name in ("evaluate_fsc.png", "evaluate_slices.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")


def test_evaluate_a_map_alone_finds_the_same_resolution(
    finished: Path, particles: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = judged(capsys, finished / "map.mrc", particles)
    assert alone["images"] is None
    assert alone["rotation_error_median_deg"] is None
    assert alone["hand"] == "mirrored"
    # From nothing, and from the poses, the same map.
    assert alone["fsc_0.5_angstrom"] == pytest.approx(judged(capsys, finished, particles)["fsc_0.5_angstrom"], rel=0.03)


def test_evaluate_a_table_alone(particles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = judged(capsys, particles / "truth.star", particles)
    assert line["images"] == 600
    # Six decimals of angles in the file.
    assert line["rotation_error_mean_deg"] < 1e-3
    assert line["shift_error_median_px"] < 1e-3
    assert line["hand"] == "same"
    assert line["fsc_0.5_shell"] is None
    assert line["junk_auc"] is None


def test_evaluate_refuses_what_does_not_belong_together(
    ubiquitin: Path, particles: Path, shared_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(MissingInputError, match="neither"):
        evaluate.run(str(tmp_path), truth=str(particles))
    with pytest.raises(InputError, match="rlnAngleRot"):
        evaluate.run(str(particles / "particles.star"), truth=str(particles))
    with pytest.raises(InputError, match="other particles"):
        evaluate.run(str(shared_data / "projections_relion/relion_proj_batch_pfac2.star"), truth=str(particles))
    with pytest.raises(InputError, match="Å wide"):
        evaluate.run(str(shared_data / "maps/emd_1832.map"), truth=str(particles))
    with pytest.raises(MissingInputError, match=r"truth\.mrc"):
        evaluate.run(str(particles / "truth.star"), truth=str(tmp_path))
