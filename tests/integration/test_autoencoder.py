"""The auto-encoder's stage: it finds poses and map from nothing, resumes to the bit, and splits over workers."""

import dataclasses
import json
from contextlib import suppress
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import pytest
import torch

from scalecryo.commands import assign, simulate, train
from scalecryo.commands.convert import run as convert
from scalecryo.config import Config, load_config
from scalecryo.data.formats.mrc import read_map
from scalecryo.data.formats.relion import read_poses
from scalecryo.distributed.world import World
from scalecryo.errors import CheckpointError, TrainingError
from scalecryo.runs.checkpoint import Checkpoint
from scalecryo.runs.folder import RunFolder
from scalecryo.train import loop
from tests.conftest import SimulatedParticles
from tests.support.gloo import by_workers

SMALL = {"pose.source": "encoder", "autoencoder.starts": "2", "autoencoder.start_steps": "4", "autoencoder.steps": "12",
         "autoencoder.batch_size": "32", "encoder.hidden": "32", "monitor.every": "1", "monitor.pictures_every": "6",
         "train.checkpoint_every": "4"}  # fmt: skip


@pytest.fixture(autouse=True)
def _any_gain_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dozen steps find no structure: what they are for here is to be the same ones."""
    monkeypatch.setattr("scalecryo.train.stages.autoencoder.NO_SIGNAL_ERRORS", -1e9)
    monkeypatch.setattr("scalecryo.train.stages.autoencoder.check_contrast", lambda *_: None)


def start(data: str, out: Path, *, resume: bool = False, **overrides: object) -> None:
    settings = SMALL | {key.replace("__", "."): str(value) for key, value in overrides.items()}
    train.run(None, data=data, out=str(out), workers="0", device="cpu", resume=resume, overrides=settings)


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_it_converges_from_random_poses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adenylate kinase with CTF at 0 dB, 32 px: poses and structure from nothing, no search, in 250 steps."""
    monkeypatch.undo()  # the checks for structure count here
    with as_file(files("scalecryo.data") / "4ake.pdb.gz") as structure:
        simulate.run(str(structure), str(tmp_path / "data"), n=3000, box=32, pixel_size=3.2, snr_db=0.0,
                     defocus_um=(0.4, 1.2), astigmatism_um=0.0, shift_a=0.0, seed=0)  # fmt: skip
    convert(str(tmp_path / "data" / "particles.star"), str(tmp_path / "store.zarr"), data_dir=None, box=None,
            dtype="float16", workers=1, overwrite=True, invert=False, uninvert=True)  # fmt: skip
    train.run(None, data=str(tmp_path / "store.zarr"), out=str(tmp_path / "run"), workers="0", device="cpu",
              resume=False, overrides={"pose.source": "encoder", "pose.centred": "true", "autoencoder.steps": "250",
                                       "autoencoder.starts": "3",
                                       "monitor.truth": str(tmp_path / "data")})  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    error = "truth/rotation_error_mod_pseudosymmetry_median_deg"
    last = [row for row in rows if error in row][-1]
    # Random poses are 100° off modulo the two-fold; at the last shell, 15, a turn by 3.8° moves by one Fourier pixel.
    assert last[error] < 6
    assert last["truth/fsc_0.5_shell"] > 13
    assert "of the signal of right poses" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    "overrides",
    [
        {"pose__parameterisation": "quaternion"},
        {"pose__parameterisation": "euler", "pose__centred": "true", "pose__copies": 2, "pose__heads": 1},
        {"volume__update": "gradient"},
        {"autoencoder__refine": "true", "guided__iterations": 2},
    ],
    ids=lambda o: "-".join(str(v) for v in o.values()),
)
def test_every_choice_leaves_a_finished_run(
    simulated: SimulatedParticles, tmp_path: Path, overrides: dict[str, object]
) -> None:
    start(simulated.store, tmp_path / "run", monitor__truth=simulated.folder, **overrides)
    assert np.isfinite(losses(tmp_path / "run")).all()
    poses = read_poses(str(tmp_path / "run" / "particles.star"))
    assert len(poses.names) == simulated.count
    assert np.linalg.det(poses.rotation) == pytest.approx(1.0, abs=1e-5)
    assert np.isfinite(read_map(str(tmp_path / "run" / "map.mrc"))[0]).all()


@pytest.mark.parametrize("update", ["average", "gradient"])
def test_resume_repeats_the_uninterrupted_run_bit_for_bit(
    simulated: SimulatedParticles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update: str
) -> None:
    """Killed after the second random start, and after the eighth step."""
    start(simulated.store, tmp_path / "whole", volume__update=update)
    save, left = loop.save_checkpoint, [3]

    def deadly(*arguments: object, **options: object) -> None:
        save(*arguments, **options)  # type: ignore[arg-type]
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_checkpoint", deadly)
    with pytest.raises(KeyboardInterrupt):
        start(simulated.store, tmp_path / "cut", volume__update=update)
    left[0] = 1
    with pytest.raises(KeyboardInterrupt):
        start(simulated.store, tmp_path / "cut", resume=True, volume__update=update)
    monkeypatch.setattr(loop, "save_checkpoint", save)
    start(simulated.store, tmp_path / "cut", resume=True, volume__update=update)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for name in ("map.mrc", "half1.mrc"):
        a, b = (read_map(str(tmp_path / run / name))[0] for run in ("whole", "cut"))
        assert np.array_equal(a, b)


def test_assign_poses_particles_as_the_run_did(simulated: SimulatedParticles, tmp_path: Path) -> None:
    start(simulated.store, tmp_path / "run")
    assign.run(str(tmp_path / "run"), data=None, out=str(tmp_path / "again"))
    first, second = (read_poses(str(tmp_path / name / "particles.star")) for name in ("run", "again"))
    assert np.array_equal(first.rotation, second.rotation)


def test_refinement_resumes_after_the_auto_encoder(
    simulated: SimulatedParticles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the refinement's first iteration: it goes on there, not at the auto-encoder."""
    settings = {"autoencoder__refine": "true", "guided__iterations": 2}
    start(simulated.store, tmp_path / "whole", **settings)
    save = loop.save_checkpoint

    def deadly(run: RunFolder, checkpoint: Checkpoint, *arguments: object, **options: object) -> None:
        save(run, checkpoint, *arguments, **options)  # type: ignore[arg-type]
        if checkpoint.stage == "refinement":
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_checkpoint", deadly)
    with pytest.raises(KeyboardInterrupt):
        start(simulated.store, tmp_path / "cut", **settings)
    monkeypatch.setattr(loop, "save_checkpoint", save)
    monkeypatch.delattr("scalecryo.train.stages.autoencoder.AutoEncoding.step")
    start(simulated.store, tmp_path / "cut", resume=True, **settings)
    a, b = (read_map(str(tmp_path / name / "map.mrc"))[0] for name in ("whole", "cut"))
    assert np.array_equal(a, b)


def test_a_checkpoint_of_other_settings_is_refused(
    simulated: SimulatedParticles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deadly(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("scalecryo.train.stages.autoencoder.AutoEncoding._finish", deadly)
    with pytest.raises(KeyboardInterrupt):
        start(simulated.store, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"other settings of \[autoencoder\]"):
        start(simulated.store, tmp_path / "run", resume=True, autoencoder__remembered=500)


def config_of(data: str, out: Path, workers: int) -> Config:
    # At its default rate the encoder amplifies a rounding difference of 1e-7 to 1e-3 within these steps.
    settings = {"train.final_pass": "false", "optim.encoder_rate": "1e-5"}
    config = load_config(None, SMALL | settings)
    run = dataclasses.replace(config.run, data=data, out=str(out), workers=str(workers))
    return dataclasses.replace(config, run=run)


def train_in_vain(world: World, config: Config) -> None:
    with suppress(TrainingError):  # no structure: a child has no patches
        loop.train(config, world, torch.device("cpu"))


def test_two_workers_of_half_a_batch_equal_one(
    simulated: SimulatedParticles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Gradients, numerators and denominators are sums over particles: only the order of additions differs, and the
    # winner of an image whose candidates tie.
    one, two = tmp_path / "one", tmp_path / "two"
    for out, workers in ((one, 1), (two, 2)):
        RunFolder(str(out)).create(config_of(simulated.store, out, workers), resume=False)
    loop.train(config_of(simulated.store, one, 1), World(), torch.device("cpu"))
    by_workers(train_in_vain, config_of(simulated.store, two, 2))
    assert losses(two) == pytest.approx(losses(one), rel=2e-5)
    assert len(losses(one)) == 8
