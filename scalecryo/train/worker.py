"""Ray Train at the edge: the only module that imports ray. The loop itself knows nothing of it."""

import dataclasses
import os
from typing import Any

import fsspec
import ray
import ray.train
import torch
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device

from scalecryo.config import Config, config_from_dict
from scalecryo.errors import ScalecryoError, TrainingError
from scalecryo.train.logs import log_to_stderr
from scalecryo.train.loop import train
from scalecryo.train.world import World

OBJECT_STORE_BYTES = 100 * 2**20  # the particles never pass through it


def train_on_ray(config: Config) -> None:
    """Run the loop in `run.workers` Ray Train workers and wait for its end.

    Joins the cluster that RAY_ADDRESS or an earlier `ray.init` names, else starts one on this machine. A failed
    worker restarts the group, which goes on from the newest checkpoint in the run's folder.

    Raises:
        TrainingError: the cluster is too small, or the workers failed for good.
        ScalecryoError: what a worker raised on purpose.
    """
    low, high = config.run.worker_range
    if not ray.is_initialized():
        _join_or_start()
    gpu = config.run.device == "cuda"
    resource = "GPU" if gpu else "CPU"
    there = ray.cluster_resources().get(resource, 0)
    if there < low:
        raise TrainingError(
            f"--workers {config.run.workers} needs {low} {resource}s and the Ray cluster has {there:g}: "
            "use fewer workers, or add nodes"
        )
    workers: Any = low if low == high else (low, high)
    filesystem, path = fsspec.core.url_to_fs(config.run.out)
    trainer = TorchTrainer(
        _worker,
        train_loop_config=dataclasses.asdict(config),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu),
        run_config=RunConfig(
            name="ray",
            storage_path=path,
            storage_filesystem=PyFileSystem(FSSpecHandler(filesystem)),
            failure_config=FailureConfig(max_failures=3),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _cause(error) from error


def _join_or_start() -> None:
    """Join the cluster that RAY_ADDRESS names (`ray job submit` sets it), else start one of this machine alone."""
    quiet = ray.LoggingConfig(log_level="ERROR")  # its messages are for Ray's own logs
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_config=quiet)  # refuses resources and memory: those are the cluster's
    else:
        # Without a dashboard Ray Train complains every second. "local": another cluster on this machine is not ours.
        ray.init("local", object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False, logging_config=quiet)


def _worker(settings: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    log_to_stderr()
    config = config_from_dict(settings)
    context = ray.train.get_context()
    device = get_device()
    if isinstance(device, list):
        device = device[0]
    train(
        config,
        World(context.get_world_rank(), context.get_world_size()),
        torch.device(device),
        # A report is a barrier: only at checkpoints.
        at_checkpoint=lambda step: ray.train.report({"step": step}),
    )


def _cause(error: BaseException) -> ScalecryoError:
    """The error that a worker raised on purpose, out of Ray's wrappers, else a summary of the failure."""
    failures = list(getattr(error, "worker_failures", {}).values())
    for failure in failures:
        inner = getattr(failure, "cause", None) or failure
        if isinstance(inner, ScalecryoError):
            return inner
    text = str(failures[0] if failures else error).strip().splitlines()
    return TrainingError(f"the Ray Train workers failed: {text[-1] if text else 'no message'} (--debug shows where)")
