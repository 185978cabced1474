"""tools/stress.py on its smallest set: simulate, train from nothing and from true poses, judge, one table."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["guided.starts=1", "guided.bootstrap_steps=10", "guided.bootstrap_rounds=1", "guided.iterations=2",
         "guided.encoder_steps=0"]  # fmt: skip


def stress(*words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tools" / "stress.py"), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_smallest_set_is_run_and_judged(shared_data: Path, tmp_path: Path) -> None:
    structures = ["--structures", str(shared_data / "structures")]
    done = stress(str(tmp_path), "--only", "toy", *structures, "--set", *SHORT)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "stress.md").read_text().splitlines()
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells[:2] == ["toy", "0"]
    assert cells[-1] == "met" or cells[-1].startswith("missed: ")
    known = json.loads((tmp_path / "toy" / "draw0" / "poses.json").read_text())
    # From true poses at 3.2 Å/px: half a voxel at the particle's edge (40 Å) is 2.3°. 540 of 600 images are no junk.
    assert known["images"] == 540
    assert known["rotation_error_median_deg"] < 2.3
    assert known["junk_auc"] > 0.5
    scratch = json.loads((tmp_path / "toy" / "draw0" / "scratch0.json").read_text())
    assert scratch["settings"]["guided.starts"] == "1"
    assert "guided.starts" not in known["settings"]
    assert f"{scratch['fsc_mean']:.4f} / {known['fsc_mean']:.4f}" in lines[2]
    # What is finished is not run again.
    marker = tmp_path / "toy" / "draw0" / "scratch0" / "map.mrc"
    before = marker.stat().st_mtime_ns
    again = stress(str(tmp_path), "--only", "t?y", *structures, "--set", *SHORT)
    assert again.returncode == 0, again.stderr
    assert marker.stat().st_mtime_ns == before


def test_wrong_names_are_refused_at_once(tmp_path: Path) -> None:
    for words in (["--only", "no-such"], ["--set", "guided.no=1"]):
        done = stress(str(tmp_path / "out"), *words)
        assert done.returncode == 2
        assert words[1] in done.stderr
    assert not (tmp_path / "out").exists()
