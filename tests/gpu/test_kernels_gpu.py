"""The CUDA kernels on a GPU: numbers against the reference, races, waits for the device, and speed."""

import time
from collections.abc import Callable

import pytest
import torch

from scalecryo.config import config_from_dict
from scalecryo.map.backprojection import Backprojection
from scalecryo.model.autoencoder import build_autoencoder
from scalecryo.physics.fft import fourier_pixels
from scalecryo.physics.fourier_slice import fourier_slice, insert_slices
from scalecryo.physics.image_formation import CtfWeightedImages
from scalecryo.physics.kernels.backend import cuda_kernels
from scalecryo.physics.rotation import random_rotations
from scalecryo.pose.local_refinement import refine_poses
from scalecryo.train.stages.gradient_descent import build_optimiser
from tests.numerics.test_slice_backends import TOLERANCE, Case, worst
from tests.unit.test_hot_path import inputs, step
from tests.unit.test_local_refinement import away, scene
from tools.step_memory import step_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def _device():
    with torch.device("cuda"):
        yield


def on_gpu(case: Case) -> Case:
    for name in ("volume", "rotation", "shift", "ctf", "kx", "ky", "gradient"):
        setattr(case, name, getattr(case, name).cuda())
    return case


def made(box: int, scale: float, count: int) -> Case:
    """Generators of the CPU draw it."""
    with torch.device("cpu"):
        case = Case(box, scale, count)
    return on_gpu(case)


@pytest.mark.parametrize(("box", "scale"), [(32, 1.0), (64, 2.0), (128, 1.0)])
def test_slices_and_gradients(box: int, scale: float):
    case = made(box, scale, 16)
    expected = case.run("reference", torch.float64)
    # Places are rounded to |q| 2^-23 voxels: four times coarser at 128 px than in the tests on the CPU.
    assert worst(case.run("cuda", torch.float32), expected) < 4 * TOLERANCE


def test_additions_do_not_race():
    # 512 images through the same few voxels: lost additions would differ from run to run, and from double precision.
    case = made(32, 1.0, 512)
    expected = case.run("reference", torch.float64)[1]
    for _ in range(5):
        assert worst([case.run("cuda", torch.float32)[1]], [expected]) < TOLERANCE


@pytest.mark.parametrize("padding", [1.0, 2.0])
def test_insertion(padding: float):
    with torch.device("cpu"):
        pixels, rotation = fourier_pixels(64), random_rotations(200, torch.Generator().manual_seed(0))
        values = torch.randn(200, len(pixels), dtype=torch.complex64)
    box = int(64 * padding)
    grids = torch.zeros(box, box, box // 2 + 1, dtype=torch.complex64), torch.zeros(box, box, box // 2 + 1)
    wide, near = pixels.to("cuda", torch.float64), pixels.to("cuda")
    values, rotation = values.cuda(), rotation.cuda()
    cuda_kernels().insert_slices_cuda(values, values.abs(), rotation, near.kx, near.ky, padding, *grids)
    for grid, inserted in zip(grids, (values.to(torch.complex128), values.abs().double()), strict=True):
        expected = insert_slices(inserted, rotation.double(), wide.kx, wide.ky, padding, box)
        assert worst([grid], [expected]) < 4 * TOLERANCE


@pytest.mark.parametrize("padding", [1.0, 2.0])
def test_local_refinement(padding: float):
    with torch.device("cpu"):
        given = scene(48, padding, count=20, with_ctf=True).single()
        start = away(given, 4.0, 0.5)
        expected = given.refine_poses(*start, 14, "numba", passes=3)
    near = given.pixels.prefix(14).to("cuda")
    arguments = [given.images[:, : len(near)].cuda(), *(pose.cuda() for pose in start)]
    ctf = given.ctf[:, : len(near)].cuda()
    found = refine_poses(given.volume_rfft.cuda(), *arguments, ctf, near.weight, near, given.scale, passes=3)
    torch.testing.assert_close(found.rotation.cpu(), expected.rotation, rtol=0, atol=3e-4)
    torch.testing.assert_close(found.shift_px.cpu(), expected.shift_px, rtol=0, atol=3e-3)


def test_training_step_never_waits_for_the_device():
    config = config_from_dict({"pose": {"source": "encoder", "heads": 2, "copies": 2}, "encoder": {"network": "cnn"}})
    with torch.device("cpu"):
        model, batch = build_autoencoder(config, 32, 10).cuda(), inputs("cuda", 32, 4)
    optimiser = build_optimiser(config, model)

    def once() -> None:
        optimiser.zero_grad(set_to_none=True)
        step(model, batch)
        optimiser.step()

    once()  # compiles, and moves tables
    torch.cuda.set_sync_debug_mode("error")
    try:
        once()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_what_was_predicted():
    config = config_from_dict({"pose": {"source": "encoder"}, "encoder": {"network": "cnn"}})
    with torch.device("cpu"):
        model, batch = build_autoencoder(config, 128, 10).cuda(), inputs("cuda", 128, 16)
    optimiser = build_optimiser(config, model)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        optimiser.zero_grad(set_to_none=True)
        step(model, batch)
        optimiser.step()
    # A quarter for workspaces of convolutions and transforms.
    assert torch.cuda.max_memory_allocated() < 1.25 * step_memory(128, 16).peak


def milliseconds(work: Callable[[], object]) -> float:
    """Best of ten, after a warm-up."""
    work()
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


def test_kernels_are_faster_than_the_reference():
    case = made(128, 2.0, 32)
    reference, kernels = (milliseconds(lambda b=b: case.run(b, torch.float32)) for b in ("reference", "cuda"))
    assert kernels < reference / 2


def test_insertion_rate():
    with torch.device("cpu"):
        pixels, rotation = fourier_pixels(130, 64), random_rotations(1000, torch.Generator().manual_seed(0))
        values = torch.randn(1000, len(pixels), dtype=torch.complex64)
    accumulator, near = Backprojection(130, device="cuda"), pixels.to("cuda")
    images = CtfWeightedImages(values.cuda(), values.cuda().abs())
    pose = rotation.cuda(), torch.zeros(1000, 2), torch.ones(1000)
    # A core does 5,000 a second.
    assert milliseconds(lambda: accumulator.add(images, *pose, near)) < 1000 / 50


def test_backend_follows_the_device():
    case = made(16, 1.0, 2)
    volume = case.volume.to(torch.complex64).requires_grad_()
    k = case.kx.float(), case.ky.float()
    images = fourier_slice(volume, case.rotation.float(), None, None, *k, 1.0, 16)
    assert images.device.type == "cuda"
    assert torch.equal(images, fourier_slice(volume, case.rotation.float(), None, None, *k, 1.0, 16, backend="cuda"))
