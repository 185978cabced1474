"""Tables and a plot of tools/scaling_model.py.

python -m tools.bench scaling [--plot scaling.png]
"""

import argparse
from pathlib import Path

from scalecryo.train.cost_model import (
    A100,
    ENCODER_STEPS,
    H100,
    ITERATION_BATCH,
    PARTICLES,
    PER_NODE,
    Hardware,
    accumulator_ball_bytes,
    accumulator_bytes,
    grid_encoder_parameters,
    iteration_reach,
    predict_iteration,
)
from tools.scaling_model import (
    BATCH,
    BOXES,
    GPUS,
    ball_bytes,
    encoder_parameters,
    predict_steps,
    volume_bytes,
)

METHODS = {"auto-encoder": predict_steps, "iteration": predict_iteration}
PARTS = {"compute": "compute", "sum": "all-reduce", "data": "waiting for data", "checkpoints": "checkpoints",
         "poses": "exchange of poses"}  # fmt: skip
DEFAULT_ITERATION, DEFAULT_BATCH = 50_000, 1024  # guided.iteration_particles and guided.batch_size, over all workers


def report_bytes() -> None:
    """What is summed: a table in MB."""
    print("\n| bytes that are summed, MB | " + " | ".join(f"{box} px" for box in BOXES) + " |")
    print("| --- " * (1 + len(BOXES)) + "|")
    rows = {
        "a step, volume gradient, DDP in float32": lambda box: volume_bytes(box),
        "a step, volume gradient, float16 (fp16_compress_hook)": lambda box: volume_bytes(box, 2),
        "a step, Fourier ball to Nyquist, float16": lambda box: ball_bytes(box / 2 - 1),
        "a step, Fourier ball to half of Nyquist, float16": lambda box: ball_bytes(box / 4),
        "a step, the encoder's gradient, float32": lambda box: 4 * encoder_parameters(box),
        "a step, the same with encoder.input_box = 64": lambda _: 4 * encoder_parameters(64),
        "an iteration, accumulators, whole padded cube": lambda box: accumulator_bytes(box),
        "an iteration, their ball, refined to 0.9 of Nyquist": lambda box: accumulator_ball_bytes(
            iteration_reach(box, 0.9 * box / 2)
        ),
        "an iteration, their ball, refined to 0.4 of Nyquist": lambda box: accumulator_ball_bytes(
            iteration_reach(box, 0.4 * box / 2)
        ),
        "the whole cube, for each of 49 batches (50,000 particles)": lambda box: accumulator_bytes(box) / 49,
        "the ball (0.4), for each of 49 batches": lambda box: (
            accumulator_ball_bytes(iteration_reach(box, 0.2 * box)) / 49
        ),
        "a batch of an iteration, the encoder's steps": lambda _: ENCODER_STEPS * 4 * grid_encoder_parameters(),
    }
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{row(box) / 1e6:,.1f}" for box in BOXES) + " |")


def report_predictions(hardware: Hardware) -> None:
    """Both methods on many GPUs: a table."""
    print(f"\n| {hardware.name} | box | GPUs | images/s | efficiency from 1 GPU | s a pass of 10⁷ | compute | "
          "all-reduce | data | rest | GPU-hours | $ | saturates first |\n" + "| --- " * 13 + "|")  # fmt: skip
    for name, predict in METHODS.items():
        for box in BOXES:
            one = predict(box, 1, hardware).images_second
            for gpus in GPUS:
                found = predict(box, gpus, hardware)
                terms = found.terms
                rest = found.seconds - terms["compute"] - terms["sum"] - terms["data"]
                shares = " | ".join(f"{part / found.seconds:.0%}"
                                    for part in (terms["compute"], terms["sum"], terms["data"], rest))  # fmt: skip
                share = found.images_second / one / gpus
                print(f"| {name} | {box} | {gpus} | {found.images_second:,.0f} | {share:.0%} | {found.seconds:,.0f} | "
                      f"{shares} | {found.gpu_hours:.2f} | {found.dollars:.2f} | {found.saturates} |")  # fmt: skip


def report_remedies(hardware: Hardware, gpus: int = 64) -> None:
    """What a step's all-reduce costs on many GPUs if less is summed, data and checkpoints left aside."""
    print(f"\n| auto-encoder, {gpus} {hardware.name}s, ms a step: compute + all-reduce that does not hide | "
          + " | ".join(f"{box} px" for box in BOXES) + " |\n" + "| --- " * (1 + len(BOXES)) + "|")  # fmt: skip
    rows = {
        "all in float32": lambda box: volume_bytes(box) + 4 * encoder_parameters(box),
        "all in float16": lambda box: volume_bytes(box, 2) + 2 * encoder_parameters(box),
        "input_box = 64, float32": lambda box: volume_bytes(box) + 4 * encoder_parameters(64),
        "input_box = 64, float16": lambda box: volume_bytes(box, 2) + 2 * encoder_parameters(64),
        "the same, volume as a ball to half of Nyquist": lambda box: ball_bytes(box / 4) + 2 * encoder_parameters(64),
    }
    for name, moved in rows.items():
        cells = []
        for box in BOXES:
            terms = predict_steps(box, gpus, hardware, gradients=moved(box)).terms
            each = 1e3 * BATCH * gpus / PARTICLES
            cells.append(f"{terms['compute'] * each:.1f} + {terms['sum'] * each:.1f}")
        print(f"| {name} | {' | '.join(cells)} |")


def report_defaults(hardware: Hardware) -> None:
    """An iteration with the package's defaults, which hold for all workers together: seconds."""
    print(f"\n| an iteration of {DEFAULT_ITERATION:,} particles, batches of {DEFAULT_BATCH} over all {hardware.name}s, "
          "s (of which all-reduce, checkpoint) | 1 GPU | " + " | ".join(f"{gpus} GPUs" for gpus in GPUS) + " |\n"
          + "| --- " * (2 + len(GPUS)) + "|")  # fmt: skip
    for box in BOXES:
        cells = []
        for gpus in (1, *GPUS):
            found = predict_iteration(box, gpus, hardware, batch=DEFAULT_BATCH / gpus, particles=DEFAULT_ITERATION)
            cells.append(f"{found.seconds:.1f} ({found.terms['sum']:.1f}, {found.terms['checkpoints']:.1f})")
        print(f"| {box} px | {' | '.join(cells)} |")


def plot(path: Path, hardware: Hardware = H100) -> None:
    """Images a second and shares of a pass against the number of GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 7.5), layout="constrained")
    counts = [2**power for power in range(11)]
    for row, (name, predict) in zip(axes, METHODS.items(), strict=True):
        left, *right = row
        for number, box in enumerate(BOXES):
            rates = [predict(box, gpus, hardware).images_second for gpus in counts]
            left.loglog(counts, rates, "o-", markersize=3, color=f"C{number}", label=f"{box} px")
            left.loglog(counts, [rates[0] * gpus for gpus in counts], ":", linewidth=1, color=f"C{number}")
        left.set(xlabel="GPUs", ylabel="images/s", title=f"{name} (dotted: 1 GPU × their number)")
        left.legend(loc="upper left")
        for panel, box in zip(right, (BOXES[0], BOXES[-1]), strict=True):
            found = [predict(box, gpus, hardware) for gpus in counts]
            parts = [[one.terms.get(key, 0.0) / one.seconds for one in found] for key in PARTS]
            panel.stackplot(counts, parts, labels=list(PARTS.values()), colors=[f"C{i}" for i in (0, 1, 2, 4, 7)])
            panel.set(xscale="log", xlabel="GPUs", ylabel="share of a pass", title=f"{name}, {box} px",
                      xlim=(1, counts[-1]), ylim=(0, 1))  # fmt: skip
    figure.legend(*axes[1, 1].get_legend_handles_labels(), loc="outside lower center", ncols=len(PARTS))
    for axis in axes.flat:
        axis.set_xticks([1, 8, 64, 512], labels=["1", "8", "64", "512"])
        axis.minorticks_off()
    figure.suptitle(f"Model, not measured: {hardware.name}, nodes of {PER_NODE}, {hardware.network / 1e9:.0f} GB/s "
                    f"between nodes, storage {hardware.store / 1e9:.0f} GB/s a node, "
                    f"{hardware.store_total / 1e9:.0f} GB/s in all; "
                    f"{BATCH} and {ITERATION_BATCH} particles a GPU")  # fmt: skip
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report() -> None:
    """All tables."""
    report_bytes()
    report_remedies(H100)
    for hardware in (H100, A100):
        values = ", ".join(f"{key} {value:g}" for key, value in vars(hardware).items() if key != "name")
        print(f"\n{hardware.name}: {values}")
        report_predictions(hardware)
    report_defaults(H100)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="a PNG of the H100's tables")
    args = parser.parse_args()
    report()
    if args.plot:
        plot(args.plot)
