"""The CUDA kernels without a GPU: run by Triton's interpreter against the reference, compiled ahead of time.

The interpreter runs programs one after the other. What it cannot see (programs that race) is covered by the counts of
atomic instructions in the compiled code, and by tests/gpu.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from scalecryo.physics.fft import fourier_pixels
from scalecryo.physics.fourier_slice import fourier_slice, insert_slices
from scalecryo.physics.rotation import euler_to_rotation, random_rotations
from scalecryo.pose import local_refinement_torch
from tests.numerics.test_slice_backends import TOLERANCE, Case, worst
from tests.unit.test_local_refinement import Scene, away, problem, scene

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("a GPU is here: tests/gpu runs the kernels on it", allow_module_level=True)

from scalecryo.physics.kernels import cuda

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_slices_and_their_gradients(scale: float):
    case = Case(14, scale, count=3)
    assert worst(case.run("cuda", torch.float32), case.run("reference", torch.float64)) < TOLERANCE


def test_slices_without_ctf_and_shift():
    case = Case(14, 1.0, count=2)
    expected = case.run("reference", torch.float64, with_shift=False, with_ctf=False)
    assert worst(case.run("cuda", torch.float32, with_shift=False, with_ctf=False), expected) < TOLERANCE


def test_slices_beyond_the_transform_are_zero_and_a_prefix_of_the_ctf_is_read_in_place():
    case, near = Case(16, 1.0, count=2), fourier_pixels(16, 6)
    small = case.volume[:10, :10, :6].to(torch.complex64)
    ctf = case.ctf.float()[:, : len(near)]
    assert not ctf.is_contiguous()
    given = small, case.rotation.float(), case.shift.float(), ctf, near.kx, near.ky, 1.0, 16
    found, expected = (fourier_slice(*given, backend=backend) for backend in ("cuda", "reference"))
    assert (found - expected).abs().max() < TOLERANCE * expected.abs().max()
    assert (found[:, near.radius > 4] == 0).all()


def insertion_error(scale: float) -> float:
    """Of the kernel against torch in the same precision, in both grids, relative to their largest entry."""
    pixels, padded = fourier_pixels(14), int(14 * scale)
    generator = torch.Generator().manual_seed(2)
    special = euler_to_rotation(torch.tensor([[0.0, 0.0, 0.0], [90.0, 90.0, 90.0]]))
    rotation = torch.cat([random_rotations(2, generator), special])
    values = torch.randn(len(rotation), len(pixels), dtype=torch.complex64, generator=generator)
    power = torch.rand(len(rotation), len(pixels), generator=generator)
    shape = (padded, padded, padded // 2 + 1)
    numerator, denominator = torch.zeros(shape, dtype=torch.complex64), torch.zeros(shape)
    geometry = rotation, pixels.kx, pixels.ky, scale
    cuda.insert_slices_cuda(values, power, *geometry, numerator, denominator)
    expected = [insert_slices(given, *geometry, padded) for given in (values, power)]
    return worst([numerator, denominator], expected)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_insertion(scale: float):
    assert insertion_error(scale) < TOLERANCE


@pytest.fixture
def without_atomics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The slice kernels with every atomic addition replaced by read, add, write."""
    source = Path(cuda.triton_slice.__file__).read_text()
    changed, count = re.subn(
        r"tl\.atomic_add\((.+), (.+), mask=mask, sem=\"relaxed\"\)",
        r"tl.store(\1, tl.load(\1, mask=mask, other=0.0) + \2, mask=mask)",
        source,
    )
    assert count == 4
    path = tmp_path / "without_atomics.py"
    path.write_text(changed)
    spec = importlib.util.spec_from_file_location("without_atomics", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(cuda, "triton_slice", module)
    return module


@pytest.mark.usefixtures("without_atomics")
def test_additions_without_atomics_are_noticed():
    # At padding 1 several samples of a program share a voxel; at 2 they hardly do, which would hide the fault.
    case = Case(14, 1.0, count=1)
    found, expected = (case.run(*arguments) for arguments in (("cuda", torch.float32), ("reference", torch.float64)))
    assert worst([found[1]], [expected[1]]) > 0.01
    # The rest of the mutant is sound.
    assert worst([found[0], *found[2:]], [expected[0], *expected[2:]]) < TOLERANCE
    assert insertion_error(1.0) > 0.01


@pytest.mark.parametrize("padding", [1.0, 2.0])
def test_refinement_sums(padding: float):
    # 1 and a half blocks of pixels, and a prefix that is read in place.
    given: Scene = scene(24, padding, count=3, with_ctf=True)
    near = len(given.pixels.prefix(9))
    start = away(given, 4.0, 0.7)
    expected = local_refinement_torch.normal_equations(cut(given, near, fused=False), *start)
    single = tuple(pose.float() for pose in start)
    found = local_refinement_torch.normal_equations(cut(given.single(), near, fused=True), *single)
    assert worst(list(found), list(expected)) < TOLERANCE
    alone = local_refinement_torch.costs(cut(given.single(), near, fused=True), *single)
    torch.testing.assert_close(alone, expected[0], rtol=TOLERANCE, atol=0)


def cut(given: Scene, pixels: int, *, fused: bool) -> local_refinement_torch.Problem:
    whole = problem(given)
    packed = {"observed": whole.observed[:, :pixels], "ctf": whole.ctf[:, :pixels]}
    return whole._replace(
        **packed, weight=whole.weight[:pixels], kx=whole.kx[:pixels], ky=whole.ky[:pixels], fused=fused
    )


def test_local_refinement_finds_what_the_torch_backend_finds():
    given = scene(16, 2.0, count=3, with_ctf=True).single()
    start = away(given, 4.0, 0.5)
    fused, torch_only = (given.refine_poses(*start, 7, backend, passes=2) for backend in ("triton", "torch"))
    # Two passes of the same steps; sums rounded in another order move a step by about 1e-5 of itself.
    torch.testing.assert_close(fused.rotation, torch_only.rotation, rtol=0, atol=1e-4)
    torch.testing.assert_close(fused.shift_px, torch_only.shift_px, rtol=0, atol=1e-3)
    assert (fused.cost < fused.cost_before).all()


def test_compiled_code_spills_nothing_reads_pairs_and_adds_atomically(tmp_path: Path):
    environment = os.environ | {
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    environment.pop("TRITON_INTERPRET")
    tool = [sys.executable, str(ROOT / "tools" / "aot_kernels.py"), "--targets", "80", "90"]
    kernels = ["--kernels", "slice_forward", "slice_backward", "insert", "refinement_sums"]
    done = subprocess.run([*tool, *kernels], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if re.search(r"\| (80|90) \|", line)]
    assert len(rows) == 8
