"""The compiled slice kernels against `physics.fourier_slice` in double precision, and their adjoint identity."""

import threading
from typing import Any

import numba
import numpy as np
import pytest
import torch
from torch import Tensor

from scalecryo.errors import InputError
from scalecryo.physics.fft import FourierPixels, fourier_pixels
from scalecryo.physics.fourier_slice import extract_slices, insert_slices
from scalecryo.physics.image_formation import shift_ramp
from scalecryo.physics.kernels import cpu_insert, jit
from scalecryo.physics.kernels.cpu_insert import insert_slices_cpu
from scalecryo.physics.kernels.refine_cpu import bricks
from scalecryo.physics.rotation import euler_to_rotation, random_rotations

# Single precision places a sample to about |q| 2^-23 voxels, and smooth transforms change by less than their maximum
# from voxel to voxel: at |q| <= 64 that is 8e-6 of the maximum at worst.
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def hermitian_transform(box: int, seed: int = 0) -> torch.Tensor:
    """Transform of a real volume that fades towards the edges, in double precision, largest value 1."""
    generator = torch.Generator().manual_seed(seed)
    axis = (torch.arange(box, dtype=torch.float64) + box // 2) % box - box // 2
    line = torch.exp(-0.5 * (axis / (box / 8)) ** 2)
    noise = torch.randn(box, box, box, dtype=torch.float64, generator=generator)
    transform = torch.fft.rfftn(noise * line[:, None, None] * line[:, None] * line)
    return transform / transform.abs().max()


def rotations(count: int, seed: int = 1) -> torch.Tensor:
    """Random ones, and some that put samples exactly on grid planes and on q_x = 0."""
    special = euler_to_rotation(torch.tensor([[0.0, 0.0, 0.0], [90.0, 0.0, 0.0], [0.0, 90.0, 0.0], [90.0, 90.0, 90.0]]))
    return torch.cat([random_rotations(count, torch.Generator().manual_seed(seed)), special])


CASES = [(30, 1.0), (30, 2.0), (64, 1.0), (64, 2.0), (100, 1.0), (64, 1.5)]


@pytest.mark.parametrize(("box", "scale"), CASES)
def test_extraction_is_that_of_the_reference(box: int, scale: float):
    volume, pixels, rotation = hermitian_transform(int(box * scale)), fourier_pixels(box), rotations(12)
    wide = pixels.to(dtype=torch.float64)
    expected = extract_slices(volume, rotation.double(), wide.kx, wide.ky, scale)
    found = extract_slices(volume.to(torch.complex64), rotation, pixels.kx, pixels.ky, scale, backend="cpu")
    assert found.dtype == torch.complex64
    assert (found - expected).abs().max() < TOLERANCE
    # Double precision rotations are accepted; rounding them is within the tolerance.
    rounded = extract_slices(volume.to(torch.complex64), rotation.double(), pixels.kx, pixels.ky, scale)
    assert torch.equal(rounded, found)


@pytest.mark.parametrize(("box", "scale"), CASES)
def test_insertion_is_that_of_the_reference(box: int, scale: float):
    generator = torch.Generator().manual_seed(2)
    pixels, rotation, padded = fourier_pixels(box), rotations(12), int(box * scale)
    values = torch.randn(len(rotation), len(pixels), dtype=torch.complex64, generator=generator)
    power = torch.rand(len(rotation), len(pixels), generator=generator)
    numerator, denominator = grids(padded)
    insert(values, power, rotation, pixels, numerator, denominator, scale)
    for inserted, grid in ((values, numerator), (power, denominator)):
        # The reference in the same precision: on grid planes, double precision may pick the other half for a value.
        expected = insert_slices(inserted, rotation, pixels.kx, pixels.ky, scale, padded)
        assert (grid - expected).abs().max() < TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("at_once", [1, 5000])
def test_shifts_and_weights_are_those_of_the_plain_composition(at_once: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_insert, "_SAMPLES_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(6)
    pixels, rotation = fourier_pixels(48), rotations(8)
    values = torch.randn(len(rotation), len(pixels), dtype=torch.complex64, generator=generator)
    shift, weight = (
        torch.randn(len(rotation), 2, generator=generator) * 5,
        torch.rand(len(rotation), generator=generator),
    )
    power = torch.rand(1, len(pixels), generator=generator)
    numerator, denominator = grids(96)
    insert(values, power, rotation, pixels, numerator, denominator, 2.0, weight, shift)
    centred = values * shift_ramp(-shift, pixels.kx, pixels.ky, 48) * weight[:, None]
    for inserted, grid in ((centred, numerator), (power * weight[:, None], denominator)):
        expected = insert_slices(inserted, rotation, pixels.kx, pixels.ky, 2.0, 96)
        # Phases of up to 50 rad are rounded to 4e-6 rad, a few of them add up in a voxel.
        assert (grid - expected).abs().max() < TOLERANCE * expected.abs().max()


def insert(
    values: Tensor,
    power: Tensor,
    rotation: Tensor,
    pixels: FourierPixels,
    numerator: Tensor,
    denominator: Tensor,
    scale: float,
    weight: Tensor | None = None,
    shift_px: Tensor | None = None,
) -> None:
    """insert_slices_cpu, by default without shifts and weights."""
    weight = torch.ones(len(rotation)) if weight is None else weight
    shift_px = torch.zeros(len(rotation), 2) if shift_px is None else shift_px
    pose = rotation, shift_px, pixels.kx, pixels.ky, round(len(numerator) / scale)
    insert_slices_cpu(values, power, weight, torch.ones(len(pixels)), *pose, numerator, denominator)


def grids(box: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (box, box, box // 2 + 1)
    return torch.zeros(shape, dtype=torch.complex64), torch.zeros(shape)


def test_insertion_is_the_adjoint_of_extraction():
    # Re<extract(V), S> = Re<V, insert(S)>: an identity; both sides are sums of about 1e5 rounded terms.
    generator = torch.Generator().manual_seed(3)
    pixels, rotation = fourier_pixels(48), random_rotations(40, generator)
    volume = torch.randn(96, 96, 49, dtype=torch.complex64, generator=generator)
    values = torch.randn(40, len(pixels), dtype=torch.complex64, generator=generator)
    numerator, denominator = grids(96)
    insert(values, values.real, rotation, pixels, numerator, denominator, 2.0)
    slices = extract_slices(volume, rotation, pixels.kx, pixels.ky, 2.0)
    left = (slices.conj() * values).real.double().sum()
    right = (volume.conj() * numerator).real.double().sum()
    size = (slices.abs() * values.abs()).double().sum()
    assert abs(left - right) < 1e-6 * size
    # Interpolation weights add up to one, so real values are conserved.
    assert denominator.double().sum() == pytest.approx(values.real.double().sum().item(), abs=1e-6 * size.item())


def test_insertion_adds_to_what_is_there_and_skips_images_without_weight():
    generator = torch.Generator().manual_seed(4)
    pixels, rotation = fourier_pixels(32), random_rotations(6, generator)
    values = torch.randn(6, len(pixels), dtype=torch.complex64, generator=generator)
    power = torch.rand(6, len(pixels), generator=generator)
    once, twice, weight = grids(32), grids(32), torch.tensor([0.0, 1.0]).repeat(3)
    insert(values[1::2], power[1::2], rotation[1::2], pixels, *once, 1.0)
    for _ in range(2):
        insert(values, power, rotation, pixels, *twice, 1.0, weight=weight)
    for a, b in zip(once, twice, strict=True):
        # Adding everything a second time rounds differently from doubling: one unit in the last place a term.
        assert torch.allclose(2 * a, b, rtol=1e-5, atol=1e-5)


def test_samples_beyond_the_transform_are_zero_and_are_not_inserted():
    pixels, rotation, volume = fourier_pixels(32), rotations(3), hermitian_transform(20).to(torch.complex64)
    outside = pixels.radius > 20 / 2 - 1 + 1e-3
    slices = extract_slices(volume, rotation, pixels.kx, pixels.ky, 1.0)
    assert (slices[:, outside] == 0).all()
    assert (slices[:, ~outside].abs() > 0).all()
    numerator, denominator = grids(20)
    values, power = torch.ones_like(slices), outside.float().expand(len(rotation), -1)
    insert(values * outside, power, rotation, pixels, numerator, denominator, 1.0)
    assert not numerator.any()
    assert not denominator.any()


def test_results_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jit, "_SAMPLES_A_THREAD", 1)
    generator = torch.Generator().manual_seed(5)
    pixels, rotation = fourier_pixels(48), random_rotations(30, generator)
    values = torch.randn(30, len(pixels), dtype=torch.complex64, generator=generator)
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        numerator, denominator = grids(96)
        insert(values, values.abs(), rotation, pixels, numerator, denominator, 2.0)
        slices = extract_slices(numerator, rotation, pixels.kx, pixels.ky, 2.0)
        results.append((numerator, denominator, slices))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_is_kept_of_pixels_follows_the_pixels():
    # The order of the pixels is kept from call to call: pixels written to, or that take freed memory, must be seen.
    volume, rotation = hermitian_transform(32).to(torch.complex64), rotations(3)
    pixels = fourier_pixels(32, 12)
    kx, ky = pixels.kx.clone(), pixels.ky.clone()
    extract_slices(volume, rotation, kx, ky, 1.0, backend="cpu")
    kx, ky = kx.mul_(0.5), ky.mul_(0.5)
    expected = extract_slices(volume, rotation, pixels.kx, pixels.ky, 0.5, backend="reference")
    found = extract_slices(volume, rotation, kx, ky, 1.0, backend="cpu")
    assert (found - expected).abs().max() < TOLERANCE
    for angle in torch.linspace(0, 3, 40):  # more than are kept
        kx, ky = angle.cos() * pixels.kx, angle.sin() * pixels.kx
        expected = extract_slices(volume, rotation, kx, ky, 1.0, backend="reference")
        found = extract_slices(volume, rotation, kx, ky, 1.0, backend="cpu")
        assert (found - expected).abs().max() < TOLERANCE
    with torch.inference_mode():  # tensors without a version
        kx = pixels.kx * 1
        found = extract_slices(volume, rotation, kx, pixels.ky, 1.0, backend="cpu")
        assert torch.equal(found, extract_slices(volume, rotation, pixels.kx, pixels.ky, 1.0, backend="cpu"))
        turned = extract_slices(volume, rotation, -pixels.kx, pixels.ky, 1.0, backend="cpu")
        assert torch.equal(extract_slices(volume, rotation, kx.neg_(), pixels.ky, 1.0, backend="cpu"), turned)


def test_empty_batches():
    pixels, rotation = fourier_pixels(16), torch.zeros(0, 3, 3)
    numerator, denominator = grids(16)
    assert extract_slices(numerator, rotation, pixels.kx, pixels.ky, 1.0).shape == (0, len(pixels))
    values = torch.zeros(0, len(pixels), dtype=torch.complex64)
    insert(values, values.real, rotation, pixels, numerator, denominator, 1.0)
    assert not numerator.any()


def test_bad_input_is_refused():
    pixels, rotation = fourier_pixels(16), torch.eye(3)[None]
    values = torch.zeros(1, len(pixels), dtype=torch.complex64)
    numerator, denominator = grids(16)

    def refused(match: str, **change: Any) -> None:
        given = {"values": values, "power": values.real, "rotation": rotation, "pixels": pixels}
        given |= {"numerator": numerator, "denominator": denominator, "scale": 1.0}
        with pytest.raises(InputError, match=match):
            insert(**(given | change))

    for broken in (float("nan"), float("inf")):
        refused("rotation", rotation=rotation * broken)
    refused("numerator has shape", numerator=numerator[:, :, :5])
    refused("denominator has shape", denominator=torch.zeros(16, 16, 18)[:, :, ::2])
    refused("power has shape", power=values.real[:, :5].contiguous())
    refused("shift_px has shape", shift_px=torch.zeros(1, 3))
    refused("weight has shape", weight=torch.ones(2))
    refused("float32", power=values.real.double())


def test_work_is_shared_by_at_most_torchs_threads():
    seen: list[tuple[int, int, int]] = []

    def work(share: int, shares: int) -> None:
        seen.append((share, shares, threading.get_ident()))

    torch.set_num_threads(3)
    jit.in_threads(work, 10**9)
    assert sorted(share for share, _, _ in seen) == [0, 1, 2]
    assert {shares for _, shares, _ in seen} == {3}
    seen.clear()
    jit.in_threads(work, 10)
    assert [(share, shares) for share, shares, _ in seen] == [(0, 1)]


def test_an_error_in_a_thread_is_raised():
    def work(share: int, shares: int) -> None:
        if share == shares - 1:
            raise ArithmeticError

    torch.set_num_threads(2)
    with pytest.raises(ArithmeticError):
        jit.in_threads(work, 10**9)


def test_kernels_compile_where_nothing_can_be_cached(monkeypatch: pytest.MonkeyPatch):
    compile_for_real = numba.njit

    def njit(**options: Any) -> Any:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return compile_for_real(**options)

    monkeypatch.setattr(numba, "njit", njit)

    @jit.kernel
    def double(values: np.ndarray) -> np.ndarray:
        return 2 * values

    assert (double(np.ones(3)) == 2).all()


@pytest.mark.parametrize(("box", "half"), [(8, 1), (8, 2), (8, 3), (12, 4)])
def test_every_frequency_has_its_place_in_a_brick(box: int, half: int) -> None:
    # Reference: the layout's own definition, one value at a time.
    generator = np.random.default_rng(0)
    wrapped = generator.standard_normal((box, box, box // 2 + 1)).astype(np.complex64)
    found = bricks(wrapped, half).view(np.complex64).reshape(half + 1, half + 1, (half + 2) // 2, 2, 2, 2)
    expected = np.zeros_like(found)
    for z in range(-half, half + 1):
        for y in range(-half, half + 1):
            for x in range(half + 1):
                place = z + half, y + half, x
                at = tuple(index // 2 for index in place) + tuple(index % 2 for index in place)
                expected[at] = wrapped[z % box, y % box, x]
    assert np.array_equal(found, expected)
