"""Bytes of a store's objects by range: pread for files, obstore for S3, fsspec for every other address.

obstore reads blocks from S3 1.5 to 2 times as fast as s3fs at a third of the CPU time (tools/bench/stream.py). Where
it connects and as whom is taken from s3fs, so that environment, profiles and fsspec's own settings mean the same.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from scalecryo.data.io import urls
from scalecryo.data.io.retry import RetryPolicy, ShortBodyError, cause, is_past_end, possible_errors, with_retries
from scalecryo.errors import MissingInputError, StoreError

if TYPE_CHECKING:
    from obstore.store import S3Store

Buffer = bytes | bytearray | memoryview
Result = TypeVar("Result")
_CREDENTIALS_LAST = timedelta(minutes=5)


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
        direct: False reads S3 through fsspec as well.
    """

    def __init__(self, patience: RetryPolicy | None = None, *, direct: bool = True) -> None:
        self.patience = patience or RetryPolicy()
        self._direct = direct
        self._process = os.getpid()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._clients: dict[str, S3Store | None] = {}
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
                part = f"{where}bytes {start} to {stop}"
                data = self._patiently(url, lambda: self._remote(url, start, stop, whole), part)
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
                data = self._patiently(url, lambda: self._remote_object(url), "")
            self._add(len(data))
        return data

    def size(self, url: str) -> int:
        """Length of an object.

        Raises:
            MissingInputError: there is no such object.
            StoreError: the server kept failing.
        """
        return urls.size(url) if urls.is_local(url) else self._patiently(url, lambda: urls.size(url), "length")

    def _remote(self, url: str, start: int, stop: int, whole: bool) -> Buffer:
        client, key = self._client(url)
        try:
            if client is None:
                data: Buffer = urls.fetch(url, start, stop)
            else:
                import obstore

                data = memoryview(obstore.get_range(client, key, start=start, end=stop))
        except possible_errors() as error:
            if not is_past_end(error):
                raise
            data = b""
        if whole and len(data) != stop - start:
            raise ShortBodyError(f"{len(data)} bytes came instead of {stop - start}")
        return data

    def _remote_object(self, url: str) -> Buffer:
        client, key = self._client(url)
        if client is None:
            return urls.fetch(url)
        import obstore

        answer = obstore.get(client, key)
        data = memoryview(answer.bytes())
        if len(data) != answer.meta["size"]:
            raise ShortBodyError(f"{len(data)} bytes came instead of {answer.meta['size']}")
        return data

    def _patiently(self, url: str, call: Callable[[], Result], part: str) -> Result:
        where = f"{urls.redacted(url)} ({part})" if part else urls.redacted(url)
        try:
            return with_retries(call, self.patience, where, stopped=self._stopped, on_retry=self._count_retry)
        except FileNotFoundError as error:
            raise MissingInputError(f"{urls.redacted(url)}: no such file") from error
        except ShortBodyError as error:
            raise StoreError(f"{where}: the object is too short: {error}") from error
        except possible_errors() as error:
            raise StoreError(
                f"{where}: cannot be read: {cause(error)}; check the address and the credentials"
            ) from error

    def _client(self, url: str) -> tuple["S3Store | None", str]:
        """obstore's client for the URL's bucket, and the key; None where fsspec reads."""
        if os.getpid() != self._process:
            raise StoreError(
                f"{urls.redacted(url)}: this process was forked after its reader was made: open the store anew"
            )
        if not self._direct or not url.startswith(("s3://", "s3a://")):
            return None, ""
        bucket, _, key = url.partition("://")[2].partition("/")
        with self._lock:
            if bucket not in self._clients:
                self._clients[bucket] = s3_client(url, bucket, self.patience)
            return self._clients[bucket], key

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


def s3_client(url: str, bucket: str, patience: RetryPolicy) -> "S3Store | None":
    """obstore's client of a bucket as s3fs would reach it; None where only s3fs can do what is configured."""
    try:
        from obstore.store import S3Store
    except ImportError:
        return None
    fs, _ = urls.filesystem(url)
    if fs.client_kwargs.get("verify") is not None or fs.config_kwargs.get("s3") or fs.config_kwargs.get("proxies"):
        return None
    client = fs.s3
    endpoint = str(client.meta.endpoint_url)
    options: dict[str, Any] = {"skip_signature": True} if fs.anon else {}
    if not fs.anon:
        options["credential_provider"] = _credentials_of(fs)
    if fs.req_kw.get("RequestPayer"):
        options["request_payer"] = True
    return S3Store(
        bucket,
        endpoint=endpoint,
        region=_region_of(fs, bucket, endpoint),
        virtual_hosted_style_request=False,
        retry_config={"max_retries": 0},  # `retry` retries, and counts
        client_options={
            "allow_http": endpoint.startswith("http://"),
            "timeout": timedelta(seconds=patience.request_seconds),
            "connect_timeout": timedelta(seconds=min(5.0, patience.request_seconds)),
        },
        **options,
    )


def _region_of(fs: Any, bucket: str, endpoint: str) -> str:
    """The bucket's own region where AWS says it (obstore follows no redirects), else the client's."""
    region = str(fs.s3.meta.region_name or "us-east-1")
    if "amazonaws.com" in endpoint:
        head = fs.call_s3("head_bucket", Bucket=bucket)
        region = head["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region", region)
    return "us-east-1" if region == "aws-global" else region


def _credentials_of(fs: Any) -> Any:
    """A provider of the credentials that s3fs uses, asked again every few minutes: roles and tokens expire."""
    from fsspec.asyn import sync

    async def frozen() -> Any:
        found = await fs.session.get_credentials()
        return await found.get_frozen_credentials() if found else None

    def provide() -> dict[str, Any]:
        if fs.key and fs.secret:
            key, secret, token = fs.key, fs.secret, fs.token
        else:
            found = sync(fs.loop, frozen)
            if found is None:
                raise PermissionError("no credentials: set them as for the AWS command line")
            key, secret, token = found.access_key, found.secret_key, found.token
        return {
            "access_key_id": key, "secret_access_key": secret, "token": token,
            "expires_at": datetime.now(UTC) + _CREDENTIALS_LAST,
        }  # fmt: skip

    return provide
