"""Kernels of normalisation: one pass over an image's pixels for its background, one to rescale it."""

import numpy as np
import numpy.typing as npt

from scalecryo.physics.kernels.jit import kernel

Array = npt.NDArray[np.float32]


@kernel
def measure_background(images: Array, weight: Array, mean: Array, rest: Array, sigma: Array) -> None:
    """Weighted mean and standard deviation of every image, in two passes.

    Args:
        images: (n, p), float32.
        weight: (p,), of sum 1: 0 where the particle may be.
        mean, rest: (n,), out; their sum is the mean. `mean` alone is what single precision gives of a large one.
        sigma: (n,), out.
    """
    for image in range(images.shape[0]):
        total = np.float32(0.0)
        for pixel in range(images.shape[1]):
            total += weight[pixel] * images[image, pixel]
        first, second = np.float32(0.0), np.float32(0.0)
        for pixel in range(images.shape[1]):
            deviation = images[image, pixel] - total
            first += weight[pixel] * deviation
            second += weight[pixel] * deviation * deviation
        mean[image], rest[image] = total, first
        sigma[image] = np.sqrt(np.maximum(second - first * first, np.float32(0.0)))


@kernel
def rescale(images: Array, mean: Array, rest: Array, factor: Array) -> None:
    """Replace every image (n, p) by factor · (image − mean − rest)."""
    for image in range(images.shape[0]):
        for pixel in range(images.shape[1]):
            images[image, pixel] = (images[image, pixel] - mean[image] - rest[image]) * factor[image]
