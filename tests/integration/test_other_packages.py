"""cryoSPARC's and cryoDRGN's own readers, where they are installed, on what `export` gives them.

References: cryosparc-tools 5.0 (`Dataset.load`), cryoDRGN 4.3 (`PoseTracker.load`, `load_ctf_for_training`).
"""

from pathlib import Path

import mrcfile
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from scalecryo.commands import export, simulate
from scalecryo.data.formats import relion

COUNT, BOX, PIXEL_SIZE = 20, 32, 2.0


@pytest.fixture(scope="module")
def run(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `export` reads of a finished run, with the true poses."""
    data, run = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("run")
    simulate.run(
        str(shared_data / "structures" / "1ubi.pdb"), str(data), n=COUNT, box=BOX, pixel_size=PIXEL_SIZE, snr_db=None,
        defocus_um=(0.5, 1.0), astigmatism_um=0.1, shift_a=3.0, seed=0,
    )  # fmt: skip
    truth = relion.read_particles(str(data / "truth.star"))
    relion.write_with_poses(
        str(run / "particles.star"), (data / "particles.star").read_bytes(), truth, truth.columns["rotation"],
        truth.columns["shift"], np.linspace(0, 1, COUNT), np.arange(COUNT) % 2 + 1,
    )  # fmt: skip
    with mrcfile.new(run / "map.mrc") as file:
        file.set_data(np.zeros((BOX, BOX, BOX), np.float32))
        file.voxel_size = PIXEL_SIZE
    return run


def test_cryosparc_tools_reads_our_table(run: Path, tmp_path: Path) -> None:
    dataset = pytest.importorskip("cryosparc.dataset", reason="cryosparc-tools is not installed")
    export.run(str(run), format="cryosparc", out=str(tmp_path / "out"))
    found = dataset.Dataset.load(str(tmp_path / "out" / "particles.cs"))
    truth = relion.read_particles(str(run / "particles.star")).columns
    assert len(found) == COUNT
    assert len(set(found["uid"])) == COUNT
    assert {str(path) for path in found["blob/path"]} == {"particles.mrcs"}
    assert found["blob/idx"].tolist() == list(range(COUNT))
    assert found["blob/psize_A"] == pytest.approx(PIXEL_SIZE)
    # cryoSPARC's rotation vector is that of our R; its shift is in pixels, the other way. Single precision.
    rotation = Rotation.from_rotvec(np.asarray(found["alignments3D/pose"])).as_matrix()
    assert rotation == pytest.approx(truth["rotation"], abs=2e-6)
    assert -np.asarray(found["alignments3D/shift"]) * PIXEL_SIZE == pytest.approx(truth["shift"], abs=1e-5)
    assert found["ctf/df1_A"] == pytest.approx(truth["defocus_u"], rel=1e-6)
    # It writes the table again in its own format, and reads it.
    found.save(str(tmp_path / "again.cs"))
    assert dataset.Dataset.load(str(tmp_path / "again.cs")) == found


def test_cryodrgn_reads_our_poses_and_ctf(run: Path, tmp_path: Path) -> None:
    reason = "cryoDRGN is not installed (pip install --no-deps cryodrgn igraph texttable)"
    pose, ctf = (pytest.importorskip(f"cryodrgn.{name}", reason=reason) for name in ("pose", "ctf"))
    export.run(str(run), format="cryodrgn", out=str(tmp_path / "out"))
    truth = relion.read_particles(str(run / "particles.star")).columns
    poses = pose.PoseTracker.load(str(tmp_path / "out" / "poses.pkl"), COUNT, BOX)
    rotation, shift_px = poses.get_pose(np.arange(COUNT))
    assert rotation.numpy().transpose(0, 2, 1) == pytest.approx(truth["rotation"], abs=2e-6)
    assert -shift_px.numpy() * PIXEL_SIZE == pytest.approx(truth["shift"], abs=1e-5)
    values = ctf.load_ctf_for_training(BOX, str(tmp_path / "out" / "ctf.pkl"))
    assert values[:, 0] == pytest.approx(PIXEL_SIZE)
    for column, name in enumerate(("defocus_u", "defocus_v", "astigmatism_angle", "voltage"), start=1):
        assert values[:, column] == pytest.approx(truth[name], rel=1e-6), name
