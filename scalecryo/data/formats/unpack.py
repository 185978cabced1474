"""gzip and bzip2 files, unpacked no further than their caller allows: a few kilobytes may say terabytes."""

import bz2
import gzip
import io
import zlib
from typing import BinaryIO

from scalecryo.errors import InputError


def is_packed(head: bytes) -> bool:
    """Whether a file that begins so is a gzip or bzip2 file."""
    return head[:2] == b"\x1f\x8b" or head[:3] == b"BZh"


class Unpacker:
    """Reads a packed file from its beginning.

    Args:
        data: the packed file.
        where: the file's name, for messages.
    """

    def __init__(self, data: bytes, where: str) -> None:
        packed = io.BytesIO(data)
        gzipped = data[:2] == b"\x1f\x8b"
        self._stream: BinaryIO = gzip.GzipFile(fileobj=packed) if gzipped else bz2.BZ2File(packed)  # type: ignore[assignment]
        self._where = where

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer at the end, whose checksum is then checked.

        Raises:
            InputError: the file is damaged.
        """
        try:
            return self._stream.read(size)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise InputError(f"{self._where}: damaged compressed file ({error}); copy it again") from error


def unpack(data: bytes, where: str, limit: int) -> bytes:
    """A whole packed file.

    Raises:
        InputError: it is damaged, or holds more than `limit` bytes.
    """
    found = Unpacker(data, where).read(limit + 1)
    if len(found) > limit:
        raise InputError(f"{where}: holds more than {limit >> 20} MiB when unpacked; unpack it first")
    return found
