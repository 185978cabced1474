"""MRC maps and image stacks (MRC2014; Cheng et al. 2015), local or by URL.

Arrays are [z, y, x]. Reads modes 0, 1, 2, 6 and 12 of either byte order, extended headers, files without the `MAP `
identifier and gzip or bzip2 files; writes mode 2 (float32), little-endian. Headers are checked against the length of
the file before anything is allocated.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from mrcfile.dtypes import HEADER_DTYPE

from scalecryo.data.formats.unpack import Unpacker, is_packed
from scalecryo.data.io import urls
from scalecryo.errors import InputError

Array = npt.NDArray[np.float32]

_HEADER_BYTES = 1024
_MODES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}
_COMPRESSED_LIMIT = 1 << 30
_ANY_LENGTH = 1 << 62
_LARGEST_PIXEL = 1e6  # Å; what is larger was never meant
_STAMPS = {0x44: "<", 0x11: ">"}  # first byte of the machine stamp
_IMOD_STAMP = 1146047817  # at byte 152; bit 0 of the flags behind it says that bytes are signed


def _parse_header(data: bytes, where: str) -> tuple[Any, str]:
    """The header record and its byte order, which the machine stamp says unless the sizes make no sense in it.

    Some writers leave no stamp, and some a wrong one.
    """
    if len(data) < _HEADER_BYTES:
        raise InputError(f"{where}: not an MRC file ({len(data)} bytes are fewer than a header's {_HEADER_BYTES})")
    stamped = _STAMPS.get(data[212], "<")
    for order in (stamped, ">" if stamped == "<" else "<"):
        header = np.frombuffer(data, HEADER_DTYPE.newbyteorder(order), count=1)[0]
        sizes = [int(header[axis]) for axis in ("nx", "ny", "nz")]
        if 0 <= int(header["mode"]) <= 127 and all(0 < size < 1 << 24 for size in sizes):
            return header, order
    raise InputError(f"{where}: not an MRC file (no byte order gives its header a sensible size and mode)")


def _kind(data: bytes, mode: int, order: str, where: str) -> str:
    """NumPy's kind and size of a pixel.

    Raises:
        InputError: the mode is not supported.
    """
    if mode not in _MODES:
        raise InputError(f"{where}: MRC mode {mode} is not supported; convert it to mode 2 (float32)")
    stamp, flags = np.frombuffer(data, order + "i4", count=2, offset=152).tolist()
    # Before MRC2014 IMOD wrote unsigned bytes, and still can.
    return "u1" if mode == 0 and stamp == _IMOD_STAMP and not flags & 1 else _MODES[mode]


@dataclass(frozen=True)
class _Layout:
    """What the header says, checked."""

    count: int
    ny: int
    nx: int
    dtype: str
    offset: int
    pixel_size: float
    nstart: tuple[int, int, int]
    origin: tuple[float, float, float]
    axes: tuple[int, int, int]
    is_volume: bool = False


def _layout(data: bytes, length: int, where: str) -> _Layout:
    """Check a header against the length of its file.

    Raises:
        InputError: not an MRC file, unsupported mode, or truncated.
    """
    header, order = _parse_header(data, where)
    kind = _kind(data, int(header["mode"]), order, where)
    nx, ny, nz = (int(header[axis]) for axis in ("nx", "ny", "nz"))
    if int(header["nsymbt"]) < 0:
        raise InputError(f"{where}: its header says {header['nsymbt']} bytes of extended header; copy it again")
    offset = _HEADER_BYTES + int(header["nsymbt"])
    image_bytes = nx * ny * np.dtype(kind).itemsize
    if length < offset + nz * image_bytes:
        whole = max(0, length - offset) // image_bytes
        raise InputError(
            f"{where}: truncated: the header says {nz} images of {ny} × {nx} pixels but the file ends after {whole}; "
            "copy it again"
        )
    cell, mx = float(header["cella"]["x"]), int(header["mx"])
    pixel_size = cell / mx if mx > 0 and np.isfinite(cell) and cell > 0 else 0.0
    axes = tuple(int(header[axis]) for axis in ("mapc", "mapr", "maps"))
    return _Layout(
        count=nz,
        ny=ny,
        nx=nx,
        dtype=order + kind,
        offset=offset,
        # A header keeps float32: 5 decimals are all that a quotient of two such numbers holds.
        pixel_size=round(pixel_size, 5) if pixel_size < _LARGEST_PIXEL else 0.0,
        nstart=(int(header["nxstart"]), int(header["nystart"]), int(header["nzstart"])),
        origin=tuple(float(header["origin"][axis]) for axis in "xyz"),  # type: ignore[arg-type]
        axes=axes if sorted(axes) == [1, 2, 3] else (1, 2, 3),  # type: ignore[arg-type]
        is_volume=int(header["ispg"]) == 1,
    )


def _unpacked_layout(url: str, fingerprint: tuple[int, str], where: str) -> tuple[_Layout, tuple[int, str], bytes]:
    """Layout, fingerprint and unpacked bytes of a compressed stack; no more is unpacked than its header announces."""
    if fingerprint[0] > _COMPRESSED_LIMIT:
        raise InputError(f"{where}: a compressed file larger than 1 GiB; unpack it first")
    stream = Unpacker(urls.read_bytes(url), where)
    head = stream.read(_HEADER_BYTES)
    announced = _layout(head, _ANY_LENGTH, where)
    length = announced.offset + announced.count * announced.ny * announced.nx * np.dtype(announced.dtype).itemsize
    if length > _COMPRESSED_LIMIT:
        raise InputError(f"{where}: larger than 1 GiB when unpacked ({length:,} bytes); unpack it first")
    # One byte more, so that a file that ends there has its checksum checked.
    unpacked = (head + stream.read(length + 1 - len(head)))[:length]
    return _layout(head, len(unpacked), where), fingerprint, unpacked


class Stack:
    """An image stack that is read in pieces; it holds no open file between reads.

    A compressed stack is unpacked in memory once, so it may hold 1 GiB at most.
    """

    def __init__(self, url: str, layout: _Layout, fingerprint: tuple[int, str], unpacked: bytes | None = None) -> None:
        self.url = url
        self.fingerprint = fingerprint  #: Length of the file and what tells this version of it from another.
        self._layout = layout
        self._unpacked = unpacked

    @classmethod
    def open(cls, url: str) -> "Stack":
        """Read and check the header.

        Raises:
            MissingInputError: there is no such file.
            InputError: not an MRC file, an unsupported mode, truncated, or too large while compressed.
        """
        where = urls.redacted(url)
        head = urls.read_range(url, 0, _HEADER_BYTES)
        fingerprint = urls.fingerprint(url)
        if is_packed(head):
            return cls(url, *_unpacked_layout(url, fingerprint, where))
        return cls(url, _layout(head, fingerprint[0], where), fingerprint)

    @property
    def unpacked_bytes(self) -> int:
        """Memory that a compressed stack takes; 0 for any other."""
        return len(self._unpacked or b"")

    @property
    def count(self) -> int:
        """Number of images."""
        return self._layout.count

    @property
    def ny(self) -> int:
        """Rows of an image."""
        return self._layout.ny

    @property
    def nx(self) -> int:
        """Columns of an image."""
        return self._layout.nx

    @property
    def is_map(self) -> bool:
        """Whether the header calls it a map (space group 1) and it is a cube, as no stack is by chance."""
        return self._layout.is_volume and self.count == self.ny == self.nx

    @property
    def box_size(self) -> int:
        """Side of the square images in pixels.

        Raises:
            InputError: the images are not square.
        """
        if self.nx != self.ny:
            raise InputError(
                f"{urls.redacted(self.url)}: images are {self.ny} × {self.nx} pixels; particles must be square: "
                "extract them again in a square box"
            )
        return self.nx

    @property
    def pixel_size(self) -> float:
        """Å; 0 when the header does not say."""
        return self._layout.pixel_size

    def read(self, indices: "slice | list[int] | npt.NDArray[np.integer]", out: Array | None = None) -> Array:
        """Images as float32 (n, ny, nx), in the order asked for.

        Args:
            indices: a slice, or image numbers from 0.
            out: where to put them, C-contiguous; a new array when absent.

        Raises:
            InputError: an index past the end, or the file ends early.
        """
        if isinstance(indices, slice):
            indices = range(self.count)[indices]  # type: ignore[assignment]
        wanted = np.asarray(indices, dtype=np.int64).reshape(-1)
        bad = (wanted < 0) | (wanted >= self.count)
        if bad.any():
            number = int(wanted[bad][0]) + 1
            raise InputError(
                f"{urls.redacted(self.url)}: image {number} was asked for but the stack holds {self.count}; "
                "the table and the stack do not belong together"
            )
        if out is None:
            out = np.empty((len(wanted), self.ny, self.nx), dtype=np.float32)
        # Runs of consecutive images are read in one piece each.
        starts = np.flatnonzero(np.diff(wanted, prepend=-2) != 1)
        stops = np.append(starts[1:], len(wanted))[: len(starts)]
        with ExitStack() as opened:
            stream = None
            if self._unpacked is None and urls.is_local(self.url) and len(wanted):
                stream = opened.enter_context(urls.open_read(self.url))
            for start, stop in zip(starts, stops, strict=True):
                self._read_run(int(wanted[start]), out[start:stop], stream)
        return out

    def _read_run(self, first: int, out: Array, stream: BinaryIO | None) -> None:
        """Fill `out` with consecutive images from number `first` on."""
        layout = self._layout
        dtype = np.dtype(layout.dtype)
        start = layout.offset + first * self.ny * self.nx * dtype.itemsize
        length = out.size * dtype.itemsize
        if stream is not None and dtype == out.dtype:
            stream.seek(start)
            done = stream.readinto(out.data.cast("B"))  # type: ignore[attr-defined]
        else:
            if stream is not None:
                stream.seek(start)
                data: bytes | memoryview = stream.read(length)
            elif self._unpacked is not None:
                data = memoryview(self._unpacked)[start : start + length]
            else:
                data = urls.read_range(self.url, start, start + length)
            done = len(data)
            if done == length:
                out[:] = np.frombuffer(data, dtype).reshape(out.shape)
        if done != length:
            raise InputError(f"{urls.redacted(self.url)}: the file ended while images {first + 1}… were read")


def read_map(url: str) -> tuple[Array, float, tuple[float, float, float]]:
    """A density map: array [z, y, x], pixel size (Å, 0 when the header has none), origin (Å, x y z).

    The origin is the position of voxel (0, 0, 0): the header's ORIGIN, or NSTART × pixel size where that is zero.

    Raises:
        MissingInputError: there is no such file.
        InputError: not a usable MRC file.
    """
    stack = Stack.open(url)
    layout = stack._layout
    # Axis 0 of the file is the section axis (maps), axis 2 the column axis (mapc).
    file_axes = layout.axes[::-1]
    volume = stack.read(slice(None)).transpose([file_axes.index(axis) for axis in (3, 2, 1)])
    if any(layout.origin):
        origin = layout.origin
    else:
        nstart = [layout.nstart[layout.axes.index(axis)] for axis in (1, 2, 3)]
        origin = (nstart[0] * layout.pixel_size, nstart[1] * layout.pixel_size, nstart[2] * layout.pixel_size)
    return np.ascontiguousarray(volume), layout.pixel_size, origin


def _header(shape: tuple[int, int, int], pixel_size: float, origin: tuple[float, float, float], is_stack: bool) -> Any:
    """A mode 2 header; density statistics are left undetermined (MRC2014: dmax < dmin, rms < 0)."""
    header = np.zeros((), dtype=HEADER_DTYPE.newbyteorder("<"))
    header["nz"], header["ny"], header["nx"] = shape
    header["mode"] = 2
    header["mx"], header["my"], header["mz"] = shape[2], shape[1], 1 if is_stack else shape[0]
    for axis in "xyz":
        header["cella"][axis] = pixel_size * int(header["m" + axis])
        header["cellb"][{"x": "alpha", "y": "beta", "z": "gamma"}[axis]] = 90.0
        header["origin"][axis] = origin["xyz".index(axis)]
    header["mapc"], header["mapr"], header["maps"] = 1, 2, 3
    header["ispg"] = 0 if is_stack else 1
    header["nversion"] = 20140
    header["map"] = b"MAP "
    header["machst"] = [0x44, 0x44, 0, 0]
    header["dmin"], header["dmax"], header["dmean"], header["rms"] = 0.0, -1.0, -2.0, -1.0
    header["nlabl"] = 1
    header["label"][0] = b"scalecryo"
    return header


def _set_statistics(header: Any, low: float, high: float, total: float, squares: float, size: int) -> None:
    mean = total / size
    header["dmin"], header["dmax"], header["dmean"] = low, high, mean
    header["rms"] = max(0.0, squares / size - mean * mean) ** 0.5


def write_map(
    url: str, volume: npt.NDArray, pixel_size: float, origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
) -> None:
    """Write a density map as float32; the file appears whole or not at all.

    Args:
        url: where to.
        volume: array [z, y, x].
        pixel_size: Å.
        origin: position of voxel (0, 0, 0), Å, (x, y, z).
    """
    data = np.ascontiguousarray(volume, dtype="<f4")
    if data.ndim != 3 or data.size == 0:
        raise InputError(f"{urls.redacted(url)}: a map has three axes, this array has shape {data.shape}")
    header = _header(data.shape, pixel_size, origin, is_stack=False)
    values = data.astype(np.float64)
    _set_statistics(header, data.min(), data.max(), values.sum(), np.square(values).sum(), data.size)
    with urls.atomic_path(url) as temporary, open(temporary, "wb") as stream:
        stream.write(header.tobytes())
        stream.write(data.data)


class StackWriter:
    """Writes a stack of `count` float32 images piece by piece; the file appears when it is closed complete.

    Use it as a context manager: after an error nothing is left behind.

    Args:
        url: where to.
        count: number of images that will be appended.
        box_size: side of the square images, px.
        pixel_size: Å.
    """

    def __init__(self, url: str, count: int, box_size: int, pixel_size: float) -> None:
        self._url = url
        self._shape = (count, box_size, box_size)
        self._header = _header(self._shape, pixel_size, (0.0, 0.0, 0.0), is_stack=True)
        self._written = 0
        self._low, self._high, self._sum, self._squares = np.inf, -np.inf, 0.0, 0.0
        self._exit = ExitStack()
        self._stream = open(self._exit.enter_context(urls.atomic_path(url)), "wb")  # noqa: SIM115
        self._stream.write(self._header.tobytes())

    def append(self, images: npt.NDArray) -> None:
        """Add images (n, y, x)."""
        data = np.ascontiguousarray(images, dtype="<f4")
        if data.shape[1:] != self._shape[1:] or self._written + len(data) > self._shape[0]:
            raise InputError(f"{urls.redacted(self._url)}: {data.shape} does not fit a stack of {self._shape}")
        self._stream.write(data.data)
        self._written += len(data)
        if len(data):
            values = data.astype(np.float64)
            self._low, self._high = min(self._low, data.min()), max(self._high, data.max())
            self._sum, self._squares = self._sum + values.sum(), self._squares + np.square(values).sum()

    def close(self) -> None:
        """Finish the header and give the file its name.

        Raises:
            InputError: fewer images were appended than announced; nothing is left behind.
        """
        try:
            if self._written != self._shape[0]:
                raise InputError(
                    f"{urls.redacted(self._url)}: {self._written} of {self._shape[0]} images were written; run it again"
                )
            _set_statistics(self._header, self._low, self._high, self._sum, self._squares, int(np.prod(self._shape)))
            self._stream.seek(0)
            self._stream.write(self._header.tobytes())
            self._stream.close()
        except BaseException as error:
            self._abandon(error)
            raise
        self._exit.close()

    def _abandon(self, error: BaseException) -> None:
        self._stream.close()
        self._exit.__exit__(type(error), error, None)

    def __enter__(self) -> "StackWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._abandon(error)
