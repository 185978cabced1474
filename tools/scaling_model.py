"""What a step or an iteration costs on many GPUs: bytes, seconds, images a second and money, from a model with stated
terms.

tools/bench/scaling.py prints it. Nothing here was measured on a GPU.

(a) the paper's auto-encoder: every GPU keeps its batch (weak scaling), gradients of volume and encoder are summed in
    every step, as plain DDP in float32 does it: this module;
(b) an iteration of the guided method that reads every particle: `scalecryo.train.cost_model`, which `scalecryo info
    STORE --plan` prints too.

Seconds of a step = max(max(GPU, host) + the part of the all-reduce that does not hide behind the backward pass, data).
"""

from scalecryo.physics.fourier_slice import padded_box
from scalecryo.train.cost_model import (
    ADAM_BYTES,
    PARTICLES,
    SECTOR,
    Hardware,
    Prediction,
    all_reduce_seconds,
    data_seconds,
    half_ball_points,
    pixels_of,
)
from tools.step_memory import step_memory

BOXES, GPUS = (128, 256, 400), (8, 64, 512)
BATCH = 128  # particles of one GPU in a step of (a)
CHECKPOINT_STEPS = 500  # the package's default


def volume_bytes(box: int, each: int = 4) -> int:
    """Gradient of the voxels: box³ numbers of `each` bytes (2: torch's fp16_compress_hook)."""
    return each * box**3


def ball_bytes(radius: float, each: int = 2) -> int:
    """A real map's Fourier coefficients up to a radius (pixels), each two numbers of `each` bytes (2: float16)."""
    return 2 * each * half_ball_points(radius)


def encoder_parameters(box: int, channels: tuple[int, ...] = (32, 64, 128), hidden: int = 512, outputs: int = 6) -> int:
    """Parameters of the paper's encoder for images of a box; most of them join the last pooling to the first layer."""
    count, previous = 0, 1
    for width in channels:
        count += 9 * previous * width + width + 9 * width * width + width
        previous = width
    side = box // 2 ** len(channels)
    return count + (previous * side * side + 1) * hidden + (hidden + 1) * hidden + (hidden + 1) * outputs


def encoder_operations(box: int, channels: tuple[int, ...] = (32, 64, 128), hidden: int = 512) -> int:
    """Additions and multiplications of the paper's encoder for one image, forward and backward (three products)."""
    products, previous, side = 0, 1, box
    for width in channels:
        products += 9 * width * (previous + width) * side * side
        previous, side = width, side // 2
    return 3 * 2 * (products + previous * side * side * hidden + hidden * hidden)


def step_compute(box: int, batch: int, hardware: Hardware) -> tuple[float, float]:
    """Seconds of the GPU for one step of (a), and of its encoder's backward pass."""
    memory = hardware.memory * hardware.memory_share
    # Activations are written, read forward, read backward, and their gradients written and read.
    moved = 5 * step_memory(box, batch, outputs=6, bytes_each=2).activations
    encoder = max(batch * encoder_operations(box) / (hardware.flops * hardware.convolution_share), moved / memory)
    d = padded_box(box, 2.0)
    transform = 8 * d * d * (d // 2 + 1)
    # A slice reads 4 sectors a sample, its adjoint reads and adds them; the padded transform and its adjoint move 4.
    slices = batch * pixels_of(box / 2 - 1) * (4 * 4 * SECTOR + 24)
    adam = ADAM_BYTES * (box**3 + encoder_parameters(box))
    return encoder + (slices + 8 * transform + adam) / memory, encoder * 2 / 3


def predict_steps(
    box: int, gpus: int, hardware: Hardware, *, batch: int = BATCH, gradients: float | None = None
) -> Prediction:
    """A pass of (a); `gradients`: bytes that a step sums, if not all of volume and encoder in float32."""
    device, backward = step_compute(box, batch, hardware)
    work = max(device, hardware.host_step)
    moved = volume_bytes(box) + 4 * encoder_parameters(box) if gradients is None else gradients
    # The loss's own sum, before the backward pass, hides behind nothing.
    whole, loss = all_reduce_seconds(moved, gpus, hardware), all_reduce_seconds(8, gpus, hardware)
    exposed = loss + max(0.0, whole - hardware.overlap * backward)
    data = data_seconds(batch, box, gpus, hardware)
    steps = PARTICLES / (batch * gpus)
    saved = 3 * 4 * (box**3 + encoder_parameters(box)) / hardware.upload + hardware.report
    terms = {"compute": steps * work, "sum": steps * exposed, "data": steps * max(0.0, data - work - exposed),
             "checkpoints": steps / CHECKPOINT_STEPS * saved}  # fmt: skip
    busy = {"GPU" if device > hardware.host_step else "host": work, "all-reduce": exposed,
            "storage": data if data > work + exposed else 0.0, "checkpoints": saved / CHECKPOINT_STEPS}  # fmt: skip
    return Prediction(gpus, box, PARTICLES, terms, max(busy, key=lambda name: busy[name]), hardware.dollars_hour)
