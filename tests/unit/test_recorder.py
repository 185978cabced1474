"""TensorBoard's view of a run, read back by TensorBoard's own reader: one curve, named, with units, and pictures."""

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from scalecryo.config import load_config
from scalecryo.runs.folder import RunFolder
from scalecryo.runs.recorder import Recorder
from scalecryo.runs.tags import CURVES, PICTURES, tag_of


def events_of(run: Path) -> EventAccumulator:
    events = EventAccumulator(str(run / "tb"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events


def test_a_resumed_run_is_one_curve(tmp_path: Path) -> None:
    config = load_config(None, {"run.data": "store", "train.rows": "700"})
    for first, last, value in ((1, 4, 1.0), (3, 5, 2.0)):
        recorder = Recorder(config, RunFolder(str(tmp_path)), start_step=first - 1)
        for step in range(first, last + 1):
            recorder.scalars(step, {"halves/resolution_angstrom": value, "seconds/read": value, "list": [1.0]})
        recorder.close()
    events = events_of(tmp_path)
    found = [(event.step, event.value) for event in events.Scalars("map/resolution")]
    assert found == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]
    assert [event.step for event in events.Scalars("time/read")] == [1, 2, 3, 4, 5]
    # metrics.jsonl keeps the names that other programs read.
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[-1]["halves/resolution_angstrom"] == 2.0
    assert rows[-1]["list"] == [1.0]
    known = events.SummaryMetadata("map/resolution")
    assert (known.display_name, known.plugin_data.plugin_name) == ("resolution (Å)", "scalars")
    assert "0.143" in known.summary_description


def test_runs_are_compared_by_what_they_were_given(tmp_path: Path) -> None:
    config = load_config(None, {"run.data": "store", "train.rows": "700", "guided.starts": "3"})
    Recorder(config, RunFolder(str(tmp_path)), start_step=0).close()
    events = events_of(tmp_path)
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["changed"].string_value == "train.rows=700 guided.starts=3"
    assert settings["train.rows"].number_value == 700
    assert settings["recipe"].string_value == "guided"
    assert "run.out" not in settings


@pytest.mark.parametrize(("settings", "shown"), [({}, False), ({"pose.source": "known"}, True)])
def test_a_loss_is_compared_where_there_is_one(tmp_path: Path, settings: dict[str, str], shown: bool) -> None:
    """A column of TensorBoard's table that no run of the recipe fills is left out."""
    Recorder(load_config(None, settings), RunFolder(str(tmp_path)), start_step=0).close()
    content = events_of(tmp_path).SummaryMetadata("_hparams_/experiment").plugin_data.content
    metrics = plugin_data_pb2.HParamsPluginData.FromString(content).experiment.metric_infos
    names = {metric.name.tag for metric in metrics}
    assert "final/resolution" in names
    assert ("optimisation/loss" in names) == shown


def test_pictures_and_the_final_correlation(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    recorder = Recorder(load_config(None, {}), run, start_step=0)
    generator = torch.Generator().manual_seed(0)
    density, curve = torch.randn(24, 24, 24, generator=generator), 1 - torch.arange(13) / 12
    recorder.scalars(1, {"loss": 1.0})
    recorder.surface(1, density, 2.0, None, {"half-maps": curve, "masked": curve})
    recorder.views(1, torch.eye(3).expand(50, 3, 3))
    run.write("fsc.csv", b"shell,fsc_corrected\n0,1.0\n1,0.75\n2,0.1\n")
    recorder.conclude({"final/resolution_angstrom": 3.5})
    recorder.close()
    events = events_of(tmp_path)
    assert {PICTURES[name].name for name in ("surface", "fsc", "views")} <= set(events.Tags()["images"])
    views = events.Images("poses/views")[0]
    assert (views.width, views.height) == (1, 1)  # as conftest draws them
    assert [(event.step, event.value) for event in events.Scalars("final_fsc/masked_corrected")] == [
        (0, 1.0), (1, 0.75), (2, pytest.approx(0.1)),
    ]  # fmt: skip
    assert events.Scalars("final/resolution")[0].value == 3.5
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["final/resolution_angstrom"] == 3.5


def test_names_are_grouped_and_none_is_used_twice() -> None:
    names = [tag.name for tag in (*CURVES.values(), *PICTURES.values())]
    assert len(set(names)) == len(names)
    assert all("/" in name for name in names)
    assert tag_of("classes/share_2").title == "class 2"
    assert tag_of("something/new").name == "something/new"
