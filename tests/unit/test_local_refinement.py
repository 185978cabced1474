"""Local refinement of poses against closed-form projections of Gaussian blobs, finite differences, and the forward
model."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scalecryo.errors import InputError
from scalecryo.physics.ctf import CtfParameters, contrast_transfer
from scalecryo.physics.fft import FourierPixels, fourier_pixels, rfft3_centred
from scalecryo.physics.fourier_slice import extract_slices, gridding_correction, padded_box
from scalecryo.physics.image_formation import form_images
from scalecryo.physics.kernels import jit
from scalecryo.physics.rotation import geodesic_angle, random_rotations, rotation_from_vector
from scalecryo.pose import local_refinement_torch
from scalecryo.pose.local_refinement import Backend, RefinedPoses, evaluate_poses, refine_poses

BACKENDS: list[Backend] = ["numba", "torch"]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Scene:
    """Projections of Gaussian blobs in closed form, and the map sampled in real space. Double precision."""

    volume_rfft: Tensor
    images: Tensor
    rotation: Tensor
    shift_px: Tensor
    ctf: Tensor | None
    pixels: FourierPixels
    scale: float

    def single(self) -> "Scene":
        ctf = None if self.ctf is None else self.ctf.float()
        narrow = {"rotation": self.rotation.float(), "shift_px": self.shift_px.float(), "ctf": ctf}
        transforms = {"volume_rfft": self.volume_rfft.to(torch.complex64), "images": self.images.to(torch.complex64)}
        return replace(self, pixels=self.pixels.to(dtype=torch.float32), **narrow, **transforms)

    def refine_poses(
        self, rotation: Tensor, shift_px: Tensor, radius: float, backend: Backend, **options
    ) -> RefinedPoses:
        near = self.pixels.prefix(radius)
        observed, ctf = self.images[:, : len(near)], None if self.ctf is None else self.ctf[:, : len(near)]
        arguments = (self.volume_rfft, observed, rotation, shift_px, ctf, near.weight, near, self.scale)
        return refine_poses(*arguments, backend=backend, **options)


def scene(box: int, padding: float, count: int, sigma: float = 1.5, *, with_ctf: bool = False, seed: int = 0) -> Scene:
    """Transform of a blob at r: sqrt(2 pi sigma^2)^3 exp(-2 pi^2 sigma^2 |k|^2 / N^2 - 2 pi i k.r / N)."""
    generator = torch.Generator().manual_seed(seed)
    pixels = fourier_pixels(box).to(dtype=torch.float64)
    # Within 0.2 of the box, as in the table of interpolation errors that the tolerances below come from.
    points = torch.randn(100, 3, dtype=torch.float64, generator=generator)
    distance = torch.rand(100, 1, dtype=torch.float64, generator=generator) ** (1 / 3)
    points = points / points.norm(dim=1, keepdim=True) * distance * 0.2 * box
    axis = torch.arange(box, dtype=torch.float64) - box // 2
    lines = [torch.exp(-((axis - points[:, i : i + 1]) ** 2) / (2 * sigma**2)) for i in range(3)]
    volume = torch.einsum("nz,ny,nx->zyx", lines[2], lines[1], lines[0])
    corrected = volume * gridding_correction(box, padding, dtype=torch.float64)

    rotation = random_rotations(count, generator, dtype=torch.float64)
    shift_px = 2 * torch.rand(count, 2, dtype=torch.float64, generator=generator) - 1
    k = torch.stack([pixels.kx, pixels.ky], dim=-1)
    phase = torch.einsum("pi,bji,nj->bpn", k, rotation[:, :, :2], points) * (-2 * math.pi / box)
    envelope = (2 * math.pi * sigma**2) ** 1.5 * torch.exp(-2 * (math.pi * sigma * pixels.radius / box) ** 2)
    slices = torch.complex(phase.cos().sum(-1), phase.sin().sum(-1)) * envelope
    ctf = None
    if with_ctf:
        one = torch.ones(count, dtype=torch.float64)
        defocus = 8_000 + 8_000 * torch.rand(count, dtype=torch.float64, generator=generator)
        parameters = CtfParameters(defocus, defocus - 500, 30 * one, 300 * one, 2.7 * one, 0.1 * one, 0 * one)
        ctf = contrast_transfer(parameters, pixels.kx, pixels.ky, box, 2.0)
    images = form_images(slices, ctf, shift_px, pixels.kx, pixels.ky, box)
    scale = padded_box(box, padding) / box
    transform = rfft3_centred(corrected, padded_box(box, padding))
    return Scene(transform, images, rotation, shift_px, ctf, pixels, scale)


def away(given: Scene, degrees: float, px: float, seed: int = 1) -> tuple[Tensor, Tensor]:
    """The true poses, each turned by so many degrees about a random axis and shifted by so many px."""
    generator, count = torch.Generator().manual_seed(seed), len(given.rotation)
    axis = torch.randn(count, 3, dtype=torch.float64, generator=generator)
    aside = torch.randn(count, 2, dtype=torch.float64, generator=generator)
    turn = rotation_from_vector(math.radians(degrees) * axis / axis.norm(dim=1, keepdim=True)).to(given.rotation.dtype)
    shift = given.shift_px + px * (aside / aside.norm(dim=1, keepdim=True)).to(given.shift_px.dtype)
    return given.rotation @ turn, shift


def problem(given: Scene) -> local_refinement_torch.Problem:
    p = given.pixels
    return local_refinement_torch.Problem(
        given.volume_rfft, given.images, given.ctf, p.weight, p.kx, p.ky, given.scale, p.box_size
    )


def predicted(given: Scene, rotation: Tensor, shift_px: Tensor) -> Tensor:
    """The forward model."""
    p = given.pixels
    slices = extract_slices(given.volume_rfft, rotation, p.kx, p.ky, given.scale)
    return form_images(slices, given.ctf, shift_px, p.kx, p.ky, p.box_size)


@pytest.mark.parametrize(("box", "padding"), [(16, 1.0), (20, 2.0), (22, 1.5)])
def test_cost_and_gradient_are_those_of_the_forward_model(box: int, padding: float):
    # Central differences of the forward model in double precision. Error: h^2 f''' ~ 1e-10, rounding 1e-16 / h ~ 1e-10,
    # and the kinks of the interpolation: a sample that crosses a grid plane within h |q| = 1e-5 voxel of it.
    given = scene(box, padding, count=6, sigma=1.2, with_ctf=True)
    rotation, shift_px = away(given, 8.0, 0.7)
    cost, matrix, gradient = local_refinement_torch.normal_equations(problem(given), rotation, shift_px)
    weight, step = given.pixels.weight, 1e-6

    residual = given.images - predicted(given, rotation, shift_px)
    expected = 0.5 * (weight * residual.abs().square()).sum(-1)
    torch.testing.assert_close(cost, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        local_refinement_torch.costs(problem(given), rotation, shift_px), expected, rtol=1e-12, atol=0
    )

    derivatives = []
    for i in range(5):
        vector = torch.zeros(6, 5, dtype=torch.float64)
        vector[:, i] = step
        ahead, behind = (
            predicted(given, rotation @ rotation_from_vector(v[:, :3]), shift_px + v[:, 3:]) for v in (vector, -vector)
        )
        derivatives.append((ahead - behind) / (2 * step))
    jacobian = torch.stack(derivatives, dim=-1)
    slope = (weight[:, None] * (jacobian.conj() * residual[:, :, None]).real).sum(1)
    normal = torch.einsum("p,bpi,bpj->bij", weight.to(jacobian.dtype), jacobian.conj(), jacobian).real
    torch.testing.assert_close(gradient, slope, rtol=1e-6, atol=1e-6 * slope.abs().max().item())
    torch.testing.assert_close(matrix, normal, rtol=1e-6, atol=1e-6 * normal.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("box", "padding"), [(30, 2.0), (64, 1.0), (100, 1.0)])
def test_candidate_costs_are_those_of_the_forward_model(box: int, padding: float, backend: Backend):
    given = scene(box, padding, count=4, with_ctf=True)
    poses = [away(given, degrees, 1.0, seed) for seed, degrees in enumerate((0.0, 5.0, 90.0))]
    weight = given.pixels.weight
    expected = torch.stack(
        [0.5 * (weight * (given.images - predicted(given, *pose)).abs().square()).sum(-1) for pose in poses], dim=1
    )
    narrow = given.single()
    rotation, shift_px = (torch.stack([pose[i] for pose in poses], dim=1).float() for i in (0, 1))
    data = (narrow.images, rotation, shift_px, narrow.ctf, narrow.pixels.weight, narrow.pixels, narrow.scale)
    found = evaluate_poses(narrow.volume_rfft, *data, backend=backend)
    assert found.dtype == torch.float64
    # Single precision places samples to 1e-5 voxel and rounds every term to 1e-7: 1e-5 of the images' own power.
    power = 0.5 * (weight * given.images.abs().square()).sum(-1, keepdim=True)
    assert ((found - expected).abs() < 1e-5 * power).all()


@pytest.mark.parametrize(
    ("box", "padding", "sigma", "with_ctf", "degrees"),
    # degrees: trilinear interpolation with sinc^2 correction leaves 0.8 % (twice padded) or 3.6 % (unpadded) of the
    # signal wrong, for blobs within 0.2 of the box. If all of that looked like one turn it would be that fraction over
    # 2 pi |r| |k| / N, with the blobs' rms |r| of 0.15 N and |k| of N / (2 pi sigma sqrt(2)): 0.008 or 0.036 rad times
    # sigma sqrt(2) / 0.15 N, the degrees below. In fact most of it looks like no turn at all.
    [
        (64, 2.0, 1.5, False, 0.1),
        (64, 2.0, 1.5, True, 0.1),
        (100, 1.0, 1.5, True, 0.3),
        (30, 2.0, 1.0, False, 0.15),
    ],
)
def test_converges_from_ten_degrees_and_two_pixels(
    box: int, padding: float, sigma: float, with_ctf: bool, degrees: float
):
    given = scene(box, padding, count=24, sigma=sigma, with_ctf=with_ctf).single()
    start = away(given, 10.0, 2.0)
    found = {}
    for backend in BACKENDS:
        rotation, shift_px = start
        for radius in (6, 10, min(20, box // 2 - 1)):
            refined = given.refine_poses(rotation, shift_px, radius, backend, passes=4)
            rotation, shift_px = refined.rotation, refined.shift_px
        error = geodesic_angle(rotation.double(), given.rotation.double())
        assert error.median() < degrees / 2
        assert error.quantile(0.9) < degrees
        # A shift moves the strongest pixels by as much as a turn does at |r| = 0.15 N: the same bound, in px.
        assert (shift_px - given.shift_px).norm(dim=1).max() < math.radians(degrees) * 0.15 * box
        found[backend] = rotation
    # Both stop within single precision of the same minimum: 1e-7 of the data is 1e-2 of the smallest step's effect.
    assert geodesic_angle(found["numba"].double(), found["torch"].double()).max() < 0.01


@pytest.mark.parametrize(("box", "padding", "fit_shift"), [(30, 1.0, True), (64, 2.0, True), (100, 1.0, False)])
def test_compiled_and_batched_versions_agree(box: int, padding: float, fit_shift: bool):
    given = scene(box, padding, count=12, with_ctf=True, seed=2).single()
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(given.images.shape, dtype=torch.complex64, generator=generator)
    noisy = replace(given, images=given.images + noise * given.images.abs().mean())
    start = away(given, 4.0, 0.5)
    for passes in (1, 3):
        a, b = (
            noisy.refine_poses(
                *start, 16, backend, passes=passes, fit_shift=fit_shift, max_turn_deg=3.0, max_shift_px=0.4
            )
            for backend in BACKENDS
        )
        # Single precision sums of gradient and matrix, 1e-6 of their size, give steps of degrees to 1e-5 of theirs;
        # each pass may magnify the difference.
        assert geodesic_angle(a.rotation.double(), b.rotation.double()).max() < 2e-3
        assert (a.shift_px - b.shift_px).abs().max() < 1e-4
        torch.testing.assert_close(a.cost, b.cost, rtol=1e-5, atol=0)
        torch.testing.assert_close(a.cost_before, b.cost_before, rtol=1e-5, atol=0)
        assert (a.cost < a.cost_before).all()


def test_double_precision_refinement_is_exact_where_the_model_is():
    # Images made by the slices themselves: the minimum is the true pose, to Newton's quadratic convergence.
    given = scene(32, 1.0, count=8)
    given = replace(given, images=predicted(given, given.rotation, given.shift_px))
    rotation, shift_px = away(given, 3.0, 0.5)
    refined = given.refine_poses(rotation, shift_px, 15, "torch", passes=30)
    assert refined.rotation.dtype == torch.float64
    assert geodesic_angle(refined.rotation, given.rotation).max() < 1e-6
    assert (refined.shift_px - given.shift_px).abs().max() < 1e-8


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    backend=st.sampled_from(BACKENDS),
    passes=st.integers(0, 5),
    radius=st.integers(1, 14),
    fit_shift=st.booleans(),
    signal=st.sampled_from([0.0, 1.0]),
)
def test_never_worse(seed: int, backend: Backend, passes: int, radius: int, fit_shift: bool, signal: float):
    generator = torch.Generator().manual_seed(seed)
    volume = torch.randn(30, 30, 30, generator=generator)
    pixels = fourier_pixels(30).prefix(radius)
    rotation, shift_px = random_rotations(5, generator), 3 * torch.randn(5, 2, generator=generator)
    transform = rfft3_centred(volume)
    images = signal * extract_slices(transform, rotation, pixels.kx, pixels.ky, 1.0)
    images = images + 30 * torch.randn(images.shape, dtype=torch.complex64, generator=generator)
    arguments = (None, pixels.weight, pixels, 1.0)
    found = refine_poses(
        transform, images, rotation, shift_px, *arguments, passes=passes, fit_shift=fit_shift, backend=backend
    )
    assert (found.cost <= found.cost_before).all()
    same = found.cost == found.cost_before
    assert torch.equal(found.rotation[same], rotation[same])
    assert torch.equal(found.shift_px[same], shift_px[same])
    if passes == 0:
        assert same.all()
    if not fit_shift:
        assert torch.equal(found.shift_px, shift_px)
    # The cost reported is that of the pose returned: sums of p terms in single precision, blocks of 256 of them.
    poses = found.rotation[:, None], found.shift_px[:, None]
    again = evaluate_poses(transform, images, *poses, *arguments, backend=backend)[:, 0]
    torch.testing.assert_close(again, found.cost, rtol=1e-5, atol=0)
    identity = found.rotation.mT @ found.rotation
    assert (identity - torch.eye(3)).abs().max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_information_poses_stay_bit_for_bit(backend: Backend):
    given = scene(30, 1.0, count=4, with_ctf=True).single()
    rotation, shift_px = away(given, 5.0, 1.0)
    weightless = replace(given, pixels=replace(given.pixels, weight=torch.zeros_like(given.pixels.weight)))
    opaque = replace(given, ctf=torch.zeros_like(given.ctf))
    empty = replace(given, volume_rfft=torch.zeros_like(given.volume_rfft))
    broken = replace(given, images=given.images * float("nan"))
    infinite = replace(given, volume_rfft=given.volume_rfft * float("inf"))
    for nothing in (weightless, opaque, empty, broken, infinite):
        found = nothing.refine_poses(rotation, shift_px, 14, backend, passes=3)
        assert torch.equal(found.rotation, rotation)
        assert torch.equal(found.shift_px, shift_px)
    assert (weightless.refine_poses(rotation, shift_px, 14, backend, passes=3).cost == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_hopeless_image_does_not_touch_the_others(backend: Backend):
    given = scene(30, 1.0, count=3).single()
    start = away(given, 3.0, 0.5)
    expected = given.refine_poses(*start, 14, backend, passes=3)
    images = given.images.clone()
    images[1] = float("nan")
    found = replace(given, images=images).refine_poses(*start, 14, backend, passes=3)
    assert torch.equal(found.rotation[1], start[0][1])
    assert torch.equal(found.rotation[::2], expected.rotation[::2])
    assert torch.equal(found.cost[::2], expected.cost[::2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_pixels_beyond_the_transform_count_as_unexplained(backend: Backend):
    # A transform of 20 px under images of 30 px: beyond 9 cycles the model is zero, which no pose can change.
    given = scene(30, 1.0, count=4).single()
    small = replace(given, volume_rfft=given.volume_rfft[:20, :20, :11].contiguous())
    found = small.refine_poses(given.rotation, given.shift_px, 14, backend, passes=2)
    residual = small.images - predicted(small, given.rotation, given.shift_px)
    expected = 0.5 * (given.pixels.weight * residual.abs().square()).sum(-1).double()
    torch.testing.assert_close(found.cost_before, expected, rtol=1e-5, atol=0)
    assert (found.cost <= found.cost_before).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_are_limited(backend: Backend):
    given = scene(30, 2.0, count=6).single()
    rotation, shift_px = away(given, 8.0, 1.5)
    found = given.refine_poses(rotation, shift_px, 8, backend, passes=1, max_turn_deg=0.5, max_shift_px=0.1)
    # Rounding of the angle between single precision matrices: 1e-7 rad against 0.5 degrees.
    assert geodesic_angle(found.rotation.double(), rotation.double()).max() < 0.5 + 1e-3
    assert (found.shift_px - shift_px).norm(dim=1).max() < 0.1 + 1e-5


def test_results_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jit, "_SAMPLES_A_THREAD", 1)
    given = scene(30, 2.0, count=11).single()
    start, found = away(given, 5.0, 1.0), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(given.refine_poses(*start, 14, "numba", passes=3))
    for other in found[1:]:
        assert torch.equal(other.rotation, found[0].rotation)
        assert torch.equal(other.shift_px, found[0].shift_px)
        assert torch.equal(other.cost, found[0].cost)


def test_inputs_are_left_alone_and_gradients_are_not_needed():
    given = scene(30, 1.0, count=3).single()
    rotation, shift_px = (pose.requires_grad_() for pose in away(given, 5.0, 1.0))
    wanting = replace(given, volume_rfft=given.volume_rfft.clone().requires_grad_())
    before = rotation.detach().clone(), shift_px.detach().clone()
    found = wanting.refine_poses(rotation, shift_px, 10, "numba", passes=2)
    assert not found.rotation.requires_grad
    assert torch.equal(rotation, before[0])
    assert torch.equal(shift_px, before[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend: Backend):
    given = scene(16, 1.0, count=2).single()
    near = given.pixels.prefix(5)
    arguments = (None, near.weight, near, 1.0)
    images = given.images[:0, : len(near)]
    found = refine_poses(
        given.volume_rfft, images, torch.zeros(0, 3, 3), torch.zeros(0, 2), *arguments, passes=2, backend=backend
    )
    assert found.rotation.shape == (0, 3, 3)
    assert found.shift_px.shape == (0, 2)
    assert found.cost.shape == found.cost_before.shape == (0,)
    poses = torch.zeros(0, 4, 3, 3), torch.zeros(0, 4, 2)
    assert evaluate_poses(given.volume_rfft, images, *poses, *arguments, backend=backend).shape == (0, 4)


def test_bad_input_is_refused():
    given = scene(16, 1.0, count=2).single()
    rotation, shift_px, near = given.rotation, given.shift_px, given.pixels

    def run(volume_rfft=given.volume_rfft, images=given.images, turned=rotation, ctf=None, table=near, **options):
        options = {"passes": 1} | options
        return refine_poses(volume_rfft, images, turned, shift_px, ctf, near.weight, table, 1.0, **options)

    with pytest.raises(InputError, match="rotation has shape"):
        run(turned=rotation[:1])
    with pytest.raises(InputError, match="rotation has shape"):
        run(turned=rotation[:, None])
    with pytest.raises(InputError, match="ctf has shape"):
        run(ctf=torch.ones(2, 3))
    with pytest.raises(InputError, match="same prefix"):
        run(table=near.prefix(3))
    with pytest.raises(InputError, match="passes is -1"):
        run(passes=-1)
    with pytest.raises(InputError, match="not finite"):
        run(turned=rotation * float("nan"))
    with pytest.raises(InputError, match="complex64 on the CPU"):
        run(images=given.images.to(torch.complex128), backend="numba")
