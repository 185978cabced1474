"""Points that TensorBoard's embedding projector shows: tables of coordinates and of labels beside the event files."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int, Shaped
from numpy.typing import NDArray

from scalecryo.data.io import urls
from scalecryo.runs.folder import RunFolder

MOST_POINTS = 5000  # that a browser turns without stopping


def shown_rows(count: int) -> Int[NDArray, " n"]:
    """The rows of a table that are shown, evenly chosen."""
    return np.linspace(0, count - 1, min(count, MOST_POINTS)).round().astype(int)


def write_points(
    run: RunFolder, name: str, points: Float[NDArray, "n d"], labels: Mapping[str, Shaped[NDArray, " n"]]
) -> None:
    """Write the shown rows of a table for the projector; a table of the same name is replaced.

    Args:
        run: its folder.
        name: that the projector offers it by.
        points: coordinates.
        labels: that points are coloured by and told by, each with its heading; at least two.
    """
    some = shown_rows(len(points))
    folder = f"projector/{name}"
    urls.make_folder(run.path("tb", folder))
    run.write(f"tb/{folder}/points.tsv", _lines(_told(points[some])))
    columns = [[heading, *_told(values[some])] for heading, values in labels.items()]
    run.write(f"tb/{folder}/labels.tsv", _lines(["\t".join(row) for row in zip(*columns, strict=True)]))
    # What is there, each under its folder's name: tables of the run's other stages stay.
    run.write("tb/projector_config.pbtxt", "".join(map(_entry, urls.list_folder(run.path("tb/projector")))).encode())


def _entry(name: str) -> str:
    paths = f'tensor_path: "projector/{name}/points.tsv"\n  metadata_path: "projector/{name}/labels.tsv"'
    return f'embeddings {{\n  tensor_name: "{name}"\n  {paths}\n}}\n'


def _told(values: Shaped[NDArray, "n ..."]) -> list[str]:
    rows = values if values.ndim > 1 else values[:, None]
    return ["\t".join(f"{value:.5g}" if np.issubdtype(rows.dtype, np.floating) else str(value) for value in row)
            for row in rows.tolist()]  # fmt: skip


def _lines(rows: list[str]) -> bytes:
    return "".join(f"{row}\n" for row in rows).encode()
