"""Remote files by their exact name: S3, Google Cloud, Azure and web servers through obstore, all else through fsspec.

A key is never a pattern: `*`, `?`, `[`, `]`, `%`, `#` and spaces in it are themselves. (fsspec's own `rm`, `cat` and
`glob` take them for patterns; nothing here calls those.) Each call is one try, which fails as its client does.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import fsspec
import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, PreconditionError
from obstore.store import ObjectStore, from_url

from scalecryo.data.io.retry import RetryPolicy, ShortBodyError, is_absent, is_past_end
from scalecryo.errors import InputError, MissingInputError, StoreError

Buffer = bytes | bytearray | memoryview
Tag = dict[str, str]  # what tells one version of an object from another

BY_OBSTORE = ("s3", "s3a", "gs", "gcs", "az", "azure", "abfs", "abfss", "adl", "http", "https")
_SETTINGS = (  # of the environment, by which an address may come to mean another place or person
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE",
    "GOOGLE_APPLICATION_CREDENTIALS", "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCOUNT_NAME",
)  # fmt: skip
_PART_BYTES = 5 << 20  # the smallest that S3 takes: each must arrive within one try, on slow lines too
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


class ObjectFiles:
    """Objects of one bucket or web server by key, through obstore."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store

    def get(self, key: str, start: int = 0, stop: int | None = None) -> Buffer:
        """A whole file, or the bytes start…stop−1 of it; fewer where it ends before."""
        if stop is None:
            answer = obstore.get(self.store, key)
            data = memoryview(answer.bytes())
            if len(data) != answer.meta["size"]:
                raise ShortBodyError(f"{len(data)} bytes came instead of {answer.meta['size']}")
            return data
        try:
            return memoryview(obstore.get_range(self.store, key, start=start, end=stop)) if stop > start else b""
        except BaseError as error:
            if is_past_end(error):
                return b""
            raise

    def get_tagged(self, key: str) -> tuple[bytes, Tag]:
        """A small file, and the tag of this version of it."""
        answer = obstore.get(self.store, key)
        tags = {"e_tag": answer.meta["e_tag"], "version": answer.meta["version"]}
        return answer.bytes().to_bytes(), {name: tag for name, tag in tags.items() if tag is not None}

    def status(self, key: str) -> tuple[int, str]:
        """Length of a file and what tells one version of it from another."""
        meta = obstore.head(self.store, key)
        return meta["size"], meta["e_tag"] or str(meta["last_modified"])

    def exists(self, key: str) -> bool:
        """Whether there is such a file, or a folder: something below this name."""
        try:
            with suppress(FileNotFoundError):
                return bool(key and obstore.head(self.store, key)) or self._holds(key)
            return self._holds(key)
        except BaseError as error:
            if is_absent(error):
                return False
            raise

    def _holds(self, key: str) -> bool:
        return any(len(batch) for batch in obstore.list(self.store, key or None))

    def names(self, key: str) -> list[str]:
        """Names in a folder; none where there is no such folder. A plain web server lists nothing."""
        try:
            found = obstore.list_with_delimiter(self.store, key or None)
        except BaseError as error:
            if is_absent(error):
                return []
            raise
        paths = [*found["common_prefixes"], *(item["path"] for item in found["objects"])]
        return [path.rpartition("/")[2] for path in paths]

    def put(self, key: str, source: bytes | memoryview | Path) -> None:
        """Write a file; it appears when all of it has arrived."""
        obstore.put(self.store, key, source, chunk_size=_PART_BYTES, max_concurrency=2)

    def put_if(self, key: str, data: bytes, tag: Tag | None) -> bool:
        """Write a small file if it still has this tag (None: if there is none); False where it was changed."""
        try:
            mode: Any = "create" if tag is None else tag or "overwrite"
            obstore.put(self.store, key, data, mode=mode)
        except (AlreadyExistsError, PreconditionError, FileNotFoundError):
            return False
        except GenericError as error:
            if not is_absent(error):
                raise
            self.put(key, data)  # a server without conditional writes
        return True

    def remove(self, key: str) -> None:
        """Remove a file, and a folder of this name with all it holds."""
        with suppress(FileNotFoundError):
            obstore.delete(self.store, key)
        for batch in obstore.list(self.store, key, chunk_size=1000):
            with suppress(FileNotFoundError):
                obstore.delete(self.store, [item["path"] for item in batch])


class _FsspecFiles:
    """The same of an fsspec file system, such as memory or SFTP; keys are its paths. Methods as above."""

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def get(self, key: str, start: int = 0, stop: int | None = None) -> Buffer:
        data: bytes = self._fs.cat_file(key) if stop is None else self._fs.cat_file(key, start=start, end=stop)
        return data

    def get_tagged(self, key: str) -> tuple[bytes, Tag]:
        return self._fs.cat_file(key), {}  # a tag that fits every version

    def status(self, key: str) -> tuple[int, str]:
        info = self._fs.info(key)
        tags = ("ETag", "etag", "LastModified", "mtime", "created")
        return int(info["size"]), str(next((info[name] for name in tags if name in info), ""))

    def exists(self, key: str) -> bool:
        return bool(self._fs.exists(key))

    def names(self, key: str) -> list[str]:
        self._fs.invalidate_cache(key)  # another process may have written since the last look
        entries = self._fs.ls(key, detail=False) if self._fs.isdir(key) else []
        return [entry.rstrip("/").rpartition("/")[2] for entry in entries]

    def put(self, key: str, source: bytes | memoryview | Path) -> None:
        self._fs.makedirs(key.rpartition("/")[0], exist_ok=True)
        if isinstance(source, Path):
            self._fs.put_file(str(source), key)
        else:
            self._fs.pipe_file(key, bytes(source))

    def put_if(self, key: str, data: bytes, tag: Tag | None) -> bool:
        self._fs.makedirs(key.rpartition("/")[0], exist_ok=True)
        try:
            self._fs.pipe_file(key, data, mode="create" if tag is None else "overwrite")
        except FileExistsError:
            return False
        return True

    def remove(self, key: str) -> None:
        self._fs.invalidate_cache(key)
        entries = self._fs.find(key, withdirs=True, detail=True)
        for path in sorted(entries, reverse=True):  # what a folder holds before the folder
            with suppress(FileNotFoundError):
                (self._fs.rmdir if entries[path]["type"] == "directory" else self._fs.rm_file)(path)


RemoteFiles = ObjectFiles | _FsspecFiles


def remote_files(url: str, policy: RetryPolicy | None = None) -> tuple[RemoteFiles, str]:
    """The files of the server that a URL names, and the key of the URL among them.

    Args:
        policy: says after how many silent seconds one try counts as failed.

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
        return _FsspecFiles(fs), path
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
    settings = *(os.environ.get(name) for name in _SETTINGS), str(_stated())
    try:
        return _object_files(f"{scheme}://{host}", (policy or RetryPolicy()).request_seconds, settings), key
    except (ValueError, BaseError) as error:
        raise InputError(f"{redacted(url)}: cannot be reached: {str(error).splitlines()[0]}") from error


@lru_cache(maxsize=1)
def _first_process() -> int:
    """The process that first used an object store: a fork of it would wait for obstore's threads for ever."""
    return os.getpid()


@lru_cache(maxsize=64)
def _object_files(server: str, seconds: float, settings: tuple[object, ...]) -> ObjectFiles:
    """Made once for an environment; `with_retries` tries again, and counts."""
    return ObjectFiles(client(server, retries=0, seconds=seconds))


def client(server: str, retries: int, seconds: float) -> ObjectStore:
    """obstore's client of a bucket or web server, `scheme://host`.

    Args:
        retries: how often the client itself tries again.
        seconds: after which a try without an answer counts as failed.

    Raises:
        InputError: there are no credentials.
    """
    scheme, _, host = server.partition("://")
    arguments: dict[str, Any] = {}
    if scheme.startswith("s3"):
        arguments = _aws(host)
    elif scheme.startswith("a"):
        arguments = {"config": dict(_azure())}
    limits = {"read_timeout": timedelta(seconds=seconds), "connect_timeout": timedelta(seconds=min(5.0, seconds))}
    arguments["client_options"] = {"allow_http": True, **limits}
    server = server.replace("gcs://", "gs://")  # the one that obstore knows
    made: ObjectStore = from_url(server, retry_config={"max_retries": retries}, **arguments)
    return made


def _stated() -> dict[str, Any]:
    """What fsspec's configuration files and FSSPEC_S3_… variables say of S3."""
    stated: dict[str, Any] = fsspec.config.conf.get("s3", {})
    return stated


def _aws(bucket: str) -> dict[str, Any]:
    """Endpoint, region and credentials as the AWS command line finds them, or as fsspec's settings say."""
    try:
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        raise InputError("s3:// needs boto3: pip install 'scalecryo[s3]'") from error
    stated = _stated()
    try:
        session = boto3.Session(*(stated.get(name) for name in ("key", "secret", "token")),
                                profile_name=stated.get("profile"))  # fmt: skip
        settings = {"endpoint_url": stated.get("endpoint_url"), **stated.get("client_kwargs", {})}
        if not (session.region_name or settings.get("region_name")):
            settings["region_name"] = "us-east-1"
        s3 = session.client("s3", **settings)
        config: dict[str, Any] = {"endpoint": s3.meta.endpoint_url, "region": s3.meta.region_name}
        if "amazonaws.com" in s3.meta.endpoint_url:  # obstore follows no redirects to the bucket's own region
            with suppress(ClientError):
                config["region"] = s3.head_bucket(Bucket=bucket)["BucketRegion"]
            config["endpoint"] = session.client("s3", region_name=config["region"]).meta.endpoint_url
        if stated.get("anon") or os.environ.get("AWS_SKIP_SIGNATURE"):
            return {"config": {**config, "skip_signature": True}}
        if session.get_credentials() is None:
            raise InputError("there are no credentials: set them as for the AWS command line")
        return {"config": config, "credential_provider": Boto3CredentialProvider(session, ttl=_CREDENTIALS_LAST)}
    except BotoCoreError as error:
        raise InputError(str(error)) from error


def _azure() -> Iterator[tuple[str, str]]:
    """Settings from AZURE_STORAGE_CONNECTION_STRING, which obstore does not read."""
    names = {"AccountName": "account_name", "AccountKey": "account_key", "SharedAccessSignature": "sas_key",
             "BlobEndpoint": "endpoint"}  # fmt: skip
    for part in os.environ.get("AZURE_STORAGE_CONNECTION_STRING", "").split(";"):
        name, _, value = part.partition("=")
        if name in names:
            yield names[name], value
