"""Writing RELION 3.1 particle tables: our own, or a source's with other values or fewer rows.

A source's table is copied byte for byte but for the values that change: every other column, row, block and comment
comes out as it was.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from scalecryo.data.formats.relion.aberrations import as_numbers, optics_columns
from scalecryo.data.formats.relion.syntax import MARK, Block, Rows, StarText, Text
from scalecryo.data.formats.relion.values import (
    ANGLES,
    CLASS,
    CLASS_PROBABILITY,
    DEFOCUS,
    GROUP,
    HALF,
    IMAGE_NAME,
    MAX_CONFIDENCE,
    OPTICS,
    ORIGINS,
    ORIGINS_PX,
    Floats,
    particle_block,
    pieces,
    with_format,
)
from scalecryo.data.formats.rotations import matrix_to_euler
from scalecryo.data.io import urls
from scalecryo.data.particles import ParticleTable
from scalecryo.errors import InputError

# RELION tells old files from new ones by this line.
VERSION = b"# version 30001\n\n"
_PIECE = 50_000
_QUOTED = re.compile(rb"\s|^[\"'#_]|^$|^(?i:data_|loop_)")
_NONE: Mapping[str, npt.NDArray] = MappingProxyType({})

#: For some rows of a source's table, what becomes of each: None to leave it out, or new values by column.
Edit = Callable[[Rows], Iterator[Sequence[bytes] | None]]


def pose_columns(rotation: npt.NDArray[np.floating], shift: npt.NDArray[np.floating]) -> dict[str, Floats]:
    """RELION's angles in degrees and origins in Å."""
    angles = matrix_to_euler(rotation)
    columns = {name: angles[:, axis] for axis, name in enumerate(ANGLES)}
    # Minus zero would be written as -0.000000.
    return columns | {name: 0.0 - np.asarray(shift, dtype=np.float64)[:, axis] for axis, name in enumerate(ORIGINS)}


def quoted(value: bytes) -> bytes:
    """A value as it stands in a row: between quotes where it would be taken for something else."""
    if not _QUOTED.search(value):
        return value
    return b"'" + value + b"'" if b'"' in value else b'"' + value + b'"'


def text_of_column(values: npt.NDArray) -> list[bytes]:
    """A column as RELION writes it."""
    if values.dtype.kind == "S":
        return [quoted(value) for value in values.tolist()]
    form = b"%12d" if values.dtype.kind in "iu" else b"%12.6f"
    return [form % value for value in values.tolist()]


def header(name: bytes, columns: Sequence[str]) -> bytes:
    """The first lines of a data block with a loop."""
    lines = [f"_{column} #{number + 1}" for number, column in enumerate(columns)]
    return b"data_" + name + b"\n\nloop_\n" + "\n".join(lines).encode() + b"\n"


def _optics_text(optics: Mapping[str, Sequence[bytes]]) -> bytes:
    """A data_optics block with its version line."""
    rows = b"".join(b" ".join(row) + b"\n" for row in zip(*optics.values(), strict=True))
    return VERSION + header(b"optics", list(optics)) + rows + b"\n"


def _optics_of(
    keys: Sequence[tuple[bytes, ...]], names: Sequence[str], boxes: Sequence[int]
) -> dict[str, Sequence[bytes]]:
    """The columns of an optics table with one group for each key: values of `names`, the pixel size last.

    `boxes` are those of the groups' images, px; 0 where they are not known.
    """
    numbers = [b"%d" % (number + 1) for number in range(len(keys))]
    optics: dict[str, Sequence[bytes]] = {
        GROUP: numbers,
        "rlnOpticsGroupName": [b"opticsGroup" + number for number in numbers],
    }
    optics |= {name: [key[column] for key in keys] for column, name in enumerate(names)}
    if all(float(key[-1]) for key in keys):
        optics["rlnImagePixelSize"] = [key[-1] for key in keys]
    if all(boxes):
        optics |= {"rlnImageSize": [b"%d" % box for box in boxes], "rlnImageDimensionality": [b"2"] * len(keys)}
    return optics


def write_particles(
    url: str,
    names: Sequence[str],
    table: ParticleTable,
    with_poses: bool,
    box_size: int | None = None,
    confidence: npt.NDArray[np.floating] | None = None,
    pose: tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]] | None = None,
    more: Mapping[str, npt.NDArray] = _NONE,
    more_optics: Mapping[str, npt.NDArray] = _NONE,
) -> None:
    """Write a RELION 3.1 particle table; the file appears whole or not at all.

    Args:
        url: where to.
        names: `i@stack` of every row, numbers from 1.
        table: the particles; CTF columns are written when it has them.
        with_poses: also write rotations and shifts, which the table must have.
        box_size: of the images, px, for the optics table.
        confidence: (N,) 0 to 1, written as rlnMaxValueProbDistribution.
        pose: rotation and shift (Å) in double precision, in place of the table's own.
        more, more_optics: further columns by row, of the particles and of their optics; texts are bytes.
    """
    columns = table.columns
    if with_poses and pose is None:
        pose = columns["rotation"], columns["shift"]
    lines = own_table(table, pose, columns["half"], confidence, box_size, more, more_optics, names)
    _write_lines(url, lines)


def _write_lines(url: str, lines: Iterator[bytes]) -> None:
    with urls.atomic_path(url) as temporary, open(temporary, "wb") as stream:
        stream.writelines(lines)


def own_table(
    table: ParticleTable,
    pose: tuple[npt.NDArray, npt.NDArray] | None,
    half: npt.NDArray,
    confidence: npt.NDArray | None,
    box_size: int | None,
    more: Mapping[str, npt.NDArray] = _NONE,
    more_optics: Mapping[str, npt.NDArray] = _NONE,
    names: Sequence[str] = (),
) -> Iterator[bytes]:
    """The lines of a table's own STAR file; see `write_particles`."""
    columns, names = table.columns, names or table.image_names()
    shared = [columns[ours] for ours in OPTICS] if table.has_ctf else []
    boxes = np.array(table.stack_boxes)[columns["stack"]] if table.stack_boxes else np.full(len(table), box_size or 0)
    shared = [columns["optics_group"], *shared, *more_optics.values(), table.pixel_sizes(), boxes]
    # Beam tilts are small numbers.
    forms = [b"%.6f"] * len(OPTICS) * table.has_ctf + [b"%.9g"] * len(more_optics) + [b"%.6f"]
    # Rows of one group number that differ in voltage and the like make several groups.
    apart = [*(values.astype(np.float64) for values in shared), *as_numbers(columns)]
    keys, group = np.unique(np.stack(apart, 1), axis=0, return_inverse=True)
    keys, aberrations = np.split(keys, [len(shared)], axis=1)
    optics = _optics_of(
        [tuple(form % value for form, value in zip(forms, key[1:-1], strict=True)) for key in keys.tolist()]
        or [(b"0",)],
        [*(OPTICS.values() if table.has_ctf else ()), *more_optics] if len(keys) else [],
        [int(key[-1]) for key in keys.tolist()] or [box_size or 0],
    )
    if table.has_aberrations and not more_optics:  # a beam tilt from cryoSPARC's tables is all that theirs hold
        optics |= optics_columns(aberrations)
    frame: dict[str, npt.NDArray] = {GROUP: group.reshape(-1) + 1}
    if table.has_ctf:
        frame |= {theirs: columns[ours] for ours, theirs in DEFOCUS.items()} | {"rlnPhaseShift": columns["phase_shift"]}
    frame |= {HALF: half} if half.any() else {}
    frame |= pose_columns(*pose) if pose is not None else {}
    frame |= {} if confidence is None else {MAX_CONFIDENCE: np.asarray(confidence, dtype=np.float64)}
    frame = {**more, **frame}
    yield _optics_text(optics) + b"\n" + VERSION + header(b"particles", [IMAGE_NAME, *frame])
    for start in range(0, len(names), _PIECE):
        some = [quoted(with_format(name).encode()) for name in names[start : start + _PIECE]]
        texts = [text_of_column(values[start : start + _PIECE]) for values in frame.values()]
        yield from (b" ".join(row) + b"\n" for row in zip(some, *texts, strict=True))


def write_with_poses(
    url: str,
    source_star: Text | None,
    table: ParticleTable,
    rotation: npt.NDArray[np.floating],
    shift: npt.NDArray[np.floating],
    confidence: npt.NDArray[np.floating],
    half: npt.NDArray[np.integer],
    box_size: int | None = None,
    more: Mapping[str, npt.NDArray] = _NONE,
    more_optics: Mapping[str, npt.NDArray] = _NONE,
    classes: tuple[npt.NDArray[np.integer], npt.NDArray[np.floating]] | None = None,
) -> None:
    """Write the source's own table with new poses: all its columns, every other value as it was.

    A RELION 3.0 table gains the optics table of 3.1; its own columns stay. Rows are matched by `source_row`; a row of
    the source that the table lacks (an image left out of the store) has no pose, and is left out.

    Args:
        url: where to.
        source_star: the source's STAR file (`ParticleStore.source_star`); None writes `table` itself.
        table: the particles that the poses belong to.
        rotation: (N, 3, 3), image frame to volume frame.
        shift: (N, 2) Å, where the content sits, (x, y).
        confidence: (N,) 0 to 1, written as rlnMaxValueProbDistribution.
        half: (N,) 1 or 2.
        box_size: of the images, px, for an optics table that is made.
        more, more_optics: further columns where `table` itself is written (`write_particles`).
        classes: (N,) from 1, and the probability of each, written as rlnClassNumber and scalecryoClassProbability; None
            leaves the source's.

    Raises:
        InputError: the table has rows that the source does not have, or one twice.
    """
    half, found = np.asarray(half), {}
    if classes is not None:
        found = {CLASS: classes[0].astype(np.int64), CLASS_PROBABILITY: classes[1].astype(np.float64)}
    if source_star is None:
        more = {**more, **found}
        _write_lines(url, own_table(table, (rotation, shift), half, confidence, box_size, more, more_optics))
        return
    text = StarText(source_star, urls.redacted(url))
    source_row = table.columns["source_row"]
    place = np.full(int(source_row.max(initial=-1)) + 1, -1, dtype=np.int64)
    place[source_row] = np.arange(len(table))
    count = sum(len(rows) for rows in text.rows(particle_block(text)))
    if len(place) > count or np.count_nonzero(place >= 0) < len(table):
        raise InputError(f"{text.where}: the source table has {count} rows, the poses are for {len(table)} others")
    new: dict[str, npt.NDArray] = dict(pose_columns(rotation, shift))
    new |= {HALF: half.astype(np.int64), MAX_CONFIDENCE: np.asarray(confidence, dtype=np.float64)}
    new |= found
    _write_edited(url, text, place, new, table.pixel_size, box_size)


def _write_edited(
    url: str,
    text: StarText,
    place: npt.NDArray[np.int64],
    new: Mapping[str, npt.NDArray],
    pixel_size: float,
    box_size: int | None,
) -> None:
    """Write a source's table with the values `new[column][place[row]]`, rows without a place left out."""
    block = particle_block(text)
    has_optics = any(other.name == "optics" for other in text.blocks)
    made, groups = ({}, None) if has_optics else make_optics(text, pixel_size, box_size)
    names = list(new)
    in_pixels = [(name, angstrom) for name, angstrom in zip(ORIGINS_PX, ORIGINS, strict=True) if name in block.columns]
    names += [name for name, _ in in_pixels]
    if not has_optics or GROUP not in block.columns:
        names.append(GROUP)
    values_of = pieces(text)

    def edit(rows: Rows) -> Iterator[Sequence[bytes] | None]:
        values = next(values_of)
        known = place[rows.first : rows.first + len(rows)]
        known = np.append(known, np.full(len(rows) - len(known), -1))
        picked = {name: array[known] for name, array in new.items()}
        columns = [text_of_column(array) for array in picked.values()]
        if in_pixels:
            sizes = values.pixel_sizes()
            sizes = np.where(sizes > 0, sizes, pixel_size or 1.0)
            # Where the file also has origins in pixels, the two must agree.
            columns += [text_of_column(picked[angstrom] / sizes) for _, angstrom in in_pixels]
        if len(names) > len(columns):
            columns.append(
                text_of_column(values.groups() if groups is None else groups[rows.first : rows.first + len(rows)])
            )
        for number, row in enumerate(zip(*columns, strict=True)):
            yield row if known[number] >= 0 else None

    with urls.atomic_path(url) as temporary, open(temporary, "wb") as stream:
        if made:
            stream.write(_optics_text(made) + b"\n")
        copy_edited(stream, text, block, names, edit, new_name=b"" if has_optics else b"particles")


def make_optics(
    text: StarText, pixel_size: float, box_size: int | None
) -> tuple[Mapping[str, Sequence[bytes]], npt.NDArray[np.int64]]:
    """The optics table of rows that each carry their own optics, and every row's group number from 1."""
    keys: dict[tuple[bytes, ...], int] = {}
    number: list[npt.NDArray[np.int64]] = []
    names: list[str] = []
    for values in pieces(text):
        names = [name for name in OPTICS.values() if name in values]
        sizes = values.pixel_sizes()
        columns = [values.rows.strings(name) for name in names if name in values.rows.columns]
        # Six digits: two rows whose magnifications differ in the last one have one pixel size.
        columns += [[b"%.6f" % size for size in np.where(sizes > 0, sizes, pixel_size).tolist()]]
        own = values.groups().tolist()
        found = zip(own, *columns, strict=True)
        number.append(np.array([keys.setdefault(key, len(keys)) for key in found], dtype=np.int64))
    ordered = sorted(keys, key=lambda key: [float(part) for part in key])
    rank = np.empty(max(len(keys), 1), dtype=np.int64)
    rank[[keys[key] for key in ordered]] = np.arange(1, len(keys) + 1)
    groups = rank[np.concatenate(number)] if number else np.zeros(0, np.int64)
    one_size = len({key[-1] for key in ordered}) < 2
    boxes = [(box_size or 0) if one_size else 0] * max(len(ordered), 1)
    return _optics_of([key[1:] for key in ordered] or [(b"0",)], names if keys else [], boxes), groups


def write_rows(url: str, source_star: Text, keep: npt.NDArray[np.bool_]) -> None:
    """Write a source's table with some of its rows, all else byte for byte as it was.

    Args:
        url: where to.
        source_star: the source's STAR file.
        keep: (N,) whether each row stays.
    """
    text = StarText(source_star, urls.redacted(url))

    def edit(rows: Rows) -> Iterator[Sequence[bytes] | None]:
        for kept in keep[rows.first : rows.first + len(rows)].tolist():
            yield () if kept else None

    with urls.atomic_path(url) as temporary, open(temporary, "wb") as stream:
        copy_edited(stream, text, particle_block(text), [], edit)


def copy_edited(
    stream: BinaryIO,
    text: StarText,
    block: Block,
    names: Sequence[str],
    edit: Edit,
    new_name: bytes = b"",
    times: int = 1,
) -> None:
    """Copy a STAR file, its particle rows edited.

    Args:
        stream: where to.
        text: the file.
        block: its particles.
        names: columns of the values that `edit` gives; those the block lacks are added at its end.
        edit: for some rows, what becomes of each.
        new_name: another name for the block, before which a version line is put.
        times: how many lines `edit` gives in place of each row's one.
    """
    stream.write(text.text[: block.start].removeprefix(MARK))
    added = [name for name in names if name not in block.columns]
    stream.write(edited_header(text, block, added, new_name))
    inside = sorted((block.columns.index(name), names.index(name)) for name in names if name in block.columns)
    outside = [names.index(name) for name in added]
    for rows in text.rows(block):
        done, edited = 0, edit(rows)
        for row, (start, stop) in enumerate(rows.line_spans()):
            stream.write(rows.text[done:start])
            done = stop
            for values in islice(edited, times):
                if values is not None:
                    stream.write(edited_line(rows, row, (start, stop), values, inside, outside))
        stream.write(rows.text[done:])
    stream.write(text.text[block.stop :])


def edited_header(text: StarText, block: Block, added: Sequence[str], new_name: bytes) -> bytes:
    """The particle block up to its rows, with columns added."""
    if block.single is not None:
        return header(new_name or block.name.encode(), [*block.columns, *added])
    head = text.text[block.start : block.body]
    if new_name:
        head = (
            VERSION
            + b"data_"
            + new_name
            + head[head.index(b"data_" + block.name.encode()) + 5 + len(block.name.encode()) :]
        )
    first = len(block.columns) + 1
    lines = "".join(f"_{name} #{first + number}\n" for number, name in enumerate(added)).encode()
    return head.rstrip() + b"\n" + lines if lines else head


def edited_line(
    rows: Rows,
    row: int,
    span: tuple[int, int],
    values: Sequence[bytes],
    inside: Sequence[tuple[int, int]],
    outside: Sequence[int],
) -> bytes:
    """One row's line with values replaced and others added behind the last one."""
    parts, done = [], span[0]
    for column, number in inside:
        start, stop = int(rows.starts[row, column]), int(rows.stops[row, column])
        parts += [rows.text[done:start], values[number].strip()]
        done = stop
    last = int(rows.stops[row, -1])
    last += rows.text[last : last + 1] in (b"'", b'"')
    parts.append(rows.text[done:last])
    parts += [b" " + values[number] for number in outside]
    parts.append(rows.text[last : span[1]])
    line = b"".join(parts)
    return line if line.endswith(b"\n") else line + b"\n"
