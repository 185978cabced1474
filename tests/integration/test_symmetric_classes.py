"""Several structures that share a point group: one assembly in two compositions, and unrelated structures."""

import json
from pathlib import Path
from typing import Any

import mrcfile
import pytest
import torch
from torch import Tensor

from scalecryo.commands import convert, evaluate, simulate, train
from scalecryo.data.formats.mrc import read_map
from scalecryo.errors import TrainingError
from scalecryo.evaluate.symmetry_axes import symmetrised_map
from scalecryo.physics.fsc import fsc
from scalecryo.physics.symmetry import PointGroup
from tests.support.blobs import blobs

COUNT, BOX, PIXEL_SIZE = 500, 32, 4.0
START = {
    "train.classes": "2",
    "guided.starts": "1",
    "guided.bootstrap_steps": "20",
    "guided.bootstrap_rounds": "12",
    "guided.bootstrap_batch": "80",
    "guided.iterations": "3",
    "pose.centred": "true",
}


def _simulated(folder: Path, maps: list[Tensor]) -> Path:
    names = []
    for number, volume in enumerate(maps):
        names.append(folder / f"map{number}.mrc")
        with mrcfile.new(names[-1], volume.numpy()) as handle:
            handle.voxel_size = PIXEL_SIZE
    simulate.run(str(names[0]), str(folder / "data"), mix=[str(name) for name in names[1:]], n=COUNT, box=BOX,
                 pixel_size=PIXEL_SIZE, snr_db=5.0, defocus_um=(0.8, 1.6), astigmatism_um=0.05, shift_a=0.0,
                 seed=2)  # fmt: skip
    return folder / "data"


def _store(data: Path) -> str:
    convert.run(str(data / "particles.star"), str(data / "store.zarr"), data_dir=None, box=None, dtype="float16",
                workers=2, overwrite=False, invert=False, uninvert=True)  # fmt: skip
    return str(data / "store.zarr")


def _train(data: str, out: Path, settings: dict[str, str]) -> None:
    train.run(None, data=data, out=str(out), workers="0", device="cpu", resume=False, overrides=settings)


def _scores(run: Path, truth: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    evaluate.run(str(run), truth=str(truth))
    return json.loads(capsys.readouterr().out)


def _least_agreement(run: Path, number: int, group: str) -> float:
    """Of a class's map with itself made symmetric about RELION's axes."""
    volume = torch.from_numpy(read_map(str(run / f"class{number}" / "map.mrc"))[0])
    # Blobs of 1.5 px have 2 % of their amplitude left at shell 10: beyond it is interpolation.
    return float(fsc(volume, symmetrised_map(volume, PointGroup.of(group)))[1:11].min())


@pytest.fixture(scope="module")
def compositions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One structure of D2, with and without a part in each of its four units."""
    whole = symmetrised_map(blobs(BOX, 1), PointGroup.of("D2"))
    line = torch.arange(BOX) - BOX // 2
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    part = torch.exp(-((x - 4) ** 2 + (y + 4) ** 2 + (z - 3) ** 2) / (2 * 2.5**2))
    part = symmetrised_map(part, PointGroup.of("D2"))
    return _simulated(tmp_path_factory.mktemp("compositions"), [whole, whole * (1 - part / part.max())])


@pytest.fixture(scope="module")
def species(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two unrelated structures of C3."""
    maps = [symmetrised_map(blobs(BOX, seed), PointGroup.of("C3")) for seed in (1, 3)]
    return _simulated(tmp_path_factory.mktemp("species"), maps)


def test_compositions_of_a_symmetric_assembly(
    compositions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = START | {"train.symmetry": "D2", "train.class_mode": "docked"}
    _train(_store(compositions), tmp_path / "run", settings)
    # Reference: the simulated labels and poses, modulo the group; at 32 px a voxel at the particle's edge is 5°.
    found = _scores(tmp_path / "run", compositions, capsys)
    assert found["symmetry"] == "D2"
    assert found["class_accuracy"] > 0.95
    assert max(found["class_rotation_error_median_deg"]) < 2.5
    # Symmetric about RELION's axes: only interpolation is left.
    assert min(_least_agreement(tmp_path / "run", number, "D2") for number in (1, 2)) > 0.99


def test_unrelated_structures_each_find_their_axes(
    species: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = _store(species)
    _train(store, tmp_path / "run", START | {"train.symmetry": "C3"})
    found = _scores(tmp_path / "run", species, capsys)
    assert found["class_accuracy"] > 0.98
    assert max(found["class_rotation_error_median_deg"]) < 2.5
    assert min(_least_agreement(tmp_path / "run", number, "C3") for number in (1, 2)) > 0.99
    assert max(found["class_fsc_0.5_angstrom"]) < 16
    with pytest.raises(TrainingError, match=r"class \d of the start agrees with itself under C4 at"):
        _train(store, tmp_path / "other", START | {"train.symmetry": "C4", "guided.bootstrap_rounds": "1"})
    assert not (tmp_path / "other" / "map.mrc").exists()
