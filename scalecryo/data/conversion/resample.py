"""Stacks of several pixel sizes as stacks of one: Fourier-cropped towards the coarsest, then cut to one box.

Every stack is cropped in Fourier space to the even box nearest to what its pixel size asks for, which leaves a small
error of the pixel size; centres stay at index N//2.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scalecryo.data.formats.mrc import Array, Stack
from scalecryo.data.io import urls
from scalecryo.data.storage.store import SOURCE_STACKS, ParticleStore


@dataclass(frozen=True)
class Resampling:
    """How one stack's images become the common ones.

    Args:
        fourier_box: box after cropping in Fourier space, px.
        box_size: box after cutting in real space, px.
        error: relative error of the pixel size that the even box leaves.
    """

    fourier_box: int
    box_size: int
    error: float = 0.0


class ResampledStack(Stack):
    """A stack whose images are read in another pixel size and box."""

    def __init__(self, stack: Stack, resampling: Resampling) -> None:
        super().__init__(stack.url, stack._layout, stack.fingerprint, stack._unpacked)
        self.resampling = resampling

    @property
    def ny(self) -> int:
        """Rows of an image as it is read."""
        return self.resampling.box_size

    @property
    def nx(self) -> int:
        """Columns of an image as it is read."""
        return self.resampling.box_size

    @property
    def pixel_size(self) -> float:
        """Å; 0, since the header's is not that of the images as they are read."""
        return 0.0

    def read(self, indices: "slice | list[int] | npt.NDArray[np.integer]", out: Array | None = None) -> Array:
        """Resampled images as float32 (n, ny, nx); see `Stack.read`. A pixel's value keeps its scale."""
        source = Stack(self.url, self._layout, self.fingerprint, self._unpacked).read(indices)
        box, middle, size = source.shape[-1], self.resampling.fourier_box, self.resampling.box_size
        # torch takes seconds to import: only once images are read.
        import torch

        from scalecryo.physics.fft import fourier_crop_2d

        images = torch.from_numpy(source)
        if middle != box:
            # The crop keeps the noise; a projection's values stay what they are when scaled by the boxes' quotient.
            images = fourier_crop_2d(images, middle) * (middle / box)
        edge = middle // 2 - size // 2
        cut: Array = images[:, edge : edge + size, edge : edge + size].numpy()
        if out is None:
            return np.ascontiguousarray(cut)
        out[:] = cut
        return out


def plan_resampling(boxes: Sequence[int], pixel_sizes: Sequence[float]) -> tuple[Resampling, ...]:
    """How stacks of these boxes (px) and pixel sizes (Å) become one: the coarsest pixel, and the smallest box."""
    target = max(pixel_sizes)
    middle = [2 * max(1, round(box * size / target / 2)) for box, size in zip(boxes, pixel_sizes, strict=True)]
    smallest = min(middle)
    return tuple(
        Resampling(new, smallest, box * size / new / target - 1)
        for box, size, new in zip(boxes, pixel_sizes, middle, strict=True)
    )


def resampled(stack: Stack, resampling: Resampling | None) -> Stack:
    """The stack, read as `resampling` says; itself where nothing changes."""
    if resampling is None or (resampling.fourier_box == resampling.box_size == stack.nx):
        return stack
    return ResampledStack(stack, resampling)


def reopen(store: ParticleStore) -> list[Stack]:
    """The stacks that a store was made from, where they were then, read as they were then.

    Raises:
        MissingInputError: a stack is no longer there.
        InputError: a stack can no longer be read.
    """
    document = json.loads(urls.read_bytes(urls.join(store.url, SOURCE_STACKS)))
    plans: list[Resampling | None] = [Resampling(*boxes) for boxes in document.get("resampling", [])]
    plans += [None] * (len(document["urls"]) - len(plans))
    return [resampled(Stack.open(url), resampling) for url, resampling in zip(document["urls"], plans, strict=True)]
