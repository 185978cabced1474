"""Run many tasks with few in memory: on threads of this process, or on a `distributed` cluster."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING

import dask.config
from dask.base import compute
from dask.callbacks import Callback
from dask.delayed import delayed

from scalecryo.data.conversion.shard_task import Done, ShardTask
from scalecryo.errors import InputError
from scalecryo.physics.threads import one_torch_thread

if TYPE_CHECKING:
    from distributed import Future

_TASKS_PER_WORKER = 8
_CONNECT_SECONDS = 30

Task = Callable[[ShardTask], Done]
Finished = Callable[[Done], None]
ProgressCallback = Callable[[int, int], None]  # particles done, and particles in all


class _Finished(Callback):
    """Tells of every task as it ends."""

    def __init__(self, finished: Finished) -> None:
        super().__init__(posttask=self._after)
        self._finished = finished

    def _after(self, key: object, value: object, *_: object) -> None:
        if isinstance(value, Done):
            self._finished(value)


def _on_threads(function: Task, tasks: Iterator[ShardTask], workers: int, finished: Finished) -> None:
    call = delayed(function, pure=False, traverse=False)
    # Leaving the pool waits for tasks under way: after an error none still writes when this returns.
    with one_torch_thread(), ThreadPoolExecutor(workers) as pool:
        # A scheduler that the caller has set goes first.
        settings = {} if dask.config.get("scheduler", None) else {"scheduler": "threads", "pool": pool}
        # Some at a time: a graph of all of them would hold the whole table twice.
        while some := [call(task) for task in islice(tasks, _TASKS_PER_WORKER * workers)]:
            with _Finished(finished):
                compute(*some, optimize_graph=False, **settings)


def _on_cluster(function: Task, tasks: Iterator[ShardTask], address: str, finished: Finished) -> None:
    try:
        from distributed import Client, as_completed
    except ImportError as error:
        raise InputError(f"--scheduler {address}: needs the package distributed: pip install distributed") from error
    try:
        client = Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise InputError(f"--scheduler {address}: no dask scheduler answers there ({error})") from error
    with client:
        threads = sum(client.nthreads().values()) or 1

        def submit(number: int) -> list["Future[Done]"]:
            return [client.submit(function, task, pure=False) for task in islice(tasks, number)]

        running, failed = as_completed(submit(2 * threads), loop=client.loop), None
        for future in running:
            if future.exception() is not None:
                failed = failed or future  # tasks under way are waited for: none still writes when this returns
            else:
                finished(future.result())
            if failed is None:
                running.update(submit(1))
        if failed is not None:
            failed.result()


def run_tasks(
    function: Task,
    tasks: Iterable[ShardTask],
    finished: Finished,
    *,
    total: int,
    done: int = 0,
    workers: int = 0,
    scheduler: str | None = None,
    progress: ProgressCallback | None = None,
) -> None:
    """Run a function on tasks, in any order.

    Args:
        function: what to do; importable on every worker.
        tasks: made as they are needed.
        finished: called here with each result, as it comes.
        total, done: particles in all, and of them those that need no task.
        workers: threads; 0 for one per core. A dask scheduler that the caller has set is used instead.
        scheduler: address of a `distributed` scheduler; its workers must reach the source and the store by the same
            addresses.
        progress: called at first and after each task.

    Raises:
        InputError: no scheduler answers, or a task's own.
    """

    def counted(result: Done) -> None:
        nonlocal done
        done += result.rows
        finished(result)
        if progress:
            progress(done, total)

    if progress:
        progress(done, total)
    if scheduler:
        _on_cluster(function, iter(tasks), scheduler, counted)
    else:
        _on_threads(function, iter(tasks), workers or os.cpu_count() or 1, counted)
