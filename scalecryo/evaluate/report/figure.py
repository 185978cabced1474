"""Figures as PNG bytes. No pyplot, so no state is shared between figures."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import imsave
from numpy.typing import NDArray
from PIL import Image

_DPI = 110


def png_of(figure: Figure) -> bytes:
    """The figure as PNG bytes."""
    return _drawn(figure)


def png_of_pixels(image: NDArray[np.uint8]) -> bytes:
    """An image (rows, columns, 3), the first row on top, as PNG bytes."""
    return _written(image)


def film_of_pixels(frames: Sequence[NDArray[np.uint8]], seconds: float) -> bytes:
    """Images (rows, columns, 3) one after the other, again and again, as bytes of an animated PNG."""
    first, *others = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    duration = round(1000 * seconds / len(frames))
    first.save(buffer, format="PNG", save_all=True, append_images=others, duration=duration, loop=0, optimize=True)
    return buffer.getvalue()


def _drawn(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def _written(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    imsave(buffer, image, format="png")
    return buffer.getvalue()
