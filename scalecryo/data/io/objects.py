"""Remote files by their exact name: S3, Google Cloud, Azure and web servers through obstore, all else through fsspec.

A key is never a pattern: `*`, `?`, `[`, `]`, `%`, `#` and spaces in it are themselves. (fsspec's own `rm`, `cat` and
`glob` take them for patterns; nothing here calls those.)
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import fsspec
import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import ObjectStore, from_url

from scalecryo.data.io.retry import RetryPolicy, ShortBodyError, is_absent, is_past_end
from scalecryo.errors import InputError, MissingInputError, StoreError

Buffer = bytes | bytearray | memoryview

BY_OBSTORE = ("s3", "s3a", "gs", "gcs", "az", "azure", "abfs", "abfss", "adl", "http", "https")
_SETTINGS = ("AWS_", "GOOGLE_", "AZURE_", "HOME")  # of the environment, that say where and as whom
_WRITE_SECONDS = 600.0  # one try of sending an object, which may be large and the line slow
_PART_BYTES = 64 << 20
_REMOVED_AT_ONCE = 1000
_CREDENTIALS_LAST = timedelta(minutes=5)


def redacted(url: str) -> str:
    """The URL as it may appear in a message: without user, password and query."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    host, slash, path = rest.partition("/")
    # `?` is a character like any other in an object's key, but where a name and a value follow.
    before, mark, query = path.partition("?")
    if mark and (scheme.startswith("http") or "=" in query.partition("/")[0]):
        path = before
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


class RemoteFiles(Protocol):
    """One server's files by key, each call one try that fails as its client does."""

    def get(self, key: str, start: int = 0, stop: int | None = None) -> Buffer:
        """A whole file, or the bytes start…stop−1 of it; fewer where it ends before."""

    def get_tagged(self, key: str) -> tuple[bytes, str]:
        """A small file, and the tag of this version of it."""

    def status(self, key: str) -> tuple[int, str]:
        """Length of a file and what tells one version of it from another."""

    def exists(self, key: str) -> bool:
        """Whether there is such a file or folder."""

    def is_folder(self, key: str) -> bool:
        """Whether there is such a folder: something below this name."""

    def names(self, key: str) -> list[str]:
        """Names in a folder; none where there is no such folder."""

    def put(self, key: str, source: bytes | memoryview | Path) -> None:
        """Write a file whole."""

    def put_if(self, key: str, data: bytes, tag: str | None) -> bool:
        """Write a small file if it still has this tag (None: if there is none); False where it was changed."""

    def remove(self, key: str) -> None:
        """Remove a file, and a folder of this name with all it holds."""


@contextmanager
def suppress_absent() -> Iterator[None]:
    """End a block where a server has no such bucket, or no way to list what it has."""
    try:
        yield
    except BaseError as error:
        if not is_absent(error):
            raise


class ObjectFiles:
    """Objects of one bucket or web server, through obstore.

    Args:
        reading, writing: its clients.
    """

    def __init__(self, reading: ObjectStore, writing: ObjectStore) -> None:
        self.reading = reading
        self._writing = writing

    def get(self, key: str, start: int = 0, stop: int | None = None) -> Buffer:
        """As `RemoteFiles.get`."""
        if stop is not None:
            if stop <= start:
                return b""
            try:
                return memoryview(obstore.get_range(self.reading, key, start=start, end=stop))
            except BaseError as error:
                if is_past_end(error):
                    return b""
                raise
        answer = obstore.get(self.reading, key)
        data = memoryview(answer.bytes())
        if len(data) != answer.meta["size"]:
            raise ShortBodyError(f"{len(data)} bytes came instead of {answer.meta['size']}")
        return data

    def get_tagged(self, key: str) -> tuple[bytes, str]:
        """As `RemoteFiles.get_tagged`."""
        answer = obstore.get(self.reading, key)
        return answer.bytes().to_bytes(), answer.meta["e_tag"] or ""

    def status(self, key: str) -> tuple[int, str]:
        """As `RemoteFiles.status`."""
        meta = obstore.head(self.reading, key)
        return meta["size"], meta["e_tag"] or str(meta["last_modified"])

    def exists(self, key: str) -> bool:
        """As `RemoteFiles.exists`."""
        if key:
            with suppress(FileNotFoundError):
                obstore.head(self.reading, key)
                return True
        return self.is_folder(key)

    def is_folder(self, key: str) -> bool:
        """As `RemoteFiles.is_folder`; a plain web server shows none."""
        with suppress_absent():
            return any(len(batch) for batch in obstore.list(self.reading, key or None))
        return False

    def names(self, key: str) -> list[str]:
        """As `RemoteFiles.names`; a plain web server lists nothing."""
        with suppress_absent():
            found = obstore.list_with_delimiter(self.reading, key or None)
            paths = [*found["common_prefixes"], *(item["path"] for item in found["objects"])]
            return [path.rpartition("/")[2] for path in paths]
        return []

    def put(self, key: str, source: bytes | memoryview | Path) -> None:
        """As `RemoteFiles.put`; an object appears when all its parts have arrived."""
        obstore.put(self._writing, key, source, chunk_size=_PART_BYTES, max_concurrency=2)

    def put_if(self, key: str, data: bytes, tag: str | None) -> bool:
        """As `RemoteFiles.put_if`, which the server decides (If-None-Match, If-Match)."""
        try:
            obstore.put(self._writing, key, data, mode="create" if tag is None else {"e_tag": tag})
        except (AlreadyExistsError, PreconditionError, FileNotFoundError):
            return False
        return True

    def remove(self, key: str) -> None:
        """As `RemoteFiles.remove`."""
        if key:
            with suppress(FileNotFoundError):
                obstore.delete(self._writing, key)
        for batch in obstore.list(self.reading, key or None, chunk_size=_REMOVED_AT_ONCE):
            with suppress(FileNotFoundError):
                obstore.delete(self._writing, [item["path"] for item in batch])


class FsspecFiles:
    """Files of an fsspec file system: memory, SFTP and so on.

    Args:
        fs: the file system; keys are its paths.
    """

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def get(self, key: str, start: int = 0, stop: int | None = None) -> Buffer:
        """As `RemoteFiles.get`."""
        data: bytes = self._fs.cat_file(key) if stop is None else self._fs.cat_file(key, start=start, end=stop)
        return data

    def get_tagged(self, key: str) -> tuple[bytes, str]:
        """As `RemoteFiles.get_tagged`, without a tag."""
        return self._fs.cat_file(key), ""

    def status(self, key: str) -> tuple[int, str]:
        """As `RemoteFiles.status`."""
        info = self._fs.info(key)
        version = next(
            (info[name] for name in ("ETag", "etag", "LastModified", "mtime", "created") if name in info), ""
        )
        return int(info["size"]), str(version)

    def exists(self, key: str) -> bool:
        """As `RemoteFiles.exists`."""
        return bool(self._fs.exists(key))

    def is_folder(self, key: str) -> bool:
        """As `RemoteFiles.is_folder`."""
        return bool(self._fs.isdir(key))

    def names(self, key: str) -> list[str]:
        """As `RemoteFiles.names`."""
        self._fs.invalidate_cache(key)  # another process may have written since the last look
        try:
            if self._fs.isfile(key):
                return []
            return [entry.rstrip("/").rpartition("/")[2] for entry in self._fs.ls(key, detail=False)]
        except FileNotFoundError:
            return []

    def put(self, key: str, source: bytes | memoryview | Path) -> None:
        """As `RemoteFiles.put`."""
        self._fs.makedirs(key.rpartition("/")[0], exist_ok=True)
        if isinstance(source, Path):
            self._fs.put_file(str(source), key)
        else:
            self._fs.pipe_file(key, bytes(source))

    def put_if(self, key: str, data: bytes, tag: str | None) -> bool:
        """As `RemoteFiles.put_if`; a file that is there is replaced whoever has written it."""
        self._fs.makedirs(key.rpartition("/")[0], exist_ok=True)
        try:
            self._fs.pipe_file(key, data, mode="create" if tag is None else "overwrite")
        except FileExistsError:
            return False
        return True

    def remove(self, key: str) -> None:
        """As `RemoteFiles.remove`."""
        self._fs.invalidate_cache(key)
        entries = self._fs.find(key, withdirs=True, detail=True)
        for path in sorted(entries, reverse=True):  # what a folder holds before the folder
            with suppress(FileNotFoundError):
                (self._fs.rmdir if entries[path]["type"] == "directory" else self._fs.rm_file)(path)


def remote_files(url: str, policy: RetryPolicy | None = None) -> tuple[RemoteFiles, str]:
    """The files of the server that a URL names, and the key of the URL among them.

    Args:
        policy: says after how many silent seconds one try to read counts as failed.

    Raises:
        InputError: no such protocol, the package that speaks it is not installed, or the address holds credentials
            that its protocol would take for a part of the name.
        MissingInputError: no object can have this name.
        StoreError: this process was forked from one that used object stores.
    """
    scheme, _, rest = url.partition("://")
    host, _, key = rest.partition("/")
    if scheme not in BY_OBSTORE:
        try:
            fs, path = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise InputError(f"{redacted(url)}: cannot reach this kind of address ({error})") from error
        return FsspecFiles(fs), path
    if scheme.startswith(("s3", "g")) and "@" in host:
        raise InputError(
            f"{redacted(url)}: its address holds credentials; take them out, and give them by the environment or a "
            "profile"
        )
    if _first_process() != os.getpid():
        raise StoreError(f"{redacted(url)}: this process was forked after object stores were used: start it anew")
    key = key.rstrip("/")
    if not host or {"", ".", ".."} & set(key.split("/")[: len(key)]):
        raise MissingInputError(f"{redacted(url)}: no object has such a name: it has an empty part, `.` or `..`")
    settings = *sorted(item for item in os.environ.items() if item[0].startswith(_SETTINGS)), str(_stated())
    seconds = (policy or RetryPolicy()).request_seconds
    try:
        return _object_files(f"{scheme}://{host}", seconds, settings), key
    except (ValueError, BaseError) as error:
        raise InputError(f"{redacted(url)}: cannot reach this address ({str(error).splitlines()[0]})") from error


@lru_cache(maxsize=1)
def _first_process() -> int:
    """The process that first used an object store: a fork of it would wait for obstore's threads for ever."""
    return os.getpid()


@lru_cache(maxsize=64)
def _object_files(server: str, seconds: float, settings: tuple[object, ...]) -> ObjectFiles:
    """Clients of a bucket or web server, made once for an environment; `with_retries` tries again, and counts."""
    whole = timedelta(seconds=max(seconds, _WRITE_SECONDS))
    return ObjectFiles(
        client(server, retries=0, read_timeout=timedelta(seconds=seconds)), client(server, retries=0, timeout=whole)
    )


def client(server: str, retries: int, **limits: timedelta) -> ObjectStore:
    """obstore's client of a bucket or web server.

    Its own reading of the environment holds; AWS profiles (boto3), the bucket's region, Azure's connection string and
    fsspec's settings for `s3` are added.

    Args:
        server: `scheme://host`.
        retries: how often the client itself tries again.
        limits: its timeouts.
    """
    scheme, _, host = server.partition("://")
    arguments: dict[str, Any] = {}
    if scheme.startswith("s3"):
        arguments = _aws(host)
    elif scheme.startswith("a"):
        arguments = {"config": dict(_azure())}
    arguments["client_options"] = {"allow_http": True, "connect_timeout": timedelta(seconds=5), **limits}
    made: ObjectStore = from_url(server, retry_config={"max_retries": retries}, **arguments)
    return made


def _stated() -> dict[str, Any]:
    """What fsspec's configuration files and FSSPEC_S3_… variables say of S3."""
    stated: dict[str, Any] = fsspec.config.conf.get("s3", {})
    return stated


def _aws(bucket: str) -> dict[str, Any]:
    stated, found = _stated(), {}
    more = stated.get("client_kwargs", {})
    config: dict[str, Any] = {
        "access_key_id": stated.get("key"),
        "secret_access_key": stated.get("secret"),
        "session_token": stated.get("token"),
        "skip_signature": stated.get("anon"),
        "endpoint": stated.get("endpoint_url") or more.get("endpoint_url"),
        "region": more.get("region_name"),
    }
    profile = stated.get("profile") or os.environ.get("AWS_PROFILE")
    if not config["access_key_id"] and not config["skip_signature"] and (profile or _has_profiles()):
        found = _profile(profile, config)
    endpoint = config["endpoint"] or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint is None or endpoint.endswith("amazonaws.com"):
        config |= {"endpoint": None, "region": _region_of(bucket) or config["region"]}
    return {**found, "config": {name: value for name, value in config.items() if value}}


def _has_profiles() -> bool:
    places = {"AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials", "AWS_CONFIG_FILE": "~/.aws/config"}
    return any(Path(os.environ.get(name, usual)).expanduser().is_file() for name, usual in places.items())


def _profile(name: str | None, config: dict[str, Any]) -> dict[str, Any]:
    """A provider of the credentials that the AWS command line would take; its region and endpoint go into `config`."""
    try:
        import boto3
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        if name is None:
            return {}
        raise InputError(f"AWS profile {name}: profiles need boto3: pip install 'scalecryo[s3]'") from error
    try:
        session = boto3.Session(profile_name=_stated().get("profile"))  # else it reads AWS_PROFILE itself
        meta = session.client("s3", region_name=session.region_name or "us-east-1").meta
        config["endpoint"] = config["endpoint"] or meta.endpoint_url
        config["region"] = config["region"] or meta.region_name
        if session.get_credentials() is None:
            return {}
        return {"credential_provider": Boto3CredentialProvider(session, ttl=_CREDENTIALS_LAST)}
    except BotoCoreError as error:
        raise InputError(f"AWS profile {name or 'default'}: {error}; see ~/.aws/config") from error


def _region_of(bucket: str) -> str | None:
    """The region that AWS names for a bucket (obstore follows no redirects); None where it cannot be asked."""
    request = Request(f"https://s3.amazonaws.com/{bucket}", method="HEAD")
    try:
        with urlopen(request, timeout=5) as answer:
            return answer.headers.get("x-amz-bucket-region")
    except HTTPError as error:  # it says so to strangers too
        return error.headers.get("x-amz-bucket-region")
    except OSError:
        return None


def _azure() -> Iterator[tuple[str, str]]:
    """Settings from AZURE_STORAGE_CONNECTION_STRING, which obstore does not read."""
    names = {"AccountName": "account_name", "AccountKey": "account_key", "SharedAccessSignature": "sas_key",
             "BlobEndpoint": "endpoint"}  # fmt: skip
    for part in os.environ.get("AZURE_STORAGE_CONNECTION_STRING", "").split(";"):
        name, _, value = part.partition("=")
        if name in names:
            yield names[name], value
