"""tools/classes.py: which goals a run misses, and the table."""

from types import ModuleType
from typing import Any

import pytest

from tests.support.tools import tool


@pytest.fixture
def classes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return tool("classes", monkeypatch)


def a_run(**changed: Any) -> dict[str, Any]:
    row = {"class_accuracy": 0.99, "class_purity": 0.99, "class_confusion": [[50, 1], [0, 49]], "junk_auc": None,
           "class_rotation_error_median_deg": [0.8, 1.0], "class_fsc_0.5_angstrom": [8.1, None],
           "processor_seconds": 12.3, "peak_gib": 2.0}  # fmt: skip
    return row | changed


ALONE = [{"rotation_error_mod_pseudosymmetry_median_deg": None, "rotation_error_median_deg": 0.7},
         {"rotation_error_mod_pseudosymmetry_median_deg": 0.9, "rotation_error_median_deg": 40.0}]  # fmt: skip


def test_goals(classes: ModuleType) -> None:
    two, more = classes.SETS["two"], classes.SETS["four-k6"]
    assert classes.missed(two, a_run(), ALONE) == []
    assert classes.missed(two, a_run(class_accuracy=0.94), ()) == ["labels"]
    # More classes than structures: a structure that is split is no mistake, one that is mixed is.
    assert classes.missed(more, a_run(class_accuracy=0.7), ()) == []
    assert classes.missed(more, a_run(class_purity=0.97), ()) == ["labels"]
    assert classes.missed(two, a_run(class_rotation_error_median_deg=[1.06, 1.0]), ALONE) == ["pose"]
    assert classes.missed(two, a_run(class_rotation_error_median_deg=[0.8, None]), ALONE) == ["pose"]
    assert classes.missed(classes.SETS["junk"], a_run(junk_auc=0.98), ()) == ["AUC"]
    assert classes.missed(two, {"error": "no structure"}, ()) == ["refused"]
    # Two classes of 64 px beside one: twice the time, 0.2 GiB more.
    assert classes.missed(two, a_run(), (), {"processor_seconds": 6.2, "peak_gib": 1.85}) == []
    assert classes.missed(two, a_run(), (), {"processor_seconds": 6.1, "peak_gib": 1.75}) == ["time", "memory"]


def test_table(classes: ModuleType) -> None:
    refused, one = {"error": "no structure", "processor_seconds": 1.0}, {"processor_seconds": 9.0, "peak_gib": 1.9}
    lines = classes.table([("two", 0, a_run(), ALONE, one), ("two", 1, refused, (), None)])
    assert "| 99.00% | 99.00% | 50 1 / 0 49 | 0.80, 1.00 (0.70, 0.90) | 8.10, - | - | 12 (9) | 0.10 | met |" in lines
    assert "no structure" in lines
    assert len({line.count("|") for line in lines.splitlines()}) == 1
