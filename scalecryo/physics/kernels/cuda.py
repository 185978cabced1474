"""The slice operator, insertion and local refinement's sums on a GPU: how the Triton kernels are called.

Nothing here waits for the device. Single precision; boxes up to 1280 px. With TRITON_INTERPRET=1 in the environment,
before the first import, the same kernels run on tensors of the CPU, slowly, to be compared with the reference.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from jaxtyping import Complex, Float
from torch import Tensor

from scalecryo.physics.kernels import triton_refine, triton_slice
from scalecryo.physics.kernels.views import Gradients, Views, Wanted

INTERPRETED = not isinstance(triton_slice.slice_forward, triton.JITFunction)

# Pixels of a program, one a thread: with two, registers double and fewer programs run at a time.
BLOCK = 128
OPTIONS = {"num_warps": BLOCK // 32, "enable_fp_fusion": True}
# Blocks that a program of local refinement goes through: its sums stay short enough for single precision.
_REFINEMENT_BLOCKS = 8


def forward(volume: Complex[Tensor, "d d h"], views: Views) -> Complex[Tensor, "b p"]:
    """As `kernels.reference.forward`."""
    images = torch.empty(len(views.rotation), len(views.kx), dtype=volume.dtype, device=volume.device)
    if images.numel():
        pointers, numbers, flags = _arguments(volume, views)
        with _on(volume):
            triton_slice.slice_forward[_programs(images)](
                _real(volume), *pointers, _real(images), *numbers, **flags, BLOCK=BLOCK, **OPTIONS
            )
    return images


def backward(
    gradient: Complex[Tensor, "b p"], volume: Complex[Tensor, "d d h"], views: Views, wanted: Wanted
) -> Gradients:
    """As `kernels.reference.backward`. The volume's gradient is summed in no fixed order."""
    nothing = volume.real.new_empty(0)
    grid = torch.zeros_like(volume, memory_format=torch.contiguous_format) if wanted.volume else volume.new_empty(0)
    programs, pose = _programs(gradient), wanted.rotation or wanted.shift
    sums = volume.real.new_zeros((len(views.rotation), programs[0], 8) if pose else (0,))
    if gradient.numel():
        pointers, numbers, flags = _arguments(volume, views)
        with _on(volume):
            triton_slice.slice_backward[programs](
                _real(gradient), _real(volume), *pointers, _real(grid), sums, *numbers, **flags,
                FOR_VOLUME=wanted.volume, FOR_POSE=pose, BLOCK=BLOCK, **OPTIONS,
            )  # fmt: skip
    for_rotation = for_shift = nothing
    if pose:
        total = sums.sum(1)
        turned = (views.scale * total[:, :6]).unflatten(1, (3, 2))
        for_rotation = torch.nn.functional.pad(turned, (0, 1)) if wanted.rotation else nothing
        for_shift = (-2 * math.pi / views.box_size) * total[:, 6:] if wanted.shift else nothing.clone()
    real = views.rotation.dtype
    return Gradients(grid, for_rotation.to(real), for_shift.to(real))


def insert_slices_cuda(
    values: Complex[Tensor, "b p"],
    power: Float[Tensor, "b p"],
    rotation: Float[Tensor, "b 3 3"],
    kx: Float[Tensor, " p"],
    ky: Float[Tensor, " p"],
    scale: float,
    numerator: Complex[Tensor, "d d h"],
    denominator: Float[Tensor, "d d h"],
) -> None:
    """As `fourier_slice.insert_slices`, of values and of their weights in one go; added in no fixed order."""
    if not values.numel():
        return
    box = numerator.shape[0]
    with _on(numerator):
        triton_slice.insert[_programs(values)](
            _real(values), power.contiguous(), rotation.float().contiguous(), kx.float(), ky.float(),
            _real(numerator), denominator, float(scale), _radius(box, scale), len(kx), box,
            BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip


def refinement_sums(
    volume: Complex[Tensor, "d d h"],
    observed: Complex[Tensor, "b p"],
    views: Views,
    weight: Float[Tensor, " p"],
    *,
    derivatives: bool,
) -> Float[Tensor, "b s"]:
    """Sums over each image's pixels that Levenberg-Marquardt needs, in double precision.

    One pass over images and volume. The 20 sums of `pose.refine_cpu`, in its order; without derivatives the first,
    w |residual|^2, alone. All pixels must lie inside the transform.
    """
    count, pixels = observed.shape
    programs, size = triton.cdiv(pixels, BLOCK * _REFINEMENT_BLOCKS), 20 if derivatives else 1
    sums = torch.zeros(count, programs, size, device=volume.device)
    if observed.numel():
        pointers, numbers, flags = _arguments(volume, views)
        observed = observed if observed.stride(1) == 1 else observed.contiguous()
        scale, per_px, _, _, box, ctf_stride = numbers
        with _on(volume):
            triton_refine.refinement_sums[(programs, count)](
                _real(volume), torch.view_as_real(observed.resolve_conj()), *pointers, weight.float().contiguous(),
                sums, scale, -per_px, pixels, box, ctf_stride, observed.stride(0),
                HAS_CTF=flags["HAS_CTF"], DERIVATIVES=derivatives, BLOCK=BLOCK, BLOCKS=_REFINEMENT_BLOCKS,
                **OPTIONS,
            )  # fmt: skip
    return sums.double().sum(1)


def _arguments(volume: Tensor, views: Views) -> tuple[tuple[Tensor, ...], tuple[Any, ...], dict[str, bool]]:
    """Pointers from the rotation to ky, numbers from scale to the CTF's stride, and what is there."""
    rotation, shift_px, ctf, kx, ky, scale, box_size = views
    rotation = rotation.float().contiguous()
    ctf = ctf.float() if ctf is not None else rotation
    # A prefix of a wider table is read in place.
    ctf = ctf if ctf.stride(-1) == 1 else ctf.contiguous()
    shift = rotation if shift_px is None else shift_px.float().contiguous()
    pointers = rotation, shift, ctf, kx.float().contiguous(), ky.float().contiguous()
    box = volume.shape[0]
    numbers = float(scale), -1 / box_size, _radius(box, scale), len(kx), box, ctf.stride(0)
    return pointers, numbers, {"HAS_SHIFT": shift_px is not None, "HAS_CTF": views.ctf is not None}


def _radius(box: int, scale: float) -> float:
    """Cycles per image box up to which samples lie inside the transform, with room for rounding."""
    return (box // 2 - 1) / scale * (1 + 1e-6)


def _programs(images: Tensor) -> tuple[int, int]:
    return triton.cdiv(images.shape[1], BLOCK), images.shape[0]


def _real(values: Tensor) -> Tensor:
    """Pairs of real numbers."""
    return torch.view_as_real(values.resolve_conj().contiguous())


def _on(values: Tensor) -> AbstractContextManager[object]:
    """Kernels run on the current device, which need not be the tensors'."""
    return torch.cuda.device(values.device) if values.is_cuda else nullcontext()
