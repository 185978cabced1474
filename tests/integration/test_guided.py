"""The guided method from random poses: it must converge, resume, split over workers, and refuse what holds nothing."""

import dataclasses
import json
from importlib.resources import as_file, files
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import starfile
import torch
from scipy.spatial.transform import Rotation
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scalecryo.commands import assign, convert, evaluate, simulate, train
from scalecryo.config import load_config
from scalecryo.data.formats.relion import read_poses
from scalecryo.distributed.world import World
from scalecryo.errors import StoreError, TrainingError
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import PoseEstimates
from scalecryo.runs.checkpoint import load_checkpoint
from scalecryo.runs.folder import RunFolder
from scalecryo.train import particle_state
from scalecryo.train.stages import bootstrap, final_pass
from scalecryo.train.stages.bootstrap import Bootstrap
from scalecryo.train.stages.final_poses import ReferencePoses
from tests.conftest import SimulatedParticles
from tests.support.gloo import train_by_workers

ROWS, EXTRA, BOX, PIXEL_SIZE = 1200, 100, 32, 3.2


def store_of(table: Path, store: Path) -> str:
    convert.run(str(table), str(store), data_dir=None, box=None, dtype="float16", workers=2, overwrite=False,
                invert=False, uninvert=True)  # fmt: skip
    return str(store)


@pytest.fixture(scope="module")
def particles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """1,300 noisy, shifted particles of 4AKE with CTF, and their store without poses."""
    folder = tmp_path_factory.mktemp("guided")
    with as_file(files("scalecryo.data") / "4ake.pdb.gz") as structure:
        simulate.run(str(structure), str(folder / "data"), n=ROWS + EXTRA, box=BOX, pixel_size=PIXEL_SIZE, snr_db=0.0,
                     defocus_um=(0.8, 1.6), astigmatism_um=0.05, shift_a=2.0, seed=3)  # fmt: skip
    return folder / "data", store_of(folder / "data" / "particles.star", folder / "store.zarr")


SETTINGS = {"train.rows": str(ROWS), "guided.shift_radius_a": "6", "guided.iterations": "6",
            "guided.bootstrap_steps": "40", "guided.bootstrap_rounds": "1", "guided.starts": "1"}  # fmt: skip
# On 300 images: nothing that needs a structure.
SHORT = {"train__rows": "300", "guided__bootstrap_steps": "8", "guided__bootstrap_rounds": "1",
         "guided__iterations": "4"}  # fmt: skip


def start(data: str, out: Path, *, resume: bool = False, **extra: str) -> None:
    overrides = SETTINGS | {key.replace("__", "."): value for key, value in extra.items()}
    if overrides.get("guided.start") == "poses":  # no bootstrap
        overrides = {
            key: overrides[key]
            for key in overrides.keys() - {"guided.bootstrap_steps", "guided.bootstrap_rounds", "guided.starts"}
        }
    train.run(None, data=data, out=str(out), workers="0", device="cpu", resume=resume, overrides=overrides)


@pytest.fixture(scope="module")
def finished(particles: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("guided_run") / "run"
    start(particles[1], run, monitor__truth=str(particles[0]))
    return run


def errors(run: Path, truth: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
    capsys.readouterr()
    evaluate.run(str(run), truth=str(truth))
    return json.loads(capsys.readouterr().out)


def test_it_converges_from_random_poses(
    finished: Path, particles: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    # Reference: the simulated truth. Bounds: at 32 px of 3.2 Å one voxel at the particle's edge (radius 12 px) is 4.6°;
    # poses within half of that and shifts within a quarter of a pixel leave the map's detail whole. 1,200 images.
    found = errors(finished, particles[0], capsys)
    assert found["rotation_error_mod_pseudosymmetry_median_deg"] < 2.3
    assert found["shift_error_median_px"] < 0.25
    assert found["fsc_0.5_shell"] > 12
    poses = read_poses(str(finished / "particles.star"))
    assert len(poses.names) == ROWS + EXTRA  # also those never trained on
    assert set(np.unique(poses.half)) == {1, 2}
    assert poses.confidence is not None
    assert 0.3 < np.median(poses.confidence) <= 1.0


def test_tensorboard_shows_the_refinement(finished: Path) -> None:
    events = EventAccumulator(str(finished / "tb"))
    events.Reload()
    tags = events.Tags()
    wanted = {"refinement/radius", "map/resolution", "speed/images_per_second", "speed/data_wait_share",
              "speed/images_per_second_slowest_worker", "memory/resident", "time/local_refinement", "speed/workers",
              "optimisation/encoder_loss", "refinement/likelihood_gain", "speed/stream_retries"}  # fmt: skip
    assert wanted <= set(tags["scalars"])
    assert {"poses/tilt", "poses/confidence", "speed/images_per_second_by_worker"} <= set(tags["histograms"])
    pictures = {"slice/z", "projection/x", "particles/observed_above_predicted", "map/surface", "map/fsc",
                "poses/views", "final/surface"}  # fmt: skip
    assert pictures <= set(tags["images"])
    shells = [event.step for event in events.Scalars("final_fsc/masked_corrected")]
    assert shells == list(range(len(shells)))
    assert "final/resolution" in tags["scalars"]
    assert len(shells) > 8
    assert [event.step for event in events.Scalars("refinement/radius")] == list(
        range(1, len(events.Scalars("refinement/radius")) + 1)
    )


def test_particles_never_trained_on_are_posed_as_well(
    finished: Path, particles: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The same bounds as for all of them.
    table = starfile.read(finished / "particles.star", always_dict=True)
    table["particles"] = table["particles"][ROWS:]
    starfile.write(table, tmp_path / "unseen.star")
    found = errors(tmp_path / "unseen.star", particles[0], capsys)
    assert found["rotation_error_mod_pseudosymmetry_median_deg"] < 2.3
    assert found["shift_error_median_px"] < 0.25


def test_a_killed_run_goes_on_as_if_nothing_had_happened(simulated: SimulatedParticles, tmp_path: Path) -> None:
    # A kill within iteration 3, after its poses were written and before its checkpoint was: iteration 3 is done again.
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    start(simulated.store, whole, **SHORT)
    start(simulated.store, cut, **SHORT | {"guided__iterations": "3", "train__final_pass": "false"})
    assert not (cut / "map.mrc").exists()
    (cut / "checkpoints" / "step_0000000003.pt").unlink()
    start(simulated.store, cut, resume=True, **SHORT | {"train__final_pass": "true"})
    for name in ("map.mrc", "half1.mrc"):
        assert (whole / name).read_bytes()[1024:] == (cut / name).read_bytes()[1024:]  # past the header's date
    first, second = (read_poses(str(run / "particles.star")) for run in (whole, cut))
    assert np.array_equal(first.rotation, second.rotation)
    curves = ([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (whole, cut))
    left, right = ([(row["step"], row["halves/fsc_mean"], row.get("encoder_loss")) for row in rows] for rows in curves)
    assert left == right
    assert left[-1][2] is not None


def test_a_start_that_was_killed_goes_on(
    particles: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in its second round, it is taken up at its last save and ends in the same maps bit for bit.

    The first round has 8 steps; it is judged again, and chooses the same two maps.
    """
    options = {"guided__iterations": "1", "guided__encoder_steps": "0", "train__final_pass": "false",
               "guided__bootstrap_steps": "8", "guided__bootstrap_rounds": "2"}  # fmt: skip
    seen: list[int] = []
    learn = Bootstrap._learn

    def until(deadly: int) -> None:
        def noted(self: Bootstrap, batch: ParticleImages, world: World) -> None:
            if len(seen) == deadly:
                raise KeyboardInterrupt
            learn(self, batch, world)
            seen.append(self._step + 1)

        monkeypatch.setattr(Bootstrap, "_learn", noted)

    until(1_000_000)
    start(particles[1], tmp_path / "whole", **options)
    whole = len(seen)
    assert whole == 16
    assert seen == list(range(1, whole + 1))
    seen.clear()
    until(10)
    with pytest.raises(KeyboardInterrupt):
        start(particles[1], tmp_path / "cut", **options)
    until(1_000_000)
    start(particles[1], tmp_path / "cut", resume=True, **options)
    assert seen == [*range(1, 11), *range(9, whole + 1)]
    first, second = (
        load_checkpoint(RunFolder(str(tmp_path / name)), store_hash=None, recipe="guided") for name in ("whole", "cut")
    )
    assert first is not None
    assert second is not None
    assert first.stage == second.stage == "refinement"
    assert torch.equal(first.state["references"]["maps"], second.state["references"]["maps"])


def test_assign_of_a_guided_run(finished: Path, particles: tuple[Path, str], tmp_path: Path) -> None:
    assign.run(str(finished), data=None, out=str(tmp_path / "again"))
    first, second = (read_poses(str(path / "particles.star")) for path in (finished, tmp_path / "again"))
    assert np.abs(first.rotation - second.rotation).max() < 1e-5


def test_assign_of_images_of_another_pixel_size_is_refused(
    finished: Path, particles: tuple[Path, str], tmp_path: Path
) -> None:
    source, smaller = particles[0] / "particles.star", str(tmp_path / "smaller.zarr")
    convert.run(str(source), smaller, data_dir=None, box=BOX - 8, dtype="float16", workers=1, overwrite=False,
                invert=False, uninvert=True)  # fmt: skip
    with pytest.raises(StoreError, match=f"24 px of 4.267 Å, the run's maps {BOX} px of 3.2 Å"):
        assign.run(str(finished), data=smaller, out=str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_imported_poses_are_refined(
    particles: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The true poses, each turned by 4° about a random axis and moved by half a pixel: the refinement must win most of
    # that back, to the same bounds as from nothing, and the frame must stay: without any alignment.
    truth = starfile.read(particles[0] / "truth.star", always_dict=True)
    generator = np.random.default_rng(0)
    true = read_poses(str(particles[0] / "truth.star")).rotation
    off = Rotation.from_rotvec(np.radians(4) * random_units(generator, len(true)))
    angles = Rotation.from_matrix(true @ off.as_matrix())
    columns = ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]
    truth["particles"][columns] = angles.as_euler("ZYZ", degrees=True)
    for name in ("rlnOriginXAngst", "rlnOriginYAngst"):
        truth["particles"][name] += generator.choice([-0.5, 0.5], len(true)) * PIXEL_SIZE
    starfile.write(truth, particles[0] / "moved.star")
    store = store_of(particles[0] / "moved.star", tmp_path / "moved.zarr")
    start(store, tmp_path / "run", guided__start="poses", guided__iterations="4", guided__encoder_steps="0")
    poses = read_poses(str(tmp_path / "run" / "particles.star"))
    cosine = (np.einsum("nij,nij->n", poses.rotation, true) - 1) / 2
    assert np.median(np.degrees(np.arccos(np.clip(cosine, -1, 1)))) < 2.3
    found = errors(tmp_path / "run", particles[0], capsys)
    assert found["shift_error_median_px"] < 0.25
    assert found["fsc_0.5_shell"] > 12


def random_units(generator: np.random.Generator, count: int) -> np.ndarray:
    vectors = generator.standard_normal((count, 3))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_poses_that_are_not_there_cannot_be_refined(particles: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="the store has none"):
        start(particles[1], tmp_path / "run", guided__start="poses")


def test_an_assignment_that_was_killed_goes_on(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Killed after five batches of 256; what was posed before must not be posed again, and nothing else may differ.
    monkeypatch.setattr(particle_state, "PART_ROWS", 300)
    estimate, posed_rows, last = ReferencePoses.estimate, [], 5

    def counted(self: ReferencePoses, images: ParticleImages) -> PoseEstimates:
        if len(posed_rows) == last:
            raise KeyboardInterrupt
        posed_rows.append(images.rows.tolist())
        return estimate(self, images)

    monkeypatch.setattr(ReferencePoses, "estimate", counted)
    with pytest.raises(KeyboardInterrupt):
        assign.run(str(finished), data=None, out=str(tmp_path / "again"))
    before = sum(len(rows) for rows in posed_rows)
    posed_rows.clear()
    last = 100
    assign.run(str(finished), data=None, out=str(tmp_path / "again"))
    after = sum(len(rows) for rows in posed_rows)
    assert after <= ROWS + EXTRA - before + 256 + 300  # the first batch for its pictures, and the part not yet written
    assert not (tmp_path / "again" / "particles").exists()
    first, second = (read_poses(str(path / "particles.star")) for path in (finished, tmp_path / "again"))
    assert np.array_equal(first.rotation, second.rotation)
    assert (finished / "map.mrc").read_bytes()[1024:] == (tmp_path / "again" / "map.mrc").read_bytes()[1024:]


def test_a_weak_start_and_uncertain_poses_are_said_in_the_report(
    simulated: SimulatedParticles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After one round whose halves agree by less than asked for, and with a mean confidence below what is asked for."""
    monkeypatch.setattr(bootstrap, "WEAK", 1.01)
    monkeypatch.setattr(final_pass, "UNCERTAIN", 1.01)
    start(simulated.store, tmp_path / "run", **SHORT | {"guided__iterations": "1", "guided__encoder_steps": "0"})
    report = (tmp_path / "run" / "report.html").read_text()
    assert "The first map is weak: held-out images gain" in report
    mean = np.mean(read_poses(str(tmp_path / "run" / "particles.star")).confidence)
    assert f"shown in the pose given for it with a probability of {mean:.0%}" in report


def test_pure_noise_is_not_sold_as_a_structure(tmp_path: Path) -> None:
    images = np.random.default_rng(0).standard_normal((1000, 32, 32), dtype=np.float32)
    with mrcfile.new(str(tmp_path / "noise.mrcs")) as stack:
        stack.set_data(images)
        stack.set_image_stack()
        stack.voxel_size = 3.0
    store = store_of(tmp_path / "noise.mrcs", tmp_path / "noise.zarr")
    with pytest.raises(TrainingError, match="no structure"):
        start(store, tmp_path / "run", train__rows="1000")
    assert not (tmp_path / "run" / "map.mrc").exists()
    # Its page says why, and shows the images.
    report = (tmp_path / "run" / "report.html").read_text()
    assert "No result" in report
    assert "the start found no structure" in report
    assert "What the images look like" in report


def test_two_workers_converge_as_well(
    particles: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(None, SETTINGS | {"guided.iterations": "2", "guided.encoder_steps": "0"})
    run = dataclasses.replace(config.run, data=particles[1], out=str(tmp_path / "run"), workers="2")
    config = dataclasses.replace(config, run=run)
    RunFolder(str(tmp_path / "run")).create(config, resume=False)
    train_by_workers(config)
    found = errors(tmp_path / "run", particles[0], capsys)
    assert found["rotation_error_mod_pseudosymmetry_median_deg"] < 2.3
