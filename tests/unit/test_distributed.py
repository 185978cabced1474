"""Collectives: every device that a run reduces on has a backend, and one worker needs no process group."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from scalecryo.config import config_from_dict
from scalecryo.distributed.world import World, process_group_backend
from scalecryo.train import ray_workers


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


def test_eight_workers_take_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Ray Train is asked for, by its own reckoning of the resources of a worker; nothing is started."""
    asked: dict[str, Any] = {}

    class Trainer:
        def __init__(self, _loop: Any, **settings: Any) -> None:
            asked.update(settings)

        def fit(self) -> None:
            pass

    held = iter([["ours"], ["ours", "0a" * 18]])  # before the attempt, and after it
    removed: list[str] = []
    monkeypatch.setattr(ray_workers, "TorchTrainer", Trainer)
    monkeypatch.setattr(ray_workers, "_held_groups", lambda: next(held))
    monkeypatch.setattr(ray_workers, "remove_placement_group", lambda group: removed.append(group.id.hex()))
    config = config_from_dict({"run": {"workers": "8", "device": "cuda", "out": "/tmp/never"}})
    ray_workers._fit(config, 8)
    scaling = asked["scaling_config"]
    assert scaling.num_workers == 8
    assert scaling.total_resources["GPU"] == 8
    assert asked["torch_config"].backend == "cpu:gloo,cuda:nccl"
    assert ray_workers._resource(config) == "GPU"
    assert removed == ["0a" * 18]  # what Ray Train forgot would hold the GPUs of the next attempt
