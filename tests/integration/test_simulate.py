"""`scalecryo simulate` and `scalecryo evaluate`, as called by the command line."""

import json
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
    shift = truth.columns["shift"] + np.einsum("nji,j->ni", rotation, u)[:, :2]
    rotation[::3] = symmetry @ rotation[::3]
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
