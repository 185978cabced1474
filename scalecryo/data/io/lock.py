"""One writer of a store at a time.

On a local disk a file lock that the system drops with the process, however it dies. An object store has no such thing:
there every conversion leaves a claim that it renews, each time on condition that nobody else has written it since.
Conversions of one plan write the same bytes and may run side by side; a claim of another plan is respected until it has
been silent for a while.
"""

import errno
import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from filelock import FileLock, Timeout

from scalecryo.data.io import urls
from scalecryo.data.io.objects import Tag
from scalecryo.errors import OutputError

LOCK = "_lock"
_SILENT_SECONDS = 120.0
_TRIES = 20

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
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except (Timeout, FileNotFoundError) as error:
        raise _taken(store_url) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            raise  # else a file system without locks: nothing can be asked of it
    try:
        yield lambda: None
    finally:
        path.unlink(missing_ok=True)  # before the lock is free: a lock on a file without a name is worth nothing
        lock.release()
        with suppress(OSError):  # a folder that holds nothing else was made for the lock
            path.parent.rmdir()


class _Claim:
    """A claim beside the objects of a store."""

    def __init__(self, store_url: str, plan_hash: str) -> None:
        self._store_url = store_url
        self._url = urls.join(store_url, LOCK)
        self._mine = {"plan_hash": plan_hash, "token": uuid.uuid4().hex}

    def _read(self) -> tuple[dict[str, str | float], Tag | None]:
        """The claim that is there and its tag; empty and None without one."""
        found = urls.read_tagged(self._url)
        if found is None:
            return {}, None
        try:
            return json.loads(found[0]), found[1]
        except ValueError:
            return {}, found[1]

    def renew(self, silent_seconds: float = float("inf")) -> None:
        """Write the claim anew.

        Args:
            silent_seconds: after which another plan's claim counts as left by a killed conversion.
        """
        for _ in range(_TRIES):
            claim, tag = self._read()
            other = claim.get("plan_hash", self._mine["plan_hash"]) != self._mine["plan_hash"]
            if other and time.time() - float(claim.get("time", 0)) < silent_seconds:
                break
            if urls.write_if(self._url, json.dumps({**self._mine, "time": time.time()}).encode(), tag):
                return
        raise _taken(self._store_url)

    def drop(self) -> None:
        """Remove the claim, if it is still this one."""
        if self._read()[0].get("token") == self._mine["token"]:
            urls.remove_tree(self._url)


@contextmanager
def _remote_lock(store_url: str, plan_hash: str) -> Iterator[Renew]:
    claim = _Claim(store_url, plan_hash)
    claim.renew(_SILENT_SECONDS)
    try:
        yield claim.renew
    finally:
        claim.drop()


@contextmanager
def writing(store_url: str, plan_hash: str) -> Iterator[Renew]:
    """Be the only conversion that writes to a place; yields a function to call now and then while it is held.

    Args:
        store_url: the store.
        plan_hash: what is being written.

    Raises:
        OutputError: another conversion holds the place; the yielded function raises it too, when one took it over.
    """
    with _local_lock(store_url) if urls.is_local(store_url) else _remote_lock(store_url, plan_hash) as renew:
        yield renew
