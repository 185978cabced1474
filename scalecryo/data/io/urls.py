"""Files by path or URL: every path is a local path, `file://…`, an object store's address (`s3://…`, `gs://…`,
`az://…`), a web server's, or any other URL that fsspec knows.

Names are exact: no character in them is a pattern. Writes are all-or-nothing: a local file appears by rename, an object
when it has arrived. Messages never carry credentials or query strings.
"""

import errno
import io
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

from scalecryo.data.io.objects import RemoteFiles, Tag, remote_files
from scalecryo.data.io.objects import redacted as redacted
from scalecryo.data.io.retry import REQUEST_ERRORS, RetryPolicy, ShortBodyError, cause, with_retries
from scalecryo.errors import InputError, MissingInputError, OutputError, StoreError

Result = TypeVar("Result")
_AT_ONCE = 32


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


def remote_call(
    url: str,
    call: Callable[[RemoteFiles, str], Result],
    part: str = "",
    policy: RetryPolicy | None = None,
    stopped: threading.Event | None = None,
    on_retry: Callable[[], None] = lambda: None,
) -> Result:
    """A call on a remote file, with patience (`retry.py`).

    Args:
        url: of the file.
        call: what is asked of its server's files under its key; it may be repeated.
        part: of the file, for messages.
        policy, stopped, on_retry: as for `with_retries`.

    Raises:
        MissingInputError: there is no such file.
        StoreError: the server refused it, or kept failing.
    """
    policy = policy or RetryPolicy()
    files, key = remote_files(url, policy)
    where = f"{redacted(url)} ({part})" if part else redacted(url)
    try:
        return with_retries(lambda: call(files, key), policy, where, stopped=stopped, on_retry=on_retry)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingInputError(f"{redacted(url)}: no such file") from error
    except ShortBodyError as error:
        raise StoreError(f"{where}: the object is too short: {error}") from error
    except REQUEST_ERRORS as error:
        raise StoreError(
            f"{where}: cannot be read or written: {cause(error)}; check the address and the credentials"
        ) from error


def exists(url: str) -> bool:
    """Whether a file or folder is there."""
    if is_local(url):
        return local_path(url).exists()
    with suppress(MissingInputError):
        return remote_call(url, lambda files, key: files.exists(key))
    return False


def dangling(url: str) -> str:
    """Which link on the way to a local file leads nowhere, in words; empty where none does."""
    if is_local(url):
        with suppress(OSError):
            for path in (local_path(url), *local_path(url).parents):
                if path.is_symlink() and not path.exists():
                    return f"{path} is a link to {os.readlink(path)}, which is not there"
    return ""


def check_there(url: str) -> None:
    """
    Raises:
        MissingInputError: no such file or folder; a link that leads nowhere is named.
    """
    if not exists(url):
        raise MissingInputError(dangling(url) or f"{redacted(url)}: no such file")


def is_folder(url: str) -> bool:
    """Whether a folder is there; at a URL: one that holds something."""
    return local_path(url).is_dir() if is_local(url) else bool(list_folder(url))


def open_read(url: str) -> BinaryIO:
    """A binary stream of a local file.

    Raises:
        MissingInputError: there is no such file.
        InputError: it is no file, or may not be read.
    """
    local = local_path(url)
    try:
        # Opening a pipe waits for its writer, and a device never ends.
        if local.exists() and not local.is_file() and not local.is_dir():
            raise InputError(f"{redacted(url)}: not a regular file; copy it to one")
        return open(local, "rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _missing(url) from error
    except (IsADirectoryError, PermissionError) as error:
        raise InputError(f"{redacted(url)}: cannot be read ({error.strerror or error})") from error


def _missing(url: str) -> MissingInputError:
    """That a local file does not exist, and where its links end."""
    return MissingInputError(dangling(url) or f"{redacted(url)}: no such file")


def read_bytes(url: str) -> bytes:
    """The whole file; from an object store with patience (`retry.py`).

    Raises:
        MissingInputError: there is no such file.
        StoreError: the object store kept failing.
    """
    if is_local(url):
        with open_read(url) as stream:
            return stream.read()
    return bytes(remote_call(url, lambda files, key: files.get(key)))


def read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes start…stop−1 of a file; fewer when the file ends before.

    Raises:
        MissingInputError: there is no such file.
        StoreError: the object store kept failing.
    """
    if is_local(url):
        with open_read(url) as stream:
            return os.pread(stream.fileno(), stop - start, start)
    return bytes(remote_call(url, lambda files, key: files.get(key, start, stop)))


def read_many(urls: Sequence[str]) -> list[bytes]:
    """Several whole files; from an object store many at the same time.

    Raises:
        MissingInputError: one of them does not exist.
    """
    if not urls or is_local(urls[0]):
        return [read_bytes(url) for url in urls]
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="read") as pool:
        return list(pool.map(read_bytes, urls))


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


def read_tagged(url: str) -> tuple[bytes, Tag] | None:
    """A small remote file and the tag of this version of it, for `write_if`; None when there is no such file."""
    with suppress(MissingInputError):
        return remote_call(url, lambda files, key: files.get_tagged(key))
    return None


def write_if(url: str, data: bytes, tag: Tag | None) -> bool:
    """Write a small remote file if it is still the version of a tag, or None: if there is none.

    Returns:
        Whether it was written; False where somebody else wrote it since.
    """
    return remote_call(url, lambda files, key: files.put_if(key, data, tag))


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
            raise _missing(url) from error
        return status.st_size, str(status.st_mtime_ns)
    return remote_call(url, lambda files, key: files.status(key))


def _send(url: str, source: memoryview | Path) -> None:
    _refuse_root(url)
    remote_call(url, lambda files, key: files.put(key, source))


def _refuse_root(url: str) -> None:
    if not remote_files(url)[1].strip("/"):
        raise OutputError(f"{redacted(url)}: names a bucket, not a file or folder in it")


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
        StoreError: the object store kept failing.
    """
    folder = local_path(url).parent if is_local(url) else Path(tempfile.gettempdir())
    with _full_disk_explained(url):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{name(url)}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            yield temporary
            if is_local(url):
                os.replace(temporary, local_path(url))
            else:
                _send(url, temporary)
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
        _send(url, memory.getbuffer())


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
    """Make a local folder and those above it; elsewhere they come with what is written into them."""
    if is_local(url):
        local_path(url).mkdir(parents=True, exist_ok=True)


def list_folder(url: str) -> list[str]:
    """Names in a folder, sorted; empty when there is no such folder."""
    if is_local(url):
        path = local_path(url)
        return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    with suppress(MissingInputError):
        return sorted(set(remote_call(url, lambda files, key: files.names(key))) - {""})
    return []


def remove_leftovers(url: str) -> None:
    """Remove the temporary files that a killed process left in a local folder and below."""
    if is_local(url):
        for path in local_path(url).rglob(".*.tmp"):
            path.unlink(missing_ok=True)


def remove_tree(url: str) -> None:
    """Remove a file or a folder with all it holds; nothing happens when there is none."""
    if is_local(url):
        path = local_path(url)
        with suppress(FileNotFoundError, NotADirectoryError):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    else:
        _refuse_root(url)
        remote_call(url, lambda files, key: files.remove(key))


def absolute(url: str) -> str:
    """The URL itself, or the absolute form of a local path, which another working folder does not change."""
    return url if "://" in url else str(Path(url).absolute())
