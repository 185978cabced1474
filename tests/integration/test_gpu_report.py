"""tools/gpu_report.py, rehearsed on the CPU as on a machine that has torch and the wheels of its list, and no Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.gpu.document import write
from tools.gpu.timeline import blamed, covered, gaps
from tools.gpu_report import PARTS, Report

ROOT = Path(__file__).resolve().parents[2]
LIST = ROOT / "tools" / "gpu_wheels.txt"


def report(out: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    bare = [sys.executable, str(ROOT / "tests/support/bare_machine.py"), str(LIST)]
    command = [*bare, str(ROOT / "tools/gpu_report.py"), str(out), "--device", "cpu", *words]
    # A bare machine has no beartype to check shapes with.
    env = {name: value for name, value in os.environ.items() if name != "SCALECRYO_CHECK_SHAPES"}
    return subprocess.run(command, capture_output=True, text=True, cwd=out.parent, timeout=1200, env=env)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gpu") / "report"
    result = report(out, "--minutes", "6")
    assert result.returncode == 0, result.stdout + result.stderr
    return out


def parts_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())["parts"]


def test_every_part_runs_without_what_is_not_on_the_list(finished: Path) -> None:
    found = parts_of(finished)
    assert list(found) == [part.name for part in PARTS]
    assert {part["status"] for part in found.values()} == {"done"}
    assert all(part["rows"] for part in found.values())
    text = (finished / "report.md").read_text()
    assert all(part.title in text for part in PARTS)
    assert "A rehearsal" in text
    for picture in ("kernels", "steps", "iteration", "D"):
        assert (finished / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_kernels_agree_with_their_references(finished: Path) -> None:
    # Single precision places a sample to |q| 2^-23 voxels (test_slice_backends.py); here |q| <= 16.
    errors = {row["kernel"]: row["error"] for row in parts_of(finished)["kernels"]["rows"] if row["error"] is not None}
    assert len(errors) == 5
    assert max(errors.values()) < 2e-5


def test_the_run_found_a_map(finished: Path) -> None:
    rows = parts_of(finished)["D"]["rows"]
    (trained,) = [row for row in rows if row.get("device") == "cpu"]
    assert trained["pose error, °"] < 4  # it began with the true poses; 32 px: a pixel at the edge is 3.6°
    assert any("README" in row.get("device", "") for row in rows)


def test_called_again_it_keeps_what_is_done(finished: Path) -> None:
    path = finished / "report.json"
    before = json.loads(path.read_text())
    before["parts"]["precision"]["status"] = "cut after 1 s"
    path.write_text(json.dumps(before))
    again = report(finished, "--only", "precision", "kernels")
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.splitlines()[0].startswith("precision: done")
    assert "kernels: " not in again.stdout
    assert parts_of(finished)["kernels"] == before["parts"]["kernels"]


def test_another_device_or_code_begins_anew(tmp_path: Path) -> None:
    part = PARTS[0]
    for digest, kept in (("a", "done"), ("b", None)):
        known = Report(tmp_path, tmp_path)
        known.begin({"code": "a", "device": "x", "commit": "1"})
        known.add(part, "done", 1.0, [])
        later = Report(tmp_path, tmp_path)
        later.begin({"code": digest, "device": "x", "commit": "2"})
        assert later.status(part) == kept
    assert (tmp_path / "report_before.json").exists()


def test_parts_that_were_not_reached_are_named(tmp_path: Path) -> None:
    write({"identity": {"device": "x"}, "parts": {}}, PARTS, tmp_path)
    assert (tmp_path / "report.md").read_text().count("Not reached") == len(PARTS)


def test_idle_time_of_the_device_is_laid_to_the_innermost_operation() -> None:
    busy = covered([(0, 10), (5, 20), (120, 130), (400, 410)])
    assert busy == [(0, 20), (120, 130), (400, 410)]
    idle = gaps(busy)
    assert idle == [(20, 120), (130, 400)]
    host = [(0, 300, "step"), (50, 90, "aten::nonzero"), (390, 395, "late")]
    assert blamed(idle, host) == {"aten::nonzero": 100, "step": 270}


def test_the_list_pins_what_the_image_pins() -> None:
    lines = [line for line in LIST.read_text().splitlines() if line and not line.startswith("#")]
    assert all(line.count("==") == 1 for line in lines)
    assert not [line for line in lines if line.startswith(("ray", "torch==", "numpy", "numba", "matplotlib"))]
