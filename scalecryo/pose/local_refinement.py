"""Local refinement of poses against a map: Levenberg-Marquardt on so(3) x R^2 of every image by itself.

The cost of an image is its negative log-likelihood up to a constant,

    sum over pixels of w |Y - CTF ramp(shift) slice(R)|^2 / 2,    w = Hermitian weight / noise variance,

and Gauss-Newton's matrix comes with the residual in one pass, by the analytic gradient of the trilinear interpolation.
Compiled kernels on the CPU (`refine_cpu`); batched tensors elsewhere (`local_refinement_torch`), whose sums over pixels
come from one fused kernel on a GPU, and from torch in double precision.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Complex, Float
from torch import Tensor

from scalecryo.errors import InputError
from scalecryo.physics.fft import FourierPixels
from scalecryo.physics.kernels import refine_cpu
from scalecryo.physics.kernels.backend import choose_backend
from scalecryo.physics.kernels.jit import in_threads
from scalecryo.physics.kernels.packed_volume import PackedVolume
from scalecryo.pose import local_refinement_torch

Backend = Literal["numba", "torch", "triton"]

# Samples (images x pixels) that the torch backend works on at a time: about 1 GB of intermediate results.
_SAMPLES_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class RefinedPoses:
    """Poses after local refinement, and what they cost."""

    rotation: Float[Tensor, "b 3 3"]
    shift_px: Float[Tensor, "b 2"]
    cost: Float[Tensor, " b"]
    """Of the poses returned, double precision: negative log-likelihood up to a constant."""
    cost_before: Float[Tensor, " b"]
    """Of the poses given."""


@torch.no_grad()
def refine_poses(
    volume: Complex[Tensor, "d d h"] | PackedVolume,
    observed: Complex[Tensor, "b p"],
    rotation: Float[Tensor, "b 3 3"],
    shift_px: Float[Tensor, "b 2"],
    ctf: Float[Tensor, "b p"] | None,
    pixel_weight: Float[Tensor, " p"],
    pixels: FourierPixels,
    scale: float,
    *,
    passes: int,
    fit_shift: bool = True,
    max_turn_deg: float = 10.0,
    max_shift_px: float = 2.0,
    backend: Backend | None = None,
) -> RefinedPoses:
    """Refine poses by a few damped Gauss-Newton passes. No pose gets worse: one that no pass helped returns as it was.

    The basin is about a Fourier pixel's turn wide: from an error of e degrees start at a radius of about 60/e and raise
    it, with a longer prefix of the pixels each time.

    Args:
        volume: `rfft3_centred` of the gridding corrected map; box d = scale * pixels.box_size.
        observed: transforms of the images at `pixels`.
        rotation: image frame to volume frame. A pass turns it on the right (in the image frame): R exp([w]x).
        shift_px: where the content sits, (x, y).
        ctf: None for none.
        pixel_weight: `FourierPixels.weight` over the noise variance of a coefficient's real or imaginary part.
        pixels: packed pixels, on the data's device: any prefix.
        scale: padded_box / box_size.
        passes: poses tried for each image; each costs a pass over its pixels, and there is one more at the start.
        fit_shift: False leaves the shifts exactly as they are.
        max_turn_deg: largest turn of one pass.
        max_shift_px: largest shift of one pass.
        backend: default for single precision the compiled kernels of the device, else torch.

    Raises:
        InputError: shapes that do not fit, rotations that are none, a backend that cannot take the data.
    """
    data = _Data(_as_volume(volume), observed, ctf, pixel_weight, pixels, scale)
    backend = data.check(rotation, shift_px, (len(observed),), backend)
    if passes < 0:
        raise InputError(f"passes is {passes}: give 0 (cost only) or more")
    limits = passes, 5 if fit_shift else 3, math.radians(max_turn_deg), float(max_shift_px)
    if backend == "numba":
        turned, moved, before, after = _refine_numba(data, rotation, shift_px, limits)
    else:
        turned, moved, before, after = _refine_batched(data, rotation, shift_px, limits, backend)
    better = after < before
    return RefinedPoses(
        rotation=torch.where(better[:, None, None], turned.to(rotation.dtype), rotation),
        shift_px=torch.where(better[:, None], moved.to(shift_px.dtype), shift_px),
        cost=after,
        cost_before=before,
    )


@torch.no_grad()
def evaluate_poses(
    volume: Complex[Tensor, "d d h"] | PackedVolume,
    observed: Complex[Tensor, "b p"],
    rotation: Float[Tensor, "b k 3 3"],
    shift_px: Float[Tensor, "b k 2"],
    ctf: Float[Tensor, "b p"] | None,
    pixel_weight: Float[Tensor, " p"],
    pixels: FourierPixels,
    scale: float,
    *,
    backend: Backend | None = None,
) -> Float[Tensor, "b k"]:
    """Cost, as in `refine_poses`, of k candidate poses for each image, in double precision.

    Arguments and errors as in `refine_poses`.
    """
    data = _Data(_as_volume(volume), observed, ctf, pixel_weight, pixels, scale)
    count, candidates = len(observed), rotation.shape[1]
    backend = data.check(rotation, shift_px, (count, candidates), backend)
    if backend == "numba":
        cost = torch.zeros(count, candidates, dtype=torch.float64)
        poses = _float32(rotation), _float32(shift_px)
        in_threads(refine_cpu.score_poses, observed.numel() * candidates, *data.arrays(), *poses, cost.numpy())
        return cost
    problem, beyond = data.tensors(backend)
    image = torch.arange(count, device=observed.device).repeat_interleave(candidates)
    turned, moved = rotation.flatten(0, 1), shift_px.flatten(0, 1)
    runs = _runs(len(image), observed.shape[1])
    parts = [local_refinement_torch.costs(problem.images(image[run]), turned[run], moved[run]) for run in runs]
    return torch.cat(parts).reshape(count, candidates) + beyond[:, None]


@dataclass(frozen=True)
class _Data:
    """What poses are judged by, as the caller gave it."""

    volume: PackedVolume
    observed: Complex[Tensor, "b p"]
    ctf: Float[Tensor, "b p"] | None
    pixel_weight: Float[Tensor, " p"]
    pixels: FourierPixels
    scale: float

    @property
    def volume_rfft(self) -> Complex[Tensor, "d d h"]:
        return self.volume.volume_rfft

    def check(self, rotation: Tensor, shift_px: Tensor, poses: tuple[int, ...], backend: Backend | None) -> Backend:
        """Refuse what does not fit together; choose the backend."""
        count, size = self.observed.shape
        expected = [("rotation", rotation, (*poses, 3, 3)), ("shift_px", shift_px, (*poses, 2))]
        expected.append(("pixel_weight", self.pixel_weight, (size,)))
        if self.ctf is not None:
            expected.append(("ctf", self.ctf, (count, size)))
        for name, tensor, shape in expected:
            if tuple(tensor.shape) != shape:
                given = tuple(tensor.shape)
                raise InputError(f"{name} has shape {given}: {count} images of {size} pixels need {shape}")
        if size != len(self.pixels):
            table = len(self.pixels)
            raise InputError(f"images have {size} pixels and the pixel table {table}: cut both to the same prefix")
        on_cpu = self.observed.device.type == "cpu"
        # Elsewhere the check would wait for the device; and there a stray index is an error, not a crash.
        if on_cpu and not bool((rotation.abs() <= 2).all()):
            raise InputError("rotation holds entries that are not finite or beyond 2: check the poses")
        single = self.volume_rfft.dtype == self.observed.dtype == torch.complex64
        kernels = choose_backend(self.volume_rfft, "cuda" if backend == "triton" else None) if single else "reference"
        suits: Backend = "numba" if kernels == "cpu" else "triton" if kernels == "cuda" else "torch"
        if backend == "numba" and suits != "numba":
            found = f"{self.volume_rfft.dtype} and {self.observed.dtype} on {self.observed.device}"
            raise InputError(f"the numba backend takes complex64 on the CPU, not {found}: use the torch backend")
        return suits if backend in (None, "triton") else backend

    def inside(self) -> int:
        """Number of pixels within the volume's transform (slices are zero beyond); the others follow them."""
        return self.pixels.count((self.volume_rfft.shape[0] // 2 - 1 + 1e-4) / self.scale)

    def arrays(self) -> tuple[Any, ...]:
        """The first arguments of the compiled kernels: grid, pixels, observed, ctf, inside, geometry."""
        inside, pixels = self.inside(), self.pixels
        farthest = float(np.sqrt(pixels.squared_radius[inside - 1])) if inside else 0.0
        half = min(self.volume_rfft.shape[0] // 2, math.ceil(farthest * self.scale) + 1)
        table = tuple(_float32(values) for values in (pixels.kx, pixels.ky, self.pixel_weight))
        images = self.observed.detach().resolve_conj().contiguous().numpy()
        contrast = np.ones((1, len(pixels)), np.float32) if self.ctf is None else _float32(self.ctf)
        geometry = np.float32(self.scale), np.float32(1 / pixels.box_size)
        return (self.volume.compact(half), half), table, images, contrast, inside, geometry

    def tensors(self, backend: Backend) -> tuple[local_refinement_torch.Problem, Float[Tensor, " b"]]:
        """The batched problem, and the cost of the pixels outside the transform."""
        inside, real, pixels = self.inside(), self.observed.real.dtype, self.pixels
        problem = local_refinement_torch.Problem(
            volume_rfft=self.volume_rfft.to(self.observed.dtype),
            observed=self.observed[:, :inside],
            ctf=None if self.ctf is None else self.ctf[:, :inside].to(real),
            weight=self.pixel_weight[:inside].to(real),
            kx=pixels.kx[:inside].to(real),
            ky=pixels.ky[:inside].to(real),
            scale=self.scale,
            box_size=pixels.box_size,
            fused=backend == "triton",
        )
        beyond = self.observed[:, inside:].abs().square().double() @ self.pixel_weight[inside:].double() / 2
        return problem, beyond


def _as_volume(volume: Tensor | PackedVolume) -> PackedVolume:
    return volume if isinstance(volume, PackedVolume) else PackedVolume(volume)


_Found = tuple[Float[Tensor, "b 3 3"], Float[Tensor, "b 2"], Float[Tensor, " b"], Float[Tensor, " b"]]
"""Rotation, shift, cost before and after."""


def _refine_numba(data: _Data, rotation: Tensor, shift_px: Tensor, limits: tuple[int, int, float, float]) -> _Found:
    turned, moved, cost = _float32(rotation).copy(), _float32(shift_px).copy(), np.zeros((len(rotation), 2))
    samples = data.observed.numel() * (limits[0] + 1)
    in_threads(refine_cpu.refine_images, samples, *data.arrays(), limits, turned, moved, cost)
    before, after = torch.from_numpy(cost).unbind(-1)
    return torch.from_numpy(turned), torch.from_numpy(moved), before, after


def _refine_batched(
    data: _Data, rotation: Tensor, shift_px: Tensor, limits: tuple[int, int, float, float], backend: Backend
) -> _Found:
    problem, beyond = data.tensors(backend)
    parts = [
        local_refinement_torch.refine_batch(problem.images(run), rotation[run], shift_px[run], *limits)
        for run in _runs(len(rotation), data.observed.shape[1])
    ]
    turned, moved, before, after = (torch.cat(part) for part in zip(*parts, strict=True))
    return turned, moved, before + beyond, after + beyond


def _float32(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().contiguous().numpy()


def _runs(count: int, pixels: int) -> Iterator[slice]:
    """Cut `count` images into runs that fit in memory; one empty run when there are none."""
    run = max(1, _SAMPLES_AT_ONCE // max(pixels, 1))
    for start in range(0, max(count, 1), run):
        yield slice(start, start + run)
