"""Two particle tables as one, by what they mean: all columns of both, and optics groups that are equal taken as one.

Numbers are compared, not their texts (300.0 is 300.000000). Where a table lacks a column of the other, its optics
group's value stands there if that has one, else what does nothing: 0, 1 on the diagonal of a magnification matrix,
`None` for a text.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from scalecryo.data.formats.relion.syntax import MARK, Block, Rows, StarText, small_table
from scalecryo.data.formats.relion.values import GROUP, Optics, particle_block, pieces
from scalecryo.data.formats.relion.write import VERSION, edited_header, edited_line, header, make_optics, quoted

_NAME = "rlnOpticsGroupName"
_PLAIN = {"rlnMagMat00": b"1.000000", "rlnMagMat11": b"1.000000", "rlnImageDimensionality": b"2"}
_LIST = re.compile(rb"\[[^\[\]]*\]")


class Merged(NamedTuple):
    """One table out of two.

    Args:
        text: of the STAR file.
        groups: what became of the second table's optics groups, by number; empty where neither has an optics table.
        filled: columns that one of the tables lacks, where nothing is known.
    """

    text: bytes
    groups: Mapping[int, int]
    filled: tuple[str, ...]


@dataclass(frozen=True)
class _Table:
    """A table with its optics, made where it has none of its own.

    Args:
        rows: optics group of every row, where the optics were made.
    """

    text: StarText
    block: Block
    optics: Mapping[str, Sequence[bytes]] | None
    rows: npt.NDArray[np.int64] | None = None

    @classmethod
    def of(cls, text: StarText, pixel_size: float, box_size: int, with_optics: bool) -> "_Table":
        block = particle_block(text)
        own = next((other for other in text.blocks if other.name == "optics"), None)
        if own is not None:
            Optics.read(text)  # which checks it
            return cls(text, block, small_table(text, own))
        if not with_optics:
            return cls(text, block, None)
        made, rows = make_optics(text, pixel_size, box_size)
        return cls(text, block, made, rows)

    def numbers(self) -> list[int]:
        """Numbers of its optics groups."""
        return [] if self.optics is None else [int(float(value)) for value in self.optics[GROUP]]


def merge(first: StarText, second: StarText, pixel_size: float, box_size: int) -> Merged:
    """One table of the rows of two, the first one's before.

    Args:
        first, second: the tables; comments and other blocks of the second are left out.
        pixel_size, box_size: of both tables' images, Å and px, for optics that lack them.

    Raises:
        InputError: a table cannot be read.
    """
    texts = (first, second)
    with_optics = any(block.name == "optics" for text in texts for block in text.blocks)
    a, b = (_Table.of(text, pixel_size, box_size, with_optics) for text in texts)
    known = {"rlnImagePixelSize": b"%.6f" % pixel_size, "rlnImageSize": b"%d" % box_size}
    optics, groups = _merged_optics(a, b, known) if with_optics else (None, {})
    columns = list(dict.fromkeys((*a.block.columns, *b.block.columns, *([GROUP] if with_optics else []))))
    filler = {name: _nothing(name, _example(a if name in a.block.columns else b, name)) for name in columns}
    lacking = [name for table in (a, b) for name in columns if name not in table.block.columns and name != GROUP]
    filled = [name for name in lacking if not all(name in (table.optics or table.block.columns) for table in (a, b))]
    unchanged = optics is not None and a.optics is not None and dict(optics) == dict(a.optics)
    same = a.block.columns == b.block.columns == tuple(columns) and a.rows is None and b.rows is None
    out = io.BytesIO()
    if optics is not None and a.rows is not None:
        out.write(VERSION + _optics_block(optics) + b"\n")
    out.write(first.text[: first.blocks[0].start].removeprefix(MARK))
    for number, block in enumerate(first.blocks):
        if block.name == "optics" and optics is not None and not unchanged:
            out.write(_optics_block(optics) + VERSION)
        elif block is a.block:
            name = b"particles" if a.rows is not None else b""
            out.write(edited_header(first, block, [column for column in columns if column not in block.columns], name))
            out.writelines(_lines(a, columns, filler, {}, copy=same))
            out.writelines(_lines(b, columns, filler, groups, copy=same and all(k == v for k, v in groups.items())))
            out.write(b"\n" + (VERSION if number + 1 < len(first.blocks) else b""))
        else:
            out.write(first.text[block.start : block.stop])
    return Merged(out.getvalue(), groups, tuple(dict.fromkeys(filled)))


def _optics_block(optics: Mapping[str, Sequence[bytes]]) -> bytes:
    rows = zip(*([quoted(value) for value in values] for values in optics.values()), strict=True)
    return header(b"optics", list(optics)) + b"".join(b" ".join(row) + b"\n" for row in rows) + b"\n\n"


def _merged_optics(a: _Table, b: _Table, known: Mapping[str, bytes]) -> tuple[dict[str, list[bytes]], dict[int, int]]:
    """All optics groups of both tables, and the new numbers of the second one's."""
    assert a.optics is not None
    assert b.optics is not None
    names = list(dict.fromkeys((*a.optics, *b.optics)))
    merged: dict[str, list[bytes]] = {name: [] for name in names}
    meaning: dict[tuple[object, ...], int] = {}
    groups: dict[int, int] = {}
    taken = {*a.numbers()}
    for table in (a, b):
        assert table.optics is not None
        for line, number in enumerate(table.numbers()):
            values = {
                name: table.optics[name][line]
                if name in table.optics
                else known.get(name) or _nothing(name, merged[name] or (a.optics | b.optics)[name])  # type: ignore[operator]
                for name in names
                if name != GROUP
            }
            if _NAME in names and _NAME not in table.optics:
                values[_NAME] = b"opticsGroup%d" % number
            key = tuple(_meaning(value) for value in values.values())
            if table is b and key in meaning:
                groups[number] = meaning[key]
                continue
            new = number if table is a or number not in taken else max(taken) + 1
            taken.add(new)
            if table is b:
                groups[number] = new
                if values.get(_NAME) in merged.get(_NAME, []):
                    values[_NAME] = _free_name(values[_NAME], new, merged[_NAME])
            meaning.setdefault(key, new)
            merged[GROUP].append(b"%d" % new)
            for name, value in values.items():
                merged[name].append(value)
    return merged, groups


def _free_name(name: bytes, number: int, taken: Sequence[bytes]) -> bytes:
    """A name for an optics group whose own another one has: RELION knows groups by their names."""
    stem = name.rstrip(b"0123456789")
    candidate = (stem or name) + b"%d" % number
    while candidate in taken:
        candidate += b"b"
    return candidate


def _meaning(value: bytes) -> object:
    """What a value says, so that equal numbers are equal whatever their text; a list's too."""
    if _LIST.fullmatch(value):
        return tuple(_meaning(part.strip()) for part in value[1:-1].split(b","))
    try:
        return b"%.6g" % float(value)
    except ValueError:
        return value


def _example(table: _Table, name: str) -> list[bytes]:
    """Some values of a table's column."""
    if name not in table.block.columns:
        return []
    return next((rows.strings(name)[:100] for rows in table.text.rows(table.block) if len(rows)), [])


def _nothing(name: str, like: Sequence[bytes]) -> bytes:
    """A value that does nothing, for a column with such values elsewhere."""
    if name in _PLAIN:
        return _PLAIN[name]
    if like and _LIST.fullmatch(like[0]):
        return b"[" + b",".join([b"0"] * (like[0].count(b",") + 1)) + b"]"
    for value in like:
        try:
            float(value)
        except ValueError:
            return b"None"
    return b"0"


def _lines(
    table: _Table, columns: Sequence[str], filler: Mapping[str, bytes], groups: Mapping[int, int], *, copy: bool
) -> Iterator[bytes]:
    """The lines of a table's rows with all columns; as they are where nothing about them changes."""
    block, optics = table.block, table.optics or {}
    place = {number: line for line, number in enumerate(table.numbers())}
    added = [name for name in columns if name not in block.columns]
    values_of = pieces(table.text)
    for rows in table.text.rows(block):
        own = next(values_of).groups() if table.rows is None else table.rows[rows.first : rows.first + len(rows)]
        if copy:
            yield from (_ended(rows.text[start:stop]) for start, stop in rows.line_spans())
            continue
        numbers = [groups.get(number, number) for number in own.tolist()]
        more: dict[str, list[bytes]] = {}
        for name in added:
            if name in optics:
                more[name] = [quoted(optics[name][place[number]]) for number in own.tolist()]
            else:
                more[name] = [filler[name]] * len(rows)
        if GROUP in columns:
            more[GROUP] = [b"%d" % number for number in numbers]
        yield from _rewritten(rows, block, columns, more)


def _rewritten(
    rows: Rows, block: Block, columns: Sequence[str], more: Mapping[str, Sequence[bytes]]
) -> Iterator[bytes]:
    """Lines of some rows, in the order of `columns`."""
    if block.columns == tuple(columns[: len(block.columns)]):
        names = list(more)
        inside = sorted((block.columns.index(name), names.index(name)) for name in names if name in block.columns)
        outside = [names.index(name) for name in columns if name not in block.columns]
        values = zip(*more.values(), strict=True) if names else iter([()] * len(rows))
        for row, (span, new) in enumerate(zip(rows.line_spans(), values, strict=True)):
            yield edited_line(rows, row, span, list(new), inside, outside)
        return
    texts = [more[name] if name in more else [quoted(value) for value in rows.strings(name)] for name in columns]
    for row_texts in zip(*texts, strict=True):
        yield b" ".join(row_texts) + b"\n"


def _ended(line: bytes) -> bytes:
    return line if line.endswith(b"\n") else line + b"\n"
