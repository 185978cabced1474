"""Ray Train at the edge: the only module that imports ray. The loop itself knows nothing of it.

The driver owns the restarts: an attempt that lost a worker or a node is followed by another, which goes on from the
newest checkpoint in the run's folder. What a worker raised on purpose ends the run at once.
"""

import dataclasses
import logging
import os
import re
import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import ray
import ray.autoscaler.sdk
import ray.train
import ray.util.metrics
import torch
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from scalecryo.config import Config, config_from_dict
from scalecryo.data.io import urls
from scalecryo.data.io.filesystem import filesystem
from scalecryo.distributed.world import World, process_group_backend
from scalecryo.errors import ScalecryoError, Stopped, TrainingError
from scalecryo.runs.checkpoint import newest_step
from scalecryo.runs.exported import GAUGES, LOST_WORKERS, LOST_WORKERS_HELP, PREFIX
from scalecryo.runs.folder import RunFolder
from scalecryo.runs.log import log_to_stderr
from scalecryo.train.loop import Publish, train
from scalecryo.train.stopping import ANSWER, DriversNotice, Notice, ended_by_sigterm, notice_of_sigterm, notice_of_word

logger = logging.getLogger(__name__)
OBJECT_STORE_BYTES = 100 * 2**20  # the particles never pass through it
LEAST_WAIT_MINUTES = 2.0  # for a lost node to come back, or its loss to be noticed
START_FAILURES = 3  # of Ray's own attempts to start the workers
SETTLE_SECONDS = 10.0  # for what a lost attempt held to become free
# What Ray says of a lost worker, and what that is called here; the first that fits.
_CAUSES = (
    (r"out.?of.?memory|memory usage threshold|\boom\b", "killed for memory: give workers more, or lower the batch"),
    (r"preempt", "its node was taken back (spot)"),
    (r"node (?:has )?died|node .{0,80}(?:dead|terminated|was removed)|missed too many heartbeats", "its node is gone"),
    (r"SIGTERM", "its process was told to end (SIGTERM: its pod or node is taken away)"),
    (r"failed to connect to", "its process or its node is gone (it cannot be reached)"),
    (r"SIGKILL|exit(?:ed)? with signal 9|connection error code 2|SYSTEM_ERROR|unexpectedly",
     "its process was killed (by the kernel for memory, by someone, or with its node)"),
)  # fmt: skip


class _MoreWorkers(Exception):
    """Worker 0 saw room for more workers, right after a checkpoint."""


def train_on_ray(config: Config) -> None:
    """Run the loop in `run.workers` Ray Train workers and wait for its end.

    Joins the cluster that RAY_ADDRESS or an earlier `ray.init` names, else starts one on this machine. After a loss
    the group starts again, on as many workers as there are, from the newest checkpoint; `run.max_failures` losses in
    a row without a new checkpoint end the run. A group smaller than `run.workers` allows starts again, larger, at the
    first checkpoint after room appeared.

    The number of workers of an attempt is fixed here and not left to Ray's own elastic groups: these count a dead node
    for a minute, and wait three for what a killed driver had reserved (seen with Ray 2.60).

    Raises:
        TrainingError: the cluster is too small, or the workers failed for good.
        ScalecryoError: what a worker raised on purpose; Stopped, where SIGTERM told it to end.
    """
    if not ray.is_initialized():
        with ended_by_sigterm("while Ray was starting"):
            _join_or_start()
    run, failures, wait = RunFolder(config.run.out), 0, config.run.wait_minutes
    notice = DriversNotice(run)
    losses = ray.util.metrics.Counter(f"{PREFIX}{LOST_WORKERS}", LOST_WORKERS_HELP, tag_keys=("run",))
    while True:
        with ended_by_sigterm("while it waited for workers"):
            workers = _await_workers(config, wait)
        before = newest_step(run)
        try:
            with notice_of_sigterm(notice.give):
                _fit(config, workers)
            if (answer := notice.answer()) is not None:
                raise Stopped(answer)
            return
        except ray.train.TrainingFailedError as error:
            cause = _purpose(error)
            if cause is not None:
                raise cause from error
            reached = newest_step(run)
            if notice.given:
                lost = f"stopped by SIGTERM as workers were lost ({_reason(error)})"
                raise Stopped(f"{lost}: --resume goes on from the newest checkpoint") from error
            if any(isinstance(failure, _MoreWorkers) for failure in _failures(error).values()):
                logger.info("there is room for more workers: starting again from checkpoint %d", reached)
                continue
            failures = 1 if reached > before else failures + 1
            losses.inc(max(1, len(_lost(error))), tags={"run": urls.redacted(config.run.out)})
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


def _await_workers(config: Config, minutes: float) -> int:
    """Return how many workers the cluster can hold, at least the smallest number; an autoscaler is asked for that.

    Raises:
        TrainingError: it could not within so many minutes.
    """
    (low, high), resource = config.run.worker_range, _resource(config)
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
    settled = time.monotonic() + SETTLE_SECONDS
    while (free := _free(resource)) < min(high, there) and time.monotonic() < settled:
        time.sleep(0.2)
        there = ray.cluster_resources().get(resource, 0)
    workers = max(low, min(high, free))
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    logger.info("starting %d workers on %d nodes with %g %ss", workers, nodes, there, resource)
    return workers


def _resource(config: Config) -> str:
    """What a worker takes one of."""
    return "GPU" if config.run.device == "cuda" else "CPU"


def _free(resource: str) -> int:
    """How many of them nobody holds."""
    return int(ray.available_resources().get(resource, 0))


def _fit(config: Config, workers: int) -> None:
    """One attempt: start the workers, wait for their end."""
    storage, path = filesystem(config.run.out)
    before = set(_held_groups())
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"config": dataclasses.asdict(config), "asked": time.time()},
        torch_config=TorchConfig(backend=process_group_backend(config.run.device)),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=config.run.device == "cuda"),
        run_config=RunConfig(
            name="ray",
            storage_path=path,
            storage_filesystem=PyFileSystem(FSSpecHandler(storage)),
            # Ray restarts after announced preemptions; what fails comes back to `train_on_ray`.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=START_FAILURES),  # type: ignore[call-arg]
        ),
    )
    try:
        trainer.fit()
    finally:
        for name in set(_held_groups()) - before:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(name))))


def _held_groups() -> list[str]:
    """Placement groups of this driver and its workers that hold resources, or wait for some.

    Ray Train 2.60 forgets its own where a worker is lost as it starts the loop: the next attempt would wait in vain.
    """
    job = ray.get_runtime_context().get_job_id()
    return [name for name, group in placement_group_table().items()
            if name.endswith(job) and group["state"] != "REMOVED"]  # fmt: skip


def _worker(settings: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    log_to_stderr()
    config = config_from_dict(settings["config"])
    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size())
    run = RunFolder(config.run.out)
    if not urls.exists(run.path("config.toml")):
        raise TrainingError(
            f"{config.run.out} cannot be seen from node {ray.util.get_node_ip_address()}: "
            "write the run to a folder that all nodes share, or to a URL"
        )
    if world.is_leader:
        logger.info("%d workers are up after %.0f s, going on from step %d",
                    world.size, time.time() - settings["asked"], newest_step(run))  # fmt: skip
    device = get_device()
    if isinstance(device, list):
        device = device[0]

    # The cluster is asked for room for the missing workers only now: sooner, this would take what those here need.
    missing = config.run.worker_range[1] - world.size if world.is_leader else 0
    room = [placement_group([{_resource(config): 1}]) for _ in range(missing)]

    def at_checkpoint(step: int) -> None:
        ray.train.report({"step": step})  # a barrier
        # Not `group.wait`: Ray 2.60 cuts its timeout to whole seconds, and whether none at all suffices is luck.
        if any(placement_group_table(group)["state"] == "CREATED" for group in room):
            raise _MoreWorkers

    publish = _gauges(urls.redacted(config.run.out))
    # Worker 0 looks for the driver's word, and tells the others.
    with notice_of_word(run) if world.is_leader else nullcontext(Notice()) as notice:
        try:
            train(config, world, torch.device(device), at_checkpoint=at_checkpoint, publish=publish, notice=notice)
        except Stopped as stopped:  # raised, Ray would print it with a traceback of each worker: the driver says it
            if world.is_leader:
                run.write(ANSWER, str(stopped).encode())


def _gauges(run: str) -> Publish:
    """Ray's exporter on worker 0's node serves the run's figures, as `ray_scalecryo_…`."""
    made: dict[str, ray.util.metrics.Gauge] = {}

    def publish(figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            if name not in made:
                made[name] = ray.util.metrics.Gauge(f"{PREFIX}{name}", GAUGES[name].help, tag_keys=("run",))
            made[name].set(value, tags={"run": run})

    return publish


def _failures(error: BaseException) -> dict[int, BaseException]:
    """What befell each worker, without Ray's wrapping."""
    return {rank: _unwrapped(failure) for rank, failure in getattr(error, "worker_failures", {}).items()}


def _unwrapped(failure: BaseException) -> BaseException:
    """What a worker raised, or what Ray's look after it met with."""
    for wrapping in ("_base_exc", "health_check_failure"):
        failure = getattr(failure, wrapping, None) or failure
    return failure


def _purpose(error: BaseException) -> ScalecryoError | None:
    """The error that a worker raised on purpose, if one did: trying again would raise it again."""
    return next((failure for failure in _failures(error).values() if isinstance(failure, ScalecryoError)), None)


def _lost(error: BaseException) -> dict[int, ray.exceptions.RayError]:
    """Workers that ended without an error of their own."""
    return {rank: one for rank, one in _failures(error).items() if isinstance(one, ray.exceptions.RayError)}


def _loss(failure: ray.exceptions.RayError) -> str:
    """Where a worker was lost, and why, as far as Ray tells."""
    said = re.sub(r"Some common causes include:.*", "", str(failure))  # Ray's guesses, of memory among others
    found = re.search(r"\bip: *([0-9A-Fa-f.:]+[0-9A-Fa-f])", said) or re.search(r"\b(\d+(?:\.\d+){3})\b", said)
    where = f"on node {found[1]}" if found else "on an unknown node"
    causes = [cause for pattern, cause in _CAUSES if re.search(pattern, said, re.IGNORECASE)]
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    cause = (causes or lines[-1:] or [type(failure).__name__])[0]
    if getattr(failure, "preempted", False):
        cause = "its node was taken back (spot)"
    return f"{where} was lost: {cause}"


def _reason(error: BaseException) -> str:
    """In one line, what went wrong where."""
    failures, lost = _failures(error), _lost(error)
    if lost:
        return "; ".join(f"worker {rank} {_loss(failure)}" for rank, failure in sorted(lost.items()))
    starting = getattr(error, "controller_failure", None)
    if isinstance(starting, ray.exceptions.RayActorError):  # Ray tells no rank
        return f"as the workers started, one {_loss(starting)}"
    text = str(next(iter(failures.values()), error))
    if "gloo" in text.lower() and ("address" in text or "interface" in text):
        return "gloo found no network interface to reach the other workers by: set GLOO_SOCKET_IFNAME on every node"
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no message"
