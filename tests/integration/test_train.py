"""Training end to end on a small simulated set: every pose source, resume, several workers, and refusals."""

import dataclasses
import json
import math
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scalecryo.cli import main
from scalecryo.commands import assign, train
from scalecryo.config import SETTINGS, Config, load_config
from scalecryo.data.formats.mrc import read_map
from scalecryo.data.formats.relion import read_poses
from scalecryo.data.storage.store import ParticleStore
from scalecryo.distributed.world import World
from scalecryo.errors import (
    CheckpointError,
    ConfigError,
    MissingInputError,
    OutputError,
    OutputExistsError,
    ScalecryoError,
    StoreError,
    TrainingError,
)
from scalecryo.model.autoencoder import build_autoencoder
from scalecryo.runs.checkpoint import Checkpoint, best_checkpoint, save_checkpoint
from scalecryo.runs.folder import RunFolder
from scalecryo.train import loop
from scalecryo.train.particle_source import RunContext
from scalecryo.train.stages import gradient_descent
from tests.conftest import SimulatedParticles
from tests.support.gloo import train_by_workers

RUN_FILES = ["map.mrc", "map_unsharpened.mrc", "half1.mrc", "half2.mrc", "mask.mrc", "particles.star", "fsc.csv",
             "metrics.jsonl", "config.toml", "report.html", "fsc.png", "slices.png", "checkpoints", "tb",
             "fsc_cones.csv", "fsc_cones.png"]  # fmt: skip


def start(data: str, out: Path | str, *, resume: bool = False, **overrides: object) -> None:
    settings = {"pose.source": "encoder", "encoder.network": "cnn", "train.steps": 6,
                "train.batch_size": 16, "monitor.every": 1,
                "monitor.pictures_every": 3, "train.checkpoint_every": 3,
                "encoder.channels": "4,8", "encoder.hidden": 16}  # fmt: skip
    source = overrides.get("pose__source", "encoder")
    recipe = "paper" if source == "encoder" else source
    settings = {key: value for key, value in settings.items() if recipe in SETTINGS[key].metadata["recipes"]}
    settings |= {key.replace("__", "."): value for key, value in overrides.items()}
    workers = str(settings.pop("run.workers", "0"))
    train.run(None, data=data, out=str(out), workers=workers, device="cpu", resume=resume,
              overrides={key: str(value) for key, value in settings.items()})  # fmt: skip


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    by_step = {row["step"]: row["loss"] for row in rows if "loss" in row}
    return [by_step[step] for step in sorted(by_step)]


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({"pose__source": "known"}, marks=pytest.mark.pictures),
        {"pose__source": "table", "pose__centred": "false"},
        {"pose__parameterisation": "s2s2"},
        {"pose__parameterisation": "quaternion", "pose__centred": "false"},
        {"pose__parameterisation": "euler", "encoder__precision": "bfloat16"},
        {"pose__heads": 3, "pose__copies": 2},
        {"pose__copies": 8, "encoder__input_box": 16},
    ],
    ids=lambda o: "-".join(str(v) for v in o.values()),
)
def test_every_source_leaves_a_finished_run(
    simulated: SimulatedParticles, tmp_path: Path, overrides: dict[str, object]
) -> None:
    run = tmp_path / "run"
    start(simulated.posed_store, run, monitor__truth=simulated.folder, **overrides)
    assert all((run / name).exists() for name in RUN_FILES)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["final/worst_cone_ratio"] * lines[-1]["final/resolution_angstrom"] == pytest.approx(
        lines[-1]["final/worst_cone_angstrom"]
    )
    values = losses(run)
    assert len(values) == 6
    assert np.isfinite(values).all()
    poses = read_poses(str(run / "particles.star"))
    assert len(poses.names) == simulated.count
    assert np.linalg.det(poses.rotation) == pytest.approx(1.0, abs=1e-5)
    volume, pixel_size, _ = read_map(str(run / "map.mrc"))
    assert volume.shape == (simulated.box_size,) * 3
    assert pixel_size == pytest.approx(3.2, rel=1e-5)
    assert np.isfinite(volume).all()


def test_known_poses_find_the_map(simulated: SimulatedParticles, tmp_path: Path) -> None:
    # True poses: the loss must fall and the learnt map agree with the simulated one (Fourier shell correlation above
    # 0.5 beyond half of Nyquist; 300 images with CTF at 10 dB hold more than that).
    run = tmp_path / "run"
    start(simulated.posed_store, run, pose__source="known", train__steps=120, optim__volume_rate=0.2,
          monitor__truth=simulated.folder, monitor__pictures_every=120, train__checkpoint_every=60)  # fmt: skip
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    truth = next(row for row in rows if "truth/fsc_0.5_shell" in row)
    assert truth["truth/rotation_error_median_deg"] < 0.01
    assert truth["truth/fsc_0.5_shell"] > 8
    values = losses(run)
    assert np.mean(values[-10:]) < 0.5 * values[0]


def test_event_files_hold_scalars_and_pictures(simulated: SimulatedParticles, tmp_path: Path) -> None:
    run = tmp_path / "run"
    start(simulated.store, run, monitor__truth=simulated.folder)
    events = EventAccumulator(str(run / "tb"))
    events.Reload()
    tags = events.Tags()
    wanted = {"optimisation/loss", "speed/images_per_second", "speed/data_wait_share", "optimisation/pose_spread",
              "optimisation/gradient_norm_volume", "optimisation/gradient_norm_poses", "truth/rotation_error_median",
              "truth/fsc_0.5_shell", "speed/workers", "memory/resident"}  # fmt: skip
    assert wanted <= set(tags["scalars"])
    assert {"slice/z", "projection/x", "particles/observed_above_predicted", "map/surface", "poses/views"} <= set(
        tags["images"]
    )
    assert "poses/tilt" in tags["histograms"]
    assert [event.step for event in events.Scalars("optimisation/loss")] == list(range(1, 7))
    assert [event.value for event in events.Scalars("optimisation/loss")] == pytest.approx(losses(run), rel=1e-6)


def test_part_of_a_store_is_trained_on_alone(simulated: SimulatedParticles, tmp_path: Path) -> None:
    # Every third row by number; the order holds no other, and another part is not resumed.
    rows = tmp_path / "rows.txt"
    rows.write_text("\n".join(str(row) for row in range(0, simulated.count, 3)))
    start(simulated.store, tmp_path / "run", train__index=rows, train__final_pass="false")
    seen = load_config(
        None, {"pose.source": "encoder", "encoder.network": "cnn", "train.index": str(rows), "train.batch_size": "16"}
    )
    store = ParticleStore.open(simulated.store)
    order = RunContext.of(seen, store, RunFolder(""), World(), torch.device("cpu")).order(32, 16)
    assert order.subset is not None
    assert order.subset.count == simulated.count // 3
    assert {int(row) % 3 for row in order.rows(0, 0) if row >= 0} == {0}
    with pytest.raises(CheckpointError, match="another store"):
        start(simulated.store, tmp_path / "run", resume=True, train__index="", train__query="defocus_u < 1e9")


def test_maps_hold_the_chosen_particles_only(simulated: SimulatedParticles, tmp_path: Path) -> None:
    # The chosen third alone, and the whole: another map, but every particle has its pose in both tables.
    maps = []
    for name, query in (("part", "source_row < 100"), ("whole", "")):
        start(simulated.posed_store, tmp_path / name, pose__source="known", train__query=query, train__steps=1)
        maps.append(read_map(str(tmp_path / name / "map.mrc"))[0])
        assert len(read_poses(str(tmp_path / name / "particles.star")).names) == simulated.count
    assert np.corrcoef(maps[0].ravel(), maps[1].ravel())[0, 1] < 0.999


def test_resume_repeats_the_uninterrupted_run_bit_for_bit(simulated: SimulatedParticles, tmp_path: Path) -> None:
    # Same process count, same machine: the same floating-point operations in the same order.
    start(simulated.store, tmp_path / "whole")
    start(simulated.store, tmp_path / "cut", train__steps=3, train__final_pass="false")
    start(simulated.store, tmp_path / "cut", resume=True, train__final_pass="true")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    a, b = (read_map(str(tmp_path / name / "volume.mrc"))[0] for name in ("whole", "cut"))
    assert np.array_equal(a, b)


def test_resume_of_a_finished_run_leaves_it_as_it_is(
    simulated: SimulatedParticles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    start(simulated.posed_store, run, pose__source="known", train__steps=1)

    def files() -> dict[Path, tuple[bytes, int]]:
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file()}

    before = files()
    capsys.readouterr()
    main(["train", "--out", str(run), "--resume"])
    assert capsys.readouterr().out == f"run finished already: {run}; its results are as they were\n"
    assert files() == before
    # What is missing is made again, the same; another setting makes it go on.
    (run / "map.mrc").unlink()
    main(["train", "--out", str(run), "--resume"])
    assert np.array_equal(read_map(str(run / "map.mrc"))[0], read_map_of(before[run / "map.mrc"][0], tmp_path))
    main(["train", "--out", str(run), "--resume", "--train.steps", "2"])
    assert len(losses(run)) == 2
    assert files()[run / "map.mrc"] != before[run / "map.mrc"]


def read_map_of(data: bytes, folder: Path) -> np.ndarray:
    (folder / "kept.mrc").write_bytes(data)
    return read_map(str(folder / "kept.mrc"))[0]


def test_a_checkpoint_of_an_older_format_is_refused_in_one_line(simulated: SimulatedParticles, tmp_path: Path) -> None:
    start(simulated.store, tmp_path / "run", train__final_pass="false")
    newest = sorted((tmp_path / "run" / "checkpoints").glob("*.pt"))[-1]
    torch.save({"format_version": 1, "step": 6, "store_hash": "x", "model": {}}, newest)
    with pytest.raises(CheckpointError, match=r"format 1, this scalecryo reads 2: use the version .*anew$"):
        start(simulated.store, tmp_path / "run", resume=True)


def test_damaged_newest_checkpoint_falls_back(
    simulated: SimulatedParticles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start(simulated.store, tmp_path / "whole")
    run = tmp_path / "run"
    start(simulated.store, run, train__final_pass="false")
    newest = sorted((run / "checkpoints").iterdir())[-1]
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 0xFF
    newest.write_bytes(bytes(data))
    start(simulated.store, run, resume=True, train__final_pass="true")
    assert losses(run) == losses(tmp_path / "whole")


def test_checkpoint_of_another_store_is_refused(simulated: SimulatedParticles, tmp_path: Path) -> None:
    start(simulated.store, tmp_path / "run", train__final_pass="false")
    with pytest.raises(CheckpointError, match="another store"):
        start(simulated.posed_store, tmp_path / "run", resume=True)


def test_assign_elsewhere_gives_the_same_poses(simulated: SimulatedParticles, tmp_path: Path) -> None:
    start(simulated.store, tmp_path / "run")
    assign.run(str(tmp_path / "run"), data=None, out=str(tmp_path / "again"))
    first, second = (read_poses(str(tmp_path / name / "particles.star")) for name in ("run", "again"))
    assert np.array_equal(first.rotation, second.rotation)
    assert all((tmp_path / "again" / name).exists() for name in ("map.mrc", "half1.mrc", "fsc.csv", "report.html"))


def config_of(simulated: SimulatedParticles, out: Path, workers: int) -> Config:
    config = load_config(None, {"pose.source": "encoder", "encoder.network": "cnn", "train.steps": "5",
                                "train.batch_size": "16", "monitor.every": "1", "encoder.channels": "4,8",
                                "encoder.hidden": "16", "pose.heads": "2"})  # fmt: skip
    run = dataclasses.replace(config.run, data=simulated.store, out=str(out), workers=str(workers))
    return dataclasses.replace(config, run=run)


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, "paper", "gradient descent", "x", {})


def test_the_best_checkpoint_is_kept(simulated: SimulatedParticles, tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    for step, score in ((1, 0.1), (2, 0.9), (3, 0.5), (4, 0.4), (5, 0.6)):
        save_checkpoint(run, checkpoint(step), 2, score=score)
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("*.pt")) == [
        f"step_{step:010d}.pt" for step in (2, 4, 5)
    ]
    assert best_checkpoint(run) == (2, 0.9)
    save_checkpoint(run, checkpoint(2), 2, score=0.2)  # of a run taken up at step 1: what was is gone
    assert best_checkpoint(run) == (2, 0.2)


def test_curves_reach_a_remote_run_before_the_checkpoint_that_follows_them(
    simulated: SimulatedParticles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed right after its first checkpoint, a run whose folder is a URL still has every step when it is resumed."""
    fs = fsspec.filesystem("memory")
    save = loop.save_checkpoint

    def deadly(*arguments: object, **options: object) -> None:
        save(*arguments, **options)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_checkpoint", deadly)
    with pytest.raises(KeyboardInterrupt):
        start(simulated.store, "memory://killed_run", train__final_pass="false")
    monkeypatch.setattr(loop, "save_checkpoint", save)
    start(simulated.store, "memory://killed_run", resume=True, train__final_pass="false")
    steps = [json.loads(line)["step"] for line in fs.cat_file("/killed_run/metrics.jsonl").splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_checkpoint_of_another_recipe_is_refused(simulated: SimulatedParticles, tmp_path: Path) -> None:
    start(simulated.store, tmp_path / "run", train__final_pass="false")
    with pytest.raises(CheckpointError, match="is of the recipe paper, the settings are of guided"):
        start(simulated.store, tmp_path / "run", resume=True, pose__source="guided")


def test_out_of_memory_names_the_settings_to_lower(
    simulated: SimulatedParticles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(gradient_descent, "train_step", full)
    with pytest.raises(TrainingError, match=r"box 32: lower train.batch_size .* \(CUDA out of memory"):
        start(simulated.store, tmp_path / "run")


def test_two_workers_of_half_a_batch_equal_one(simulated: SimulatedParticles, tmp_path: Path) -> None:
    # Gradients are sums over particles, so only the order of additions differs: single precision, five steps.
    one, two = tmp_path / "one", tmp_path / "two"
    for out, workers in ((one, 1), (two, 2)):
        RunFolder(str(out)).create(config_of(simulated, out, workers), resume=False)
    loop.train(config_of(simulated, one, 1), World(), torch.device("cpu"))
    train_by_workers(config_of(simulated, two, 2))
    assert losses(two) == pytest.approx(losses(one), rel=2e-5)
    # The learnt volume: in the reconstruction a particle whose two heads tie may fall either way.
    maps = [read_map(str(out / "volume.mrc"))[0] for out in (one, two)]
    assert np.corrcoef(maps[0].ravel(), maps[1].ravel())[0, 1] > 0.9999


def test_gradients_may_travel_in_bfloat16(simulated: SimulatedParticles, tmp_path: Path) -> None:
    """Half of the bytes, and the losses of five steps within bfloat16's 2⁻⁸."""
    for name, reduce_dtype in (("single", "float32"), ("brief", "bfloat16")):
        config = config_of(simulated, tmp_path / name, 2)
        config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, reduce_dtype=reduce_dtype))
        RunFolder(config.run.out).create(config, resume=False)
        train_by_workers(config)
    assert losses(tmp_path / "brief") == pytest.approx(losses(tmp_path / "single"), rel=2**-8)
    assert losses(tmp_path / "brief") != losses(tmp_path / "single")
    mib = []
    for name in ("single", "brief"):
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        mib.append(rows[-1]["reduce/mib_per_step"])
    # Beside the gradients two float32 numbers a step. The volume's share is a sphere, π/6 of its cube.
    assert mib[1] == pytest.approx(mib[0] / 2, rel=1e-3)
    model = build_autoencoder(config_of(simulated, tmp_path / "any", 1), 32, simulated.count)
    encoder = sum(parameter.numel() for parameter in model.pose_source.parameters())
    assert mib[0] * 2**20 == pytest.approx(4 * (encoder + 32**3 * math.pi / 6), rel=0.02)


@pytest.mark.ray
def test_ray_train_runs_the_same_loop(ray_cluster: None, simulated: SimulatedParticles, tmp_path: Path) -> None:
    start(simulated.store, tmp_path / "alone", train__steps=3, train__final_pass="false")
    start(simulated.store, tmp_path / "ray", train__steps=3, run__workers=2)
    assert losses(tmp_path / "ray") == pytest.approx(losses(tmp_path / "alone"), rel=2e-5)
    assert all((tmp_path / "ray" / name).exists() for name in RUN_FILES)


@pytest.mark.ray
def test_more_workers_than_the_cluster_has_is_said_at_once(
    ray_cluster: None, simulated: SimulatedParticles, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match="needs 5 CPUs"):
        start(simulated.store, tmp_path / "run", run__workers=5)


@pytest.mark.parametrize(
    ("overrides", "kind", "fragment"),
    [
        ({"pose__source": "known"}, TrainingError, "needs poses"),
        ({"train__box": 64}, ConfigError, "levels 32"),
        ({"encoder__input_box": 2}, ConfigError, "encoder.input_box"),
        ({"monitor__truth": "nowhere"}, ScalecryoError, "truth.star"),
    ],
)
def test_refusals(
    simulated: SimulatedParticles, tmp_path: Path, overrides: dict[str, object], kind: type[Exception], fragment: str
) -> None:
    with pytest.raises(kind, match=fragment):
        start(simulated.store, tmp_path / "run", **overrides)
    assert not (tmp_path / "run").exists()


def test_a_wrong_choice_of_particles_does_not_cost_the_folder(simulated: SimulatedParticles, tmp_path: Path) -> None:
    for wrong, kind, fragment in (
        ({"train__query": "defocusu > 0"}, ConfigError, "no column defocusu"),
        ({"train__query": "defocus_u >"}, ConfigError, "invalid syntax"),
        ({"train__index": str(tmp_path / "rows.txt")}, MissingInputError, "rows.txt"),
    ):
        with pytest.raises(kind, match=fragment):
            start(simulated.store, tmp_path / "run", **wrong)
    start(simulated.store, tmp_path / "run", train__query="half < 3", train__final_pass="false")
    assert (tmp_path / "run" / "checkpoints").exists()


def test_a_folder_that_cannot_be_written_is_said(simulated: SimulatedParticles) -> None:
    with pytest.raises(OutputError, match=r"run folder /proc/run cannot be written .*name another --out"):
        start(simulated.store, "/proc/run")


def test_existing_run_is_refused(simulated: SimulatedParticles, tmp_path: Path) -> None:
    start(simulated.store, tmp_path / "run", train__final_pass="false")
    before = (tmp_path / "run" / "config.toml").read_bytes()
    with pytest.raises(OutputExistsError, match="--resume"):
        start(simulated.store, tmp_path / "run", train__steps=9)
    assert (tmp_path / "run" / "config.toml").read_bytes() == before


def test_incomplete_store_is_refused_before_a_run_folder_exists(simulated: SimulatedParticles, tmp_path: Path) -> None:
    import shutil

    store = tmp_path / "store.zarr"
    shutil.copytree(simulated.store, store)
    path = store / "zarr.json"
    group = json.loads(path.read_text())
    group["attributes"]["complete"] = False
    path.write_text(json.dumps(group))
    with pytest.raises(StoreError, match="did not finish"):
        start(str(store), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_a_number_stops_the_run(simulated: SimulatedParticles, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="lower optim"):
        start(
            simulated.store, tmp_path / "run", optim__volume_rate=9, optim__encoder_rate=9, volume__initial_scale=1e20
        )


def test_command_line_trains(simulated: SimulatedParticles, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--data", simulated.store, "--out", str(tmp_path / "run"), "--pose.source", "encoder",
          "--encoder.network", "cnn", "--train.steps", "2",
          "--train.batch_size", "8", "--pose.copies", "2"])  # fmt: skip
    assert str(tmp_path / "run") in capsys.readouterr().out
    resolved = load_config(str(tmp_path / "run" / "config.toml"), {})
    assert (resolved.train.steps, resolved.pose.copies) == (2, 2)
