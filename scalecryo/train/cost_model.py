"""What an iteration of the refinement costs on many GPUs: bytes, seconds, images a second and money, from a model with
stated terms.

Nothing here was measured on a GPU. Each constant of `Hardware` says where it comes from; what a step takes with one and
two workers of one CPU core each, and how well the same terms describe that, is tools/bench/workers.py's.

An iteration reads every particle: batches of `ITERATION_BATCH` a GPU, the encoder's gradients summed `ENCODER_STEPS`
times a batch, the half-maps' accumulators once at the end. Seconds of a batch = max(max(GPU, host) + all-reduce, data).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from scalecryo.physics.fourier_slice import padded_box

PARTICLES = 10**7
PER_NODE = 8
# Of one GPU: the package's defaults, but for each GPU.
ITERATION_BATCH, ENCODER_STEPS, ENCODER_BATCH = 1024, 2, 256
ENCODER_PIXELS, ROTATIONS, GRID_HIDDEN = 233, 4608, 1024  # of the guided method's encoder: 12 Fourier pixels at 32 px
SECTOR = 32  # bytes that a GPU moves at least
ADAM_BYTES = 28  # a parameter: four numbers read, three written


@dataclass(frozen=True)
class Hardware:
    """One kind of GPU in nodes of eight; bytes and operations a second, seconds.

    Attributes:
        flops: dense bfloat16, from NVIDIA's data sheet.
        memory: bandwidth, from NVIDIA's data sheet.
        node_link: all-reduce bandwidth inside a node: about 80 % of NVLink's one direction (data sheet); assumption.
        dollars_hour: a round price of a rented GPU; assumption.
        network: between nodes, of each node: 200 Gb/s at 80 %; assumption.
        reader: that one worker draws from object storage; assumption (measured: 0.75 GB/s with a one-core server).
        store: that a node draws from object storage; assumption (100 Gb/s links reach 5 to 10).
        store_total: that the storage gives to all nodes; assumption.
        convolution_share: of `flops` that 3 × 3 convolutions with 32 to 128 channels reach; assumption.
        memory_share: of `memory` that the kernels reach; assumption (large copies reach 0.9).
        host_step, host_batch: Python and launches of a step of the paper's auto-encoder, and of a batch of an
            iteration; assumption. Such a step has about 300 launches of 5 to 10 µs.
        link_latency, network_latency: of one hop of an all-reduce; assumption, as NCCL's own tuning tables have it.
        overlap: share of a backward pass that can hide the sum of gradients; assumption.
        report: a checkpoint's barrier; measured with Ray Train on two cores (1.9 s: it polls every 2 s).
        upload: of a checkpoint by worker 0; assumption.
        row: a particle's pose, sorted and kept, on every worker; measured on one core (0.5 µs).
    """

    name: str
    flops: float
    memory: float
    node_link: float
    dollars_hour: float
    network: float = 20e9
    reader: float = 1e9
    store: float = 5e9
    store_total: float = 100e9
    convolution_share: float = 0.25
    memory_share: float = 0.7
    host_step: float = 3e-3
    host_batch: float = 20e-3
    link_latency: float = 5e-6
    network_latency: float = 15e-6
    overlap: float = 0.6
    report: float = 1.9
    upload: float = 1e9
    row: float = 0.5e-6


H100 = Hardware("H100", flops=989e12, memory=3.35e12, node_link=360e9, dollars_hour=3.0)
A100 = Hardware("A100", flops=312e12, memory=2.0e12, node_link=240e9, dollars_hour=1.5)


def half_ball_points(radius: float) -> int:
    """Lattice points within a radius with kx ≥ 0, which is what a half-complex transform holds of a ball: 2πr³/3."""
    reach, count = int(radius), 0
    squares = [number * number for number in range(-reach, reach + 1)]
    limit = radius * radius
    for z in squares:
        for y in squares:
            left = limit - z - y
            if left >= 0:
                count += math.isqrt(int(left)) + 1
    return count


def accumulator_bytes(box: int, padding: float = 2.0) -> int:
    """Both half-maps' sums on the whole padded transform: complex64 numerator, float32 denominator."""
    d = padded_box(box, padding)
    return 2 * (8 + 4) * d * d * (d // 2 + 1)


def accumulator_ball_bytes(reach: float, padding: float = 2.0) -> int:
    """The part of them that slices up to a radius can touch: trilinear neighbours lie up to √3 samples beyond."""
    return 2 * (8 + 4) * half_ball_points(padding * reach + math.sqrt(3))


def iteration_reach(box: int, radius: float) -> float:
    """Radius up to which an iteration inserts, as `IterationPlan.insertion_radius`, in pixels."""
    return min(box / 2 - 1, 1.4 * radius + 6)


def grid_encoder_parameters(pixels: int = ENCODER_PIXELS, hidden: int = GRID_HIDDEN, rotations: int = ROTATIONS) -> int:
    """Parameters of the guided method's encoder."""
    return (2 * pixels + 1) * hidden + (hidden + 1) * hidden + (hidden + 1) * (rotations + 2)


def poses_bytes(particles: int) -> int:
    """What an iteration found of so many particles: row, rotation, shift, class, its probability, confidence, half …"""
    return (8 + 36 + 8 + 5 * 4) * particles


def image_bytes(box: int) -> int:
    """A stored image: float16."""
    return 2 * box * box


def pixels_of(reach: float) -> float:
    """Fourier pixels of half a disc."""
    return math.pi * reach * reach / 2


def ring_seconds(moved: float, workers: int, bandwidth: float, latency: float) -> float:
    """All-reduce of `moved` bytes: 2 (W − 1) / W of them over every link, and as many hops as a ring or tree needs."""
    if workers == 1:
        return 0.0
    hops = min(2 * (workers - 1), 2 * math.ceil(math.log2(workers)))
    return 2 * (workers - 1) / workers * moved / bandwidth + latency * hops


def all_reduce_seconds(moved: float, gpus: int, hardware: Hardware) -> float:
    """All-reduce over nodes: inside each node, and between the nodes at the same time; the slower of the two counts."""
    inside = ring_seconds(moved, min(gpus, PER_NODE), hardware.node_link, hardware.link_latency)
    between = ring_seconds(moved, -(-gpus // PER_NODE), hardware.network, hardware.network_latency)
    return max(inside, between)


def map_reduction_seconds(box: int, gpus: int, hardware: Hardware) -> float:
    """Each map's sums to the worker that solves it, and the maps to all: every byte once over every link."""
    moved = accumulator_ball_bytes(iteration_reach(box, box / 2)) + 2 * 4 * box**3
    return all_reduce_seconds(moved, gpus, hardware) / 2


def data_seconds(images: float, box: int, gpus: int, hardware: Hardware) -> float:
    """Reading so many images a GPU: the worker itself, its node's link or the whole storage, the slowest of them."""
    bandwidth = min(hardware.reader * gpus, hardware.store * -(-gpus // PER_NODE), hardware.store_total)
    return gpus * images * image_bytes(box) / bandwidth


class Prediction(NamedTuple):
    """One pass over the particles on so many GPUs.

    Attributes:
        terms: seconds of the pass by what they are for; `data` is what computing does not hide, `sum` likewise.
        saturates: the resource that sets the pace.
    """

    gpus: int
    box: int
    particles: int
    terms: dict[str, float]
    saturates: str
    dollars_hour: float

    @property
    def seconds(self) -> float:
        """Of the pass."""
        return sum(self.terms.values())

    @property
    def images_second(self) -> float:
        """Of all GPUs together."""
        return self.particles / self.seconds

    @property
    def gpu_hours(self) -> float:
        """Of the pass."""
        return self.gpus * self.seconds / 3600

    @property
    def dollars(self) -> float:
        """Of the pass."""
        return self.gpu_hours * self.dollars_hour


def iteration_compute(box: int, batch: float, hardware: Hardware) -> tuple[float, float]:
    """Seconds of the GPU for one batch, and for what an iteration does once: references and solutions."""
    memory, reach = hardware.memory * hardware.memory_share, box / 2 - 1
    # Local refinement: two passes and a last look; insertion reads and adds; transform, CTF, copies of packed pixels.
    samples = pixels_of(reach) * ((3 + 3) * 4 * SECTOR + 100) + 12 * box * box
    # As many projections of the map as real particles.
    encoder = ENCODER_STEPS * (batch * 2 * ENCODER_BATCH / ITERATION_BATCH * 6 * grid_encoder_parameters() / (
        hardware.flops * 0.3)
                         + ADAM_BYTES * grid_encoder_parameters() / memory)  # fmt: skip
    d = padded_box(box, 2.0)
    # About forty walks over a padded transform for each half: references, Friedel partners, shell means, transforms.
    once = 2 * 40 * 12 * d * d * (d // 2 + 1) / memory
    return batch * samples / memory + encoder, once


def predict_iteration(
    box: int, gpus: int, hardware: Hardware, *, batch: float = ITERATION_BATCH, particles: int = PARTICLES
) -> Prediction:
    """An iteration that reads so many particles, `batch` of them a GPU at a time, and searches none of them
    anew."""
    device, once = iteration_compute(box, batch, hardware)
    work = max(device, hardware.host_batch)
    encoder = ENCODER_STEPS * all_reduce_seconds(4 * grid_encoder_parameters(), gpus, hardware)
    data, batches = data_seconds(batch, box, gpus, hardware), particles / (batch * gpus)
    maps = map_reduction_seconds(box, gpus, hardware)
    # Every GPU of a node receives all poses over the node's one network.
    received = PER_NODE * poses_bytes(particles) / hardware.network if gpus > PER_NODE else 0.0
    poses = particles * hardware.row + received
    saved = hardware.report + (poses_bytes(particles) + 8 * box**3) / hardware.upload
    terms = {"compute": batches * work + once, "sum": batches * encoder + maps,
             "data": batches * max(0.0, data - work - encoder), "poses": poses, "checkpoints": saved}  # fmt: skip
    busy = {"GPU" if device > hardware.host_batch else "host": terms["compute"], "all-reduce": terms["sum"],
            "storage": batches * data if terms["data"] else 0.0, "poses": poses, "checkpoints": saved}  # fmt: skip
    return Prediction(gpus, box, particles, terms, max(busy, key=lambda name: busy[name]), hardware.dollars_hour)
