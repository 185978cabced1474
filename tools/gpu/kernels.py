"""Each kernel beside its reference and beside the roofline.

Bytes are counted from shapes: pixels once; of the volume the sectors that samples touch (4 lines of 32 bytes each, once
to read, twice to add), but no more than the whole volume once for each such walk. A share above 1 says that a cache
held the volume. Operations are those of the formula: 8 neighbours of a complex sample, rotation, weights, CTF, ramp.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from scalecryo.map.backprojection import Backprojection
from scalecryo.physics.fft import fourier_pixels, rfft3_centred
from scalecryo.physics.fourier_slice import fourier_slice, insert_slices
from scalecryo.physics.image_formation import CtfWeightedImages
from scalecryo.physics.rotation import random_rotations
from scalecryo.pose.local_refinement import evaluate_poses, refine_poses
from tools.gpu.session import Roofline, Row, Session, Work, roofline

PADDING = 2
SECTORS = 4 * 32  # bytes of a sample's 8 neighbours
PASSES = 4
# Operations of a sample: interpolation 32, weights 20, rotation 12, CTF and ramp 26; derivatives and sums beyond.
FORWARD, WITH_POSE, WITH_VOLUME, SUMS, INSERT = 90, 200, 150, 320, 100


class Kernel(NamedTuple):
    """One kernel.

    Attributes:
        work: to be timed.
        moved, operations: bytes and operations of it, at least.
        error: largest deviation from the reference in double precision, as a share of its largest value; or None.
    """

    work: Work
    moved: float
    operations: float
    error: Callable[[], float] | None


class Scene:
    """A random volume, poses and images of one box."""

    def __init__(self, box: int, batch: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.box, self.scale = box, float(PADDING)
        self.map = torch.rand(box, box, box, generator=generator).to(device)
        self.pixels = fourier_pixels(box).to(device)
        self.volume = rfft3_centred(self.map, PADDING * box)
        self.rotation = random_rotations(batch, generator, device)
        self.shift = (torch.rand(batch, 2, generator=generator) * 4 - 2).to(device)
        self.ctf = (torch.rand(batch, len(self.pixels), generator=generator) + 0.5).to(device)
        self.geometry = self.pixels.kx, self.pixels.ky, self.scale, box
        with torch.no_grad():
            self.images = fourier_slice(self.volume, self.rotation, self.shift, self.ctf, *self.geometry)
        # Of no image's own phases: the shift's gradient along the image itself is zero.
        self.gradient = self.images * torch.polar(torch.ones_like(self.ctf), 6 * self.ctf)

    def gradients(self, double: bool, wanted: tuple[str, ...]) -> tuple[Tensor, ...]:
        """Of the slices' product with some others, by the device's kernels or by the reference in double precision."""
        real, whole = (torch.float64, torch.complex128) if double else (torch.float32, torch.complex64)
        given = {"volume": self.volume.to(whole), "rotation": self.rotation.to(real), "shift": self.shift.to(real)}
        for name in wanted:
            given[name] = given[name].clone().requires_grad_()
        k = self.pixels.kx.to(real), self.pixels.ky.to(real), self.scale, self.box
        made = fourier_slice(*given.values(), self.ctf.to(real), *k, backend="reference" if double else None)
        return torch.autograd.grad(made, [given[name] for name in wanted], self.gradient.to(whole))

    def inserted(self, double: bool) -> Tensor:
        """Numerator of the images' insertion."""
        if double:
            wide = self.pixels.to(self.map.device, torch.float64)
            values = self.images.to(torch.complex128) * wide.weight / 2
            return insert_slices(values, self.rotation.double(), wide.kx, wide.ky, self.scale, PADDING * self.box)
        sums, ones = Backprojection(self.box, PADDING, self.map.device), torch.ones_like(self.shift[:, 0])
        weighted = CtfWeightedImages(self.images, torch.ones_like(self.ctf))
        sums.insert(weighted, self.rotation, self.shift * 0, ones, self.pixels)
        return sums.numerator[0, 0]


def worst(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Largest deviation of any tensor, as a share of its own largest value."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


def kernels_of(scene: Scene) -> dict[str, Kernel]:
    """By name."""
    samples, volume = scene.images.numel(), 8 * scene.volume.numel()
    walk, packed = min(samples * SECTORS, volume), samples * 12
    turned, moved = scene.rotation.clone().requires_grad_(), scene.shift.clone().requires_grad_()
    learnt = scene.volume.clone().requires_grad_()
    made = fourier_slice(learnt, turned, moved, scene.ctf, *scene.geometry)
    parameter = scene.map.clone().requires_grad_()
    transformed = rfft3_centred(parameter, PADDING * scene.box)
    likelihood = scene.ctf, scene.pixels.weight, scene.pixels, scene.scale
    pose = scene.rotation, scene.shift
    sums, ones = Backprojection(scene.box, PADDING, scene.map.device), torch.ones_like(scene.shift[:, 0])
    keep = {"retain_graph": True}
    transform_flops = 2.5 * scene.volume.numel() * 2 * 3 * torch.log2(torch.tensor(2.0 * scene.box)).item()

    def refined() -> float:
        double = scene.volume.to(torch.complex128), scene.images.to(torch.complex128)
        far = scene.rotation, scene.shift + 0.3
        found = refine_poses(scene.volume, scene.images, *far, *likelihood, passes=PASSES)
        expected = refine_poses(*double, *far, *likelihood, passes=PASSES, backend="torch")
        return float((found.shift_px - expected.shift_px).abs().max())

    return {
        "slice forward": Kernel(
            lambda: fourier_slice(scene.volume, *pose, scene.ctf, *scene.geometry), walk + packed, FORWARD * samples,
            lambda: worst((scene.images,), (fourier_slice(
                scene.volume.to(torch.complex128), scene.rotation.double(), scene.shift.double(), scene.ctf.double(),
                scene.pixels.kx.double(), scene.pixels.ky.double(), scene.scale, scene.box, backend="reference"),)),
        ),
        "slice backward, pose": Kernel(
            lambda: torch.autograd.grad(made, (turned, moved), scene.images, **keep), walk + packed,
            WITH_POSE * samples,
            lambda: worst(*(scene.gradients(double, ("rotation", "shift")) for double in (False, True))),
        ),
        "slice backward, all": Kernel(
            lambda: torch.autograd.grad(made, (learnt, turned, moved), scene.images, **keep),
            3 * walk + packed + volume, (WITH_POSE + WITH_VOLUME) * samples,
            lambda: worst(*(scene.gradients(double, ("volume", "rotation")) for double in (False, True))),
        ),
        f"local refinement, {PASSES} passes (error: px)": Kernel(
            lambda: refine_poses(scene.volume, scene.images, *pose, *likelihood, passes=PASSES),
            (PASSES + 1) * (walk + packed), (PASSES + 1) * SUMS * samples, refined,
        ),
        "cost of poses": Kernel(
            lambda: evaluate_poses(scene.volume, scene.images, pose[0][:, None], pose[1][:, None], *likelihood),
            walk + packed, FORWARD * samples, None,
        ),
        "insertion": Kernel(
            lambda: sums.insert(CtfWeightedImages(scene.images, scene.ctf), *pose, ones, scene.pixels),
            3 * walk + packed, INSERT * samples,
            lambda: worst((scene.inserted(False),), (scene.inserted(True),)),
        ),
        "padded FFT": Kernel(
            lambda: rfft3_centred(scene.map, PADDING * scene.box), 4 * volume, transform_flops, None,
        ),
        "padded FFT backward": Kernel(
            lambda: torch.autograd.grad(transformed, parameter, scene.volume, **keep), 4 * volume, transform_flops,
            None,
        ),
    }  # fmt: skip


def kernels(session: Session) -> Iterator[Row]:
    """Time, rate, share of the roofline and error of each kernel at each box."""
    reach, batch = roofline(session), session.sizes.kernel_batch
    for box in session.sizes.boxes:
        try:
            scene = Scene(box, batch, session.device)
            for name, kernel in kernels_of(scene).items():
                yield _row(session, reach, box, name, kernel)
        except torch.OutOfMemoryError:
            yield {"box": box, "kernel": "out of memory"}


def _row(session: Session, reach: Roofline, box: int, name: str, kernel: Kernel) -> Row:
    taken = session.seconds(kernel.work)
    error = None if kernel.error is None or box > 256 else kernel.error()
    return {
        "box": box,
        "kernel": name,
        "ms": round(1e3 * taken, 4),
        "images/s": round(session.sizes.kernel_batch / taken),
        "GB": round(kernel.moved / 1e9, 5),
        "GFLOP": round(kernel.operations / 1e9, 5),
        "share of the roofline": round(reach.seconds(kernel.moved, kernel.operations) / taken, 3),
        "error": None if error is None else float(f"{error:.2g}"),
    }
