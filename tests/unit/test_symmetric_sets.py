"""tools/symmetry.py: where the true axes lie, how far a run's are from RELION's, which goals a set misses."""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from scalecryo.commands import simulate
from scalecryo.data.formats.relion import read_particles, write_particles
from scalecryo.physics.symmetry import PointGroup
from tests.support.tools import tool


@pytest.fixture
def symmetry(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return tool("symmetry", monkeypatch)


def angles_deg(rotations: torch.Tensor) -> np.ndarray:
    return np.asarray(Rotation.from_matrix(rotations.numpy()).magnitude() * 180 / np.pi)


def test_axes_of_chains(symmetry: ModuleType, shared_data: Path) -> None:
    spike = symmetry.true_rotations(symmetry.SETS["spike"], shared_data / "structures")
    # 6VXX was refined with C3 about z: its chains are copies to the digits of the file (0.001 Å at 70 Å).
    assert angles_deg(spike).round(3).tolist() == [0.0, 120.0, 120.0]
    assert torch.allclose(spike[:, 2, 2], torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-6)
    groel = symmetry.true_rotations(symmetry.SETS["groel"], shared_data / "structures")
    assert sorted(np.round(angles_deg(groel) * 7 / 360, 3)) == [0.0, 1, 1, 2, 2, 3, 3, *[3.5] * 7]


def test_axis_error(symmetry: ModuleType, tmp_path: Path, shared_data: Path) -> None:
    """Poses that see the particle tilted by an angle have axes that are off by it; any copy of a pose will do."""
    simulate.run(str(shared_data / "structures" / "1ubi.pdb"), str(tmp_path), n=60, box=16, pixel_size=6.0, snr_db=0.0,
                 defocus_um=(1.0, 2.0), astigmatism_um=0.0, shift_a=0.0, seed=1, symmetry="D3")  # fmt: skip
    group = PointGroup.of("D3")
    table = read_particles(str(tmp_path / "truth.star"))
    rotation = symmetry.read_poses(str(tmp_path / "truth.star")).rotation
    copies = group.rotations.numpy()[np.arange(60) % 6]
    for tilt_deg in (0.0, 0.7):
        tilted = Rotation.from_rotvec([0.0, np.deg2rad(tilt_deg), 0.0]).as_matrix()
        write_particles(str(tmp_path / "particles.star"), table.image_names(), table, True, 16,
                        pose=(tilted @ copies @ rotation, np.zeros((60, 2))))  # fmt: skip
        found = symmetry.axis_error_deg(tmp_path, tmp_path, group.rotations.double(), group)
        assert found == pytest.approx(tilt_deg, abs=0.01)  # tables hold five decimals of a degree


def a_run(**changed: Any) -> dict[str, Any]:
    return {"fsc_mean": 0.98, "rotation_error_median_deg": 0.5, "fsc_0.5_angstrom": 8.1, "processor_seconds": 100.0,
            "axis_error_deg": 0.05} | changed  # fmt: skip


def test_goals(symmetry: ModuleType) -> None:
    refused = {"error": "agrees with itself under D6 at 0.1: try --symmetry D7", "processor_seconds": 50.0}
    assert symmetry.missed(a_run(), a_run(), refused) == []
    assert symmetry.missed(a_run(), a_run(fsc_mean=0.97), refused) == ["FSC"]
    assert symmetry.missed(a_run(), a_run(axis_error_deg=0.21), refused) == ["axis"]
    assert symmetry.missed(a_run(), a_run(processor_seconds=111.0), refused) == ["time"]
    assert symmetry.missed(a_run(), a_run(), a_run()) == ["wrong group"]
    assert symmetry.missed(a_run(), refused, refused) == ["refused"]
    lines = symmetry.table([("groel", 0, a_run(), a_run(fsc_mean=0.99), refused)])
    assert "| groel (D7) | 0 | 0.50 / 0.50 | 8.10 / 8.10 | 0.9800 / 0.9900 | 0.050 | 100 / 100 | met |" in lines
    assert "groel, seed 0, D6: agrees with itself" in lines
