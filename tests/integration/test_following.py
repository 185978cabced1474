"""`train --follow`: particles are appended to the store while the run waits; it takes them in and refines on."""

import dataclasses
import json
import math
import shutil
import threading
from pathlib import Path

import pytest
import starfile

from scalecryo.commands import convert, evaluate, train
from scalecryo.commands.following import Follower, check_following
from scalecryo.config import Config, load_config
from scalecryo.data.formats.relion import read_poses
from scalecryo.data.storage.store import ParticleStore
from scalecryo.errors import ConfigError
from tests.conftest import SimulatedParticles

FIRST = 180
SETTINGS = {"guided.start": "poses", "guided.iterations": "2", "guided.shift_radius_a": "6", "guided.batch_size": "100",
            "guided.encoder_hidden": "16"}  # fmt: skip


@pytest.fixture
def sessions(simulated: SimulatedParticles, tmp_path: Path) -> list[Path]:
    """The table with true poses in two parts, beside its stack."""
    blocks = starfile.read(simulated.folder / "truth.star", always_dict=True)
    whole, found = blocks["particles"], []
    (tmp_path / "data").mkdir()
    shutil.copy(simulated.folder / "particles.mrcs", tmp_path / "data" / "particles.mrcs")
    for number, part in enumerate((whole[:FIRST], whole[FIRST:])):
        found.append(tmp_path / "data" / f"session{number}.star")
        starfile.write({**blocks, "particles": part}, found[-1])
    return found


def converted(table: Path, store: Path, *, add: bool = False) -> None:
    convert.run(str(table), str(store), data_dir=None, box=None, dtype="float16", workers=1, overwrite=False,
                invert=False, uninvert=not add, add=add)  # fmt: skip


def config_of(run: Path, store: Path) -> Config:
    config = load_config(None, SETTINGS)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, data=str(store), out=str(run)))


def test_a_run_takes_in_what_is_appended(
    sessions: list[Path],
    simulated: SimulatedParticles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """New particles get poses, though their own were never read, and the map gets better: by the simulated truth."""
    store, run, seen = tmp_path / "store.zarr", tmp_path / "run", []
    converted(sessions[0], store)

    def waits(self: Follower) -> bool:
        poses = read_poses(str(run / "particles.star"))
        seen.append(len(poses.names))
        capsys.readouterr()
        evaluate.run(str(run), truth=str(simulated.folder))
        errors.append(json.loads(capsys.readouterr().out))
        if len(seen) == 1:
            converted(sessions[1], store, add=True)
        return len(seen) == 1

    errors: list[dict[str, float]] = []
    monkeypatch.setattr(Follower, "_grows", waits)
    train.run(None, data=str(store), out=str(run), workers="0", device="cpu", resume=False, overrides=SETTINGS,
              follow_hours=math.inf)  # fmt: skip
    assert seen == [FIRST, simulated.count]
    first, second = errors
    # One voxel at the particle's edge (12 px) is 4.6°; the encoder has seen 180 particles, so that some new ones miss.
    assert second["rotation_error_mod_pseudosymmetry_median_deg"] < 2.3
    assert second["fsc_mean"] > first["fsc_mean"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    numbers = [row["step"] for row in rows]
    assert numbers == list(range(1, len(rows) + 1))
    assert len(rows) > 2


def test_it_ends_on_a_word_or_in_time(sessions: list[Path], tmp_path: Path) -> None:
    store, run = tmp_path / "store.zarr", tmp_path / "run"
    converted(sessions[0], store)
    run.mkdir()
    (run / "stop").write_text("of before")
    known, calls = ParticleStore.open(str(store)).content_hash, []
    Follower(config_of(run, store), known, 1e-5, poll_seconds=0.01).follow(lambda: calls.append("never"))
    assert not calls
    # Said while the run still works, before it waits.
    told = Follower(config_of(run, store), known, math.inf, poll_seconds=0.01)
    (run / "stop").touch()
    told.follow(lambda: calls.append("never"))
    assert not calls
    follower = Follower(config_of(run, store), known, math.inf, poll_seconds=0.01)

    def go_on() -> None:
        calls.append("grown")
        (run / "stop").touch()

    waiting = threading.Thread(target=follower.follow, args=(go_on,))
    waiting.start()
    converted(sessions[1], store, add=True)
    waiting.join()
    assert calls == ["grown"]
    assert not (run / "stop").exists()
    grown = ParticleStore.open(str(store))
    assert grown.grown_from == (known,)
    assert grown.content_hash != known


@pytest.mark.parametrize(
    "settings", [{"pose.source": "known"}, {"train.classes": "2"}, {"train.components": "2"}, {"train.rows": "10"}]
)
def test_what_cannot_follow_is_refused(settings: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="--follow"):
        check_following(load_config(None, settings))
    check_following(load_config(None, {}))
