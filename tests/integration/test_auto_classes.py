"""`--classes auto`: how many structures there are, from many cheap starts; from simulated blobs to a finished run."""

import json
import shutil
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from scalecryo.api.run import open_run
from scalecryo.commands import evaluate, train
from scalecryo.config import config_to_toml, load_config
from scalecryo.data.storage.store import ParticleStore
from scalecryo.distributed.world import World
from scalecryo.errors import ConfigError, TrainingError
from scalecryo.runs.folder import RunFolder
from scalecryo.train.loop import run_stages
from scalecryo.train.particle_source import RunContext
from scalecryo.train.particle_state import ParticleState
from scalecryo.train.stage import Learned
from scalecryo.train.stages.ensemble import Ensemble, LearntStart
from tests.support.blobs import blobs
from tests.support.mixtures import BOX, simulated
from tests.support.thread_world import ThreadWorld

START = {
    "train.classes": "auto",
    "guided.ensemble_classes": "2,3",
    "guided.ensemble_starts": "2",
    "guided.ensemble_steps": "24",
    "guided.bootstrap_steps": "10",
    "guided.bootstrap_rounds": "3",
    "guided.bootstrap_batch": "50",
    "guided.iterations": "1",
    "pose.centred": "true",
}


@pytest.fixture(scope="module")
def species(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two unrelated structures."""
    folder = tmp_path_factory.mktemp("species")
    return folder / "data", simulated(folder, [blobs(BOX, 1), blobs(BOX, 3)], "particles")


def run_train(data: str, out: Path, *, resume: bool = False, **more: str) -> None:
    train.run(None, data=data, out=str(out), workers="0", device="cpu", resume=resume, overrides=START | more)


@pytest.fixture(scope="module")
def finished(species: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("auto") / "run"
    run_train(species[1], run)
    return run


def test_two_structures_are_counted_and_told_apart(
    finished: Path, species: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    # Reference: the simulated labels.
    evaluate.run(str(finished), truth=str(species[0]))
    scores = json.loads(capsys.readouterr().out)
    assert scores["class_accuracy"] > 0.95
    assert open_run(str(finished)).classes == 2
    assert 'classes = "auto"' in (finished / "config.toml").read_text()
    report = (finished / "report.html").read_text()
    assert "Auto: 2 classes from 4 starts: shares " in report
    first = json.loads((finished / "metrics.jsonl").read_text().splitlines()[0])
    assert first["ensemble/classes"] == 2
    assert first["ensemble/starts"] == 4
    assert first["ensemble/confusion"] < 0.5
    assert not list((finished / "particles").glob("ensemble*"))  # labels are of no use any more


def ensemble_of(
    data: str, folder: Path, world: World | None = None, **more: str
) -> tuple[Ensemble, RunContext, Learned]:
    config = load_config(None, START | more | {"run.data": data, "run.out": str(folder)})
    store, run = ParticleStore.open(data), RunFolder(str(folder))
    context = RunContext.of(config, store, run, world or World(), torch.device("cpu"))
    learned = Learned(ParticleState(run, store.count))
    return Ensemble(context, learned), context, learned


FEW = {"guided.ensemble_starts": "1", "guided.ensemble_classes": "2,3,2", "guided.ensemble_steps": "12"}


@pytest.fixture(scope="module")
def alone(species: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Learned, dict[str, Any]]:
    """What one process finds, and what it had saved after the first start."""
    stage, context, learned = ensemble_of(species[1], tmp_path_factory.mktemp("alone"), **FEW)
    saved: list[dict[str, Any]] = []
    finish = stage.finish_pass

    def finish_and_keep(world: World) -> Any:
        report = finish(world)
        saved.append(stage.state_dict() if report.checkpoint else {})
        return report

    stage.finish_pass = finish_and_keep  # type: ignore[method-assign]
    run_stages([stage], context)
    return learned, saved[0]


def test_a_killed_ensemble_goes_on_after_its_starts(
    alone: tuple[Learned, dict[str, Any]], species: tuple[Path, str], tmp_path: Path
) -> None:
    whole, state = alone
    stage, context, learned = ensemble_of(species[1], tmp_path, **FEW)
    stage.load_state_dict(state)
    assert len(stage._learnt) == 1
    run_stages([stage], context)
    assert learned.first_maps is not None
    assert whole.first_maps is not None
    assert torch.equal(learned.first_maps, whole.first_maps)
    assert learned.notes == whole.notes
    other, _, _ = ensemble_of(species[1], tmp_path, **FEW | {"train.seed": "1"})
    other.load_state_dict(state)  # other settings: from the beginning
    assert not other._learnt


def test_two_workers_find_what_one_does(
    alone: tuple[Learned, dict[str, Any]], species: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A switch of the whole process: each of two threads would put back what the other had set.
    monkeypatch.setattr("scalecryo.pose.search.tensor_cores", nullcontext)
    monkeypatch.setattr("scalecryo.pose.pair_scores.tensor_cores", nullcontext)
    # Starts do not depend on the number of workers; three of them for two workers: one reads along at last.
    workers = [ensemble_of(species[1], tmp_path, world, **FEW) for world in ThreadWorld.of(2)]
    threads = [threading.Thread(target=run_stages, args=([stage], context)) for stage, context, _ in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = alone[0].first_maps
    assert whole is not None
    for _, _, learned in workers:
        assert learned.first_maps is not None
        assert learned.first_maps.shape == whole.shape
        torch.testing.assert_close(learned.first_maps, whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))


def test_a_killed_run_goes_on_in_the_rounds_of_the_found_classes(
    finished: Path, species: tuple[Path, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "checkpoints" / "step_0000000001.pt").unlink()
    for name in ("map.mrc", "class2/half1.mrc", "particles.star", "checkpoints/finished.json"):
        (run / name).unlink()
    assert (run / "checkpoints" / "step_0000000000.pt").exists()  # of the rounds
    run_train(species[1], run, resume=True)
    for name in ("class1/map.mrc", "class2/half1.mrc"):
        whole, resumed = ((path / name).read_bytes()[1024:] for path in (finished, run))
        assert whole == resumed  # past the header's date
    assert (finished / "particles.star").read_bytes() == (run / "particles.star").read_bytes()
    assert "Auto: 2 classes" in (run / "report.html").read_text()


def test_noise_has_no_classes(species: tuple[Path, str], tmp_path: Path) -> None:
    stage, _, _ = ensemble_of(species[1], tmp_path, **FEW)
    for classes in stage._plan:
        stage._learnt.append(LearntStart.empty(classes, 32, len(stage._near), torch.device("cpu")))
        stage._learnt[-1].mass.fill_(1.0)
    stage._gains[:] = torch.tensor([10.0, 2000.0, 100.0])  # 0.1 ± 0.4 nats
    stage._labels.begin(stage.name)
    with pytest.raises(TrainingError, match=r"none of 3 starts found a structure: the best gains 0\.10 ± 0\.45"):
        stage._finish_labels(World())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"train.class_mode": "docked"}, "finds independent structures"),
        ({"guided.start": "poses"}, "only the recipe guided"),
        ({"pose.source": "known"}, "only the recipe guided"),
        ({"train.components": "2"}, "components are of one structure"),
        ({"guided.ensemble_classes": "1,4"}, "2 to 64 classes"),
        ({"guided.ensemble_classes": "4", "guided.ensemble_starts": "2"}, "fewer than three starts"),
        ({"train.classes": "many"}, "must be of type int, or auto"),
    ],
)
def test_auto_is_refused_where_it_cannot_be_used(more: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        load_config(None, {"train.classes": "auto"} | more)
    assert "\n" not in str(refused.value)


def test_auto_comes_back_from_the_settings_file(tmp_path: Path) -> None:
    config = load_config(None, {"train.classes": "auto"})
    (tmp_path / "config.toml").write_text(config_to_toml(config))
    assert load_config(str(tmp_path / "config.toml"), {}) == config
    assert config.train.several
    assert config.foreseen_classes == 4
