"""Symmetry-expanded particle tables."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from scalecryo.data.formats.relion.syntax import Rows, StarText, Text
from scalecryo.data.formats.relion.values import ANGLES, PARTICLE_ID, particle_block
from scalecryo.data.formats.relion.write import copy_edited, text_of_column
from scalecryo.data.formats.rotations import matrix_to_euler
from scalecryo.data.io import urls


def write_expanded(
    url: str,
    source_star: Text,
    keep: npt.NDArray[np.bool_],
    rotation: npt.NDArray[np.floating],
    group: npt.NDArray[np.floating],
) -> None:
    """Write some rows of a source's table, each in all of its symmetry-related poses g R, all else as it was.

    The copies of a row follow each other, and rlnParticleId numbers all of them.

    Args:
        url: where to.
        source_star: the source's STAR file.
        keep: (N,) whether each row stays.
        rotation: (N, 3, 3), image frame to volume frame.
        group: (g, 3, 3), rotations of the volume.
    """
    text, count = StarText(source_star, urls.redacted(url)), len(group)
    before: npt.NDArray[np.int64] = np.cumsum(keep) - keep

    def edit(rows: Rows) -> Iterator[Sequence[bytes] | None]:
        some = slice(rows.first, rows.first + len(rows))
        angles = matrix_to_euler((group @ rotation[some, None]).reshape(-1, 3, 3))
        number = (count * before[some, None] + np.arange(1, count + 1)).reshape(-1)
        columns = [text_of_column(column) for column in (*angles.T, number)]
        for kept, row in zip(keep[some].repeat(count).tolist(), zip(*columns, strict=True), strict=True):
            yield row if kept else None

    with urls.atomic_path(url) as temporary, open(temporary, "wb") as stream:
        copy_edited(stream, text, particle_block(text), [*ANGLES, PARTICLE_ID], edit, times=count)
