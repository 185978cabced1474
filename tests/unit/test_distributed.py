"""Collectives: every device that a run reduces on has a backend, and one worker needs no process group."""

import pytest
import torch
import torch.distributed as dist

from scalecryo.distributed.world import World, process_group_backend


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_tensors_of_the_run_and_of_the_host_have_a_backend(device: str) -> None:
    # Reference: torch's own map from device to backend, of a group opened by this name. NCCL alone has none for "cpu".
    backends = dist.BackendConfig(dist.Backend(process_group_backend(device))).get_device_backend_map()
    assert backends["cpu"] == "gloo"
    assert backends[device] == ("gloo" if device == "cpu" else "nccl")
    assert "cpu" not in dist.BackendConfig(dist.Backend("nccl")).get_device_backend_map()


def test_one_worker_reduces_nothing() -> None:
    world, values = World(), torch.arange(3.0)
    world.all_reduce_(values)
    world.all_reduce_async(values)()
    assert world.all_gather(values) == [values]
    assert world.all_gather_names(["b", "a"]) == ["a", "b"]
    assert values.tolist() == [0, 1, 2]
    assert world.timer.reduced_bytes == 0
