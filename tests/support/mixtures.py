"""Small mixtures of maps, and runs that sort them."""

import json
from pathlib import Path
from typing import Any

import mrcfile
import pytest
import torch
from torch import Tensor

from scalecryo.commands import convert, evaluate, simulate, train
from tests.support.blobs import blobs

COUNT, BOX, PIXEL_SIZE = 500, 32, 4.0
START = {
    "train.classes": "2",
    "guided.starts": "1",
    "guided.bootstrap_steps": "20",
    "guided.bootstrap_rounds": "12",
    "guided.bootstrap_batch": "80",
    "pose.centred": "true",
}


def compositions() -> list[Tensor]:
    """A fifth of the blobs is missing in one of two."""
    whole = blobs(BOX, 1)
    line = torch.arange(BOX) - BOX // 2
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    return [whole, whole * (1 - torch.exp(-((x - 3) ** 2 + (y + 3) ** 2 + z**2) / (2 * 3.0**2)))]


def simulated(folder: Path, maps: list[Tensor], table: str, shares: tuple[float, ...] = ()) -> str:
    """A mixture of maps, and a store of its particles, with poses (`truth`) or without."""
    names = []
    for number, volume in enumerate(maps):
        names.append(folder / f"map{number}.mrc")
        with mrcfile.new(names[-1], volume.numpy()) as handle:
            handle.voxel_size = PIXEL_SIZE
    simulate.run(str(names[0]), str(folder / "data"), mix=[str(name) for name in names[1:]], n=COUNT, box=BOX,
                 pixel_size=PIXEL_SIZE, snr_db=5.0, defocus_um=(0.8, 1.6), astigmatism_um=0.05, shift_a=0.0,
                 seed=2, shares=shares)  # fmt: skip
    convert.run(str(folder / "data" / f"{table}.star"), str(folder / "store.zarr"), data_dir=None, box=None,
                dtype="float16", workers=2, overwrite=False, invert=False, uninvert=True)  # fmt: skip
    return str(folder / "store.zarr")


def run_train(data: str, out: Path, *, resume: bool = False, **settings: str) -> None:
    overrides = {key.replace("__", "."): value for key, value in settings.items()}
    train.run(None, data=data, out=str(out), workers="0", device="cpu", resume=resume, overrides=overrides)


def scores(run: Path, truth: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    evaluate.run(str(run), truth=str(truth))
    return json.loads(capsys.readouterr().out)
