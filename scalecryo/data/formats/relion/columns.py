"""Adding columns to a particle table that is there."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from scalecryo.data.formats.relion.syntax import Rows, StarText, text_of
from scalecryo.data.formats.relion.values import ORIGINS, ORIGINS_PX, particle_block, pieces
from scalecryo.data.formats.relion.write import copy_edited, pose_columns, text_of_column
from scalecryo.data.io import urls


def add_columns(
    url: str, columns: Mapping[str, npt.NDArray], poses: tuple[npt.NDArray, npt.NDArray] | None = None
) -> None:
    """Give every row of a particle table more values; all else stays byte for byte. Columns of the name are replaced.

    Args:
        url: of the table, which is written anew whole.
        columns: values by RELION's name, in the order of the table's rows.
        poses: rotations (n, 3, 3), image frame to volume frame, and shifts (n, 2), Å, that take the place of the
            table's; None: it keeps its own.
    """
    text = StarText(text_of(url), urls.redacted(url))
    block, whole = particle_block(text), dict(columns)
    if poses is not None:
        whole |= pose_columns(*poses)
    # Where the table also has origins in pixels, the two must agree.
    in_pixels = [
        pair for pair in zip(ORIGINS_PX, ORIGINS, strict=True) if poses is not None and pair[0] in block.columns
    ]
    values_of = pieces(text)

    def edit(rows: Rows) -> Iterator[Sequence[bytes]]:
        some = slice(rows.first, rows.first + len(rows))
        held = [text_of_column(values[some]) for values in whole.values()]
        if in_pixels:
            sizes = next(values_of).pixel_sizes()
            sizes = np.where(sizes > 0, sizes, 1.0)
            held += [text_of_column(whole[angstrom][some] / sizes) for _, angstrom in in_pixels]
        yield from zip(*held, strict=True)

    with urls.atomic_path(url) as temporary, open(temporary, "wb") as stream:
        copy_edited(stream, text, block, [*whole, *(name for name, _ in in_pixels)], edit)
