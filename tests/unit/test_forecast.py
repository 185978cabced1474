"""The time that a run will take: closed forms of what is left, and what a person sees of it."""

import io
import time
from typing import Any

import pytest

from scalecryo.config import config_from_dict
from scalecryo.runs.log import LiveLine
from scalecryo.settings import RECIPES
from scalecryo.train import forecast as foreseeing
from scalecryo.train import progress
from scalecryo.train.forecast import PRIOR_SHARE, Forecast, Part, about, parts_of
from scalecryo.train.progress import RunProgress
from scalecryo.train.stages.state_poses import ROUNDS, SEARCHED_ROUNDS

PARTS = (Part("first", 10.0), Part("second", 60.0), Part("last", 10.0, tail=20.0))
CHOICE: dict[str, dict[str, Any]] = {
    "guided": {}, "poses": {"guided": {"start": "poses"}}, "autoencoder": {"pose": {"source": "encoder"}},
    "paper": {"pose": {"source": "encoder"}, "encoder": {"network": "cnn"}},
    "known": {"pose": {"source": "known"}}, "table": {"pose": {"source": "table"}},
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_machine_twice_as_slow_needs_twice_what_is_left() -> None:
    forecast, prior = Forecast(PARTS), PRIOR_SHARE * 100
    assert forecast.left(0.0) == pytest.approx(100)
    forecast.begin("first", 0.0)
    forecast.begin("second", 20.0)
    forecast.at(0.5, 80.0)
    # 40 s of the prediction took 80 s; the prediction itself counts as 5 s.
    assert forecast.pace(80.0) == pytest.approx((80 + prior) / (40 + prior))
    assert forecast.left(80.0) == pytest.approx(60 * (80 + prior) / (40 + prior))
    forecast.begin("last", 140.0)
    forecast.at(1.0, 200.0)
    assert forecast.left(200.0) == 0


def test_what_was_done_before_a_resume_does_not_count_as_fast() -> None:
    forecast = Forecast(PARTS)
    forecast.begin("second", 0.0, resumed=True)
    forecast.at(0.9, 3.0)
    assert forecast.pace(3.0) == 1
    assert forecast.left(3.0) == pytest.approx(0.1 * 60 + 30)


def test_an_unknown_stage_is_taken_for_one_like_the_others() -> None:
    forecast = Forecast(PARTS)
    forecast.begin("never heard of", 0.0)
    assert 100 <= forecast.left(0.0) <= 200


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_every_recipe_is_foreseen(recipe: str) -> None:
    config = config_from_dict(CHOICE[recipe])
    assert config.recipe == recipe
    few, many = (Forecast(parts_of(config, count, (128, 64, 32))) for count in (1_000, 30_000))
    assert 0 < few.total < many.total
    assert "final pass ~" in str(many)
    spread = config_from_dict(CHOICE[recipe] | {"run": {"workers": "32"}})
    assert Forecast(parts_of(spread, 30_000, (128, 64, 32))).total < many.total


def test_rounds_are_foreseen_and_told_as_one() -> None:
    config = config_from_dict({"train": {"components": 4}})
    foreseen, ahead = Forecast(parts_of(config, 30_000, (64, 32))), []
    assert (foreseeing.POSE_ROUNDS, foreseeing.SEARCHED_ROUNDS) == (ROUNDS, SEARCHED_ROUNDS)
    assert str(foreseen).count("round") == 1
    names = [f"{what}, round {number + 1}" for number in range(ROUNDS) for what in ("poses of states", "components")]
    for name in ("components", *names, "coordinates"):  # what is left becomes less with each
        foreseen.begin(name, 0.0)
        ahead.append(foreseen.left(0.0))
    assert ahead == sorted(ahead, reverse=True)
    assert ahead[-1] < ahead[0]


def test_times_are_round() -> None:
    assert [about(seconds) for seconds in (1, 22, 58, 200, 3540, 7800)] == [
        "~5 s", "~20 s", "~1 min", "~3 min", "~59 min", "~2 h 10 min"
    ]  # fmt: skip


def test_what_is_logged_scrolls_by_above_the_line() -> None:
    stream = Terminal()
    line = LiveLine(stream)
    line.show("half way")
    line.write_above("something happened")
    line.hide()
    line.write_above("the end")
    # The carriage return and the erase are what a terminal takes away.
    assert stream.getvalue().split("\r\x1b[2K") == ["", "half way", "something happened\n", "half way", "the end\n"]


def test_without_a_terminal_a_long_pass_logs_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 4))  # seconds
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    lines: list[str] = []
    monkeypatch.setattr(progress.logger, "info", lambda text, *values: lines.append(text % values))
    told = RunProgress(Forecast(PARTS), LiveLine(io.StringIO()), 2)
    told.begin_stage("second")
    told.begin_pass(20)
    for _ in range(20):
        told.batch(8)
    assert told.end_pass(None, done=False).endswith(" left")
    # 80 s of 4 s a batch: the first line after 10 s, then one every 30 s.
    assert len(lines) == 3
    assert lines[0].startswith("second: 3 of 20 batches, 4 images/s, ~")
    assert "ends about" in lines[0]


def test_a_stage_is_never_said_to_be_done_before_it_is() -> None:
    forecast = Forecast(PARTS)
    told = RunProgress(forecast, None, 1)
    told.begin_stage("last")
    for _ in range(5):  # one was expected
        told.begin_pass(2)
        told.batch(8)
        told.batch(8)
        assert told.end_pass(None, done=False)
    assert told.end_pass(None, done=True) == ""
