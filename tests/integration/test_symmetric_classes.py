"""Several structures that share a point group: one assembly in two compositions, and unrelated structures."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from scalecryo.config import load_config
from scalecryo.data.formats.mrc import read_map
from scalecryo.data.storage.store import ParticleStore
from scalecryo.distributed.world import World
from scalecryo.errors import TrainingError
from scalecryo.evaluate.align import Alignment
from scalecryo.evaluate.align_maps import apply_alignment
from scalecryo.evaluate.symmetry_axes import symmetrised_map
from scalecryo.map.reference import ReferenceSet
from scalecryo.physics.fsc import fsc
from scalecryo.physics.image_formation import ctf_weighted
from scalecryo.physics.rotation import random_rotations
from scalecryo.physics.symmetry import PointGroup
from scalecryo.runs.folder import RunFolder
from scalecryo.train.particle_source import ParticleReader, RunContext
from scalecryo.train.particle_state import ParticleState
from scalecryo.train.stage import Learned
from scalecryo.train.stages.class_maps import ClassMaps
from scalecryo.train.stages.on_axes import put_on_axes
from tests.support.blobs import blobs
from tests.support.mixtures import BOX, PIXEL_SIZE, START, run_train, scores, simulated


def _least_agreement(volume: Tensor, group: str) -> float:
    """Of a map with itself made symmetric about RELION's axes."""
    # Blobs of 1.5 px have 2 % of their amplitude left at shell 10: beyond it is interpolation.
    return float(fsc(volume, symmetrised_map(volume, PointGroup.of(group)))[1:11].min())


def _compositions() -> list[Tensor]:
    """A structure of D2 with and without a part in each of its four units."""
    group = PointGroup.of("D2")
    whole = symmetrised_map(blobs(BOX, 1), group)
    line = torch.arange(BOX) - BOX // 2
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    part = symmetrised_map(torch.exp(-((x - 4) ** 2 + (y + 4) ** 2 + (z - 3) ** 2) / (2 * 2.5**2)), group)
    return [whole, whole * (1 - part / part.max())]


@pytest.fixture(scope="module")
def compositions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Particles of both with their poses, and their store."""
    folder = tmp_path_factory.mktemp("compositions")
    return folder / "data", simulated(folder, _compositions(), "truth")


def test_compositions_are_told_apart_at_imported_poses(
    compositions: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run_train(compositions[1], run, train__classes="2", train__symmetry="D2", guided__start="poses",
              guided__iterations="2", pose__centred="true")  # fmt: skip
    # Reference: the simulated labels and poses, modulo the group; at 32 px a voxel at the particle's edge is 5°.
    found = scores(run, compositions[0], capsys)
    assert found["symmetry"] == "D2"
    assert found["class_accuracy"] > 0.95
    assert max(found["class_rotation_error_median_deg"]) < 2.5
    for number in (1, 2):
        volume = torch.from_numpy(read_map(str(run / f"class{number}" / "map.mrc"))[0])
        assert _least_agreement(volume, "D2") > 0.99  # only interpolation is left


def test_rounds_over_all_poses_keep_the_axes(compositions: tuple[Path, str], tmp_path: Path) -> None:
    """Maps of docked classes are symmetric about the common map's axes, whatever the poses of a batch."""
    config = load_config(None, START | {"run.data": compositions[1], "run.out": str(tmp_path), "train.symmetry": "D2",
                                        "train.class_mode": "docked"})  # fmt: skip
    store, run = ParticleStore.open(compositions[1]), RunFolder(str(tmp_path))
    context = RunContext.of(config, store, run, World(), torch.device("cpu"))
    stage = ClassMaps(context, Learned(ParticleState(run, store.count)))
    reader = ParticleReader(context)
    (batch,) = next(iter(reader.batches(stage.request())))
    reader.close()
    near, rotation = batch.within(stage.radius), random_rotations(len(batch), torch.Generator().manual_seed(1))
    shift, one = torch.zeros(len(batch), 2), torch.ones(len(batch))
    weighted = ctf_weighted(near.transforms, near.ctf)
    stage._sums.add(weighted, rotation, shift, one, batch.half, near.pixels, torch.arange(len(batch)) % 2)
    stage._step = stage._steps  # the given maps stand no more
    for number, volume in enumerate(stage._solved(0)):
        assert all(_least_agreement(one, "D2") > 0.99 for one in (volume, *stage._halves(number)))


def _learned(maps: list[Tensor]) -> Any:
    """References of classes, a little noise in each half."""
    generator = torch.Generator().manual_seed(2)
    noisy = [torch.stack([one + 0.02 * one.std() * torch.randn(one.shape, generator=generator) for _ in (1, 2)])
             for one in maps]  # fmt: skip
    references = ReferenceSet.of_maps(torch.stack(noisy), PIXEL_SIZE, noise=torch.ones(BOX // 2 + 1), radius=12.0)
    return SimpleNamespace(references=references, notes=())


def test_each_class_is_laid_onto_its_own_axes() -> None:
    """One that does not have the group is named; where none has it, the group is refused."""
    group, turns = PointGroup.of("C3"), random_rotations(2, torch.Generator().manual_seed(4))
    turned = [
        apply_alignment(symmetrised_map(blobs(BOX, seed), group), Alignment(turn, False, torch.zeros(3), 1.0))
        for seed, turn in zip((1, 3), turns, strict=True)
    ]
    empty = torch.zeros(BOX, BOX, BOX)
    context: Any = SimpleNamespace(
        point_group=group, world=World(), solvent=None, device=torch.device("cpu"),
        config=SimpleNamespace(run=SimpleNamespace(data="store.zarr")),
    )  # fmt: skip
    learned = _learned([*turned, empty, blobs(BOX, 5)])
    put_on_axes(context, learned)
    for number in (0, 1, 3):
        for half in learned.references.maps[number]:
            assert _least_agreement(half, "C3") > 0.99
    # What has the axes is what it was, laid elsewhere.
    for number, before in enumerate(turned):
        assert float(learned.references.mean(number).std() / before.std()) == pytest.approx(1.0, abs=0.05)
    assert not learned.references.maps[2].any()
    (note,) = learned.notes
    assert note.startswith("class 4 of the start agrees with itself under C3 at 0.")
    assert "may be junk" in note
    with pytest.raises(TrainingError, match=r"store.zarr: class \d of the start agrees with itself under C3 at 0\.\d"):
        put_on_axes(context, _learned([blobs(BOX, 5), blobs(BOX, 7)]))
