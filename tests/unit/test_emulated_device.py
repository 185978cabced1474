"""The emulated device refuses what a GPU refuses, and computes what a CPU computes."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.support.emulated_device import DEVICE, EmulatedDevice, HostTensorRefusedError, OnDevice


def test_values_and_aliases_are_kept() -> None:
    with EmulatedDevice() as device:
        values = torch.arange(6.0).to(DEVICE)
        assert isinstance(values, OnDevice)
        values.view(2, 3)[1] += 10
        found = (values * 2)[torch.tensor([0, 5])]
        assert found.device == DEVICE
        assert found.tolist() == [0, 30]
        assert float(values.sum()) == 45
        assert torch.tensor([1.5], device=DEVICE).cpu().tolist() == [1.5]
        assert (values > 13).nonzero()[:, 0].tolist() == [4, 5]
        assert values[values > 13].tolist() == [14, 15]
        values[values > 14] = 16.0  # one value for all: nobody asks how many
        assert torch.view_as_real(torch.complex(values, values).conj()).cpu()[1].tolist() == [1, -1]
    assert device.waits["nonzero"] == 1
    assert device.waits["index"] == 1
    assert device.waits["index_put_"] == 0
    assert device.waits["_local_scalar_dense"] == 1


def test_gradients_flow() -> None:
    with EmulatedDevice():
        model = nn.Linear(3, 1).to(DEVICE)
        model(torch.ones(2, 3, device=DEVICE)).sum().backward()
        assert model.weight.grad is not None
        assert model.weight.grad.cpu().tolist() == [[2, 2, 2]]


@pytest.mark.parametrize(
    "fault",
    [
        lambda x: x + torch.ones(3),
        lambda x: x @ torch.ones(3),
        lambda x: torch.cat([x, torch.ones(3)]),
        lambda x: x.numpy(),
        lambda x: torch.rand(3, generator=torch.Generator(), device=DEVICE),
        lambda x: torch.zeros(3).index_add_(0, torch.tensor([0, 1, 2]).to(DEVICE), x),
    ],
    ids=["add", "matmul", "cat", "numpy", "generator", "index_add"],
)
def test_what_a_gpu_refuses_is_refused(fault: Any) -> None:
    with EmulatedDevice():
        values = torch.ones(3).to(DEVICE)
        with pytest.raises((HostTensorRefusedError, RuntimeError, TypeError)):
            fault(values)


def test_numbers_and_indices_may_come_from_the_host() -> None:
    with EmulatedDevice():
        values = torch.ones(3).to(DEVICE)
        assert (values * torch.tensor(2.0)).sum().item() == 6
        assert values[torch.tensor([True, False, True])].tolist() == [1, 1]
        values[[0, 2]] = torch.tensor([2.0, 3.0]).to(DEVICE)
        assert values.tolist() == [2, 1, 3]
        assert values[[1, 2]].tolist() == [1, 3]
        values.fill_(1)
        assert torch.zeros(3).copy_(values).tolist() == [1, 1, 1]
