"""`evaluate` against one map or structure: any grid, orientation and hand; and what it says."""

import json
from pathlib import Path

import pytest
import torch
from scipy.spatial.transform import Rotation

from scalecryo.commands import evaluate
from scalecryo.commands.evaluate_reference import is_reference
from scalecryo.data.formats.mrc import write_map
from scalecryo.errors import InputError
from scalecryo.evaluate.compare import sentence

PLACES = torch.tensor([[6.0, 1, -2], [-5, 4, 3], [2, -8, 1], [-3, -2, -7], [0, 5, 8]])  # Å, chiral


def blobs(
    shape: tuple[int, int, int], pixel_size: float, turn: torch.Tensor, centre: tuple[float, ...]
) -> torch.Tensor:
    """Five Gaussians of σ 2.5 Å, turned about the centre (x, y, z), index."""
    axes = [(torch.arange(length) - at) * pixel_size for length, at in zip(shape, reversed(centre), strict=True)]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    found = torch.zeros(shape)
    for weight, place in enumerate(PLACES @ turn.T, 2):
        squared = (x - place[0]) ** 2 + (y - place[1]) ** 2 + (z - place[2]) ** 2
        found += weight * torch.exp(-squared / (2 * 2.5**2))
    return found


def test_a_map_of_another_grid_orientation_and_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turn = torch.from_numpy(Rotation.from_euler("zyz", [40, 70, 20], degrees=True).as_matrix()).float()
    mirror = torch.diag(torch.tensor([1.0, 1, -1]))
    write_map(str(tmp_path / "map.mrc"), blobs((24, 24, 24), 2.0, torch.eye(3), (12, 12, 12)).numpy(), 2.0)
    # Odd, oblong, finer, off its middle, turned and mirrored.
    reference = blobs((35, 41, 37), 1.5, turn @ mirror, (14.0, 24.0, 18.5))
    write_map(str(tmp_path / "reference.mrc"), reference.numpy(), 1.5)
    line = evaluate.run(str(tmp_path / "map.mrc"), truth=str(tmp_path / "reference.mrc"))
    told = capsys.readouterr()
    assert json.loads(told.out) == line
    assert line["hand"] == "mirrored"
    assert line["images"] is None
    assert line["fsc_0.5_angstrom"] < 4.5  # Nyquist is 4 Å, and there is no noise
    assert (line["box_size"], line["pixel_size"]) == (24, 2.0)
    assert "agrees with" in told.err
    assert "the hand is the other one" in told.err
    assert (tmp_path / "evaluate_fsc.png").exists()


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    (tmp_path / "poses.star").write_text("")
    with pytest.raises(InputError, match="no map"):
        evaluate.run(str(tmp_path / "poses.star"), truth="structure.cif.gz")
    write_map(str(tmp_path / "map.mrc"), torch.ones(8, 8, 8).numpy(), 2.0)
    write_map(str(tmp_path / "bare.mrc"), torch.ones(8, 8, 8).numpy(), 0.0)
    with pytest.raises(InputError, match="no pixel size"):
        evaluate.run(str(tmp_path / "map.mrc"), truth=str(tmp_path / "bare.mrc"))


def test_endings_tell_a_reference_from_a_folder() -> None:
    assert all(map(is_reference, ("a.pdb", "s3://x/A.CIF.gz", "emd_1.map.gz", "b.mrc", "c.ent")))
    assert not any(map(is_reference, ("data", "run/truth", "a.star")))


def test_sentences() -> None:
    line = {"fsc_0.5_angstrom": 4.0, "box_size": 64, "pixel_size": 1.5, "hand": "same",
            "rotation_error_median_deg": 0.5, "shift_error_median_px": 0.25}  # fmt: skip
    assert sentence(line, "T") == (
        "the map agrees with T: FSC 0.5 at 4.00 Å; the median error of poses is 0.50° and 0.25 px; in the same hand"
    )
    assert "nothing like" in sentence(line | {"fsc_0.5_angstrom": 40.0}, "T")
    assert "pixels of 1.5 Å" in sentence(line | {"fsc_masked_0.5_angstrom": 3.0}, "T")
    assert sentence({}, "T") == "nothing could be compared with T"
