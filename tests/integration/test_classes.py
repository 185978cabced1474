"""Several structures at once, from simulated mixtures to the tables of other packages."""

import copy
import logging
import shutil
import threading
from contextlib import nullcontext
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import starfile
import torch

from scalecryo.commands import export, select
from scalecryo.config import load_config
from scalecryo.data.formats import csrows
from scalecryo.data.formats.relion import read_poses
from scalecryo.data.storage.store import ParticleStore
from scalecryo.distributed.world import World
from scalecryo.map.reference import ReferenceSet
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import PoseEstimates
from scalecryo.runs.folder import RunFolder
from scalecryo.train.particle_source import ParticleReader, RunContext
from scalecryo.train.particle_state import ParticleState
from scalecryo.train.stage import Learned
from scalecryo.train.stages.class_maps import ClassMaps
from scalecryo.train.stages.class_splits import ClassSplits
from tests.support.blobs import blobs
from tests.support.mixtures import BOX, COUNT, PIXEL_SIZE, START, compositions, run_train, scores, simulated
from tests.support.thread_world import ThreadWorld


@pytest.fixture(scope="module")
def species(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two unrelated structures."""
    folder = tmp_path_factory.mktemp("species")
    return folder / "data", simulated(folder, [blobs(BOX, 1), blobs(BOX, 3)], "particles")


@pytest.fixture(scope="module")
def finished(species: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("classes") / "run"
    run_train(species[1], run, guided__iterations="3", **{key.replace(".", "__"): v for key, v in START.items()})
    return run


def test_two_structures_are_told_apart_from_nothing(
    finished: Path, species: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    # Reference: the simulated labels and poses. At 32 px a voxel at the particle's edge is 5°.
    found = scores(finished, species[0], capsys)
    assert found["class_accuracy"] > 0.98
    assert max(found["class_rotation_error_median_deg"]) < 2.5
    assert sorted(found["class_partner"]) == [1, 2]
    # Blobs of 1.5 px have 2 % of their amplitude left at 13 Å, shell 10 of 16.
    assert max(found["class_fsc_0.5_angstrom"]) < 16


def test_each_class_has_its_maps_and_the_first_is_the_largest(finished: Path) -> None:
    table = starfile.read(finished / "particles.star")["particles"]
    counts = table.rlnClassNumber.value_counts()
    assert counts[1] >= counts[2]
    assert table.scalecryoClassProbability.between(0.5, 1).all()
    for name in ("map.mrc", "map_unsharpened.mrc", "half1.mrc", "half2.mrc", "mask.mrc"):
        first, second, top = (mrcfile.read(finished / path / name) for path in ("class1", "class2", "."))
        assert np.array_equal(first, top)
        assert not np.array_equal(second, top)
    assert (finished / "class1" / "fsc.csv").read_text() == (finished / "fsc.csv").read_text()
    report = (finished / "report.html").read_text()
    assert "class 2: " in report
    assert "effective number of classes" in report


def test_classes_reach_other_packages(finished: Path, tmp_path: Path) -> None:
    table = starfile.read(finished / "particles.star")["particles"]
    select.run(str(finished), str(tmp_path / "two.star"), query="class == 2 and class_probability > 0.5")
    two = starfile.read(tmp_path / "two.star")["particles"]
    assert len(two) == (table.rlnClassNumber == 2).sum()
    export.run(str(finished), format="relion", out=str(tmp_path / "relion"))
    written = starfile.read(tmp_path / "relion" / "particles.star")["particles"]
    assert (written.rlnClassNumber == table.rlnClassNumber).all()
    assert (tmp_path / "relion" / "class2" / "map.mrc").exists()
    export.run(str(finished), format="cryosparc", out=str(tmp_path / "cs"))
    rows = csrows.read(str(tmp_path / "cs" / "particles.cs"), ())
    assert (rows["alignments3D/class"] == table.rlnClassNumber - 1).all()  # cryoSPARC counts from 0
    select.run(str(tmp_path / "cs" / "particles.cs"), str(tmp_path / "two.cs"), query="class == 2")
    assert len(csrows.read(str(tmp_path / "two.cs"), ())) == len(two)


def test_a_killed_run_of_several_classes_goes_on(finished: Path, species: tuple[Path, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for step in (2, 3):
        (run / "checkpoints" / f"step_{step:010d}.pt").unlink()
    for name in ("map.mrc", "class2/half1.mrc", "particles.star", "checkpoints/finished.json"):
        (run / name).unlink()
    run_train(species[1], run, resume=True)
    for name in ("class1/map.mrc", "class2/half1.mrc"):
        whole, resumed = ((path / name).read_bytes()[1024:] for path in (finished, run))
        assert whole == resumed  # past the header's date
    assert (finished / "particles.star").read_bytes() == (run / "particles.star").read_bytes()


def test_a_rare_composition_is_found_from_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Reference: the simulated labels. One particle in five lacks some blobs; the rounds over all poses keep the labels.
    data = simulated(tmp_path, compositions(), "particles", (80.0, 20.0))
    settings = {key.replace(".", "__"): value for key, value in START.items()} | {"guided__bootstrap_rounds": "3"}
    run_train(data, tmp_path / "run", train__class_mode="docked", guided__iterations="3", **settings)
    found = scores(tmp_path / "run", tmp_path / "data", capsys)
    assert found["class_accuracy"] > 0.95
    shares = np.sort(np.sum(found["class_confusion"], 0)) / COUNT
    assert 0.15 < shares[0] < 0.25
    # Killed before its end it tells the labels once more, and alike.
    table = tmp_path / "run" / "particles.star"
    whole = table.read_bytes()
    for name in ("particles.star", "map.mrc", "checkpoints/finished.json"):
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run" / "particles" / "class_labels")
    run_train(data, tmp_path / "run", resume=True)
    assert table.read_bytes() == whole


def test_labels_hold_while_poses_are_looked_at_anew(species: tuple[Path, str], tmp_path: Path) -> None:
    """Labelled particles keep their label, others get one by the maps at their pose; those never posed, and those that
    do not show the class of their label, enter no map."""
    config = load_config(None, START | {"run.data": species[1], "run.out": str(tmp_path), "train.class_mode": "docked"})
    store, run = ParticleStore.open(species[1]), RunFolder(str(tmp_path))
    context = RunContext.of(config, store, run, World(), torch.device("cpu"))
    learned = Learned(ParticleState(run, store.count), class_shares=(0.8, 0.2))
    truth = read_poses(str(species[0] / "truth.star"))
    labels = (
        torch.from_numpy(starfile.read(species[0] / "truth.star")["particles"].rlnClassNumber.to_numpy().copy()) - 1
    )
    rotation = torch.from_numpy(truth.rotation).float()
    maps = torch.stack([torch.stack([blobs(BOX, seed)] * 2) for seed in (1, 3)])
    learned.references = ReferenceSet.of_maps(maps, PIXEL_SIZE, noise=torch.ones(BOX // 2 + 1), radius=12.0)
    given, never = torch.arange(COUNT) % 3 == 0, torch.arange(COUNT) % 3 == 1
    probability = torch.where(given, 0.75, 1.0)  # 1: without a label
    one, rows = torch.ones(COUNT), torch.arange(COUNT)[~never]
    wrong = torch.where(given, 1 - labels, 0)
    junk = torch.arange(COUNT) % 5 == 0
    fits = torch.where(junk, 0.0, 1.0)
    poses = PoseEstimates(rotation, torch.zeros(COUNT, 2), wrong, probability, one, fits, one)
    learned.particles.begin("labels")
    learned.particles.note(rows, poses.select(rows), 1 + rows % 2)
    learned.particles.commit(World())
    stage = ClassMaps(context, learned)
    request = stage.request()
    assert request.batch_size == 200  # 2.5 times as many: a fifth of them is in the smaller class
    reader = ParticleReader(context)
    (batch,) = next(iter(reader.batches(request)))
    reader.close()
    share = stage._labels(batch)
    row = torch.arange(len(batch))
    blank = never[batch.rows] | (junk & given)[batch.rows]
    kept = given[batch.rows] & ~blank
    assert (share[blank] == 0).all()
    assert torch.allclose(share[row, 1 - labels[batch.rows]][kept], torch.tensor(0.75))
    assert float(share[row, labels[batch.rows]][~kept & ~blank].mean()) > 0.95


def test_compositions_are_told_apart_at_imported_poses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Reference: the simulated labels.
    data = simulated(tmp_path, compositions(), "truth")
    run_train(data, tmp_path / "run", train__classes="2", guided__start="poses", guided__iterations="2",
              pose__centred="true")  # fmt: skip
    found = scores(tmp_path / "run", tmp_path / "data", capsys)
    assert found["class_accuracy"] > 0.95
    assert max(found["class_rotation_error_median_deg"]) < 2.5


def start_of(data: str, folder: Path) -> tuple[ClassSplits, list[ParticleImages]]:
    """A start, and the batches of its first pass."""
    config = load_config(None, START | {"run.data": data, "run.out": str(folder)})
    store, run = ParticleStore.open(data), RunFolder(str(folder))
    context = RunContext.of(config, store, run, World(), torch.device("cpu"))
    start = ClassSplits(context, Learned(ParticleState(run, store.count)))
    reader = ParticleReader(context)
    batches = [images for (images,) in reader.batches(start.request())]
    reader.close()
    return start, batches


@pytest.mark.parametrize("paired", [False, True])
def test_two_workers_sum_what_one_does_and_a_saved_start_goes_on(
    species: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paired: bool
) -> None:
    # A switch of the whole process: each of two threads would put back what the other had set.
    monkeypatch.setattr("scalecryo.pose.search.tensor_cores", nullcontext)
    monkeypatch.setattr("scalecryo.pose.pair_scores.tensor_cores", nullcontext)
    whole, batches = start_of(species[1], tmp_path / "one")
    for images in batches[:2]:
        whole.step(images)
    # From here on each class has fresh maps beside its own.
    begin = ClassSplits._begin_pairs if paired else ClassSplits._begin_fresh
    begin(whole)
    for images in batches[2:4]:
        whole.step(images)
    state = copy.deepcopy(whole.state_dict())
    # What was saved goes on to the same bits.
    whole.step(batches[4])
    resumed, _ = start_of(species[1], tmp_path / "two")
    resumed.load_state_dict(state)
    resumed.step(batches[4])
    assert all(torch.equal(a, b) for a, b in zip(whole._tensors(), resumed._tensors(), strict=True))

    # Two workers with half of the batch each: the same sums but for their order (single precision).
    workers = []
    for world in ThreadWorld.of(2):
        worker, _ = start_of(species[1], tmp_path / f"worker{world.rank}")
        worker.load_state_dict(state)
        object.__setattr__(worker._context, "world", world)
        workers.append(worker)
    parts = [batches[4].select(torch.arange(len(batches[4])) % 2 == rank) for rank in (0, 1)]
    threads = [threading.Thread(target=w.step, args=(part,)) for w, part in zip(workers, parts, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, *two in zip(whole._tensors(), *(worker._tensors() for worker in workers), strict=True):
        for other in two:
            scale = float(one.abs().max())
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4 * scale)


def test_a_fresh_map_is_taken_where_it_is_better_beyond_the_error(species: tuple[Path, str], tmp_path: Path) -> None:
    start, batches = start_of(species[1], tmp_path)
    for images in batches[:2]:
        start.step(images)
    start._earlier = [1.0] * 5  # rounds that the classes had
    start._begin_fresh()
    start.step(batches[2])
    before = start._sums.numerator.clone()
    # Held-out images, their gain over the class's map (its sum, and that of its square), and that map's own. The second
    # fresh map of class 1 leads by ten standard errors; the best one of class 2 by one.
    (_, best), (same, worse) = (start._fresh[number] for number in (0, 1))
    for place, mean in ((best, 1.0), (same, 0.1), (worse, -3.0)):
        start._duels[place] = torch.tensor([100.0, 100 * mean, 100 * (mean**2 + 1), 2000.0])
    assert not start._compare(World())
    assert torch.equal(start._sums.numerator[0], before[best])
    assert torch.equal(start._sums.numerator[1], before[1])
    assert start._fresh == {1: [same]}  # gains more than before: goes on
    start._duels[same] = torch.tensor([100.0, 10.0, 101.0, 2000.0])
    start._earlier += [1.0, 1.0]
    assert not start._compare(World())  # has not grown: over; class 1 has to settle with its new map
    assert not start._fresh
    assert torch.equal(start._sums.numerator[1], before[1])
    assert start._over


def test_two_structures_in_one_class_are_parted_where_another_is_empty(
    species: tuple[Path, str], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Reference: the simulated labels. Without a second class from the first step on, one map holds both structures.
    monkeypatch.setattr("scalecryo.train.stages.class_start.SETTLED", 2.0)  # after three rounds
    monkeypatch.setattr(ClassSplits, "least_rounds", 3)
    start, _ = start_of(species[1], tmp_path)
    start._balance.give_up(0, torch.tensor([1]))
    reader = ParticleReader(start._context)
    caplog.set_level(logging.INFO)
    parted = 0  # in which round
    while not parted or len(start._earlier) < parted + 2:  # both learn on
        assert not start.done()
        for batch in reader.batches(start.request()):
            start.step(*batch)
        start.finish_pass(World())
        if not parted and not start._balance.gone[0].any():
            parted = len(start._earlier)
    assert "in two maps of their class over its one map: class 1: " in caplog.text
    labels = torch.from_numpy(starfile.read(species[0] / "truth.star")["particles"].rlnClassNumber.to_numpy().copy())
    right = []
    for (batch,) in reader.batches(start.request()):
        images = start._groups.corrected(batch)
        found = start._shares(images, 0, start._posterior(0)).argmax(1)
        right.append(found == labels[batch.rows] - 1)
    reader.close()
    share = float(torch.cat(right).float().mean())
    assert max(share, 1 - share) > 0.95


def test_a_class_of_one_structure_is_not_split(species: tuple[Path, str], tmp_path: Path) -> None:
    """Two maps of the same are a little better than one at times: whatever held-out images say, they are left."""
    start, batches = start_of(species[1], tmp_path)
    for images in batches[:4]:
        start.step(images)
    start._balance.give_up(0, torch.tensor([1]))
    start._begin_pairs()
    first, second = start._fresh[0]
    start._put(first, second)
    before = start._sums.numerator[0].clone()
    # Number of held-out images, their gain over the class's map (its sum, and that of its square), and that map's own.
    start._duels[first] = torch.tensor([10.0, 50.0, 251.0, 500.0])
    assert not start._compare(World())
    assert not start._paired
    assert start._fresh  # what follows
    assert torch.equal(start._sums.numerator[0], before)
    assert start._balance.gone[0].tolist() == [0, 1]
    start._fresh = {}
    start._begin_next()
    assert not start._paired  # not tried again
