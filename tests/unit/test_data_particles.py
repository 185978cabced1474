"""The particle table refuses what later steps could not use."""

import numpy as np
import pytest

from scalecryo.data.particles import COLUMNS, CTF_COLUMNS, ParticleTable
from scalecryo.errors import InputError


def _columns(count: int = 3) -> dict[str, np.ndarray]:
    columns = {name: np.zeros((count, *shape), dtype) for name, (dtype, shape) in COLUMNS.items()}
    return columns | {
        "voltage": np.full(count, 300.0),
        "defocus_u": np.array([15000.0, 16000.0, 17000.0][:count]),
        "defocus_v": np.array([14000.0, 16500.0, 17000.0][:count]),
        "astigmatism_angle": np.array([10.0, 20.0, 30.0][:count]),
        "rotation": np.broadcast_to(np.eye(3), (count, 3, 3)),
        "stack_index": np.arange(count),
    }


def test_defoci_are_ordered_by_turning_the_angle() -> None:
    # cos 2(θ − a) and its amplitude are unchanged when U and V change places and a turns by 90°.
    table = ParticleTable(1.0, ("s.mrcs",), _columns())
    assert table.columns["defocus_u"].tolist() == [15000, 16500, 17000]
    assert table.columns["defocus_v"].tolist() == [14000, 16000, 17000]
    assert table.columns["astigmatism_angle"].tolist() == [10, 110, 30]
    assert {name: values.dtype.str[1:] for name, values in table.columns.items()} == {
        name: dtype for name, (dtype, _) in COLUMNS.items()
    }


def test_select_and_names() -> None:
    table = ParticleTable(1.0, ("a.mrcs", "b.mrcs"), _columns() | {"stack": np.array([1, 0, 1])})
    part = table.select(np.array([2, 0]))
    assert part.image_names() == ["000003@b.mrcs", "000001@b.mrcs"]
    assert len(table.select(slice(1, 3))) == 2
    assert table.has_ctf
    assert table.has_pose


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"defocus_u": np.array([1.0, np.nan, 2.0])}, "defocus_u of row 2 is nan"),
        ({"shift": np.array([[0, 0], [0, np.inf], [0, 0]])}, "shift of row 2"),
        ({"voltage": np.array([300.0, 300.0, 0.0])}, "voltage of row 3 is 0.0"),
        ({"amplitude_contrast": np.array([1.5, 0.0, 0.0])}, "amplitude contrast of row 1 is 1.5"),
        ({"stack": np.array([0, 0, 1])}, "stack of row 3 is 1, it must be below 1"),
        ({"stack_index": np.array([0, -1, 1])}, "stack index of row 2 is -1"),
        ({"half": np.array([0, 1, 3])}, "half of row 3 is 3"),
        ({"shift": np.zeros((3, 3))}, r"shift has shape \(3, 3\)"),
        ({"extra": np.zeros(3)}, "unknown columns extra"),
    ],
)
def test_bad_values_are_named(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ParticleTable(1.0, ("s.mrcs",), _columns() | change)


@pytest.mark.parametrize("name", ["half", "voltage", "shift"])
def test_half_given_groups_are_refused(name: str) -> None:
    columns = _columns()
    del columns[name]
    with pytest.raises(InputError, match=f"missing columns {name}"):
        ParticleTable(1.0, ("s.mrcs",), columns)


def test_ctf_and_pose_may_be_absent() -> None:
    columns = {name: values for name, values in _columns().items() if name not in (*CTF_COLUMNS, "rotation", "shift")}
    table = ParticleTable(0.0, ("s.mrcs",), columns)
    assert not table.has_ctf
    assert not table.has_pose
    with pytest.raises(InputError, match="pixel size nan"):
        ParticleTable(float("nan"), ("s.mrcs",), columns)
