"""Pickles of plain numbers: tuples, lists and dictionaries of NumPy arrays, and nothing that runs or allocates at will.

A pickle is a program. This loader knows only the calls by which NumPy arrays are stored, each replaced by one of its
own: whatever else a file names is refused before it is imported.
"""

import io
import pickle
import pickletools
import warnings
from typing import Any

import numpy as np

from scalecryo.errors import InputError


class _Array:
    """An array while its pickle is read: NumPy's own call would allocate whatever shape the file says."""

    def __init__(self) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Type) or not isinstance(data, bytes):
            raise pickle.UnpicklingError("an array of objects")
        self.array = _from_bytes(data, dtype, shape, "F" if fortran else "C")


class _Type:
    """A data type while its pickle is read; only plain numbers."""

    def __init__(self, name: str, *_: Any) -> None:
        self.dtype = np.dtype(str(name))
        if self.dtype.kind not in "biuf":
            raise pickle.UnpicklingError(f"an array of {self.dtype}")

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


def _from_bytes(data: Any, dtype: _Type, shape: Any, order: Any) -> np.ndarray:
    if order not in ("C", "F"):
        raise pickle.UnpicklingError(f"array order {order!r}")
    if not isinstance(data, bytes | bytearray):
        raise pickle.UnpicklingError(f"array content in a {type(data).__name__}")
    return np.frombuffer(bytes(data), dtype.dtype).reshape(shape, order=order)


def _reconstruct(kind: Any, shape: Any, typecode: Any) -> _Array:
    return _Array()


def _scalar(dtype: _Type, data: bytes) -> Any:
    return np.frombuffer(data, dtype.dtype)[0]


def _encode(text: str, encoding: str) -> bytes:
    """How Python 2 pickles, and protocol 2, keep bytes."""
    return text.encode("latin-1" if encoding == "latin1" else "ascii")


_MOST_STEPS = 10_000
_ERRORS = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError,
    MemoryError, RecursionError, SyntaxError,
)  # fmt: skip
_BUFFERS = ("NEXT_BUFFER", "READONLY_BUFFER")
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")
_NDARRAY = object()  # named as an argument, never called
_KNOWN = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode,
    **{
        (f"numpy.{core}.{module}", name): call
        for core in ("core", "_core")
        for module, name, call in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _from_bytes),
        )
    },
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no plain array")
        return _KNOWN[module, name]


def _plain(value: Any, depth: int = 0) -> Any:
    """The value with its arrays in place."""
    if isinstance(value, _Array):
        if value.array is None:
            raise pickle.UnpicklingError("an array without content")
        return value.array
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, tuple | list) and depth < 2 and len(value) < 100:
        return tuple(_plain(item, depth + 1) for item in value)
    raise pickle.UnpicklingError(f"a {type(value).__name__} where arrays are expected")


def _look_through(data: bytes, most_steps: int = _MOST_STEPS) -> None:
    """Refuse what Python's unpickler would allocate unasked: a bytearray of any length that a file announces, and a
    memo as long as the largest number in it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in what may be no text at all
        for count, (code, number, _) in enumerate(pickletools.genops(data)):
            if code.name in _BUFFERS:
                raise pickle.UnpicklingError("content that is kept outside of it")
            if count > most_steps or (code.name in _PUTS and number > _MOST_STEPS):  # type: ignore[operator]
                raise pickle.UnpicklingError("more steps than a few arrays take")


def load(data: bytes, where: str) -> Any:
    """An array, or a tuple of a few arrays.

    Args:
        data: the pickle.
        where: the file's name, for messages.

    Raises:
        InputError: anything else.
    """
    try:
        _look_through(data)
        return _plain(_Reader(io.BytesIO(data)).load())
    except _ERRORS as error:
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{where}: not a pickle of plain arrays ({text})") from error


def load_integers(data: bytes, where: str) -> np.ndarray:
    """A list of whole numbers, as an array or as Python's own list or tuple of them.

    Raises:
        InputError: anything else.
    """
    try:
        # A number of a list takes a few steps, and two bytes at least.
        _look_through(data, most_steps=len(data))
        value = _Reader(io.BytesIO(data)).load()
        if isinstance(value, list | tuple) and all(type(item) is int for item in value):
            return np.array(value, dtype=np.int64)
        found: np.ndarray = _plain(value)
        if not isinstance(found, np.ndarray):
            raise pickle.UnpicklingError("several arrays where one is expected")
    except _ERRORS as error:
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{where}: not a pickle of row numbers ({text})") from error
    return found
