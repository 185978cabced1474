"""The E-step of a search: images that say little get many modes, each with its share; the others their pose alone."""

from pathlib import Path

import mrcfile
import pytest
import torch

from scalecryo.commands import convert, simulate
from scalecryo.config import load_config
from scalecryo.data.formats.relion import read_poses
from scalecryo.data.selection.partition import PARTS
from scalecryo.data.storage.store import ParticleStore
from scalecryo.distributed.world import World
from scalecryo.map.image_groups import ImageGroups
from scalecryo.map.reference import ReferenceSet
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import PoseEstimates
from scalecryo.physics.rotation import geodesic_angle
from scalecryo.runs.folder import RunFolder
from scalecryo.train.particle_source import BatchRequest, ParticleReader, RunContext
from scalecryo.train.particle_state import ParticleState
from scalecryo.train.stage import Learned
from scalecryo.train.stages import batch_poses
from scalecryo.train.stages.batch_poses import BatchPoses
from scalecryo.train.stages.iteration import Iteration
from scalecryo.train.stages.schedule import IterationPlan
from tests.support.blobs import blobs

COUNT, BOX, PIXEL_SIZE = 120, 32, 4.0
PLAN = IterationPlan(12.0, BOX, True, 3, 10.0, thin_radius=12.0)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy particles of blobs, and their store."""
    folder = tmp_path_factory.mktemp("little")
    with mrcfile.new(folder / "map.mrc", blobs(BOX, 1).numpy()) as handle:
        handle.voxel_size = PIXEL_SIZE
    simulate.run(str(folder / "map.mrc"), str(folder / "data"), n=COUNT, box=BOX, pixel_size=PIXEL_SIZE, snr_db=-6.0,
                 defocus_um=(0.8, 1.6), astigmatism_um=0.05, shift_a=2.0, seed=2)  # fmt: skip
    convert.run(str(folder / "data" / "truth.star"), str(folder / "store.zarr"), data_dir=None, box=None,
                dtype="float16", workers=1, overwrite=False, invert=False, uninvert=True)  # fmt: skip
    return folder


def begun(simulated: Path, run: Path) -> tuple[RunContext, Learned, ReferenceSet, ParticleImages, PoseEstimates]:
    """A run's context, what it knows, the true map as both halves, one batch of all, and its true poses."""
    settings = {"run.data": str(simulated / "store.zarr"), "run.out": str(run), "guided.shift_radius_a": "6"}
    store, folder = ParticleStore.open(settings["run.data"]), RunFolder(str(run))
    context = RunContext.of(load_config(None, settings), store, folder, World(), torch.device("cpu"))
    learned = Learned(ParticleState(folder, COUNT), groups=ImageGroups(store.box_size, context.device))
    truth = mrcfile.read(simulated / "data" / "truth.mrc").copy()
    noise = torch.full((BOX // 2 + 1,), float((truth**2).mean()) * 40)
    references = ReferenceSet.of_maps(torch.from_numpy(truth).expand(1, 2, -1, -1, -1), PIXEL_SIZE, noise=noise,
                                      radius=12.0)  # fmt: skip
    pixels = context.pixels(BOX, PLAN.insertion_radius)
    reader = ParticleReader(context)
    (batch,) = next(iter(reader.batches(BatchRequest((pixels,), COUNT, shuffled=False))))
    reader.close()
    true, one = read_poses(str(simulated / "data" / "truth.star")), torch.ones(len(batch))
    assert true.shift is not None
    rotation, shift = (torch.from_numpy(values).float()[batch.rows] for values in (true.rotation, true.shift))
    return context, learned, references, batch, PoseEstimates(rotation, shift, one.long() * 0, one, one, one, one)


def test_only_images_that_say_little_have_several_modes(
    simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, learned, references, batch, truth = begun(simulated, tmp_path)
    pixels = batch.pixels
    parts = [references] * PARTS
    seen = torch.ones(len(batch), dtype=torch.bool)
    known = BatchPoses(PLAN, 1, context, learned, references, parts, pixels, ())
    gain = known.whole.known_gain(batch, truth)
    monkeypatch.setattr(batch_poses, "THIN", float(gain.median()))
    posed = BatchPoses(PLAN, 1, context, learned, references, parts, pixels, ()).estimate(batch, truth, seen)
    little = gain < gain.median()
    assert posed.share is not None
    assert (posed.share[~little] == 1).all()
    total = posed.share.clone()
    for rows, mode in posed.others:
        assert little[rows].all()
        total.index_add_(0, rows, mode.confidence)
    torch.testing.assert_close(total, torch.ones(len(batch)), rtol=0, atol=1e-5)
    assert (posed.share[little] < 0.999).any()
    # Reference: the poses that the images were made with; at 12 Fourier pixels of 32 px a voxel at the edge is 5°.
    assert float(geodesic_angle(posed.found.rotation, truth.rotation)[~little].median()) < 5


def test_modes_enter_the_sums_with_the_weight_of_one_image(simulated: Path, tmp_path: Path) -> None:
    context, learned, references, batch, truth = begun(simulated, tmp_path)
    learned.particles.begin("before")
    learned.particles.note(batch.rows, truth, batch.half)
    learned.particles.commit(World())
    denominators = []
    for thin in (False, True):
        plan = IterationPlan(12.0, BOX, True, 3, 10.0, thin=thin, thin_radius=12.0)
        iteration = Iteration(plan, 0, context, learned, references, None, None, (), None, None)
        iteration.step(batch)
        denominators.append(iteration._sums.denominator.double().sum((0, 2, 3, 4)))
    # The weight of an image is its CTF's power, whichever poses it is inserted at: but for what interpolation puts on
    # the planes that are stored twice (2 %), and the images that seem to be none, which are others by the other search.
    torch.testing.assert_close(denominators[1], denominators[0], rtol=0.05, atol=0)
