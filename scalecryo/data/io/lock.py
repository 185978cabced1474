"""One writer of a store at a time.

On a local disk an advisory lock that the system drops with the process, however it dies. An object store has no such
thing: there every conversion leaves a claim that it renews. Conversions of one plan write the same bytes and may run
side by side; a claim of another plan is respected until it has been silent for a while.
"""

import errno
import fcntl
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from scalecryo.data.io import urls
from scalecryo.errors import MissingInputError, OutputError

LOCK = "_lock"
_SILENT_SECONDS = 120.0

Renew = Callable[[], None]


def _taken(store_url: str) -> OutputError:
    return OutputError(
        f"{urls.redacted(store_url)}: another conversion is writing this store; wait for it, or choose another place"
    )


@contextmanager
def _local_lock(store_url: str) -> Iterator[Renew]:
    """Hold the lock file of a local store."""
    path = urls.local_path(urls.join(store_url, LOCK))
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever finishes removes the file: a lock on one that has no name any more is worth nothing.
            mine = os.fstat(descriptor).st_ino == path.stat().st_ino
        except (BlockingIOError, FileNotFoundError):
            mine = False
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            mine = True  # a file system without locks: nothing can be asked of it
        if not mine:
            raise _taken(store_url)
        try:
            yield lambda: None
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # a folder that holds nothing else was made for the lock
                path.parent.rmdir()
    finally:
        os.close(descriptor)


@contextmanager
def _remote_claim(store_url: str, plan_hash: str) -> Iterator[Renew]:
    """Hold a claim beside the objects of a store."""
    url = urls.join(store_url, LOCK)
    token = uuid.uuid4().hex

    def found() -> dict[str, str | float]:
        try:
            claim: dict[str, str | float] = json.loads(urls.read_bytes(url))
        except (MissingInputError, ValueError):
            return {}
        return claim

    def renew(first: bool = False) -> None:
        other = found()
        if other and other.get("plan_hash") != plan_hash:
            silent = time.time() - float(other.get("time", 0))
            if not first or silent < _SILENT_SECONDS:
                raise _taken(store_url)
        claim = {"plan_hash": plan_hash, "token": token, "time": time.time()}
        urls.write_bytes_atomic(url, json.dumps(claim).encode())

    renew(first=True)
    # Of two that claim at once the later one's claim stays: the other sees it before it writes anything.
    time.sleep(0.2)
    renew()
    try:
        yield renew
    finally:
        if found().get("token") == token:
            urls.remove_tree(url)


@contextmanager
def writing(store_url: str, plan_hash: str) -> Iterator[Renew]:
    """Be the only conversion that writes to a place; yields a function to call now and then while it is held.

    Args:
        store_url: the store.
        plan_hash: what is being written.

    Raises:
        OutputError: another conversion holds the place; the yielded function raises it too, when one took it over.
    """
    holder = _local_lock(store_url) if urls.is_local(store_url) else _remote_claim(store_url, plan_hash)
    with holder as renew:
        yield renew
