"""Told to end by SIGTERM within a pass, a run keeps what it did and goes on bit for bit, as one never disturbed."""

import dataclasses
import json
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scalecryo import cli
from scalecryo.commands import train
from scalecryo.config import Config, load_config
from scalecryo.distributed.world import World
from scalecryo.errors import Stopped
from scalecryo.runs.folder import RunFolder
from scalecryo.train import loop, stopping
from scalecryo.train.particle_state import ParticleState
from scalecryo.train.stages.autoencoder import AutoEncoding
from scalecryo.train.stages.final_pass import FinalPass
from scalecryo.train.stages.gradient_descent import GradientDescent
from scalecryo.train.stages.refinement import Refinement
from tests.conftest import SimulatedParticles
from tests.support.gloo import by_workers

# On few images: nothing that needs a structure. Four batches an iteration; the encoder learns in the third.
GUIDED = {"train.rows": "200", "guided.start": "poses", "guided.shift_radius_a": "6", "guided.batch_size": "64",
          "guided.iterations": "3", "guided.settled_iterations": "9", "train.final_pass": "false"}  # fmt: skip
AUTOENCODER = {"pose.source": "encoder", "autoencoder.starts": "2", "autoencoder.start_steps": "4",
               "autoencoder.steps": "12", "autoencoder.batch_size": "32", "encoder.hidden": "32",
               "monitor.every": "6", "monitor.pictures_every": "6", "train.checkpoint_every": "12",
               "autoencoder.refine": "false", "train.final_pass": "false"}  # fmt: skip
PAPER = {"pose.source": "encoder", "encoder.network": "cnn", "encoder.channels": "4,8", "encoder.hidden": "16",
         "train.steps": "6", "train.batch_size": "16", "train.checkpoint_every": "6", "train.final_pass": "false",
         "monitor.every": "2", "monitor.pictures_every": "6"}  # fmt: skip


def start(data: str, out: Path, settings: dict[str, str], *, resume: bool = False) -> None:
    train.run(None, data=data, out=str(out), workers="0", device="cpu", resume=resume, overrides=settings)


def told_after(monkeypatch: pytest.MonkeyPatch, stage: type, batches: int) -> None:
    """SIGTERM comes to this process in the stage's batch of this number, counted from now on."""
    seen: list[int] = []
    step: Callable[..., None] = stage.step  # type: ignore[attr-defined]

    def counted(self: Any, *images: Any) -> None:
        step(self, *images)
        seen.append(1)
        if len(seen) == batches:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(stage, "step", counted)


def stopped_and_resumed(
    monkeypatch: pytest.MonkeyPatch, data: str, out: Path, settings: dict[str, str], *stops: tuple[type, int]
) -> None:
    """A run that is stopped once in each of these stages, after so many of its batches, and then comes to its end."""
    for number, (stage, batches) in enumerate(stops):
        with monkeypatch.context() as patched:
            told_after(patched, stage, batches)
            with pytest.raises(Stopped, match="--resume goes on"):
                start(data, out, settings, resume=number > 0)
    start(data, out, settings, resume=True)


def rows_of(run: Path, *names: str) -> list[list[Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[row.get(name) for name in ("step", *names)] for row in rows]


def newest_state(run: Path) -> dict[str, Any]:
    newest = max((run / "checkpoints").glob("step_*.pt"))
    state: dict[str, Any] = torch.load(newest, weights_only=True)["state"]
    return state


def assert_same(one: Any, other: Any) -> None:
    """Bit for bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for mine, its in zip(one, other, strict=True):
            assert_same(mine, its)
    else:
        assert one == other


def test_a_guided_run_goes_on_within_its_iterations(
    simulated: SimulatedParticles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    start(simulated.posed_store, whole, GUIDED)
    # In the first iteration, and twice in the one whose encoder learns.
    stops = (Refinement, 2), (Refinement, 2 + 4 + 1), (Refinement, 2)
    stopped_and_resumed(monkeypatch, simulated.posed_store, cut, GUIDED, *stops)
    first, second = newest_state(whole), newest_state(cut)
    found = []
    for run, state in ((whole, first), (cut, second)):
        poses = ParticleState(RunFolder(str(run)), simulated.count)
        poses.load(state.pop("parts"))  # which are others, since it was stopped
        found.append(poses.columns())
    assert_same(first, second)
    for name in found[0]:
        assert np.array_equal(found[0][name], found[1][name])
    told = "halves/fsc_mean", "encoder_loss", "likelihood_gain_per_image", "iteration/restless_share"
    assert rows_of(whole, *told) == rows_of(cut, *told)
    assert not (cut / "checkpoints" / "paused").exists()
    # The final pass keeps the poses that it found: its resumption takes them in (test_guided).
    monkeypatch.setattr("scalecryo.train.stages.final_pass.BATCH", 100)
    told_after(monkeypatch, FinalPass, 2)
    with pytest.raises(Stopped, match="final pass, where it stands is saved"):
        start(simulated.posed_store, cut, GUIDED | {"train.final_pass": "true"}, resume=True)
    (part,) = (cut / "particles").glob("final_*/*.npz")
    assert np.array_equal(np.load(part)["rows"], np.arange(200))


@pytest.mark.parametrize(
    ("stage", "settings", "stops"),
    [(GradientDescent, PAPER, (3, 1)), (AutoEncoding, AUTOENCODER, (4 + 2, 2 + 4 + 2 + 5))],
)
def test_a_run_of_steps_goes_on_between_any_two(
    simulated: SimulatedParticles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: type,
    settings: dict[str, str], stops: tuple[int, int],
) -> None:  # fmt: skip
    # A dozen steps find no structure: what they are for here is to be the same ones.
    monkeypatch.setattr("scalecryo.train.stages.autoencoder.NO_SIGNAL_ERRORS", -1e9)
    monkeypatch.setattr("scalecryo.train.stages.autoencoder.check_contrast", lambda *_: None)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    start(simulated.store, whole, settings)
    stopped_and_resumed(monkeypatch, simulated.store, cut, settings, *((stage, batches) for batches in stops))
    assert_same(newest_state(whole), newest_state(cut))
    assert rows_of(whole, "loss") == rows_of(cut, "loss")


def test_other_settings_begin_the_pass_anew(
    simulated: SimulatedParticles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        told_after(patched, Refinement, 2)
        with pytest.raises(Stopped):
            start(simulated.posed_store, tmp_path / "run", GUIDED)
    assert (tmp_path / "run" / "checkpoints" / "paused" / "place.json").exists()
    other = GUIDED | {"guided.batch_size": "100", "guided.iterations": "1"}
    start(simulated.posed_store, tmp_path / "run", other, resume=True)
    assert "begins anew" in capfd.readouterr().err
    assert len(newest_state(tmp_path / "run")["parts"]) > 0


def test_the_command_ends_in_one_line(
    simulated: SimulatedParticles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told_after(monkeypatch, GradientDescent, 3)
    before = signal.getsignal(signal.SIGTERM)
    options = [f"--{name}={value}" for name, value in PAPER.items()]
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main(["train", "--data", simulated.store, "--out", str(tmp_path / "run"), *options])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "scalecryo: stopped by SIGTERM in the gradient descent, where it stands is saved: "
        "the same command with --resume goes on"
    )
    assert not (tmp_path / "run" / "report.html").exists()  # which is of runs that ended or failed


NEVER = 1000


class ToldLater(stopping.Notice):
    """Given from the question of this number on."""

    def __init__(self, questions: int) -> None:
        super().__init__()
        self._left = questions

    @property
    def given(self) -> bool:
        self._left -= 1
        return self._left < 0

    @given.setter
    def given(self, value: bool) -> None:
        assert not value


def train_until(world: World, runs: Sequence[tuple[Config, int]]) -> None:
    stopping.ASK_SECONDS = 0.0  # all ask after each batch: nothing depends on the clock
    for config, questions in runs:
        notice = ToldLater(questions) if world.rank == 1 else stopping.Notice()
        with suppress(Stopped):
            loop.train(config, world, torch.device("cpu"), notice=notice)
        if world.is_leader:
            assert (Path(config.run.out) / "checkpoints" / "paused").exists() == (questions < NEVER)


def test_two_workers_stop_at_the_same_batch_and_go_on(simulated: SimulatedParticles, tmp_path: Path) -> None:
    """Only the second worker is told; a batch later both leave the iteration."""
    configs = []
    for name in ("whole", "cut"):
        config = load_config(None, GUIDED | {"guided.iterations": "1"})
        run = dataclasses.replace(config.run, data=simulated.posed_store, out=str(tmp_path / name), workers="2")
        configs.append(dataclasses.replace(config, run=run))
        RunFolder(str(tmp_path / name)).create(configs[-1], resume=False)
    whole, cut = configs
    # One batch of imported poses, four of the iteration; it is told in the second of them.
    by_workers(train_until, [(whole, NEVER), (cut, 1 + 1), (cut, NEVER)])
    states = [newest_state(tmp_path / name) for name in ("whole", "cut")]
    for state in states:
        del state["parts"]  # which are others, since it was stopped
    assert_same(*states)
    told = "halves/fsc_mean", "likelihood_gain_per_image"
    assert rows_of(tmp_path / "whole", *told) == rows_of(tmp_path / "cut", *told)


def test_sigterm_before_training_ends_in_one_line_and_leaves_others_handlers() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="SIGTERM while Ray"), stopping.ended_by_sigterm("while Ray was starting"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before

    def rays(_number: int, _frame: object) -> None:
        """Ray's, which it puts there as it starts."""

    try:
        with stopping.ended_by_sigterm("while Ray was starting"):
            signal.signal(signal.SIGTERM, rays)
        assert signal.getsignal(signal.SIGTERM) is rays
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_slow_pass_after_a_fast_one_is_left_within_a_few_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a refinement, of some batches of a second each, after a start of many short ones."""

    class TwoWorkers:
        size, is_leader = 2, True

        def all_reduce_async(self, asked: torch.Tensor) -> Callable[[], None]:
            return lambda: None

    now = [0.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    notice = stopping.Notice()
    question = stopping._Question(TwoWorkers(), notice, torch.device("cpu"))  # type: ignore[arg-type]
    question.begin_pass()
    for _ in range(1000):
        now[0] += 0.005
        assert not question.answer()
    question.begin_pass()
    notice.give()
    batches = 0
    while not question.answer():
        now[0] += 1.0
        batches += 1
        assert batches < 5


def test_the_driver_says_how_its_workers_ended_and_forgets_what_an_earlier_run_said(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    run.write(stopping.ANSWER, b"an earlier run's")
    notice = stopping.DriversNotice(run)
    assert notice.answer() is None
    run.write(stopping.ANSWER, b"stopped by SIGTERM in the refinement")
    assert notice.answer() == "stopped by SIGTERM in the refinement"
