"""cryoSPARC's files as rows: .cs tables, joined by `uid`, and .csg groups; nothing in them is executed.

A .cs file is a NumPy .npy file of one structured array. Its header is checked against the length of the file before
anything is allocated, and fields that hold pickled objects are refused.
"""

import ast
import io
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import yaml
from numpy.lib import format as npy
from numpy.typing import NDArray

from scalecryo.data.io import urls
from scalecryo.errors import InputError

_HEADER_LIMIT = 2 << 20  # several fields for each of a thousand classes
_GROUP_LIMIT = 256 << 10
_LENGTH_BYTES = {(1, 0): 2, (2, 0): 4}


def decode(data: bytes, where: str) -> NDArray[np.void]:
    """The rows of a .cs file; they share its memory.

    Raises:
        InputError: not a .cs file, or it is cut short.
    """
    if data[1:6] == b"CSDAT":
        raise InputError(
            f"{where}: in cryosparc-tools' compressed format; save it with format=NUMPY_FORMAT, or export the job"
        )
    try:
        count, dtype, start = _header(data)
    except (
        ValueError,
        TypeError,
        SyntaxError,
        KeyError,
        IndexError,
        OverflowError,
        RecursionError,
        MemoryError,
    ) as error:
        text = " ".join(str(error).split())[:200]
        raise InputError(f"{where}: not a cryoSPARC table ({text})") from error
    if dtype.hasobject:
        raise InputError(f"{where}: not a cryoSPARC table (it holds pickled objects, which are never read)")
    if dtype.names is None or not dtype.itemsize:
        raise InputError(f"{where}: not a cryoSPARC table (blob/path and other fields are missing)")
    if count < 0 or start + count * dtype.itemsize > len(data):
        raise InputError(
            f"{where}: truncated: {count} rows of {dtype.itemsize} bytes do not fit in {len(data) - start} bytes; "
            "copy it again"
        )
    return np.frombuffer(data, dtype, count=count, offset=start)


def _header(data: bytes) -> tuple[int, np.dtype, int]:
    """Rows, their type, and where they begin, as the header of an .npy file says.

    NumPy's own reader mends headers of Python 2, which cryoSPARC never wrote, by a tokenizer that fails in more ways.
    """
    version = npy.read_magic(io.BytesIO(data))
    if version not in _LENGTH_BYTES:
        raise ValueError(f"version {version[0]} of the .npy format")
    first = npy.MAGIC_LEN + _LENGTH_BYTES[version]
    length = int.from_bytes(data[npy.MAGIC_LEN : first], "little")
    if length > _HEADER_LIMIT or first + length > len(data):
        raise ValueError(f"a header of {length} bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the syntax of what may be no literal at all
        said = ast.literal_eval(data[first : first + length].decode("latin-1"))
    (count,) = said["shape"]
    if not isinstance(count, int):
        raise ValueError("a shape that is no number")
    return count, npy.descr_to_dtype(said["descr"]), first + length


def encode(rows: NDArray[np.void]) -> bytes:
    """The .cs file of some rows."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a long header needs NumPy 1.9 or newer
        np.save(buffer, rows, allow_pickle=False)
    return buffer.getvalue()


def read(url: str, passthrough: Sequence[str] = ()) -> NDArray[np.void]:
    """Rows of a .cs file, with the fields of its passthrough files; or of a .csg group.

    Raises:
        MissingInputError: a file does not exist.
        InputError: a file cannot be used, or a particle is not in every file.
    """
    rows = _read_group(url) if url.endswith(".csg") else decode(urls.read_bytes(url), urls.redacted(url))
    for other in passthrough:
        more = decode(urls.read_bytes(other), urls.redacted(other))
        own = set(rows.dtype.names or ())
        rows = join(rows, more, [name for name in more.dtype.names or () if name not in own], urls.redacted(other))
    return rows


def _uids(rows: NDArray[np.void], where: str) -> NDArray[np.unsignedinteger]:
    if "uid" not in (rows.dtype.names or ()) or rows.dtype["uid"].kind not in "iu" or rows.dtype["uid"].shape:
        raise InputError(f"{where}: field uid is missing, by which cryoSPARC's files are joined")
    found: NDArray[np.unsignedinteger] = rows["uid"].astype(np.uint64)
    return found


def join(rows: NDArray[np.void], more: NDArray[np.void], names: Sequence[str], where: str) -> NDArray[np.void]:
    """`rows` with the fields `names` of another table's rows of the same uid, in place of its own of that name.

    Raises:
        InputError: a particle is missing in the other table, or stands there twice.
    """
    wanted, there = _uids(rows, where), _uids(more, where)
    order = np.argsort(there, kind="stable")
    ordered = there[order]
    if (ordered[1:] == ordered[:-1]).any():
        raise InputError(f"{where}: a uid stands there twice; its rows cannot be joined")
    place = np.searchsorted(ordered, wanted)
    missing = ordered[np.minimum(place, len(ordered) - 1)] != wanted if len(ordered) else np.ones(len(wanted), bool)
    if missing.any():
        raise InputError(
            f"{where}: lacks {np.count_nonzero(missing):,} of {len(wanted):,} particles, the first with uid "
            f"{wanted[missing][0]}; give the files of one job"
        )
    picked = order[place]
    own = [name for name in rows.dtype.names or () if name not in names]
    return build(len(rows), {name: rows[name] for name in own} | {name: more[name][picked] for name in names})


def build(count: int, fields: Mapping[str, NDArray]) -> NDArray[np.void]:
    """A structured array from its fields."""
    out = np.zeros(count, [(name, values.dtype, values.shape[1:]) for name, values in fields.items()])
    for name, values in fields.items():
        out[name] = values
    return out


def _read_group(url: str) -> NDArray[np.void]:
    """The particles of a .csg file: each kind of result from the file that the group names for it."""
    where = urls.redacted(url)
    if urls.size(url) > _GROUP_LIMIT:
        raise InputError(f"{where}: not a cryoSPARC group file (it is larger than 256 KiB)")
    try:
        text = urls.read_text(url).removeprefix("\ufeff")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ValueError("a value that stands for another: such files grow without end")
        results = {kind: entry["metafile"] for kind, entry in yaml.safe_load(text)["results"].items()}
        if not all(isinstance(word, str) for pair in results.items() for word in pair):
            raise TypeError("a metafile that is no text")
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        text = " ".join(str(error).split())[:200]
        raise InputError(f"{where}: not a cryoSPARC group file ({text})") from error
    if not results:
        raise InputError(f"{where}: not a cryoSPARC group file (it lists no results)")
    names = {kind: metafile.removeprefix(">") for kind, metafile in results.items()}
    for name in names.values():
        if not name.isprintable():
            raise InputError(f"{where}: names {name!r}, which is no file's name")
        if name.startswith("/") or "://" in name or ".." in name.split("/"):
            raise InputError(f"{where}: names {urls.redacted(name)}, which is not in the group's own folder")
    # Files named passthrough hold more particles than the job's own, or the same.
    ordered = sorted(set(names.values()), key=lambda name: ("passthrough" in name, name))
    tables = {name: decode(urls.read_bytes(urls.join(urls.parent(url), name)), name) for name in ordered}
    rows = tables[ordered[0]]
    for name in ordered[1:]:
        kinds = tuple(f"{kind}/" for kind, file in names.items() if file == name)
        fields = [field for field in tables[name].dtype.names or () if field.startswith(kinds)]
        rows = join(rows, tables[name], fields, name)
    return rows


#: What a field is where nothing is known of it, if that is not 0.
_ONES = ("ctf/scale", "alignments3D/alpha", "alignments3D/class_posterior", "alignments3D/class_ess",
         "alignments2D/class_posterior")  # fmt: skip


def merge(
    first: NDArray[np.void], second: NDArray[np.void], known: Mapping[str, float]
) -> tuple[NDArray[np.void], tuple[str, ...]]:
    """The rows of two tables with all fields of both, the first one's before.

    Args:
        first, second: rows.
        known: values of fields that a table may lack.

    Returns:
        The rows, and the fields that one of the tables lacks and of which nothing is known, or whose kinds differ.
    """
    tables = (first, second)
    names = dict.fromkeys(name for table in tables for name in table.dtype.names or ())
    fields: dict[str, NDArray] = {}
    filled: list[str] = []
    for name in names:
        kinds = [table.dtype[name] if name in (table.dtype.names or ()) else None for table in tables]
        there = [kind for kind in kinds if kind is not None]
        if len(there) < 2 or not _fit(*there):
            filled += [] if name in known else [name]
        shape = there[0].shape
        base = np.result_type(*(kind.base for kind in there)) if len(there) == 1 or _fit(*there) else there[0].base
        column = np.zeros((len(first) + len(second), *shape), base)
        for table, kind, rows in zip(tables, kinds, (slice(0, len(first)), slice(len(first), None)), strict=True):
            if kind is not None and (kind is there[0] or _fit(*there)):
                column[rows] = table[name]
            elif base.kind not in "SU":
                column[rows] = known.get(name, float(name in _ONES))
        fields[name] = column
    return build(len(first) + len(second), fields), tuple(filled)


def _fit(one: np.dtype, other: np.dtype) -> bool:
    """Whether values of two kinds can stand in one column."""
    texts = one.base.kind in "SU", other.base.kind in "SU"
    return one.shape == other.shape and texts[0] == texts[1] and (not texts[0] or one.base.kind == other.base.kind)
