"""What a run tells Prometheus: names, values, the text format."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import ray.exceptions
import ray.train
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from scalecryo.runs.exported import GAUGES, LOST_WORKERS, PREFIX, exported_values, write_text_file
from scalecryo.train.ray_workers import _reason

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
# Prometheus' data model: https://prometheus.io/docs/concepts/data_model/, and its text format's sample line.
NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
SAMPLE = re.compile(rf"{NAME.pattern}\{{run=\"(?:[^\"\\\n]|\\\\|\\\"|\\n)*\"\}} [-+0-9.e]+")


def test_names_are_prometheus_own() -> None:
    for name in (*GAUGES, LOST_WORKERS):
        assert NAME.fullmatch(f"{PREFIX}{name}")
    assert all("\n" not in gauge.help for gauge in GAUGES.values())


def test_only_finite_numbers_are_exported() -> None:
    curves = {"images_per_second": 12.5, "loss": math.nan, "halves/resolution_angstrom": 4, "truth/fsc": [1.0]}
    assert exported_values(curves) == {"images_per_second": 12.5, "resolution_angstrom": 4.0}


def test_the_text_file_is_in_prometheus_format(tmp_path: Path) -> None:
    path = tmp_path / "scalecryo.prom"
    write_text_file(path, {"loss": 0.5, "workers": 2.0}, 's3://bucket/a "run"')
    lines = path.read_text().splitlines()
    assert lines[0] == f"# HELP {PREFIX}loss {GAUGES['loss'].help}"
    assert lines[1] == f"# TYPE {PREFIX}loss gauge"
    samples = [line for line in lines if not line.startswith("#")]
    assert len(samples) == 2
    assert all(SAMPLE.fullmatch(line) for line in samples)
    assert list(tmp_path.iterdir()) == [path]  # nothing half-written beside it


@pytest.fixture
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    return found


def test_promtool_takes_the_text_file(promtool: str, tmp_path: Path) -> None:
    path = tmp_path / "scalecryo.prom"
    write_text_file(path, dict.fromkeys(GAUGES, 1.5), 's3://bucket/a "run"')
    done = subprocess.run([promtool, "check", "metrics"], input=path.read_bytes(), capture_output=True)
    # 1 is a name or a text that Prometheus refuses; 3 is advice: a curve's unit need not be one of its base units.
    assert done.returncode in (0, 3), done.stderr.decode()


def test_promtool_takes_the_dashboards_queries(promtool: str, tmp_path: Path) -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "scalecryo.json").read_text())
    queries = [target["expr"].replace("$run", ".*") for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(queries) >= len(GAUGES)
    rules = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(queries)]
    path = tmp_path / "rules.json"  # JSON is YAML
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run([promtool, "check", "rules", "--lint=none", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(queries)} rules found" in done.stdout


class Failed(Exception):
    def __init__(self, failures: dict[int, Any]) -> None:
        super().__init__("failed")
        self.worker_failures = failures


# As Ray 2.60 words them (ray.exceptions.ActorDiedError, its memory monitor and its node manager).
DIED = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: RayTrainWorker\n\tactor_id: 0a\n\tpid: 7\n"
)


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (DIED + "\tip: 10.0.0.7\nThe actor is dead because its node has died. Node Id: 5f",
         "10.0.0.7 was lost: its node is gone"),
        (DIED + "\tip: 10.0.0.8\nThe actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR "
         "Worker exit detail: Worker unexpectedly exits with a connection error code 2. End of file. Some common "
         "causes include: (1) the process was killed by the OOM killer due to high memory usage, (2) ray stop --force "
         "was called, or (3) the worker crashed unexpectedly due to SIGSEGV or another unexpected error.",
         "10.0.0.8 was lost: its process was killed"),
        (DIED + "\tip: 10.0.0.6\nThe actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR "
         "Worker exit detail: Worker exits unexpectedly by a signal. SystemExit is raised (sys.exit is called). Exit "
         "code: 1. The process receives a SIGTERM.", "10.0.0.6 was lost: its process was told to end (SIGTERM"),
        (DIED + "\tip: 10.0.0.9\nTask was killed due to the node running low on memory: memory usage threshold 0.95",
         "10.0.0.9 was lost: killed for memory"),
        ("The actor 63ac is unavailable: The actor is temporarily unavailable: RpcError: RPC error: failed to connect "
         "to all addresses; last error: UNKNOWN: ipv4:10.0.0.5:13026: Failed to connect to remote host: Connection "
         "refused rpc_code: 14. The task may or may not have been executed on the actor.",
         "10.0.0.5 was lost: its process or its node is gone"),
        ("The node was preempted.", "on an unknown node was lost: its node was taken back"),
    ],
)  # fmt: skip
def test_a_lost_worker_is_named_with_its_node_and_the_cause(said: str, line: str) -> None:
    # As Ray Train hands it over; another worker's collective fails with it.
    met = WorkerHealthCheckFailedError("A worker health check failed.", ray.exceptions.RayActorError(None, said))
    reason = _reason(Failed({1: RuntimeError("Connection closed by peer"), 3: met}))
    assert reason.startswith("worker 3 on")
    assert line in reason
    assert "\n" not in reason


def test_a_worker_lost_as_the_group_starts_has_no_rank_yet() -> None:
    said = DIED + "\tip: 10.0.0.6\nThe actor is dead. The process receives a SIGTERM."
    reason = _reason(ray.train.ControllerError(ray.exceptions.RayActorError(None, said)))
    assert reason.startswith("as the workers started, one on node 10.0.0.6 was lost: its process was told to end")


def test_an_error_of_a_workers_own_is_not_a_loss() -> None:
    assert _reason(Failed({0: ValueError("first\nthe last line")})) == "the last line"
