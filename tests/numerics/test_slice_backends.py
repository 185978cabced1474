"""The operator `scalecryo::fourier_slice`: each backend against the reference in double precision."""

import warnings

import pytest
import torch
from torch import Tensor

from scalecryo.errors import InputError
from scalecryo.physics.ctf import CtfParameters, contrast_transfer
from scalecryo.physics.fft import fourier_pixels
from scalecryo.physics.fourier_slice import fourier_slice
from scalecryo.physics.kernels import backend as backends
from scalecryo.physics.kernels import jit
from scalecryo.physics.kernels.backend import Backend, choose_backend
from scalecryo.physics.rotation import random_rotations

# Single precision places a sample to about |q| 2^-23 voxels: with |q| <= 32 and the transform's change from voxel to
# voxel about its size, 4e-6; the sums over pixels add their own rounding, a few units of 6e-8 each.
TOLERANCE = 2e-5


class Case:
    """A random transform, poses off the grid planes (single precision might fall on their other side), CTFs."""

    def __init__(self, box: int, scale: float, count: int = 5, radius: float | None = None):
        generator = torch.Generator().manual_seed(box)
        d = int(box * scale)
        axis = (torch.arange(d) + d // 2) % d - d // 2
        line = torch.exp(-0.5 * (axis / (d / 8)) ** 2).double()
        noise = torch.randn(d, d, d, dtype=torch.float64, generator=generator)
        self.volume = torch.fft.rfftn(noise * line[:, None, None] * line[:, None] * line)
        self.volume /= self.volume.abs().max()
        pixels = fourier_pixels(box, radius)
        self.kx, self.ky, self.box, self.scale = pixels.kx.double(), pixels.ky.double(), box, scale
        # Rounded to single precision here, so that both precisions mean the same poses.
        self.rotation = random_rotations(count, generator).double()
        self.shift = (3 * torch.randn(count, 2, generator=generator)).double()
        values = (12000.0, 11000.0, 20.0, 300.0, 2.7, 0.1, 0.0)
        optics = CtfParameters(*(torch.linspace(value, 1.2 * value, count).double() for value in values))
        self.ctf = contrast_transfer(optics, self.kx, self.ky, box, 1.5).float().double()
        shape = count, len(pixels)
        self.gradient = torch.randn(shape, dtype=torch.complex128, generator=generator).to(torch.complex64)

    def run(self, backend: Backend, dtype: torch.dtype, with_shift: bool = True, with_ctf: bool = True) -> list[Tensor]:
        """Images, then the gradients by volume, rotation and (with one) shift."""
        leaves = [self.volume.to(dtype.to_complex()), self.rotation.to(dtype)]
        leaves += [self.shift.to(dtype)] if with_shift else []
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        shift, ctf = leaves[2] if with_shift else None, self.ctf.to(dtype) if with_ctf else None
        k = self.kx.to(dtype), self.ky.to(dtype)
        images = fourier_slice(leaves[0], leaves[1], shift, ctf, *k, self.scale, self.box, backend=backend)
        return [images.detach(), *torch.autograd.grad(images, leaves, self.gradient.to(images.dtype))]


def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest error, relative to the largest entry of each."""
    assert len(found) == len(expected)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("box", "scale"), [(32, 1.0), (32, 2.0), (24, 1.5), (64, 1.0)])
@pytest.mark.parametrize(("with_shift", "with_ctf"), [(True, True), (False, False), (True, False)])
def test_cpu_kernels_are_the_reference(box: int, scale: float, with_shift: bool, with_ctf: bool):
    case = Case(box, scale)
    expected = case.run("reference", torch.float64, with_shift, with_ctf)
    assert worst(case.run("cpu", torch.float32, with_shift, with_ctf), expected) < TOLERANCE


def test_reference_gradients_are_those_of_finite_differences():
    case = Case(8, 1.5, count=2)

    def images(volume: Tensor, rotation: Tensor, shift: Tensor) -> Tensor:
        given = rotation, shift, case.ctf, case.kx, case.ky, case.scale, case.box
        return torch.view_as_real(fourier_slice(volume, *given, backend="reference"))

    leaves = [leaf.clone().requires_grad_() for leaf in (case.volume, case.rotation, case.shift)]
    assert torch.autograd.gradcheck(images, leaves, eps=1e-7, atol=1e-6)


def test_results_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jit, "_SAMPLES_A_THREAD", 1)
    case, threads, found = Case(32, 2.0, count=9), torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(case.run("cpu", torch.float32))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_frequency_limit_is_a_prefix(backend: Backend):
    whole, near = Case(32, 2.0), fourier_pixels(32, 9)
    n = len(near)
    given = whole.volume.to(torch.complex64), whole.rotation.float(), whole.shift.float()
    options = {"scale": 2.0, "box_size": 32, "backend": backend}
    kx, ky, ctf = whole.kx.float(), whole.ky.float(), whole.ctf.float()
    full = fourier_slice(*given, ctf, kx, ky, **options)
    assert torch.equal(fourier_slice(*given, ctf[:, :n], near.kx, near.ky, **options), full[:, :n])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_operator_passes_torchs_own_checks(backend: Backend):
    # Schema, fake tensors against real ones, autograd registration.
    case = Case(12, 1.0, count=2)
    volume, rotation = case.volume.to(torch.complex64), case.rotation.float()
    leaves = [leaf.clone().requires_grad_() for leaf in (volume, rotation, case.shift.float())]
    given = (*leaves, case.ctf.float(), case.kx.float(), case.ky.float(), case.scale, case.box, backend)
    torch.library.opcheck(
        torch.ops.scalecryo.fourier_slice.default,
        given,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_backend_follows_the_tensors_and_falls_back_with_one_warning():
    single = torch.zeros(2, 2, 2, dtype=torch.complex64)
    assert choose_backend(single) == "cpu"
    assert choose_backend(single.to(torch.complex128)) == "reference"
    assert choose_backend(single.to("meta")) == "reference"
    assert choose_backend(single, "reference") == "reference"
    backends._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="cpu kernels cannot take .*complex128"):
        assert choose_backend(single.to(torch.complex128), "cpu") == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_backend(single.to(torch.complex128), "cpu") == "reference"


def test_without_triton_the_reference_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backends, "cuda_kernels", lambda: None)
    backends._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="pip install triton"):
        assert choose_backend(torch.zeros(2, 2, 2, dtype=torch.complex64), "cuda") == "reference"


@pytest.mark.usefixtures("wrong_shapes")
def test_bad_input_is_refused():
    case = Case(8, 1.0, count=2)
    given = {"rotation": case.rotation, "shift_px": case.shift, "ctf": case.ctf, "kx": case.kx, "ky": case.ky}
    for name, value in (("rotation", case.rotation[0]), ("shift_px", case.shift[:1]), ("ctf", case.ctf[:, 1:])):
        with pytest.raises(InputError, match=f"{name} has shape"):
            fourier_slice(case.volume, **(given | {name: value}), scale=1.0, box_size=8)
    ctf = case.ctf.clone().requires_grad_()
    with pytest.raises(InputError, match="detach"):
        fourier_slice(case.volume, **(given | {"ctf": ctf}), scale=1.0, box_size=8)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_an_undefined_rotation_gives_undefined_images(backend: Backend):
    case = Case(16, 2.0, count=2)
    rotation = case.rotation.float()
    rotation[1] = float("nan")
    given = case.volume.to(torch.complex64), rotation, None, None, case.kx.float(), case.ky.float(), 2.0, 16
    images = fourier_slice(*given, backend=backend)
    assert torch.isfinite(images.abs()[0]).all()
    assert torch.isnan(images.abs()[1]).all()
