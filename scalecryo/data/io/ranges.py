"""Bytes of a store's objects by range, counted, and read again where the network fails."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from scalecryo.data.io import urls
from scalecryo.data.io.objects import Buffer, RemoteFiles
from scalecryo.data.io.retry import RetryPolicy, ShortBodyError
from scalecryo.errors import StoreError

Result = TypeVar("Result")


@dataclass(frozen=True)
class ReadCounts:
    """What a reader has done: bytes and requests so far, tries that failed and were made again, bytes asked for now."""

    bytes_read: int = 0
    requests: int = 0
    retries: int = 0
    bytes_in_flight: int = 0


class RangeReader:
    """Reads ranges and whole objects, again and again where the answer fails for a passing reason; thread-safe.

    It belongs to the process that made it: clients do not survive a fork.

    Args:
        patience: how long to try.
    """

    def __init__(self, patience: RetryPolicy | None = None) -> None:
        self.patience = patience or RetryPolicy()
        self._process = os.getpid()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._bytes = self._requests = self._retries = self._in_flight = 0

    @property
    def counts(self) -> ReadCounts:
        """What has been read until now."""
        with self._lock:
            return ReadCounts(self._bytes, self._requests, self._retries, self._in_flight)

    def stop(self) -> None:
        """Readers that wait for a server give up at once."""
        self._stopped.set()

    def read(self, url: str, start: int, stop: int, *, whole: bool = True, where: str = "") -> Buffer:
        """Bytes start…stop−1 of an object.

        Args:
            url: of the object.
            start, stop: the range.
            whole: the object is known to reach so far: fewer bytes are a fault. Else it may end before.
            where: what the range is, for messages.

        Raises:
            MissingInputError: there is no such object.
            StoreError: the server kept failing, or the object of a file system is shorter.
        """
        with self._counted(stop - start):
            if urls.is_local(url):
                data: Buffer = urls.read_range(url, start, stop)
            else:
                data = self._remote(url, lambda files, key: _range(files, key, start, stop, whole),
                                    f"{where}bytes {start} to {stop}")  # fmt: skip
            self._add(len(data))
        if whole and len(data) != stop - start:
            raise StoreError(f"{urls.redacted(url)}: ends before byte {stop}")
        return data

    def read_into(self, url: str, start: int, buffers: Sequence[Any], *, where: str = "") -> bool:
        """Fill writable buffers one after another from a byte on; False where the object ends before.

        Raises:
            MissingInputError: there is no such object.
            StoreError: the server kept failing.
        """
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        total = sum(map(len, views))
        if urls.is_local(url):
            with self._counted(total), urls.open_read(url) as stream:
                done = os.preadv(stream.fileno(), views, start)
                self._add(done)
            return done == total
        data = memoryview(self.read(url, start, start + total, where=where)).cast("B")
        for view in views:
            view[:] = data[: len(view)]
            data = data[len(view) :]
        return True

    def read_object(self, url: str) -> Buffer:
        """A whole object.

        Raises:
            MissingInputError: there is no such object.
            StoreError: the server kept failing.
        """
        with self._counted(0):
            if urls.is_local(url):
                data: Buffer = urls.read_bytes(url)
            else:
                data = self._remote(url, lambda files, key: files.get(key))
            self._add(len(data))
        return data

    def size(self, url: str) -> int:
        """Length of an object.

        Raises:
            MissingInputError: there is no such object.
            StoreError: the server kept failing.
        """
        if urls.is_local(url):
            return urls.size(url)
        return self._remote(url, lambda files, key: files.status(key)[0], "length")

    def _remote(self, url: str, call: Callable[[RemoteFiles, str], Result], part: str = "") -> Result:
        """A call on a remote file with this reader's patience; `part` of the file for messages."""
        if os.getpid() != self._process:
            raise StoreError(
                f"{urls.redacted(url)}: this process was forked after its reader was made: open the store anew"
            )
        return urls.remote_call(url, call, part, self.patience, self._stopped, self._count_retry)

    @contextmanager
    def _counted(self, size: int) -> Iterator[None]:
        with self._lock:
            self._requests += 1
            self._in_flight += size
        try:
            yield
        finally:
            with self._lock:
                self._in_flight -= size

    def _add(self, size: int) -> None:
        with self._lock:
            self._bytes += size

    def _count_retry(self) -> None:
        with self._lock:
            self._retries += 1


def _range(files: RemoteFiles, key: str, start: int, stop: int, whole: bool) -> Buffer:
    data = files.get(key, start, stop)
    if whole and len(data) != stop - start:
        raise ShortBodyError(f"{len(data)} bytes came instead of {stop - start}")
    return data
