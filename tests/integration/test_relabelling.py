"""Labels of the classes of one assembly, told once more at poses that were refined class by class."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from scalecryo.config import load_config
from scalecryo.data.formats.relion import CLASS, OwnColumns, read_poses
from scalecryo.data.storage.store import ParticleStore
from scalecryo.distributed.world import World
from scalecryo.evaluate.align import Alignment
from scalecryo.evaluate.align_maps import apply_alignment
from scalecryo.map.reference import ReferenceSet
from scalecryo.physics.poses import PoseEstimates
from scalecryo.physics.rotation import geodesic_angle, rotation_from_vector
from scalecryo.runs.folder import RunFolder
from scalecryo.train.loop import run_stages
from scalecryo.train.particle_source import RunContext
from scalecryo.train.particle_state import ParticleState
from scalecryo.train.stage import Learned
from scalecryo.train.stages.on_axes import moved_poses
from scalecryo.train.stages.relabelling import Relabelling
from tests.support.mixtures import BOX, COUNT, PIXEL_SIZE, START, compositions, simulated

JUNK = 20  # particles that no map is to be made of


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two compositions, and a store of their particles."""
    folder = tmp_path_factory.mktemp("compositions")
    return folder / "data", simulated(folder, compositions(), "particles")


def refined(data: tuple[Path, str], folder: Path) -> tuple[RunContext, Learned, PoseEstimates, Tensor, Alignment]:
    """A run at the end of its refinement, the second class's frame turned; the true poses and labels; that turn.

    A quarter of the labels is wrong, half of them believed in, and those particles have poses in the wrong class's
    frame.
    """
    store, run = ParticleStore.open(data[1]), RunFolder(str(folder))
    config = load_config(None, START | {"run.data": data[1], "run.out": str(folder), "train.class_mode": "docked"})
    context = RunContext.of(config, store, run, World(), torch.device("cpu"))
    learned = Learned(ParticleState(run, COUNT))
    truth, table = read_poses(str(data[0] / "truth.star")), data[0] / "truth.star"
    labels = torch.from_numpy(OwnColumns(table.read_bytes(), str(table)).numbers(CLASS)).long() - 1
    turn = Alignment(rotation_from_vector(torch.tensor([0.0, 0.03, 0.02])), False, torch.tensor([0.5, 0.0, -0.3]), 1.0)
    whole, part = compositions()
    maps = torch.stack([torch.stack([volume] * 2) for volume in (whole, apply_alignment(part, turn))])
    shares = torch.tensor([0.5, 0.5])
    learned.references = ReferenceSet.of_maps(
        maps, PIXEL_SIZE, noise=torch.ones(BOX // 2 + 1), radius=12.0, shares=shares
    )
    one, rows = torch.ones(COUNT), torch.arange(COUNT)
    given = torch.where(rows % 4 == 3, 1 - labels, labels)
    fits = torch.where(rows < JUNK, 0.0, 1.0)
    sure = torch.where(rows % 8 == 3, 0.7, 1.0)
    right = PoseEstimates(torch.from_numpy(truth.rotation).float(), torch.zeros(COUNT, 2), given, sure, one, fits, one)
    known, second = right, (given == 1).nonzero()[:, 0]
    known = known.put(second, moved_poses(right.select(second), turn, PIXEL_SIZE))
    learned.particles.begin("refined")
    learned.particles.note(rows, known, 1 + rows % 2)
    learned.particles.commit(World())
    return context, learned, right, labels, turn


def test_wrong_labels_are_told_and_poses_follow(data: tuple[Path, str], tmp_path: Path) -> None:
    # Reference: what was simulated.
    context, learned, right, labels, turn = refined(data, tmp_path)
    stage = Relabelling(context, learned)
    run_stages([stage], context)
    found, seen = learned.particles.read(torch.arange(COUNT))
    assert bool(seen.all())
    assert learned.labels_stay
    particle = torch.arange(COUNT) >= JUNK
    assert float((found.class_index == labels)[particle].float().mean()) > 0.98
    # Of every particle the pose is the true one in the frame of the class that it has now.
    for number in (0, 1):
        own = (found.class_index == number).nonzero()[:, 0]
        true = right.select(own) if number == 0 else moved_poses(right.select(own), turn, PIXEL_SIZE)
        # The frames are found by maps that differ: well within the 3.6° that move the outermost pixel by one, and
        # nearer than the 2.1° and half a pixel that they differ by. Local refinement comes next.
        off = geodesic_angle(found.rotation[own], true.rotation)
        assert float(off.max()) < 1.2
        assert float((found.shift[own] - true.shift).abs().max()) < 0.25 * PIXEL_SIZE


def test_particles_without_a_pose_get_no_label(data: tuple[Path, str], tmp_path: Path) -> None:
    context, learned, right, _, _ = refined(data, tmp_path)
    learned.particles = ParticleState(RunFolder(str(tmp_path / "new")), COUNT)
    some = torch.arange(COUNT // 2)
    learned.particles.begin("refined")
    learned.particles.note(some, right.select(some), 1 + some % 2)
    learned.particles.commit(World())
    run_stages([Relabelling(context, learned)], context)
    _, seen = learned.particles.read(torch.arange(COUNT))
    assert torch.equal(seen.nonzero()[:, 0], some)
