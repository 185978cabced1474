"""What every part of the GPU report works with: the device, how much to do, and how time is taken."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
Work = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    """How much a part does.

    Attributes:
        boxes, batches: px and particles, of kernels and training steps.
        kernel_batch: images of one launch.
        rounds: that a time is the median of.
        copy_numbers, product: float32 numbers that a copy moves; side of the square matrices that are multiplied.
        images: particles whose search, refinement and insertion are timed.
        radius: Fourier pixels of the search.
        half_grid: rotations of the search without their in-plane flips.
        particles, box, pixel_size: of datasets D and G; the last tenth is held out.
        large: particles of the 256 px set; 0: it is left out.
        table: that runs begin with: `particles` has no poses, `truth` has.
        settings: of the runs, beside those of the dataset.
        datasets: that are run.
    """

    boxes: tuple[int, ...] = (64, 128, 256, 400)
    batches: tuple[int, ...] = (8, 32, 128)
    kernel_batch: int = 32
    rounds: int = 15
    copy_numbers: int = 2**28
    product: int = 8192
    images: int = 2000
    radius: float = 12.0
    half_grid: int = 2304
    particles: int = 10_000
    box: int = 128
    pixel_size: float = 0.8
    large: int = 20_000
    table: str = "particles"
    settings: tuple[tuple[str, str], ...] = ()
    datasets: tuple[str, ...] = ("D", "G")


FULL = Sizes()
REHEARSAL = Sizes(
    boxes=(16,), batches=(2,), kernel_batch=2, rounds=1, copy_numbers=2**16, product=64, images=8, radius=4.0,
    half_grid=32, particles=200, box=32, pixel_size=3.2, large=0, datasets=("D",),
    table="truth", settings=(("guided.start", "poses"), ("guided.iterations", "1"), ("guided.encoder_hidden", "16")),
)  # fmt: skip
"""Seconds on one core: that every part runs, not what it finds."""


@dataclass(frozen=True)
class Session:
    """One call of the report.

    Attributes:
        device: that is looked at.
        sizes: how much is done.
        work: folder of data and runs; parts may use what earlier ones left there.
        structure: PDB or mmCIF file of the 256 px set, or None.
        rehearsal: whether sizes are those of a rehearsal.
        start: of each part's process: fork or spawn.
    """

    device: torch.device
    sizes: Sizes
    work: Path
    structure: Path | None
    rehearsal: bool
    start: str

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Work) -> float:
        """Median of a few rounds, after two to warm up and compile."""
        times = []
        for number in range(self.sizes.rounds + 2):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            if number > 1:
                times.append(time.perf_counter() - start)
        return sorted(times)[len(times) // 2]

    def peak_bytes(self, work: Work) -> int | None:
        """Largest allocation of the device during some work; None on a CPU, where nobody counts."""
        if not self.on_gpu:
            work()
            return None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device)


def session_of(device: str, work: Path, structure: Path | None, *, rehearsal: bool, start: str) -> Session:
    """Of a device by its name; does not touch it."""
    where = torch.device(device, 0) if device == "cuda" else torch.device(device)
    return Session(where, REHEARSAL if rehearsal else FULL, work, structure, rehearsal, start)


@dataclass(frozen=True)
class Roofline:
    """What the device reaches by itself.

    Attributes:
        bandwidth: bytes a second of a copy that no cache holds, read and written.
        float32, tf32, bfloat16: operations a second of a square matrix product.
    """

    bandwidth: float
    float32: float
    tf32: float
    bfloat16: float

    def seconds(self, moved: float, operations: float) -> float:
        """What so many bytes and single-precision operations take at least."""
        return max(moved / self.bandwidth, operations / self.float32)


def _copied(session: Session) -> float:
    """Bytes read and written a second."""
    source = torch.rand(session.sizes.copy_numbers, device=session.device)
    target = torch.empty_like(source)
    return 8 * source.numel() / session.seconds(lambda: target.copy_(source))


def roofline(session: Session) -> Roofline:
    """Measured: a large copy, and products of large matrices of random numbers."""
    sizes, device = session.sizes, session.device
    copied = _copied(session)
    one, other = (torch.randn(sizes.product, sizes.product, device=device) for _ in range(2))
    operations = 2.0 * sizes.product**3
    rates = []
    for allow in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = allow
        rates.append(operations / session.seconds(lambda: one @ other))
    torch.backends.cuda.matmul.allow_tf32 = False
    brief = one.bfloat16(), other.bfloat16()
    return Roofline(copied, *rates, operations / session.seconds(lambda: brief[0] @ brief[1]))


Part = Callable[[Session], Iterator[Row]]
