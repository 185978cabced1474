"""Files by path or URL: every path is a local path, `file://…` or any fsspec URL (`s3://…`, `gs://…`, `memory://…`).

Writes are all-or-nothing: a local file appears by rename, an object by a single PUT. Messages never carry
credentials or query strings.
"""

import errno
import io
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit, urlunsplit

import fsspec

from scalecryo.data.io.retry import RetryPolicy, cause, with_retries
from scalecryo.errors import InputError, MissingInputError, OutputError

Result = TypeVar("Result")


def redacted(url: str) -> str:
    """The URL as it may appear in a message: without user, password and query."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def is_local(url: str) -> bool:
    """Whether the URL names a file of this machine."""
    return "://" not in url or url.startswith(("file://", "local://"))


def local_path(url: str) -> Path:
    """The path behind a local URL.

    Raises:
        InputError: the URL is not local.
    """
    if not is_local(url):
        raise InputError(f"{redacted(url)}: a local path is needed here")
    return Path(url.split("://", 1)[1] if "://" in url else url)


def join(url: str, *parts: str) -> str:
    """The URL of something below another; an absolute path or a URL in `parts` starts anew."""
    for part in parts:
        if "://" in part or part.startswith("/"):
            url = part
        else:
            url = f"{url.rstrip('/') or '/'}/{part}" if url != "/" else f"/{part}"
    return url


def parent(url: str) -> str:
    """The folder that holds the file or folder named."""
    if is_local(url):
        return str(local_path(url).parent)
    return url.rstrip("/").rpartition("/")[0]


def folders_above(url: str) -> list[str]:
    """The folder that holds a file, and every folder above it, nearest first."""
    if is_local(url):
        return [str(folder) for folder in local_path(url).absolute().parents]
    scheme, _, path = url.partition("://")
    parts = path.split("/")
    return [f"{scheme}://{'/'.join(parts[:count])}" for count in range(len(parts) - 1, 0, -1)]


def name(url: str) -> str:
    """The last part of the path."""
    return url.rstrip("/").rpartition("/")[2]


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path inside it.

    Raises:
        InputError: no such protocol, the package that speaks it is not installed, or the address holds credentials
            that its protocol would take for a part of the name.
    """
    if url.startswith(("s3://", "s3a://", "gs://", "gcs://")) and "@" in urlsplit(url).netloc:
        raise InputError(
            f"{redacted(url)}: its address holds credentials; take them out, and give them by the environment or a "
            "profile"
        )
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise InputError(f"{redacted(url)}: cannot reach this kind of address ({error})") from error
    return fs, path


def exists(url: str) -> bool:
    """Whether a file or folder is there."""
    if is_local(url):
        return local_path(url).exists()
    fs, path = filesystem(url)
    return bool(fs.exists(path))


def is_folder(url: str) -> bool:
    """Whether a folder (or a common prefix of objects) is there."""
    if is_local(url):
        return local_path(url).is_dir()
    fs, path = filesystem(url)
    return bool(fs.isdir(path))


def open_read(url: str) -> BinaryIO:
    """A binary stream that can seek.

    Raises:
        MissingInputError: there is no such file.
    """
    try:
        if is_local(url):
            local = local_path(url)
            # Opening a pipe waits for its writer, and a device never ends.
            if local.exists() and not local.is_file() and not local.is_dir():
                raise InputError(f"{redacted(url)}: not a regular file; copy it to one")
            return open(local, "rb")
        fs, path = filesystem(url)
        stream: BinaryIO = fs.open(path, "rb")
        return stream
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingInputError(f"{redacted(url)}: no such file") from error
    except (IsADirectoryError, PermissionError) as error:
        raise InputError(f"{redacted(url)}: cannot be read ({error.strerror or error})") from error


def read_bytes(url: str) -> bytes:
    """The whole file; from an object store with patience (`retry.py`).

    Raises:
        MissingInputError: there is no such file.
        StoreError: the object store kept failing.
    """
    if is_local(url):
        with open_read(url) as stream:
            return stream.read()
    return _patient(url, lambda: fetch(url))


def read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes start…stop−1 of a file; fewer when the file ends before.

    Raises:
        MissingInputError: there is no such file.
        StoreError: the object store kept failing.
    """
    if is_local(url):
        with open_read(url) as stream:
            return os.pread(stream.fileno(), stop - start, start)
    return _patient(url, lambda: fetch(url, start, stop))


def fetch(url: str, start: int | None = None, stop: int | None = None) -> bytes:
    """A range of a remote file in one try, which fails as fsspec does."""
    fs, path = filesystem(url)
    data: bytes = fs.cat_file(path, start=start, end=stop)
    return data


def _patient(url: str, call: Callable[[], Result]) -> Result:
    """A remote call with the usual patience; what does not pass is said in our terms."""
    try:
        return with_retries(call, RetryPolicy(), redacted(url))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingInputError(f"{redacted(url)}: no such file") from error
    except (IsADirectoryError, PermissionError) as error:
        raise InputError(f"{redacted(url)}: cannot be read ({cause(error)})") from error


def read_many(urls: Sequence[str]) -> list[bytes]:
    """Several whole files of one file system; from an object store all at the same time.

    Raises:
        MissingInputError: one of them does not exist.
    """
    if not urls or is_local(urls[0]):
        return [read_bytes(url) for url in urls]
    fs, _ = filesystem(urls[0])
    paths = [fs._strip_protocol(url) for url in urls]
    try:
        found = with_retries(lambda: fs.cat(paths, on_error="raise"), RetryPolicy(), redacted(parent(urls[0])))
    except FileNotFoundError as error:
        raise MissingInputError(
            f"{redacted(urls[0])} and {len(urls) - 1} more: one is missing ({cause(error)})"
        ) from error
    # One path alone comes back as bare bytes.
    return [found] if isinstance(found, bytes) else [found[path] for path in paths]


def read_text(url: str) -> str:
    """The whole file as UTF-8 text.

    Raises:
        MissingInputError: there is no such file.
        InputError: it is not text.
    """
    try:
        return read_bytes(url).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{redacted(url)}: not a text file (byte {error.start} is not UTF-8)") from error


def size(url: str) -> int:
    """Length of a file in bytes.

    Raises:
        MissingInputError: there is no such file.
    """
    return fingerprint(url)[0]


def fingerprint(url: str) -> tuple[int, str]:
    """Length of a file and what tells one version of it from another: its time of change, or its entity tag.

    Raises:
        MissingInputError: there is no such file.
    """
    if is_local(url):
        try:
            status = local_path(url).stat()
        except FileNotFoundError as error:
            raise MissingInputError(f"{redacted(url)}: no such file") from error
        return status.st_size, str(status.st_mtime_ns)
    fs, path = filesystem(url)
    info = _patient(url, lambda: fs.info(path))
    version = next((info[key] for key in ("ETag", "etag", "LastModified", "mtime", "created") if key in info), "")
    return int(info["size"]), str(version)


@contextmanager
def _full_disk_explained(url: str) -> Iterator[None]:
    """Say in one line that there is no room to write; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OutputError(
            f"{redacted(url)}: no room to write it ({error.strerror}); make room, then run the same command again"
        ) from error


@contextmanager
def atomic_path(url: str) -> Iterator[Path]:
    """A temporary local path to write; on leaving without an error it becomes the file at `url`.

    Missing folders are made. After an error the temporary file is removed and nothing appears at `url`.

    Raises:
        OutputError: the disk is full.
    """
    local = is_local(url)
    folder = local_path(url).parent if local else Path(tempfile.gettempdir())
    with _full_disk_explained(url):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{name(url)}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            yield temporary
            if local:
                os.replace(temporary, local_path(url))
            else:
                fs, path = filesystem(url)
                make_folder(parent(url))
                with_retries(lambda: fs.put_file(str(temporary), path), RetryPolicy(), redacted(url))
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_stream(url: str) -> Iterator[BinaryIO]:
    """A stream to write a whole file through; on leaving without an error it becomes the file at `url`.

    A local file is written as it comes, an object is held in memory until it is sent, with patience (`retry.py`).

    Raises:
        OutputError: the disk is full.
        StoreError: the object store kept failing.
    """
    if is_local(url):
        with atomic_path(url) as temporary, open(temporary, "wb", buffering=0) as stream:
            yield stream
    else:
        memory = io.BytesIO()
        yield memory
        fs, path = filesystem(url)
        make_folder(parent(url))
        data = memory.getvalue()
        with_retries(lambda: fs.pipe_file(path, data), RetryPolicy(), redacted(url))


def write_all(stream: BinaryIO, data: memoryview) -> None:
    """Write all of `data`: an unbuffered stream may take it in several pieces."""
    while data:
        data = data[stream.write(data) :]


def write_bytes_atomic(url: str, data: bytes | bytearray | memoryview) -> None:
    """Write a whole file so that it is never seen half-written; missing folders are made.

    Raises:
        OutputError: the disk is full.
    """
    with atomic_stream(url) as stream:
        write_all(stream, memoryview(data).cast("B"))


def make_folder(url: str) -> None:
    """Make a folder and those above it; object stores have none and need none."""
    if is_local(url):
        local_path(url).mkdir(parents=True, exist_ok=True)
    elif not url.startswith(("s3://", "gs://", "gcs://", "az://", "abfs://")):
        fs, path = filesystem(url)
        fs.makedirs(path, exist_ok=True)


def list_folder(url: str) -> list[str]:
    """Names in a folder, sorted; empty when there is no such folder."""
    if is_local(url):
        path = local_path(url)
        return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    fs, remote = filesystem(url)
    fs.invalidate_cache(remote)  # another process may have written since the last look
    try:
        entries = fs.ls(remote, detail=False)
    except FileNotFoundError:
        return []
    return sorted({name(entry) for entry in entries} - {""})


def remove_leftovers(url: str) -> None:
    """Remove the temporary files that a killed process left in a local folder and below."""
    if is_local(url):
        for path in local_path(url).rglob(".*.tmp"):
            path.unlink(missing_ok=True)


def remove_tree(url: str) -> None:
    """Remove a file or a folder with all it holds; nothing happens when there is none."""
    fs, path = filesystem(url)
    with suppress(FileNotFoundError):
        fs.rm(path, recursive=True)


def absolute(url: str) -> str:
    """The URL itself, or the absolute form of a local path, which another working folder does not change."""
    return url if "://" in url else str(Path(url).absolute())
