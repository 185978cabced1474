"""Adding columns to a particle table that is there."""

from collections.abc import Iterator, Mapping, Sequence

import numpy.typing as npt

from scalecryo.data.formats.relion.syntax import Rows, StarText, text_of
from scalecryo.data.formats.relion.values import particle_block
from scalecryo.data.formats.relion.write import copy_edited, text_of_column
from scalecryo.data.io import urls


def add_columns(url: str, columns: Mapping[str, npt.NDArray]) -> None:
    """Give every row of a particle table more values; all else stays byte for byte. Columns of the name are replaced.

    Args:
        url: of the table, which is written anew whole.
        columns: values by RELION's name, in the order of the table's rows.
    """
    text = StarText(text_of(url), urls.redacted(url))

    def edit(rows: Rows) -> Iterator[Sequence[bytes]]:
        some = slice(rows.first, rows.first + len(rows))
        yield from zip(*(text_of_column(values[some]) for values in columns.values()), strict=True)

    with urls.atomic_path(url) as temporary, open(temporary, "wb") as stream:
        copy_edited(stream, text, particle_block(text), list(columns), edit)
