"""A URL as an fsspec file system, for libraries that ask for one."""

from typing import Any

import fsspec
from obstore.fsspec import FsspecStore
from obstore.store import ObjectStore

from scalecryo.data.io.objects import BY_OBSTORE, client
from scalecryo.data.io.retry import RetryPolicy
from scalecryo.data.io.urls import is_local

_RETRIES = 8


class ExactFileSystem(FsspecStore):
    """obstore's file system with clients as everywhere here, and without patterns: a path is one file or folder.

    It travels between processes as the name of its protocol: each finds credentials for itself.
    """

    def _construct_store(self, bucket: str) -> ObjectStore:
        return client(f"{self.protocol}://{bucket}", _RETRIES, RetryPolicy().request_seconds)

    async def _expand_path(self, path: str | list[str], recursive: bool = False, **options: Any) -> list[str]:
        paths = [path] if isinstance(path, str) else list(path)
        below = [await self._find(one) for one in paths] if recursive else []
        return sorted({*paths, *(name for found in below for name in found)})


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and the path inside it."""
    scheme, _, path = url.partition("://")
    if is_local(url) or scheme not in BY_OBSTORE:
        fs, path = fsspec.core.url_to_fs(url)
        return fs, path
    made: Any = ExactFileSystem  # its overloads know no variable
    return made(scheme), path.rstrip("/")
