"""Several structures that share a point group: one assembly in two compositions, and unrelated structures."""

from pathlib import Path

import pytest
import torch

from scalecryo.data.formats.mrc import read_map
from scalecryo.errors import TrainingError
from scalecryo.evaluate.symmetry_axes import symmetrised_map
from scalecryo.physics.fsc import fsc
from scalecryo.physics.symmetry import PointGroup
from tests.support.blobs import blobs
from tests.support.mixtures import BOX, START, run_train, scores, simulated

SETTINGS = {key.replace(".", "__"): value for key, value in START.items()} | {"guided__iterations": "3"}


def _least_agreement(run: Path, number: int, group: str) -> float:
    """Of a class's map with itself made symmetric about RELION's axes."""
    volume = torch.from_numpy(read_map(str(run / f"class{number}" / "map.mrc"))[0])
    # Blobs of 1.5 px have 2 % of their amplitude left at shell 10: beyond it is interpolation.
    return float(fsc(volume, symmetrised_map(volume, PointGroup.of(group)))[1:11].min())


def test_compositions_of_a_symmetric_assembly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With and without a part in each of its four units."""
    group = PointGroup.of("D2")
    whole = symmetrised_map(blobs(BOX, 1), group)
    line = torch.arange(BOX) - BOX // 2
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    part = symmetrised_map(torch.exp(-((x - 4) ** 2 + (y + 4) ** 2 + (z - 3) ** 2) / (2 * 2.5**2)), group)
    store = simulated(tmp_path, [whole, whole * (1 - part / part.max())], "particles")
    run_train(store, tmp_path / "run", **SETTINGS, train__symmetry="D2", train__class_mode="docked")
    # Reference: the simulated labels and poses, modulo the group; at 32 px a voxel at the particle's edge is 5°.
    found = scores(tmp_path / "run", tmp_path / "data", capsys)
    assert found["symmetry"] == "D2"
    assert found["class_accuracy"] > 0.95
    assert max(found["class_rotation_error_median_deg"]) < 2.5
    # Symmetric about RELION's axes: only interpolation is left.
    assert min(_least_agreement(tmp_path / "run", number, "D2") for number in (1, 2)) > 0.99


def test_unrelated_structures_each_find_their_axes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    maps = [symmetrised_map(blobs(BOX, seed), PointGroup.of("C3")) for seed in (1, 3)]
    store = simulated(tmp_path, maps, "particles")
    run_train(store, tmp_path / "run", **SETTINGS, train__symmetry="C3")
    found = scores(tmp_path / "run", tmp_path / "data", capsys)
    assert found["class_accuracy"] > 0.98
    assert max(found["class_rotation_error_median_deg"]) < 2.5
    assert max(found["class_fsc_0.5_angstrom"]) < 16
    assert min(_least_agreement(tmp_path / "run", number, "C3") for number in (1, 2)) > 0.99
    short = SETTINGS | {"guided__bootstrap_rounds": "1"}
    with pytest.raises(TrainingError, match=r"class \d of the start agrees with itself under C4 at"):
        run_train(store, tmp_path / "other", **short, train__symmetry="C4")
    assert not (tmp_path / "other" / "map.mrc").exists()
