"""`scalecryo info STORE --plan`: its memory against real tensors, its terms, and the table in deploy/README."""

from itertools import pairwise
from pathlib import Path

import pytest

from scalecryo.commands import info
from scalecryo.errors import UsageError
from scalecryo.map.backprojection import Backprojection
from scalecryo.train import sizing
from scalecryo.train.cost_model import A100, H100
from scalecryo.train.sizing import RunPlan, plan, plan_table
from tests.conftest import SimulatedParticles

README = Path(__file__).resolve().parents[2] / "deploy" / "README.md"
CASES = ((10**5, 128), (10**6, 256), (10**7, 256), (10**7, 400))
GPUS = (1, 8, 64, 512)


def planned(particles: int, box: int, gpus: int) -> RunPlan:
    return plan(particles, box, gpus, H100, iteration_particles=50_000, batch_size=1024)


def test_readmes_table_is_what_the_model_says() -> None:
    for line in plan_table([planned(*case, gpus) for case in CASES for gpus in GPUS]):
        assert line in README.read_text(), line


@pytest.mark.parametrize("box", [16, 32])
def test_memory_holds_the_sums_and_what_solving_them_takes(box: int) -> None:
    # Reference: the tensors themselves, by torch's own count of bytes; all four parts of a half while all is searched.
    tensors = Backprojection(box, classes=sizing.PARTS).tensors()
    held = sum(tensor.nbytes for tensor in tensors)
    transform = tensors[0][0, 0].numel()
    assert sizing.device_bytes(box, 0) >= held + 2 * 8 * transform
    assert sizing.device_bytes(box, 100) > sizing.device_bytes(box, 10)


def test_a_run_takes_no_longer_on_more_gpus_and_costs_no_less() -> None:
    for case in CASES:
        plans = [planned(*case, gpus) for gpus in GPUS]
        assert all(value >= 0 for one in plans for value in one.seconds.values())
        assert plans[0].seconds["reduction"] == 0
        # Where a set is all start, more GPUs bring nothing and add their sums: seconds.
        assert all(more.hours < 1.05 * fewer.hours for fewer, more in pairwise(plans))
        assert [one.dollars for one in plans] == sorted(one.dollars for one in plans)
        assert [one.device_bytes for one in plans] == sorted((one.device_bytes for one in plans), reverse=True)


def test_a_slower_gpu_never_makes_it_faster() -> None:
    for particles, box in CASES:
        slow = plan(particles, box, 1, A100, iteration_particles=50_000, batch_size=1024)
        assert slow.hours >= planned(particles, box, 1).hours


def test_info_says_what_a_run_would_take(simulated: SimulatedParticles, capsys: pytest.CaptureFixture[str]) -> None:
    info.run(simulated.store, plan=True, gpus=8)
    said = capsys.readouterr().out
    assert "300 particles, box 32 px" in said
    assert "never measured on a GPU" in said
    assert "  8 H100: " in said


def test_what_cannot_be_planned_is_refused(simulated: SimulatedParticles) -> None:
    with pytest.raises(UsageError, match="--gpus 0"):
        info.run(simulated.store, plan=True, gpus=0)
    with pytest.raises(UsageError, match="needs a particle store"):
        info.run(str(simulated.folder / "particles.star"), plan=True)
