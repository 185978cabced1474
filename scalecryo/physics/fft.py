"""Centred Fourier transforms, Fourier resizing, and packed half discs of Fourier pixels.

Real-space arrays ([z, y, x] or [y, x], even boxes) are centred at index N//2. Transforms are half-complex in torch.fft
order: origin at index 0, kx last and never negative, forward unscaled. This is the only file that moves the origin.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Complex, Float, Int, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from scalecryo.errors import InputError

# Padded boxes above this are transformed axis by axis, cropped in between: half of the memory and of the time. Smaller
# ones, which fit in caches, are transformed at once.
LARGE_BOX = 256
SLAB = 1 << 21  # values that are worked on together in a large one
_PLANE = (-2, -1)
_SPACE = (-3, -2, -1)


def check_even_box(box_size: int) -> None:
    """Refuse an odd or empty box.

    Raises:
        InputError: an odd box has its centre half a pixel off N/2, which this package does not model.
    """
    if box_size < 2 or box_size % 2:
        raise InputError(f"box size {box_size} px is not a positive even number: crop or pad to an even box")


def rfft2_centred(image: Float[Tensor, "... n n"]) -> Complex[Tensor, "... n n//2+1"]:
    """Unscaled half-complex transform of images centred at index n//2 (inverse: `irfft2_centred`)."""
    check_even_box(image.shape[-1])
    if image.numel() == 0:  # a worker that has none of a batch: MKL refuses it
        return torch.empty((*image.shape[:-1], image.shape[-1] // 2 + 1), dtype=torch.complex64, device=image.device)
    return torch.fft.rfft2(torch.fft.ifftshift(image, dim=_PLANE))


def irfft2_centred(transform: Complex[Tensor, "... n h"], box_size: int) -> Float[Tensor, "... n n"]:
    """Images, centred at index box_size//2, whose `rfft2_centred` is `transform`."""
    check_even_box(box_size)
    return torch.fft.fftshift(torch.fft.irfft2(transform, s=(box_size, box_size)), dim=_PLANE)


def rfft3_centred(volume: Float[Tensor, "n n n"], padded_box: int | None = None) -> Complex[Tensor, "d d d//2+1"]:
    """Unscaled half-complex transform of a volume centred at index n//2.

    Args:
        volume: density, [z, y, x].
        padded_box: box d >= n of the transform; the volume is first embedded in zeros, centre on centre.

    Raises:
        InputError: odd boxes, or a padded box smaller than the volume.
    """
    box_size = volume.shape[-1]
    check_even_box(box_size)
    box = box_size if padded_box is None else padded_box
    check_even_box(box)
    if box < box_size:
        raise InputError(f"padded box {box} px is smaller than the volume's {box_size} px: give at least that")
    return _PaddedTransform.apply(volume, box)


def _wrap(values: Tensor, box: int, dim: int) -> Tensor:
    """Embed a centred axis in `box` zeros with its centre at index 0."""
    half = values.shape[dim] // 2
    shape = list(values.shape)
    shape[dim] = box - 2 * half
    negative, positive = values.narrow(dim, 0, half), values.narrow(dim, half, half)
    return torch.cat([positive, values.new_zeros(shape), negative], dim=dim)


def _unwrap(values: Tensor, box: int, dim: int) -> Tensor:
    """The adjoint of `_wrap`: the `box` entries around index 0, centred."""
    half = box // 2
    negative, positive = values.narrow(dim, values.shape[dim] - half, half), values.narrow(dim, 0, half)
    return torch.cat([negative, positive], dim=dim)


class _PaddedTransform(torch.autograd.Function):
    """Zero-pad, move the centre to the origin, rfftn; its gradient by half-complex transforms that crop as they go.

    torch's own gradient of rfftn transforms a full complex grid; this one costs 2 to 4 times less.
    """

    @staticmethod
    def forward(ctx: Any, volume: Tensor, box: int) -> Tensor:
        ctx.box_size = volume.shape[-1]
        if box > LARGE_BOX:
            return _padded_rfft(volume, box)
        for dim in _SPACE:
            volume = _wrap(volume, box, dim)
        return torch.fft.rfftn(volume, dim=_SPACE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        box, keep = gradient.shape[0], ctx.box_size
        # norm="forward" leaves the inverse transforms unscaled: the adjoint of the unscaled forward one.
        for dim in (0, 1):
            gradient = _unwrap(torch.fft.ifft(gradient, dim=dim, norm="forward"), keep, dim)
        # irfft counts the columns 0 < kx < d/2 twice, the stored transform once.
        weight = torch.full((box // 2 + 1,), 0.5, dtype=gradient.real.dtype, device=gradient.device)
        weight[0] = weight[-1] = 1.0
        columns = torch.fft.irfft(gradient * weight, n=box, dim=2, norm="forward")
        return _unwrap(columns, keep, 2), None


def _padded_rfft(volume: Tensor, box: int) -> Tensor:
    """Axis by axis, padding as late as it can: beside the result at most a quarter of it, and half of the padding's
    transforms are never made."""
    lines = _wrap(torch.fft.rfft(_wrap(volume, box, 2), dim=2), box, 1)
    planes = lines.new_empty(len(volume), *lines.shape[1:])
    for some in slabs(len(volume), lines[0].numel()):
        planes[some] = torch.fft.fft(lines[some], dim=1)
    del lines
    made = planes.new_empty(box, *planes.shape[1:])
    for some in slabs(box, box * planes.shape[2]):
        made[:, some] = torch.fft.fft(_wrap(planes[:, some], box, 0), dim=0)
    return made


def slabs(rows: int, row: int) -> list[slice]:
    """Slices of an axis of so many rows, each of at most `SLAB` values where a row holds so many: work that stays in
    memory which was just used costs no page faults."""
    step = max(1, SLAB // row)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def irfft3_of_slabs(
    of: Callable[[slice], Complex[Tensor, "d y h"]], padded_box: int, box_size: int
) -> Float[Tensor, "n n n"]:
    """`irfft3_centred` of a transform that is made slab by slab, `of(rows)` for rows of its second axis, and never
    stands in memory as a whole: at most a half of it does, where it is cropped to a half.

    Raises:
        InputError: as `irfft3_centred`.
    """
    _check_crop(padded_box, box_size)
    if padded_box <= LARGE_BOX:
        return _cropped(torch.fft.irfftn(of(slice(None)), s=(padded_box,) * 3, dim=_SPACE), box_size)
    half = padded_box // 2 + 1
    planes: Tensor | None = None
    for some in slabs(padded_box, padded_box * half):
        cropped = _unwrap(torch.fft.ifft(of(some), dim=0), box_size, 0)
        if planes is None:
            planes = cropped.new_empty(box_size, padded_box, half)
        planes[:, some] = cropped
    assert planes is not None, "a box is not empty"
    volume = planes.real.new_empty((box_size,) * 3)
    for some in slabs(box_size, padded_box * half):
        rows = _unwrap(torch.fft.ifft(planes[some], dim=1), box_size, 1)
        volume[some] = _unwrap(torch.fft.irfft(rows, n=padded_box, dim=2), box_size, 2)
    return volume


def _check_crop(padded_box: int, box_size: int) -> None:
    check_even_box(padded_box)
    check_even_box(box_size)
    if box_size > padded_box:
        raise InputError(f"box size {box_size} px exceeds the transform's box of {padded_box} px: give at most that")


def _cropped(volume: Tensor, box_size: int) -> Tensor:
    """The middle of a volume whose centre is at index 0, its centre at index box_size//2."""
    volume = torch.fft.fftshift(volume, dim=_SPACE)
    start = (len(volume) - box_size) // 2
    inner = slice(start, start + box_size)
    return volume[inner, inner, inner]


def irfft3_centred(transform: Complex[Tensor, "d d h"], box_size: int) -> Float[Tensor, "n n n"]:
    """Centred volume of a half-complex transform, cropped about the centre to `box_size` <= d.

    Raises:
        InputError: odd boxes, or a box larger than the transform's own.
    """
    return irfft3_of_slabs(lambda rows: transform[:, rows], transform.shape[0], box_size)


def _low_frequencies(transform: Tensor, small: int, large: int, dims: int, grow: bool) -> Tensor:
    """Keep |k| < small/2 per axis, in a box of `small` px (or, growing, put them in a box of `large` px).

    The small box's Nyquist planes are zero in the result: they have no Friedel partner, so they could not be both real
    and unambiguous, and no Fourier pixel of this package reaches them.
    """
    keep, gap = small // 2, large - small
    for dim in range(-dims, -1):
        low, high = transform.narrow(dim, 0, keep), transform.narrow(dim, transform.shape[dim] - keep + 1, keep - 1)
        shape = list(transform.shape)
        shape[dim] = gap + 1 if grow else 1
        transform = torch.cat([low, transform.new_zeros(shape), high], dim=dim)
    target = large if grow else small
    transform = transform.narrow(-1, 0, keep)
    return torch.nn.functional.pad(transform, (0, target // 2 + 1 - keep))


def fourier_crop_2d(image: Float[Tensor, "... N N"], box_size: int) -> Float[Tensor, "... n n"]:
    """Downsample images by cropping their transforms, keeping the noise level.

    The orthonormal coefficient of every kept frequency is unchanged (X_small = X_big n/N unscaled), so white noise
    of variance 1 keeps variance 1 per Fourier coefficient. The small box's Nyquist row and column are set to zero,
    which makes the output exactly real; pixel variance is therefore ((n-1)/n)^2.

    Args:
        image: images centred at index N//2.
        box_size: n <= N, even; n = N returns the input.

    Raises:
        InputError: odd boxes, or n > N.
    """
    full = image.shape[-1]
    check_even_box(box_size)
    if box_size > full:
        raise InputError(f"cannot crop images of {full} px to the larger box of {box_size} px: give at most {full}")
    if box_size == full:
        check_even_box(full)
        return image
    small = _low_frequencies(rfft2_centred(image), box_size, full, dims=2, grow=False)
    return irfft2_centred(small * (box_size / full), box_size)


def fourier_resize_3d(volume: Float[Tensor, "N N N"], box_size: int) -> Float[Tensor, "n n n"]:
    """Resample a volume to another box over the same extent, by Fourier cropping or padding.

    V_new = V_old n/N on unscaled transforms, so slices of the result match images resized by `fourier_crop_2d`.
    Nyquist planes of the smaller of the two boxes are set to zero.

    Raises:
        InputError: odd boxes.
    """
    full = volume.shape[-1]
    check_even_box(box_size)
    if box_size == full:
        check_even_box(full)
        return volume
    small, large = sorted((box_size, full))
    resized = _low_frequencies(rfft3_centred(volume), small, large, dims=3, grow=box_size > full)
    return irfft3_centred(resized * (box_size / full), box_size)


@dataclass(frozen=True, eq=False)
class FourierPixels:
    """The half disc kx >= 0, |k| <= radius_limit of an image's transform, packed in order of rising radius.

    Because of that order any lower resolution is a prefix of every packed array. The kx = 0 column keeps both signs of
    ky, as the transform does. Frequencies are in cycles per box.
    """

    box_size: int
    radius_limit: float
    kx: Float[Tensor, " p"]
    ky: Float[Tensor, " p"]
    radius: Float[Tensor, " p"]
    shell: Int[Tensor, " p"]
    """Radius rounded to an integer."""
    weight: Float[Tensor, " p"]
    """How often the coefficient occurs in the full transform: 1 where kx = 0, else 2."""
    index: Int[Tensor, " p"]
    """Position in the flattened (n, n//2 + 1) transform."""
    squared_radius: np.ndarray = field(repr=False)
    """Host copy, so that `count` never waits for a device."""

    def __len__(self) -> int:
        return int(self.squared_radius.size)

    def count(self, radius: float) -> int:
        """Number of pixels with |k| <= radius, found on the host."""
        return int(np.searchsorted(self.squared_radius, math.floor(radius**2 + 1e-6), side="right"))

    def prefix(self, radius: float) -> "FourierPixels":
        """The pixels with |k| <= radius."""
        n = self.count(radius)
        return replace(
            self,
            radius_limit=min(radius, self.radius_limit),
            kx=self.kx[:n],
            ky=self.ky[:n],
            radius=self.radius[:n],
            shell=self.shell[:n],
            weight=self.weight[:n],
            index=self.index[:n],
            squared_radius=self.squared_radius[:n],
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "FourierPixels":
        """The same pixels on another device, or with real fields of another precision."""
        return replace(
            self,
            kx=self.kx.to(device, dtype),
            ky=self.ky.to(device, dtype),
            radius=self.radius.to(device, dtype),
            shell=self.shell.to(device),
            weight=self.weight.to(device, dtype),
            index=self.index.to(device),
        )

    def pack(self, transform: Shaped[Tensor, "... n h"]) -> Shaped[Tensor, "... p"]:
        """Pick the pixels out of (n, n//2 + 1) transforms."""
        return transform.flatten(-2).index_select(-1, self.index)

    def unpack(self, packed: Shaped[Tensor, "... p"]) -> Shaped[Tensor, "... n h"]:
        """Put packed values back into (n, n//2 + 1) transforms, zero elsewhere."""
        rows, columns = self.box_size, self.box_size // 2 + 1
        flat = packed.new_zeros(*packed.shape[:-1], rows * columns)
        return flat.index_copy(-1, self.index, packed).unflatten(-1, (rows, columns))

    def quarter_turn(self) -> tuple[Int[Tensor, " p"], Bool[Tensor, " p"]]:
        """Where each pixel of an image turned by +90 degrees, x towards y, comes from.

        Returns:
            The packed pixel to read, and whether to conjugate it: the turned (kx, ky) is the old (ky, -kx), or its
            Friedel partner where that is not stored. The turned image's pose is R Rz(90°)ᵀ. Exact: the lattice turns
            onto itself.
        """
        x, y = self.ky.round().long(), -self.kx.round().long()
        friedel = x < 0
        x, y = torch.where(friedel, -x, x), torch.where(friedel, -y, y)
        columns = self.box_size // 2 + 1
        position = torch.full((self.box_size * columns,), -1, device=self.index.device)
        position[self.index] = torch.arange(len(self), device=self.index.device)
        return position[(y % self.box_size) * columns + x], friedel


def fourier_pixels(box_size: int, radius: float | None = None) -> FourierPixels:
    """The half disc of Fourier pixels with |k| <= radius.

    Args:
        box_size: box of the images, px, even.
        radius: cycles per box; the default, and the most allowed, is box_size/2 - 1, the last shell whose
            coefficients all have their Friedel partners.

    Raises:
        InputError: an odd box, or a radius outside 0 .. box_size/2 - 1.
    """
    check_even_box(box_size)
    half = box_size // 2
    limit = float(half - 1) if radius is None else float(radius)
    if not 0 <= limit <= half - 1:
        raise InputError(f"Fourier radius {limit:g} is outside 0..{half - 1} for a box of {box_size} px: lower it")
    ky, kx = np.meshgrid(np.fft.fftfreq(box_size, 1 / box_size).round(), np.arange(half + 1), indexing="ij")
    squared = (kx**2 + ky**2).astype(np.int64).ravel()
    order = np.argsort(squared, kind="stable")
    order = order[: np.searchsorted(squared[order], math.floor(limit**2 + 1e-6), side="right")]
    squared, kx, ky = squared[order], kx.ravel()[order], ky.ravel()[order]
    radii = np.sqrt(squared)
    return FourierPixels(
        box_size=box_size,
        radius_limit=limit,
        kx=torch.from_numpy(kx.astype(np.float32)),
        ky=torch.from_numpy(ky.astype(np.float32)),
        radius=torch.from_numpy(radii.astype(np.float32)),
        shell=torch.from_numpy(np.floor(radii + 0.5).astype(np.int64)),
        weight=torch.from_numpy(np.where(kx == 0, 1.0, 2.0).astype(np.float32)),
        index=torch.from_numpy(order),
        squared_radius=squared,
    )
