"""RELION itself, where it is installed (Debian: `apt-get install relion`): it reads what we write, and we its files.

References: relion_star_handler, relion_reconstruct and relion_stack_create 3.1.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import starfile
import torch
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from scalecryo.commands import convert, export, select, simulate, train
from scalecryo.data.conversion.source import read_source
from scalecryo.data.formats import cryosparc, relion
from scalecryo.data.formats.mrc import write_map
from scalecryo.evaluate.align import Alignment
from scalecryo.evaluate.align_maps import apply_alignment
from scalecryo.evaluate.symmetry_axes import symmetry_axes
from scalecryo.physics.fsc import fsc
from scalecryo.physics.rotation import geodesic_angle, rotation_from_vector
from scalecryo.physics.symmetry import PointGroup

pytestmark = pytest.mark.skipif(
    shutil.which("relion_star_handler") is None, reason="RELION is not installed (Debian: apt-get install relion)"
)
BOX, PIXEL_SIZE, COUNT = 48, 2.0, 300


def _relion(program: str, *words: str, cwd: Path) -> str:
    done = subprocess.run([f"relion_{program}", *words], cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-800:]
    return done.stdout


@pytest.fixture(scope="module")
def data(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise-free particles with CTF and known poses."""
    out = tmp_path_factory.mktemp("data")
    simulate.run(
        str(shared_data / "structures" / "1ubi.pdb"), str(out), n=COUNT, box=BOX, pixel_size=PIXEL_SIZE, snr_db=None,
        defocus_um=(0.5, 1.0), astigmatism_um=0.1, shift_a=3.0, seed=0,
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on noisy particles with known poses; of a blurred map, whose correlation falls steeply."""
    folder = tmp_path_factory.mktemp("run")
    blurred = gaussian_filter(mrcfile.read(data / "truth.mrc"), 1.0)  # px
    write_map(str(folder / "blurred.mrc"), blurred, PIXEL_SIZE)
    simulate.run(
        str(folder / "blurred.mrc"), str(folder / "data"), n=COUNT, box=BOX, pixel_size=PIXEL_SIZE,
        snr_db=-10.0, defocus_um=(0.5, 1.0), astigmatism_um=0.1, shift_a=3.0, seed=1,
    )  # fmt: skip
    convert.run(
        str(folder / "data" / "truth.star"), str(folder / "store"), data_dir=None, box=None, dtype="float16", workers=1,
        overwrite=False, invert=False, uninvert=True,
    )  # fmt: skip
    train.run(
        None, data=str(folder / "store"), out=str(folder / "run"), workers="0", device="cpu", resume=False,
        overrides={"pose.source": "known", "train.steps": "1", "train.batch_size": "16"},
    )  # fmt: skip
    return folder / "run"


def _passes(star: Path, folder: Path) -> None:
    """RELION reads a table and writes it again with the same values."""
    out = folder / f"read_{star.name}"
    _relion("star_handler", "--i", str(star), "--o", str(out), "--remove_column", "rlnPhaseShift", cwd=folder)
    ours, theirs = (starfile.read(path, always_dict=True)["particles"] for path in (star, out))
    names = {name for name in ours if ours[name].dtype.kind not in "iuf"}
    assert "rlnImageName" in names
    for name in names:
        assert theirs[name].tolist() == ours[name].tolist()
    for name in set(ours) - names - {"rlnPhaseShift"}:
        assert theirs[name].to_numpy() == pytest.approx(ours[name].to_numpy(), rel=1e-5, abs=1e-5), name


def test_our_tables_pass_its_reader(data: Path, tmp_path: Path) -> None:
    table = relion.read_particles(str(data / "truth.star"))
    cryosparc.write_particles(str(tmp_path / "p.cs"), table, BOX)
    select.run(str(tmp_path / "p.cs"), str(tmp_path / "from_cs.star"))
    # As after symmetry expansion: every image twice, in another pose.
    twice = table.select(np.repeat(np.arange(COUNT), 2))
    twice.columns["rotation"][1::2] = (
        Rotation.from_euler("z", 180, degrees=True).as_matrix() @ twice.columns["rotation"][1::2]
    )
    relion.write_particles(str(tmp_path / "expanded.star"), twice.image_names(), twice, with_poses=True)
    select.run(str(tmp_path / "expanded.star"), str(tmp_path / "part.star"), query="source_row < 100")
    for star in (data / "particles.star", data / "truth.star", *sorted(tmp_path.glob("*.star"))):
        _passes(star, tmp_path)


def test_a_runs_tables_pass_its_reader(run: Path, tmp_path: Path) -> None:
    export.run(str(run), format="relion", out=str(tmp_path / "relion"))
    export.run(str(run), format="cryosparc", out=str(tmp_path / "cs"))
    select.run(str(run), str(tmp_path / "selected.star"), min_confidence=0.1, half=1)
    select.run(str(tmp_path / "cs" / "particles.cs"), str(tmp_path / "back.star"))
    stars = (
        run / "particles.star",
        tmp_path / "relion" / "particles.star",
        tmp_path / "selected.star",
        tmp_path / "back.star",
    )
    for star in stars:
        _passes(star, tmp_path)


def test_its_resolution_of_our_half_maps_is_ours(run: Path, tmp_path: Path) -> None:
    """relion_postprocess with our half-maps and mask: the corrected FSC falls below 0.143 within two shells of ours.

    Both randomise phases with their own random numbers, from the shell where the unmasked curve falls below 0.8.
    """
    said = _relion(
        "postprocess", "--i", str(run / "half1.mrc"), "--i2", str(run / "half2.mrc"), "--mask", str(run / "mask.mrc"),
        "--angpix", str(PIXEL_SIZE), "--o", str(tmp_path / "post"), cwd=tmp_path,
    )  # fmt: skip
    theirs = float(re.findall(r"FINAL RESOLUTION:\s*([\d.]+)", said)[0])
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    width = BOX * PIXEL_SIZE
    shells = width / theirs, width / last["final/resolution_angstrom"]
    assert 10 < shells[1] < BOX / 2 - 4  # within the curve's fall, not at its ends
    assert shells[0] == pytest.approx(shells[1], abs=2)


def test_it_reconstructs_the_truth_from_our_poses(data: Path, tmp_path: Path) -> None:
    """Conventions as a whole: pose, shift, CTF and pixel size; a wrong sign of any leaves no correlation at 6 Å."""
    _relion("reconstruct", "--i", "truth.star", "--o", str(tmp_path / "map.mrc"), "--ctf", cwd=data)
    truth, found = (torch.from_numpy(mrcfile.read(path)) for path in (data / "truth.mrc", tmp_path / "map.mrc"))
    curve = fsc(found, truth)
    shell = int(BOX * PIXEL_SIZE / 6)
    # Measured 0.9991 (what 300 views leave of it), and −0.1 with origins of the other sign.
    assert float(curve[1 : shell + 1].min()) > 0.99


def test_stacks_both_ways(data: Path, tmp_path: Path) -> None:
    """A .mrc stack is refused by RELION unless its format stands behind its name, as `select` writes it."""
    shutil.copy(data / "particles.mrcs", tmp_path / "p.mrc")
    text = (data / "truth.star").read_text().replace("particles.mrcs", "p.mrc")
    (tmp_path / "plain.star").write_text(text)
    table = relion.read_particles(str(tmp_path / "plain.star"))
    cryosparc.write_particles(str(tmp_path / "p.cs"), table, BOX)
    select.run(str(tmp_path / "p.cs"), str(tmp_path / "p.star"), query="source_row < 50")
    _relion("stack_create", "--i", "p.star", "--o", "made", cwd=tmp_path)
    made = read_source(str(tmp_path / "made.star"))
    assert len(made.table) == 50
    expected = mrcfile.read(data / "particles.mrcs")[:50]
    assert made.stacks[0].read(made.table.columns["stack_index"]) == pytest.approx(expected, abs=1e-5)
    for name in ("rotation", "shift", "defocus_u", "voltage"):
        assert made.table.columns[name] == pytest.approx(table.columns[name][:50], rel=1e-4, abs=1e-4), name
    assert np.unique(made.table.pixel_sizes()).tolist() == [PIXEL_SIZE]


@pytest.fixture(scope="module")
def symmetric(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Particles of six copies of ubiquitin about D3's axes, and a run that refined their true poses with --symmetry."""
    out = tmp_path_factory.mktemp("symmetric")
    simulate.run(
        str(shared_data / "structures" / "1ubi.pdb"), str(out / "data"), n=COUNT, box=BOX, pixel_size=PIXEL_SIZE * 1.5,
        snr_db=0.0, defocus_um=(0.5, 1.0), astigmatism_um=0.1, shift_a=3.0, seed=0, symmetry="D3",
    )  # fmt: skip
    convert.run(
        str(out / "data" / "truth.star"), str(out / "store"), data_dir=None, box=None, dtype="float32", workers=1,
        overwrite=False, invert=False, uninvert=True,
    )  # fmt: skip
    settings = {"guided.start": "poses", "train.symmetry": "D3", "guided.iterations": "1", "guided.encoder_steps": "0"}
    train.run(
        None, data=str(out / "store"), out=str(out / "run"), workers="0", device="cpu", resume=False, overrides=settings
    )
    return out / "data", out / "run"


def _map(path: Path) -> torch.Tensor:
    return torch.from_numpy(mrcfile.read(path))


def test_it_reconstructs_a_symmetric_runs_map(symmetric: tuple[Path, Path], tmp_path: Path) -> None:
    """relion_reconstruct --sym with the run's poses: the same map, of which the run's halves are parts."""
    data, run = symmetric
    shutil.copy(run / "particles.star", data / "ours.star")
    for sym in ("D3", "C1"):
        _relion("reconstruct", "--i", "ours.star", "--o", str(tmp_path / f"{sym}.mrc"), "--ctf", "--sym", sym, cwd=data)
    ours = (_map(run / "half1.mrc") + _map(run / "half2.mrc")) / 2
    theirs, plain = _map(tmp_path / "D3.mrc"), _map(tmp_path / "C1.mrc")
    # Measured 0.99 (a CTF without padding, other regularisation); without --sym its noise shows: below 0.95.
    assert float(fsc(ours, theirs)[1:20].min()) > 0.97
    assert float(fsc(ours, plain)[1:20].min()) < float(fsc(ours, theirs)[1:20].min())


def test_its_symmetrised_map_is_ours(symmetric: tuple[Path, Path], tmp_path: Path) -> None:
    """relion_image_handler --sym interpolates voxels: the same to 6 Å but for that."""
    _, run = symmetric
    _relion("image_handler", "--i", str(run / "map.mrc"), "--o", str(tmp_path / "s.mrc"), "--sym", "D3", cwd=tmp_path)
    ours, theirs = _map(run / "map.mrc"), _map(tmp_path / "s.mrc")
    shell = int(BOX * PIXEL_SIZE * 1.5 / 8)
    assert float(fsc(ours, theirs)[1:shell].min()) > 0.99


def test_the_axes_that_we_find_are_at_least_as_good_as_its(symmetric: tuple[Path, Path], tmp_path: Path) -> None:
    """A turned map laid onto D3's axes by relion_align_symmetry and by us, each judged by relion_image_handler --sym.

    RELION tries 400 random rotations, then a grid of 2°: where it ends differs from run to run by some degrees.
    """
    data, _ = symmetric
    group, turn = PointGroup.of("D3"), rotation_from_vector(torch.tensor([0.4, -0.9, 0.3]))
    turned = apply_alignment(_map(data / "truth.mrc"), Alignment(turn, False, torch.zeros(3), 1.0))
    write_map(str(tmp_path / "turned.mrc"), turned.numpy(), PIXEL_SIZE * 1.5)
    _relion("align_symmetry", "--i", "turned.mrc", "--o", "theirs.mrc", "--sym", "D3", "--box_size", str(BOX),
            "--keep_centre", cwd=tmp_path)  # fmt: skip
    found = symmetry_axes(turned, group, 16.0, torch.zeros(3))
    write_map(str(tmp_path / "ours.mrc"), apply_alignment(turned, found.alignment).numpy(), PIXEL_SIZE * 1.5)
    agreement = {}
    for name in ("ours", "theirs"):
        _relion("image_handler", "--i", f"{name}.mrc", "--o", "s.mrc", "--sym", "D3", cwd=tmp_path)
        agreement[name] = float(fsc(_map(tmp_path / f"{name}.mrc"), _map(tmp_path / "s.mrc"))[1:17].mean())
    assert agreement["ours"] > 0.99
    assert agreement["ours"] >= agreement["theirs"]
    # The frame that the map was turned from, to a tenth of a degree, as a rotation of the group sees it.
    true = turn.double() @ group.rotations.double() @ turn.double().T
    for one in found.rotations(group):
        assert float(geodesic_angle(true, one.expand_as(true)).min()) < 0.2
