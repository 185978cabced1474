"""Ray Train at the edge: the only module that imports ray. The loop itself knows nothing of it.

The driver owns the restarts: an attempt that lost a worker or a node is followed by another, which goes on from the
newest checkpoint in the run's folder. What a worker raised on purpose ends the run at once.
"""

import dataclasses
import logging
import os
import time
from typing import Any

import fsspec
import ray
import ray.autoscaler.sdk
import ray.train
import torch
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device

from scalecryo.config import Config, config_from_dict
from scalecryo.data import files
from scalecryo.errors import ScalecryoError, TrainingError
from scalecryo.train.checkpoint import newest_step
from scalecryo.train.logs import log_to_stderr
from scalecryo.train.loop import train
from scalecryo.train.run_folder import RunFolder
from scalecryo.train.world import World

logger = logging.getLogger(__name__)
OBJECT_STORE_BYTES = 100 * 2**20  # the particles never pass through it
LEAST_WAIT_MINUTES = 2.0  # for a lost node to come back, or its loss to be noticed
START_FAILURES = 3  # of Ray's own attempts to start the workers


def train_on_ray(config: Config) -> None:
    """Run the loop in `run.workers` Ray Train workers and wait for its end.

    Joins the cluster that RAY_ADDRESS or an earlier `ray.init` names, else starts one on this machine. After a loss
    the group starts again, on as many workers as there are, from the newest checkpoint; `run.max_failures` losses in
    a row without a new checkpoint end the run.

    Raises:
        TrainingError: the cluster is too small, or the workers failed for good.
        ScalecryoError: what a worker raised on purpose.
    """
    if not ray.is_initialized():
        _join_or_start()
    run, failures, wait = RunFolder(config.run.out), 0, config.run.wait_minutes
    while True:
        _await_workers(config, wait)
        before = newest_step(run)
        try:
            _fit(config)
            return
        except ray.train.TrainingFailedError as error:
            cause = _purpose(error)
            if cause is not None:
                raise cause from error
            reached = newest_step(run)
            failures = 1 if reached > before else failures + 1
            if failures > config.run.max_failures:
                raise TrainingError(
                    f"the Ray Train workers failed {failures} times without a new checkpoint: {_reason(error)} "
                    "(--resume goes on from the last checkpoint, --debug shows where)"
                ) from error
            where = f"checkpoint {reached}" if reached else "the start"
            logger.warning("%s: starting again from %s (loss %d without a new checkpoint, of at most %d)",
                           _reason(error), where, failures, config.run.max_failures)  # fmt: skip
        wait = max(wait, LEAST_WAIT_MINUTES)


def _join_or_start() -> None:
    """Join the cluster that RAY_ADDRESS names (`ray job submit` sets it), else start one of this machine alone."""
    quiet = ray.LoggingConfig(log_level="ERROR")  # its messages are for Ray's own logs
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_config=quiet)  # refuses resources and memory: those are the cluster's
    else:
        # Without a dashboard Ray Train complains every second. "local": another cluster on this machine is not ours.
        ray.init("local", object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False, logging_config=quiet)


def _await_workers(config: Config, minutes: float) -> None:
    """Return when the cluster can hold the smallest number of workers; an autoscaler is asked for it.

    Raises:
        TrainingError: it could not within so many minutes.
    """
    low, high = config.run.worker_range
    resource = "GPU" if config.run.device == "cuda" else "CPU"
    deadline, said = time.monotonic() + 60 * minutes, False
    while (there := ray.cluster_resources().get(resource, 0)) < low:
        if time.monotonic() >= deadline:
            raise TrainingError(
                f"--workers {config.run.workers} needs {low} {resource}s and the Ray cluster has {there:g}: "
                "use fewer workers, add nodes, or raise run.wait_minutes where nodes are on their way"
            )
        if not said:
            logger.info("waiting up to %g min for %d %ss: the cluster has %g", minutes, low, resource, there)
            ray.autoscaler.sdk.request_resources(bundles=[{resource: 1}] * low)
            said = True
        time.sleep(1)
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    logger.info("starting %d workers on %d nodes with %g %ss", min(high, int(there)), nodes, there, resource)


def _fit(config: Config) -> None:
    """One attempt: start the workers, wait for their end."""
    low, high = config.run.worker_range
    workers: Any = low if low == high else (low, high)
    filesystem, path = fsspec.core.url_to_fs(config.run.out)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"config": dataclasses.asdict(config), "asked": time.time()},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=config.run.device == "cuda"),
        run_config=RunConfig(
            name="ray",
            storage_path=path,
            storage_filesystem=PyFileSystem(FSSpecHandler(filesystem)),
            # Ray restarts after announced preemptions and to resize; what fails comes back to `train_on_ray`.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=START_FAILURES),  # type: ignore[call-arg]
        ),
    )
    trainer.fit()


def _worker(settings: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    log_to_stderr()
    config = config_from_dict(settings["config"])
    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size())
    run = RunFolder(config.run.out)
    if not files.exists(run.path("config.toml")):
        raise TrainingError(
            f"{config.run.out} cannot be seen from node {ray.util.get_node_ip_address()}: "
            "write the run to a folder that all nodes share, or to a URL"
        )
    if world.leads:
        logger.info("%d workers are up after %.0f s, going on from step %d",
                    world.size, time.time() - settings["asked"], newest_step(run))  # fmt: skip
    device = get_device()
    if isinstance(device, list):
        device = device[0]
    # A report is a barrier: only at checkpoints.
    train(config, world, torch.device(device), at_checkpoint=lambda step: ray.train.report({"step": step}))


def _failures(error: BaseException) -> dict[int, BaseException]:
    """What befell each worker, without Ray's wrapping."""
    wrapped = getattr(error, "worker_failures", {})
    return {rank: getattr(failure, "_base_exc", None) or failure for rank, failure in wrapped.items()}


def _purpose(error: BaseException) -> ScalecryoError | None:
    """The error that a worker raised on purpose, if one did: trying again would raise it again."""
    return next((failure for failure in _failures(error).values() if isinstance(failure, ScalecryoError)), None)


def _reason(error: BaseException) -> str:
    """In one line, what went wrong where."""
    failures = _failures(error)
    lost = [rank for rank, failure in failures.items() if isinstance(failure, ray.exceptions.RayError)]
    if lost:
        ranks = ", ".join(str(rank) for rank in sorted(lost))
        return f"worker {ranks} of {len(failures)} failed ones was lost (killed, out of memory, or its node is gone)"
    text = str(next(iter(failures.values()), error))
    if "gloo" in text.lower() and ("address" in text or "interface" in text):
        return "gloo found no network interface to reach the other workers by: set GLOO_SOCKET_IFNAME on every node"
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no message"
