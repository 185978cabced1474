"""Runs with a point group: from nothing and from poses that came with the particles, refused, resumed, expanded."""

import json
from pathlib import Path

import numpy as np
import pytest
import starfile
import torch
from scipy.spatial.transform import Rotation

from scalecryo.commands import assign, convert, evaluate, export, select, simulate, train
from scalecryo.config import load_config
from scalecryo.data.formats import cryosparc
from scalecryo.data.formats.cryosparc_axes import turn_of_axes
from scalecryo.data.formats.mrc import read_map
from scalecryo.data.formats.relion import read_particles, read_poses, write_particles
from scalecryo.distributed.world import World
from scalecryo.errors import InputError, TrainingError
from scalecryo.evaluate.align import Alignment
from scalecryo.evaluate.align_maps import apply_alignment
from scalecryo.evaluate.symmetry_axes import symmetrised_map
from scalecryo.physics.fsc import fsc
from scalecryo.physics.symmetry import PointGroup, symmetry_rotations
from scalecryo.runs.folder import RunFolder
from scalecryo.train import loop
from tests.support.gloo import train_by_workers

BOX, PIXEL_SIZE, COUNT, GROUP = 32, 4.0, 900, "D3"
# From RELION's axes to cryoSPARC's, whose Dn has a two-fold on y (Scipion's plugin calls it SYM_DIHEDRAL_Y).
QUARTER = Rotation.from_euler("z", 90, degrees=True).as_matrix()
QUICK = {"guided.iterations": "4", "guided.encoder_hidden": "64"}


def _store(table: Path, store: Path) -> str:
    convert.run(str(table), str(store), data_dir=str(table.parent), box=None, dtype="float16", workers=1,
                overwrite=False, invert=False, uninvert=True)  # fmt: skip
    return str(store)


@pytest.fixture(scope="module")
def data(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six copies of ubiquitin about RELION's axes of D3; noisy, with CTF and shifts."""
    out = tmp_path_factory.mktemp("symmetry") / "data"
    simulate.run(
        str(shared_data / "structures" / "1ubi.pdb"), str(out), n=COUNT, box=BOX, pixel_size=PIXEL_SIZE, snr_db=0.0,
        defocus_um=(0.8, 1.6), astigmatism_um=0.0, shift_a=4.0, seed=2, symmetry=GROUP,
    )  # fmt: skip
    return out


def _train(data: str, out: Path, *, resume: bool = False, **settings: str) -> None:
    overrides = {**QUICK, **{key.replace("__", "."): value for key, value in settings.items()}}
    train.run(None, data=data, out=str(out), workers="0", device="cpu", resume=resume, overrides=overrides)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From nothing, with the group."""
    folder = tmp_path_factory.mktemp("symmetry_run")
    store = _store(data / "particles.star", folder / "store")
    _train(store, folder / "run", train__symmetry=GROUP, guided__starts="1", guided__bootstrap_steps="40",
           guided__bootstrap_rounds="1")  # fmt: skip
    return folder / "run"


def _posed(data: Path, folder: Path, rotation: np.ndarray, shift: np.ndarray) -> str:
    """A store of the particles with poses."""
    table = read_particles(str(data / "truth.star"))
    write_particles(str(folder / "posed.star"), table.image_names(), table, True, BOX, pose=(rotation, shift))
    (folder / "particles.mrcs").symlink_to(data / "particles.mrcs")
    return _store(folder / "posed.star", folder / "store")


@pytest.fixture(scope="module")
def posed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """With true poses in another frame and with other origins."""
    poses = read_poses(str(data / "truth.star"))
    assert poses.shift is not None
    frame, centre = Rotation.from_rotvec([0.3, -0.8, 0.5]).as_matrix(), np.array([3.0, -2.0, 4.0])  # Å
    rotation = frame @ poses.rotation
    shift = poses.shift - (rotation.transpose(0, 2, 1) @ centre)[:, :2]
    return _posed(data, tmp_path_factory.mktemp("symmetry_posed"), rotation, shift)


def test_from_nothing_modulo_the_group(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    evaluate.run(str(run), truth=str(data))
    found = json.loads(capsys.readouterr().out)
    assert found["symmetry"] == GROUP  # the run's own
    # One voxel at the particle's edge (radius 12 px) is 4.8°; half of it leaves the map's detail whole.
    assert found["rotation_error_median_deg"] < 2.4
    assert found["rotation_error_mod_pseudosymmetry_median_deg"] == found["rotation_error_median_deg"]
    assert found["shift_error_median_px"] < 0.25
    assert found["fsc_0.5_shell"] > 13
    volume = torch.from_numpy(read_map(str(run / "map.mrc"))[0])
    again = symmetrised_map(volume, PointGroup.of(GROUP))
    # Symmetric about RELION's axes: only interpolation is left.
    assert float(fsc(volume, again)[1:13].min()) > 0.99
    assert "D3" in (run / "report.html").read_text()
    assert 'symmetry = "D3"' in (run / "config.toml").read_text()


def test_another_group_is_refused_in_one_line(posed: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"agrees with itself under C4 at .* try --symmetry D3"):
        _train(posed, tmp_path / "run", guided__start="poses", train__symmetry="C4")


def test_poses_that_came_with_the_particles_are_turned_onto_the_axes(
    posed: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a run that goes on after a kill has them: bit for bit the same."""
    settings = {
        "guided__start": "poses",
        "train__symmetry": GROUP,
        "train__final_pass": "false",
        "guided__iterations": "2",
    }
    _train(posed, tmp_path / "run", **settings | {"guided__iterations": "1"})
    _train(posed, tmp_path / "run", resume=True, **settings | {"train__final_pass": "true"})
    _train(posed, tmp_path / "whole", **settings | {"train__final_pass": "true"})
    first, second = (read_poses(str(tmp_path / name / "particles.star")) for name in ("run", "whole"))
    assert np.array_equal(first.rotation, second.rotation)
    capsys.readouterr()
    evaluate.run(str(tmp_path / "whole"), truth=str(data), symmetry=GROUP)
    found = json.loads(capsys.readouterr().out)
    assert found["rotation_error_median_deg"] < 2.4
    assert found["shift_error_median_px"] < 0.25
    # Poses are those of the map: the same error without any alignment but the group's own, D6 maps D3 to itself.
    truth, estimate = read_poses(str(data / "truth.star")).rotation, first.rotation
    related = np.einsum("gij,njk->ngik", symmetry_rotations("D6").numpy(), truth)
    trace = np.einsum("nij,ngij->ng", estimate, related).max(1)
    assert np.degrees(np.arccos(np.clip((np.median(trace) - 1) / 2, -1, 1))) < 3


def test_poses_of_one_asymmetric_unit_are_on_the_axes_already(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As a refinement with symmetry leaves them: nothing is turned, and other groups are refused."""
    poses = read_poses(str(data / "truth.star"))
    assert poses.shift is not None
    unit = PointGroup.of(GROUP).folded(torch.from_numpy(poses.rotation).float()).double().numpy()
    store = _posed(data, tmp_path, unit, poses.shift)
    settings = {"guided__start": "poses", "guided__iterations": "1", "train__final_pass": "false"}
    _train(store, tmp_path / "run", **settings, train__symmetry=GROUP)
    said = capfd.readouterr().err
    assert "made symmetric about RELION's axes (D3) at 1." in said
    assert "agrees with itself" not in said
    with pytest.raises(TrainingError, match="agrees with itself under C4"):
        _train(store, tmp_path / "other", **settings, train__symmetry="C4")


def test_two_workers_find_the_same(posed: str, tmp_path: Path) -> None:
    settings = QUICK | {"guided.start": "poses", "train.symmetry": GROUP, "guided.iterations": "1"}
    settings["guided.encoder_steps"] = "0"
    for name, workers in (("one", "0"), ("two", "2")):
        places = {"run.data": posed, "run.out": str(tmp_path / name), "run.workers": workers}
        config = load_config(None, {**settings, **places})
        RunFolder(config.run.out).create(config, resume=False)
        if workers == "0":
            loop.train(config, World(), torch.device("cpu"))
            continue
        train_by_workers(config)
    first, second = (torch.from_numpy(read_map(str(tmp_path / name / "map.mrc"))[0]) for name in ("one", "two"))
    # Sums are added in another order, and each worker's noise is of its own images.
    assert float(fsc(first, second)[1:13].min()) > 0.99
    one, two = (read_poses(str(tmp_path / name / "particles.star")).rotation for name in ("one", "two"))
    assert np.degrees(np.arccos(np.clip((np.median(np.einsum("nij,nij->n", one, two)) - 1) / 2, -1, 1))) < 0.5


def test_without_a_group_the_run_says_what_it_sees(posed: str, tmp_path: Path) -> None:
    _train(posed, tmp_path / "run", guided__start="poses", guided__iterations="2")
    report = (tmp_path / "run" / "report.html").read_text()
    assert "try --symmetry D3" in report


def test_an_assignment_takes_the_runs_group(run: Path, tmp_path: Path) -> None:
    assign.run(str(run), data=None, out=str(tmp_path / "again"))
    before, after = (read_map(str(folder / "map.mrc"))[0] for folder in (run, tmp_path / "again"))
    assert float(fsc(torch.from_numpy(before), torch.from_numpy(after))[1:12].min()) > 0.98


def test_a_table_is_expanded(run: Path, tmp_path: Path) -> None:
    select.run(str(run), str(tmp_path / "all.star"), expand=True, half=1)
    select.run(str(run), str(tmp_path / "all.cs"), expand=True, half=1)
    group = symmetry_rotations(GROUP).numpy()
    own, every = read_poses(str(run / "particles.star")), read_poses(str(tmp_path / "all.star"))
    assert own.half is not None
    assert own.shift is not None
    assert every.shift is not None
    kept = np.flatnonzero(own.half == 1)
    assert len(every.names) == 6 * len(kept)
    assert every.names == [own.names[row] for row in kept.repeat(6)]
    # Angles have six decimals.
    expected = (group @ own.rotation[kept, None]).reshape(-1, 3, 3)
    np.testing.assert_allclose(every.rotation, expected, atol=1e-6)
    np.testing.assert_array_equal(every.shift, own.shift[kept].repeat(6, 0))
    assert set(every.half.tolist()) == {1}
    numbers = starfile.read(tmp_path / "all.star", always_dict=True)["particles"]["rlnParticleId"]
    assert numbers.tolist() == list(range(1, 6 * len(kept) + 1))
    rows = cryosparc.read(str(tmp_path / "all.cs"))
    assert len(np.unique(rows["uid"])) == len(rows) == 6 * len(kept)
    back = cryosparc.read_particles(str(tmp_path / "all.cs"))
    # On cryoSPARC's axes; rotation vectors in single precision.
    np.testing.assert_allclose(back.columns["rotation"], QUARTER @ expected, atol=1e-5)


def test_only_a_run_with_a_group_is_expanded(posed: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--expand needs a run"):
        select.run(str(run / "particles.star"), str(tmp_path / "out.star"), expand=True)


def test_exports_stand_on_each_programs_axes(run: Path, tmp_path: Path) -> None:
    """RELION's table as it is; cryoSPARC's poses and maps turned alike, so that its own D3 fits them."""
    own, volume = read_poses(str(run / "particles.star")).rotation, read_map(str(run / "map.mrc"))[0]
    export.run(str(run), format="relion", out=str(tmp_path / "relion"))
    assert np.array_equal(read_poses(str(tmp_path / "relion" / "particles.star")).rotation, own)
    assert np.array_equal(read_map(str(tmp_path / "relion" / "map.mrc"))[0], volume)
    export.run(str(run), format="cryosparc", out=str(tmp_path / "cs"))
    back = cryosparc.read_particles(str(tmp_path / "cs" / "particles.cs"))
    np.testing.assert_allclose(back.columns["rotation"], QUARTER @ own, atol=1e-5)
    turned = torch.from_numpy(read_map(str(tmp_path / "cs" / "map.mrc"))[0])
    turn = Alignment(torch.from_numpy(QUARTER), False, torch.zeros(3), 1.0)
    same = apply_alignment(torch.from_numpy(volume), turn)
    assert float(fsc(turned, same)[1:14].min()) > 0.999
    about_y = PointGroup("D3", torch.from_numpy(QUARTER @ symmetry_rotations(GROUP).numpy() @ QUARTER.T).float())
    for group, symmetric in ((about_y, True), (PointGroup.of(GROUP), False)):
        curve = fsc(turned, symmetrised_map(turned, group))
        assert (float(curve[1:13].min()) > 0.99) == symmetric


@pytest.mark.parametrize(("group", "turned"), [("D7", True), ("D3", True), ("D2", False), ("C7", False), ("T", False)])
def test_which_groups_cryosparc_has_elsewhere(group: str, turned: bool) -> None:
    assert (turn_of_axes(group) is not None) == turned
    quarter, rotations = torch.from_numpy(QUARTER), symmetry_rotations(group)
    if group.startswith(("C", "D")):  # closed form: whether the turn takes the group to itself
        kept = all(float((rotations - quarter @ one @ quarter.T).abs().amax((1, 2)).min()) < 1e-9 for one in rotations)
        assert kept != turned
