"""Central slices of a volume's transform, and the adjoint that puts slices back.

The volume's transform is half-complex in torch.fft order on a box d = padded_box, oversampled by scale = d / box_size
against the images. Sample (b, p) sits at q = scale R_b (kx, ky, 0), R as in `rotation.py`. Where q_x < 0 the point -q
is taken instead and the value conjugated, so the eight neighbours always lie in the stored half kx >= 0.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Complex, Float, Shaped
from torch import Tensor

from scalecryo.errors import InputError
from scalecryo.physics.fft import check_even_box
from scalecryo.physics.kernels.backend import Backend, backend_module, choose_backend
from scalecryo.physics.kernels.reference import locate, scatter
from scalecryo.physics.kernels.views import Views, Wanted


def padded_box(box_size: int, padding: float) -> int:
    """Even box nearest to padding * box_size, never smaller than box_size."""
    check_even_box(box_size)
    return max(box_size, 2 * round(padding * box_size / 2))


def gridding_correction(
    box_size: int,
    padding: float,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "n n n"]:
    """What a centred map is multiplied by, before padding and transform, to undo trilinear interpolation.

    Interpolating a transform with a triangle of width 2/d multiplies the map by sinc^2(x/d) along each axis
    (x in px from the centre, d the padded box); this is the inverse.
    """
    axis = torch.arange(box_size, device=device, dtype=torch.float64) - box_size // 2
    line = torch.sinc(axis / padded_box(box_size, padding)).square().reciprocal()
    return (line[:, None, None] * line[None, :, None] * line[None, None, :]).to(dtype)


def _slice(
    volume: Tensor,
    rotation: Tensor,
    shift_px: Tensor | None,
    ctf: Tensor | None,
    kx: Tensor,
    ky: Tensor,
    scale: float,
    box_size: int,
    backend: str,
) -> Tensor:
    views = Views(rotation, shift_px, ctf, kx, ky, scale, box_size)
    return backend_module(backend).forward(volume, views)


def _slice_backward(
    gradient: Tensor,
    volume: Tensor,
    rotation: Tensor,
    shift_px: Tensor | None,
    ctf: Tensor | None,
    kx: Tensor,
    ky: Tensor,
    scale: float,
    box_size: int,
    backend: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    views = Views(rotation, shift_px, ctf, kx, ky, scale, box_size)
    return tuple(backend_module(backend).backward(gradient, volume, views, Wanted(*wanted)))


_ARGUMENTS = (
    "Tensor volume, Tensor rotation, Tensor? shift_px, Tensor? ctf, Tensor kx, Tensor ky, "
    "float scale, int box_size, str backend"
)
_OPERATOR = torch.library.custom_op(
    "scalecryo::fourier_slice", _slice, mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor"
)
_BACKWARD = torch.library.custom_op(
    "scalecryo::fourier_slice_backward",
    _slice_backward,
    mutates_args=(),
    schema=f"(Tensor gradient, {_ARGUMENTS}, bool[] wanted) -> (Tensor, Tensor, Tensor)",
)


@_OPERATOR.register_fake
def _fake_slice(volume: Tensor, rotation: Tensor, _shift: Any, _ctf: Any, kx: Tensor, *_: Any) -> Tensor:
    return volume.new_empty(rotation.shape[0], kx.shape[0])


@_BACKWARD.register_fake
def _fake_backward(gradient: Tensor, volume: Tensor, rotation: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    for_volume, for_rotation, for_shift = rest[-1]
    return (
        torch.empty_like(volume) if for_volume else volume.new_empty(0),
        torch.empty_like(rotation) if for_rotation else rotation.new_empty(0),
        rotation.new_empty(rotation.shape[0], 2) if for_shift else rotation.new_empty(0),
    )


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """The backward pass recomputes the rest: 12 bytes a sample are kept at most (CTF and prediction)."""
    ctx.save_for_backward(*inputs[:6])
    ctx.rest = inputs[6:]


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    wanted = [ctx.needs_input_grad[i] for i in range(3)]
    found = _BACKWARD(gradient, *ctx.saved_tensors, *ctx.rest, wanted)
    gradients = [value if asked else None for value, asked in zip(found, wanted, strict=True)]
    return *gradients, None, None, None, None, None, None


_OPERATOR.register_autograd(_differentiate, setup_context=_keep_inputs)


def fourier_slice(
    volume_rfft: Complex[Tensor, "d d h"],
    rotation: Float[Tensor, "b 3 3"],
    shift_px: Float[Tensor, "b 2"] | None,
    ctf: Float[Tensor, "b p"] | None,
    kx: Float[Tensor, " p"],
    ky: Float[Tensor, " p"],
    scale: float,
    box_size: int,
    *,
    backend: Backend | None = None,
) -> Complex[Tensor, "b p"]:
    """Transforms of a volume's images at packed Fourier pixels: central slice, times CTF, content moved by +shift.

    The slices are those of `extract_slices`, the rest that of `image_formation.form_images`, in one pass. A torch
    operator (`scalecryo::fourier_slice`): differentiable once in volume, rotation and shift, not in the CTF.

    Args:
        volume_rfft: `rfft3_centred` of the (gridding corrected) volume, box d.
        rotation: image frame to volume frame.
        shift_px: (x, y) in px of the image box; None: centred.
        ctf: None: none.
        kx: cycles per image box. For a lower resolution give a prefix (`FourierPixels.prefix`), and of ctf.
        ky: cycles per image box.
        scale: padded_box / box_size.
        box_size: image box, px.
        backend: default what suits the device and the precision (`choose_backend`).

    Raises:
        InputError: shapes that do not fit, a CTF that requires a gradient.
    """
    count, pixels = rotation.shape[0], kx.shape[0]
    expected = [("rotation", rotation, (count, 3, 3)), ("ky", ky, (pixels,))]
    expected += [("shift_px", shift_px, (count, 2))] if shift_px is not None else []
    expected += [("ctf", ctf, (count, pixels))] if ctf is not None else []
    for name, tensor, shape in expected:
        if tuple(tensor.shape) != shape:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}: {count} images of {pixels} pixels need {shape}")
    if ctf is not None and ctf.requires_grad:
        raise InputError("the CTF requires a gradient, which the slice operator does not give: detach it")
    chosen = choose_backend(volume_rfft, backend)
    images: Tensor = _OPERATOR(volume_rfft, rotation, shift_px, ctf, kx, ky, float(scale), box_size, chosen)
    return images


def extract_slices(
    volume_rfft: Complex[Tensor, "d d h"],
    rotation: Float[Tensor, "b 3 3"],
    kx: Float[Tensor, " p"],
    ky: Float[Tensor, " p"],
    scale: float,
    *,
    backend: Backend | None = None,
) -> Complex[Tensor, "b p"]:
    """Central slices of a volume's transform at packed Fourier pixels.

    Slice b holds F_vol(scale R_b (kx, ky, 0)): the transform of the projection along z of the volume turned by R_b^T
    (Fourier slice theorem, Bracewell 1956), with no factor. Trilinear; zero where scale |k| > d/2 - 1.

    Differentiable in volume and rotation (R's third column gets zero; gradients are one-sided where a sample falls
    exactly on a grid plane, as for any trilinear interpolation). Single and double precision.

    Args:
        volume_rfft: `rfft3_centred` of the (gridding corrected) volume, box d.
        rotation: image frame to volume frame.
        kx: cycles per image box.
        ky: cycles per image box.
        scale: padded_box / box_size.
        backend: as in `fourier_slice`.
    """
    # Without a shift the image's box plays no role.
    return fourier_slice(volume_rfft, rotation, None, None, kx, ky, scale, 1, backend=backend)


@torch.no_grad()
def insert_slices(
    values: Shaped[Tensor, "b p"],
    rotation: Float[Tensor, "b 3 3"],
    kx: Float[Tensor, " p"],
    ky: Float[Tensor, " p"],
    scale: float,
    padded_box: int,
    out: Shaped[Tensor, "d d h"] | None = None,
) -> Shaped[Tensor, "d d h"]:
    """Spread slices over the half-complex grid of box d = padded_box: the adjoint of `extract_slices`.

    Re<extract_slices(V), S> = Re<V, insert_slices(S)>, both sums over the *stored* entries, each once: every sample
    lands once, at q or at its Friedel partner -q (conjugated), whichever has q_x >= 0. Real values (weights) are spread
    the same way onto a real grid, without conjugation.

    For the sum over all samples and all their Friedel partners, as a reconstruction needs, insert values * weight / 2,
    with `FourierPixels.weight` (the kx = 0 column of a half disc already holds its own Friedel partners), and call
    `add_friedel_pairs` once at the end.

    Not differentiable.

    Args:
        values: packed slices, or real weights.
        rotation: image frame to volume frame.
        kx: cycles per image box.
        ky: cycles per image box.
        scale: padded_box / box_size.
        padded_box: box d of the grid.
        out: contiguous grid to add to, in place, and return; default a new grid of zeros.
    """
    check_even_box(padded_box)
    if out is None:
        out = values.new_zeros(padded_box, padded_box, padded_box // 2 + 1)
    scatter(values, locate(rotation, kx, ky, scale, padded_box), out)
    return out


def add_friedel_pairs(grid: Shaped[Tensor, "d d h"]) -> Shaped[Tensor, "d d h"]:
    """Add to every entry of the kx = 0 plane the conjugate of its Friedel partner at (-kz, -ky), in place.

    That plane is the only one whose Friedel partners are stored too, and where inserted samples within one voxel of it
    must appear twice. Afterwards the grid is the half of a Hermitian one.
    """
    grid[:, :, 0] = friedel_pairs(grid)
    return grid


def friedel_pairs(grid: Shaped[Tensor, "d d h"]) -> Shaped[Tensor, "d d"]:
    """The kx = 0 plane of a grid with the conjugate of its Friedel partners added."""
    plane = grid[:, :, 0]
    return plane + plane.flip(0, 1).roll((1, 1), (0, 1)).conj()
