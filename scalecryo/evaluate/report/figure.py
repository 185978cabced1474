"""Figures as PNG bytes. No pyplot, so no state is shared between figures."""

import io

import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import imsave
from numpy.typing import NDArray

_DPI = 110


def png_of(figure: Figure) -> bytes:
    """The figure as PNG bytes."""
    return _drawn(figure)


def png_of_pixels(image: NDArray[np.uint8]) -> bytes:
    """An image (rows, columns, 3), the first row on top, as PNG bytes."""
    return _written(image)


def _drawn(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def _written(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    imsave(buffer, image, format="png")
    return buffer.getvalue()
