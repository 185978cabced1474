"""The syntax of STAR files as RELION writes them: blocks, loops, and where in the text every value stands.

A value is a run of characters without white space, or stands between quotes; a `#` at the start of a value opens a
comment. Every row of a loop is one line and holds one value for each column: a row that does not is an error, never
shifted or filled up. Values stay text until a caller asks for numbers, and are found in pieces of some megabytes, so
that a table of any length costs little memory, and can be written again with every other byte as it was.
"""

import mmap
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from scalecryo.data.io import urls
from scalecryo.errors import InputError

Text = bytes | mmap.mmap

_PIECE = 8 << 20
MARK = b"\xef\xbb\xbf"  # that some editors of Windows put before UTF-8
_LONGEST_LINE = 1 << 20
_WINDOW, _OVERLAP = 256 << 20, 4096
_MAPPED = 1 << 27  # larger files are not copied to memory
_BLOCK = re.compile(rb"data_([^\s#]*)[ \t]*(?:#[^\n]*)?\r?(?=\n|\Z)")
_VALUE = re.compile(rb"\"([^\"\n]*)\"(?=\s|\Z)|'([^'\n]*)'(?=\s|\Z)|(#.*)|(\S+)")
_NUMBER_WIDTH = 32
_DIGITS = np.zeros(256, dtype=bool)
_DIGITS[[0, *b"0123456789+-.eE"]] = True


def text_of(url: str) -> Text:
    """A file's text; a large local file is mapped, not read.

    Raises:
        MissingInputError: there is no such file.
    """
    if urls.is_local(url) and urls.size(url) > _MAPPED:
        with urls.open_read(url) as stream:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    return urls.read_bytes(url)


@dataclass(frozen=True)
class Block:
    """One data block.

    Args:
        name: what follows `data_`.
        columns: names of its values, without the underscore.
        start: where its `data_` line begins.
        body, stop: where its rows begin, and where the next block, or nothing, follows.
        single: the one row of a block without a loop, as text.
    """

    name: str
    columns: tuple[str, ...]
    start: int
    body: int
    stop: int
    single: bytes | None = None


@dataclass(frozen=True)
class Rows:
    """Some consecutive rows of a loop.

    Args:
        first: number of the first of them, from 0.
        text: the piece of the file that holds them.
        starts, stops: (n, columns) where in `text` each value stands, without quotes.
        where: the file and its columns, for messages.
    """

    first: int
    text: bytes = field(repr=False)
    starts: npt.NDArray[np.int64] = field(repr=False)
    stops: npt.NDArray[np.int64] = field(repr=False)
    columns: tuple[str, ...]
    where: str

    def __len__(self) -> int:
        return len(self.starts)

    def strings(self, name: str) -> list[bytes]:
        """Values of a column as they stand."""
        column = self.columns.index(name)
        spans = zip(self.starts[:, column].tolist(), self.stops[:, column].tolist(), strict=True)
        return [self.text[start:stop] for start, stop in spans]

    def numbers(self, name: str, *, finite: bool = True) -> npt.NDArray[np.float64]:
        """Values of a column as numbers, `finite` ones unless nan and inf are asked for too.

        Raises:
            InputError: one is not.
        """
        if not len(self):
            return np.empty(0)
        column = self.columns.index(name)
        starts, lengths = self.starts[:, column], self.stops[:, column] - self.starts[:, column]
        width = int(lengths.max(initial=0))
        if width > _NUMBER_WIDTH or not lengths.all():
            return self._numbers_one_by_one(name, finite)
        place = np.arange(width)
        index = np.minimum(starts[:, None] + place, len(self.text) - 1)
        characters = np.where(place < lengths[:, None], np.frombuffer(self.text, np.uint8)[index], np.uint8(0))
        if not _DIGITS[characters].all():
            return self._numbers_one_by_one(name, finite)
        try:
            with np.errstate(over="ignore"):
                values = np.ascontiguousarray(characters).view(f"S{width}")[:, 0].astype(np.float64)
        except ValueError:
            return self._numbers_one_by_one(name, finite)
        return values if np.isfinite(values).all() else self._numbers_one_by_one(name, finite)

    def _numbers_one_by_one(self, name: str, finite: bool) -> npt.NDArray[np.float64]:
        out = np.empty(len(self))
        for row, text in enumerate(self.strings(name)):
            known = True
            try:
                out[row] = float(text) if b"_" not in text else np.nan
            except ValueError:
                known, out[row] = False, np.nan
            if not (known if not finite else np.isfinite(out[row])):
                shown = text[:40].decode(errors="replace")
                raise InputError(f"{self.where}: {name} of row {self.first + row + 1} is {shown!r}, not a number")
        return out

    def line_spans(self) -> Iterator[tuple[int, int]]:
        """Where the line of every row begins, and where the next line does."""
        for first, last in zip(self.starts[:, 0].tolist(), self.stops[:, -1].tolist(), strict=True):
            end = self.text.find(b"\n", last)
            yield self.text.rfind(b"\n", 0, first) + 1, len(self.text) if end < 0 else end + 1


class StarText:
    """A STAR file: its text and the blocks found in it.

    Raises:
        InputError: it has no block, or a block is not well-formed.
    """

    def __init__(self, text: Text, where: str) -> None:
        if text[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise InputError(f"{where}: UTF-16 text; save it as UTF-8")
        self.text = text
        self.where = where
        self._begin = len(MARK) if text[: len(MARK)] == MARK else 0
        found = [(start, match) for match in self._headers() if (start := self._line_start(match)) >= 0]
        if not found:
            raise InputError(f"{where}: not a STAR file (it has no data_ block)")
        stops = [start for start, _ in found[1:]] + [len(text)]
        self.blocks = tuple(self._block(start, match, stop) for (start, match), stop in zip(found, stops, strict=True))

    @classmethod
    def open(cls, url: str) -> "StarText":
        """The STAR file at a place.

        Raises:
            MissingInputError, InputError: there is no such file, or it is not a STAR file.
        """
        return cls(text_of(url), urls.redacted(url))

    def _headers(self) -> Iterator[re.Match[bytes]]:
        """Whatever reads `data_…` to the end of a line, looked for window by window."""
        for start in range(0, len(self.text), _WINDOW):
            for match in _BLOCK.finditer(self.text, start, start + _WINDOW + _OVERLAP):
                if match.start() < start + _WINDOW:
                    yield match
            self._forget()

    def _forget(self) -> None:
        """Let go of what a mapped file has left in memory."""
        if isinstance(self.text, mmap.mmap):
            self.text.madvise(mmap.MADV_DONTNEED)

    def _line_start(self, match: re.Match[bytes]) -> int:
        """Where the line of a match begins; −1 where the match is not the first thing on its line."""
        near = max(0, match.start() - 80)
        start = self.text.rfind(b"\n", near, match.start()) + 1
        start = max(start, self._begin) if near < self._begin else start
        return -1 if (start == 0 and near) or self.text[start : match.start()].strip() else start

    def _lines(self, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
        """Where every line begins, and what it holds but for white space and comments; none for an empty one."""
        while start < stop:
            end = self.text.find(b"\n", start, stop)
            end = stop if end < 0 else end + 1
            if end - start > _LONGEST_LINE:
                raise InputError(f"{self.where}: a line of {end - start} bytes; not a STAR file")
            line = self.text[start:end].strip()
            if line and not line.startswith(b"#"):
                yield start, line
            start = end

    def _block(self, start: int, match: re.Match[bytes], stop: int) -> Block:
        name = self._decoded(match.group(1))
        columns: list[str] = []
        values: list[bytes] = []
        loop, body = False, stop
        for place, line in self._lines(match.end(), stop):
            if not columns and not loop and line.split()[0] == b"loop_":
                loop = True
            elif line.startswith(b"_"):
                found = [value for value in _VALUE.finditer(line) if value.group(3) is None]
                columns.append(self._decoded(found[0].group()[1:]))
                if not loop:
                    if len(found) != 2:
                        raise InputError(f"{self.where}: {columns[-1]} has {len(found) - 1} values, not one")
                    values.append(found[1].group())
            elif loop and columns:
                body = place
                break
            else:
                shown = line[:40].decode(errors="replace")
                raise InputError(f"{self.where}: not a readable STAR file ({shown!r} stands outside any loop)")
        repeated = sorted({column for column in columns if columns.count(column) > 1})
        if repeated:
            raise InputError(f"{self.where}: column {repeated[0]} stands twice in data_{name}; remove one of them")
        return Block(name, tuple(columns), start, body, stop, None if loop else b" ".join(values))

    def _decoded(self, text: bytes) -> str:
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{self.where}: a name is not UTF-8 text ({text[:40]!r})") from error

    def rows(self, block: Block) -> Iterator[Rows]:
        """The rows of a block, some at a time; a piece of nothing but comments has none.

        Raises:
            InputError: a row has too few or too many values.
        """
        first = 0
        for piece in self._pieces(block):
            rows = self._rows(piece, block, first)
            first += len(rows)
            yield rows

    def _pieces(self, block: Block) -> Iterator[bytes]:
        """Whole lines of some megabytes."""
        if block.single is not None:
            yield block.single
            return
        start = block.body
        while start < block.stop:
            end = min(start + _PIECE, block.stop)
            if end < block.stop:
                last = self.text.rfind(b"\n", start, end)
                if last < 0:
                    raise InputError(f"{self.where}: a line of more than {end - start} bytes; not a STAR file")
                end = last + 1
            yield self.text[start:end]
            self._forget()
            start = end

    def _rows(self, piece: bytes, block: Block, first: int) -> Rows:
        count = len(block.columns)
        plain = not any(mark in piece for mark in (b"'", b'"', b"#"))
        found = _plain_values(piece, count) if plain else None
        starts, stops = found or self._values_by_line(piece, block, first)
        return Rows(first, piece, starts, stops, block.columns, self.where)

    def _values_by_line(
        self, piece: bytes, block: Block, first: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Places of all values, line by line, with quotes and comments understood."""
        spans: list[list[tuple[int, int]]] = []
        place = 0
        for line in piece.split(b"\n"):
            row = []
            for value in _VALUE.finditer(line):
                if value.lastindex == 3:
                    break
                row.append(tuple(place + offset for offset in value.span(value.lastindex or 0)))
            if row:
                if len(row) != len(block.columns):
                    raise InputError(
                        f"{self.where}: not a readable STAR file (row {first + len(spans) + 1} of data_{block.name} "
                        f"has {len(row)} values for {len(block.columns)} columns)"
                    )
                spans.append(row)  # type: ignore[arg-type]
            place += len(line) + 1
        both = np.array(spans, dtype=np.int64).reshape(len(spans), len(block.columns), 2)
        return both[..., 0], both[..., 1]


def _plain_values(piece: bytes, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None:
    """Places of all values where nothing is quoted; None where some row does not hold `count` of them."""
    data = np.frombuffer(piece, np.uint8)
    # Blank, tab and line ends, as bytes.split has it.
    space = (data == 32) | ((data >= 9) & (data <= 13))
    edges = np.flatnonzero(np.diff(space.view(np.int8), prepend=np.int8(1), append=np.int8(1)))
    if not count or (len(edges) // 2) % count:
        return None
    starts, stops = edges[0::2].reshape(-1, count), edges[1::2].reshape(-1, count)
    breaks = np.flatnonzero(data == 10)
    line, last = np.searchsorted(breaks, starts[:, 0]), np.searchsorted(breaks, starts[:, -1])
    whole = bool((line == last).all() and (np.diff(line) > 0).all())
    return (starts, stops) if whole else None


def small_table(text: StarText, block: Block) -> Mapping[str, list[bytes]]:
    """All values of a block of few rows, by column.

    Raises:
        InputError: a row has too few or too many values.
    """
    columns: dict[str, list[bytes]] = {name: [] for name in block.columns}
    for rows in text.rows(block):
        for name in block.columns:
            columns[name] += rows.strings(name)
    return columns
