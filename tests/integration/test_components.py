"""Continuous variety end to end: two conformations are recovered, resumed, the same from two workers."""

import threading
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import starfile
import torch

from scalecryo.commands import assign, convert, export, select, simulate
from scalecryo.config import load_config
from scalecryo.data.formats.mrc import write_map
from scalecryo.data.formats.plainpickle import load as load_pickle
from scalecryo.data.io import urls
from scalecryo.data.storage.store import ParticleStore
from scalecryo.distributed.world import World
from scalecryo.errors import ConfigError
from scalecryo.physics.mask import soft_sphere
from scalecryo.runs.folder import RunFolder
from scalecryo.train import recipes
from scalecryo.train.loop import run_stages
from scalecryo.train.particle_source import RunContext
from scalecryo.train.recipes import stages_of
from scalecryo.train.stage import Learned
from scalecryo.train.stages import classification, latent_encoding, state_maps, state_poses
from scalecryo.train.stages import components as stage
from tests.support.blobs import blobs
from tests.support.thread_world import ThreadWorld

BOX, PIXEL_SIZE, COUNT = 16, 4.0, 600


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder's error is measured elsewhere."""
    monkeypatch.setattr(latent_encoding, "STEPS", 60)


@pytest.fixture(scope="module")
def particles(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, torch.Tensor, torch.Tensor, np.ndarray]:
    """Noisy images of a mean ± a component: their store, both maps, and each particle's sign."""
    folder = tmp_path_factory.mktemp("components")
    mean, component = blobs(BOX, 1), blobs(BOX, 2, count=4) * soft_sphere(BOX, 4)
    component = 0.8 * (component - mean * (component * mean).sum() / mean.square().sum())  # no change of contrast
    for name, sign in (("a.mrc", 1), ("b.mrc", -1)):
        write_map(str(folder / name), (mean + sign * component).numpy(), PIXEL_SIZE)
    simulate.run(str(folder / "a.mrc"), str(folder / "data"), n=COUNT, box=BOX, pixel_size=PIXEL_SIZE, snr_db=0,
                 defocus_um=None, astigmatism_um=0.0, shift_a=2.0, seed=3, mix=(str(folder / "b.mrc"),))  # fmt: skip
    convert.run(str(folder / "data" / "truth.star"), str(folder / "store.zarr"), data_dir=None, box=None,
                dtype="float32", workers=1, overwrite=False, invert=False, uninvert=True)  # fmt: skip
    label = starfile.read(folder / "data" / "truth.star")["particles"]["rlnClassNumber"].to_numpy()
    return str(folder / "store.zarr"), mean, component, np.where(label == 1, 1, -1)


def learn(data: str, out: Path, world: World | None = None, stages: int = 6, first: int = 1, **more: str) -> Learned:
    """The map's gradient descent plays no part but for a checkpoint; it is left out."""
    settings = {"run.data": data, "run.out": str(out), "pose.source": "known", "train.steps": "1",
                "train.components": "2", **more}  # fmt: skip
    config, run = load_config(None, settings), RunFolder(str(out))
    if world is None or world.is_leader:
        run.create(config, resume=True)
    context = RunContext.of(config, ParticleStore.open(data), run, world or World(), torch.device("cpu"))
    made, learned = stages_of(context)
    run_stages(made[first:stages], context)
    return learned


def test_two_conformations_are_found_and_told_apart(
    particles: tuple[str, torch.Tensor, torch.Tensor, np.ndarray], tmp_path: Path
) -> None:
    data, _, component, sign = particles
    learned = learn(data, tmp_path / "run")
    coordinates = learned.coordinates
    assert coordinates is not None
    assert coordinates.passing == 1
    assert coordinates.mixture is not None
    assert len(coordinates.mixture) == 2
    z = coordinates.z[:, 0] * np.sign(np.corrcoef(coordinates.z[:, 0], sign)[0, 1])
    # Posterior means of a coordinate of unit variance correlate with it by sqrt(1 − sd²).
    expected = np.sqrt(1 - np.square(coordinates.sd[:, 0]).mean())
    assert np.corrcoef(z, sign)[0, 1] == pytest.approx(expected, abs=0.03)
    with mrcfile.open(tmp_path / "run" / "components" / "component1.mrc") as file:
        found = torch.from_numpy(file.data.copy())
    alike = float((found * component).sum() / (found.norm() * component.norm()))
    assert abs(alike) > 0.9
    table = starfile.read(tmp_path / "run" / "particles.star")["particles"]
    state = table["scalecryoState"].to_numpy()
    assert abs(np.corrcoef(state, sign)[0, 1]) > 0.85
    np.testing.assert_array_equal(table["rlnClassNumber"], state)
    assert "Continuous variety" in (report := (tmp_path / "run" / "report.html").read_text())
    assert "coordinates of particles that it has not learnt from correlate by" in report
    assert coordinates.encoder is not None
    correlation, error = coordinates.encoder
    # Sixty steps of half of a hundred images: what it says has to do with the truth, and what is said of it is so.
    assert correlation[0] > 0.5
    assert error[0] < 1
    for name in ("states/state2/half1.mrc", "components/traversal1/09.mrc", "scree.png", "latent.png"):
        assert (tmp_path / "run" / name).exists()
    assert (tmp_path / "run" / "film1.png").exists()
    assert not (tmp_path / "run" / "film2.png").exists()  # no component that does not pass
    points = np.loadtxt(tmp_path / "run" / "tb" / "projector" / "components" / "points.tsv")
    np.testing.assert_allclose(points, coordinates.z, rtol=1e-3, atol=1e-4)  # five digits
    select.run(str(tmp_path / "run"), str(tmp_path / "two.star"), query="state == 2")
    assert len(starfile.read(tmp_path / "two.star")["particles"]) == (state == 2).sum()
    export.run(str(tmp_path / "run"), format="cryodrgn", out=str(tmp_path / "drgn"))
    np.testing.assert_allclose(load_pickle(urls.read_bytes(str(tmp_path / "drgn" / "z.pkl")), "z.pkl"),
                               coordinates.z, atol=1e-5)  # fmt: skip
    exported = starfile.read(tmp_path / "drgn" / "particles.star")["particles"]
    np.testing.assert_array_equal(exported["rlnClassNumber"], state)
    export.run(str(tmp_path / "run"), format="cryosparc", out=str(tmp_path / "cs"))
    rows = np.load(tmp_path / "cs" / "particles.cs")
    np.testing.assert_allclose(rows["components_mode_1/value"], coordinates.z[:, 1], atol=1e-5)
    np.testing.assert_array_equal(rows["alignments3D/class"], state - 1)  # cryoSPARC counts from 0


def test_maps_of_states_are_the_same_however_few_sums_a_pass_holds(
    particles: tuple[str, torch.Tensor, torch.Tensor, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, mean, component, sign = particles
    learned = learn(data, tmp_path / "run", stages=5)
    coordinates = learned.coordinates
    assert coordinates is not None
    context = RunContext.of(
        load_config(None, {"run.data": data, "run.out": str(tmp_path / "run"), "pose.source": "known"}),
        ParticleStore.open(data), RunFolder(str(tmp_path / "run")), World(), torch.device("cpu"),
    )  # fmt: skip
    # A sign has unit variance, as the coordinate has: the two structures lie at 1 and −1.
    side = np.sign(np.corrcoef(coordinates.z[:, 0], sign)[0, 1])
    centres = np.array([[side, 0.0], [-side, 0.0]])
    found = []
    for held in (1 << 30, 1):
        monkeypatch.setattr(state_maps, "BYTES", held)
        made = state_maps.StateMaps(context, learned, centres, np.full(2, 150.0))
        run_stages([made], context)
        found.append(made.references.maps)
    # All kernels in one pass, and each in one of its own: the same sums in another order.
    assert found[0] == pytest.approx(found[1], abs=1e-5 * float(found[0].abs().max()))
    first, second = found[0].mean(1)
    # Reference: the true maps, mean ± component, which are at right angles; images are in units of the noise.
    scale = float(((first + second) / 2 * mean).sum() / mean.square().sum())
    apart = float(((first - second) / 2 * component).sum() / component.square().sum())
    assert apart / scale == pytest.approx(1.0, abs=0.3)
    for volume, true in ((first, mean + component), (second, mean - component)):
        assert float(torch.corrcoef(torch.stack([volume, true]).flatten(1))[0, 1]) > 0.95


def test_an_assignment_places_particles_of_another_store(
    particles: tuple[str, torch.Tensor, torch.Tensor, np.ndarray], tmp_path: Path
) -> None:
    """A part of the same particles, as a store of its own: what they are does not depend on which others are there."""
    data = particles[0]
    run = tmp_path / "run"
    learned = learn(data, run, first=0)
    assert learned.coordinates is not None
    source = Path(data).parent / "data" / "truth.star"
    np.savetxt(tmp_path / "rows.txt", np.arange(100, 300), fmt="%d")
    part, table = str(tmp_path / "part.star"), tmp_path / "placed" / "particles.star"
    select.run(str(source), part, index=str(tmp_path / "rows.txt"))
    convert.run(part, str(tmp_path / "part.zarr"), data_dir=str(source.parent), box=None, dtype="float32",
                workers=1, overwrite=False, invert=False, uninvert=True)  # fmt: skip
    assign.run(str(run), data=str(tmp_path / "part.zarr"), out=str(tmp_path / "placed"))
    placed, whole = (starfile.read(path)["particles"] for path in (table, run / "particles.star"))
    whole = whole.iloc[100:300]
    z, before = placed["scalecryoComponent1"].to_numpy(), whole["scalecryoComponent1"].to_numpy()
    # Each half has a mean of its own, and a store deals its particles out to halves by itself.
    same = placed["rlnRandomSubset"].to_numpy() == whole["rlnRandomSubset"].to_numpy()
    assert 0 < same.sum() < 200
    np.testing.assert_allclose(z[same], before[same], atol=1e-3)
    assert np.corrcoef(z, before)[0, 1] > 0.98
    state = placed["rlnClassNumber"].to_numpy()
    assert (state == placed["scalecryoState"]).all()
    assert (state == whole["rlnClassNumber"].to_numpy()).mean() > 0.97
    assert "Latent space" in (tmp_path / "placed" / "report.html").read_text()
    select.run(str(tmp_path / "placed"), str(tmp_path / "two.star"), query="state == 2")
    assert len(starfile.read(tmp_path / "two.star")["particles"]) == (state == 2).sum()


def test_poses_are_refined_with_the_components(
    particles: tuple[str, torch.Tensor, torch.Tensor, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a refinement's poses; the table gets them, and a run that goes on after a kill finds the same.

    Poses that came to rest in one round are not refined in a second.
    """
    monkeypatch.setattr(recipes, "ROUNDS", 2)
    monkeypatch.setattr(state_poses, "SAME", 1e6)
    monkeypatch.setattr(stage, "PASSES", 6)
    data, _, _, sign = particles
    given = {"pose.source": "guided", "guided.start": "poses", "guided.iterations": "1", "guided.encoder_steps": "0"}
    settings = {"run.data": data, "run.out": str(tmp_path / "run"), "train.components": "2", **given}
    found = []
    for killed_before in (6, 11):  # the second round; the end
        config, run = load_config(None, settings), RunFolder(str(tmp_path / "run"))
        run.create(config, resume=True)
        context = RunContext.of(config, ParticleStore.open(data), run, World(), torch.device("cpu"))
        made, learned = stages_of(context)
        assert [one.name for one in made[3:7]] == [
            "components", "poses of states, round 1", "components, round 1", "poses of states, round 2"
        ]  # fmt: skip
        if found:  # the start and the refinement stand in a checkpoint; the final pass, in parts
            learned.references = found[0].references
        run_stages(made[2 if found else 0 : killed_before], context)
        found.append(learned)
        assert learned.components is not None
        assert learned.components.rounds == 1
    first, again = found
    assert again.coordinates is not None
    assert abs(np.corrcoef(again.coordinates.z[:, 0], sign)[0, 1]) > 0.8
    assert first.posed is not None
    assert again.posed is not None
    poses = again.posed.all()[0]
    torch.testing.assert_close(poses.rotation, first.posed.all()[0].rotation)
    table = starfile.read(tmp_path / "run" / "particles.star")["particles"]
    np.testing.assert_allclose(table["rlnOriginXAngst"], -poses.shift[:, 0], atol=1e-4)
    parts = tmp_path / "run" / "particles"
    assert not [path for path in parts.glob("*") if "states" in path.name or "final" in path.name]
    assign.run(str(tmp_path / "run"), data=None, out=None)  # the components stay, the poses are made anew
    anew = starfile.read(tmp_path / "run" / "particles.star")["particles"]
    assert np.corrcoef(anew["scalecryoComponent1"], again.coordinates.z[:, 0])[0, 1] > 0.98


def test_no_component_passes_where_there_is_one_structure(
    particles: tuple[str, torch.Tensor, torch.Tensor, np.ndarray], tmp_path: Path
) -> None:
    data, _, _, sign = particles
    np.savetxt(tmp_path / "rows.txt", np.flatnonzero(sign == 1), fmt="%d")
    learned = learn(data, tmp_path / "run", **{"train.index": str(tmp_path / "rows.txt")})
    assert learned.coordinates is not None
    assert learned.coordinates.passing == 0
    assert "no component passes" in (tmp_path / "run" / "report.html").read_text()
    assert not (tmp_path / "run" / "states").exists()
    assert "scalecryoState" not in (tmp_path / "run" / "particles.star").read_text()


def test_two_workers_and_a_killed_run_find_the_same(
    particles: tuple[str, torch.Tensor, torch.Tensor, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = particles[0]
    monkeypatch.setattr(stage, "PASSES", 4)
    one = learn(data, tmp_path / "one", stages=4)
    worlds, found = ThreadWorld.of(2), {}

    def work(rank: int) -> None:
        found[rank] = learn(data, tmp_path / "two", worlds[rank], stages=4)

    workers = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    again = learn(data, tmp_path / "one", stages=4)  # takes up the file that the first one left
    assert one.components is not None
    for other in (found[0], found[1], again):
        assert other.components is not None
        assert other.coordinates is not None
        # Sums of 600 images in another order, single precision, five passes.
        torch.testing.assert_close(other.components.components, one.components.components, rtol=0, atol=1e-3)
        np.testing.assert_allclose(other.coordinates.z, one.coordinates.z, atol=1e-2)  # type: ignore[union-attr]


def test_two_workers_tell_classes_apart_as_one_does(
    particles: tuple[str, torch.Tensor, torch.Tensor, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two conformations as classes at imported poses: maps of both, and the labels, by one and by two workers."""
    monkeypatch.setattr(classification, "STARTS", 2)
    monkeypatch.setattr(classification, "MOST_PASSES", (3, 2))

    def sorted_(out: Path, world: World) -> Learned:
        settings = {"run.data": particles[0], "run.out": str(out), "guided.start": "poses", "train.classes": "2"}
        config, run = load_config(None, settings), RunFolder(str(out))
        if world.is_leader:
            run.create(config, resume=True)
        store = ParticleStore.open(config.run.data)
        made, learned = stages_of(RunContext.of(config, store, run, world, torch.device("cpu")))
        run_stages(made[:2], RunContext.of(config, store, run, world, torch.device("cpu")))
        return learned

    one = sorted_(tmp_path / "one", World())
    assert one.references is not None
    found = {}
    workers = [
        threading.Thread(target=lambda own=own: found.update({own.rank: sorted_(tmp_path / "two", own)}))
        for own in ThreadWorld.of(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for other in found.values():
        assert other.references is not None
        # Sums in another order, single precision, a few passes; a few images that lie between the classes may change.
        torch.testing.assert_close(other.references.maps, one.references.maps, rtol=0, atol=1e-3)
        labels = [learned.particles.all()[0].class_index for learned in (one, other)]
        assert float((labels[0] == labels[1]).float().mean()) > 0.99


def test_components_of_several_or_symmetric_structures_are_refused() -> None:
    for other in ({"train.classes": "2"}, {"train.symmetry": "C3"}):
        with pytest.raises(ConfigError, match=r"train\.components"):
            load_config(None, {"train.components": "2", **other})
