"""Memory foreseen: the grids against real tensors, the refusals in words, and what was measured."""

import pytest

from scalecryo.config import config_from_dict
from scalecryo.errors import ConfigError
from scalecryo.map.backprojection import Backprojection
from scalecryo.map.components import ComponentSums
from scalecryo.train.memory import PROCESS, check_memory, grid, machine_bytes, need_of, sums_bytes

GIB = 2**30
LEVELS = (400, 256, 128, 64, 32)


@pytest.mark.parametrize("box", [16, 32])
def test_grids_are_those_of_the_tensors(box: int) -> None:
    # Reference: torch's own count of bytes.
    numerator, denominator = Backprojection(box, classes=3).tensors()
    assert grid(box) == numerator[0, 0].numel()
    assert sums_bytes(box, 6) == numerator.nbytes + denominator.nbytes


def test_a_run_that_fits_is_let_pass() -> None:
    config = config_from_dict({})
    need = check_memory(config, LEVELS[2:], 8 * GIB)
    assert PROCESS < need.peak < 4 * GIB
    assert check_memory(config, LEVELS, None).peak > need.peak
    assert need_of(config_from_dict({"train": {"final_pass": False}}), LEVELS).final == 0


def test_a_box_that_fits_is_named() -> None:
    config = config_from_dict({})
    need = need_of(config, LEVELS)
    assert need.training > need.final
    with pytest.raises(ConfigError, match=r"train\.box = 400: .* use --train\.box 256") as refused:
        check_memory(config, LEVELS, need.final + GIB // 10)
    assert f"{need.peak / GIB:.1f}" in str(refused.value)
    check_memory(config_from_dict({"train": {"box": 256}}), LEVELS, need.final + GIB // 10)


def test_where_the_final_pass_is_too_large_the_store_is() -> None:
    with pytest.raises(ConfigError, match="convert once more with --box 128"):
        check_memory(config_from_dict({}), LEVELS, 3 * GIB)
    with pytest.raises(ConfigError, match=r"use a machine with more$"):
        check_memory(config_from_dict({}), LEVELS, GIB // 2)


def test_every_worker_of_this_machine_needs_its_own() -> None:
    alone = check_memory(config_from_dict({}), (128, 64, 32), 4 * GIB)
    assert alone.peak < 4 * GIB
    with pytest.raises(ConfigError, match="8 workers on it need"):
        check_memory(config_from_dict({"run": {"workers": "8"}}), (128, 64, 32), 4 * GIB)
    on_gpu = config_from_dict({"run": {"device": "cuda"}})
    check_memory(on_gpu, LEVELS, GIB)  # whose memory this is not


def test_several_structures_take_more() -> None:
    needs = [need_of(config_from_dict({"train": {"classes": k}}), (128, 64, 32)).peak for k in (1, 2, 4)]
    assert needs == sorted(needs)
    assert needs[2] > needs[0]


def test_components_take_what_their_tensors_do() -> None:
    """Reference: torch's count of bytes; and a measured peak (`python -m tools.bench components`, 96 px, q = 4)."""
    known = {"pose": {"source": "known"}}
    for q in (1, 4, 8):
        sums = ComponentSums(64, q).grid.nbytes
        config = config_from_dict(known | {"train": {"components": q, "box": 64}})
        assert need_of(config, (64, 32)).final > PROCESS + sums + 2 * 8 * (q + 1) * grid(64)
    needs = [need_of(config_from_dict(known | {"train": {"components": q}}), (96, 64, 32)).final for q in (0, 4, 10)]
    assert needs == sorted(needs)
    assert 1755 << 20 < needs[1] < 1.6 * (1755 << 20)  # a run with as many states as there may be takes more


def test_this_machine_tells_its_memory() -> None:
    found = machine_bytes()
    assert found is None or found > GIB // 4
