"""What tools/bench/workers.py measured, as tables, and the terms of tools/scaling_model.py fitted to it."""

import statistics
from typing import Any

from scalecryo.train.cost_model import (
    ENCODER_STEPS,
    accumulator_bytes,
    grid_encoder_parameters,
    ring_seconds,
)
from tools.scaling_model import (
    encoder_parameters,
    volume_bytes,
)

ITERATION_BATCH = 1024  # of one worker
LINK_BYTES = {"small": 2**14, "large": 2**24}  # of a bare all-reduce
SECONDS = {"step": "mean", "iteration": "seconds"}  # the figure that a trial's parts add up to
Figures = dict[str, float]
Result = dict[str, list[Figures]]  # by trial, one entry a worker that took part


def total(figures: list[Figures]) -> float:
    """Images a second of all workers of a trial; joined ones end together."""
    return sum(one["images"] / one["seconds"] for one in figures)


def middle(results: list[Result], trial: str, key: str) -> float:
    """Median over rounds of the mean over workers."""
    return statistics.median(statistics.mean(one.get(key, 0.0) for one in r[trial]) for r in results)


def by_cpu(results: list[Result], joined: str, against: str) -> str:
    """Efficiency in CPU seconds an image of all workers: what joining adds, whoever else has the cores; not waiting."""
    ratios = sorted(
        statistics.mean(one["cpu"] / one["images"] for one in r[against])
        / statistics.mean(one["cpu"] / one["images"] for one in r[joined])
        for r in results
    )
    return f"{statistics.median(ratios):.0%} ({ratios[0]:.0%}–{ratios[-1]:.0%})"


def by_wall(results: list[Result], joined: str, against: str, times: int) -> str:
    """Rate of a trial over `times` that of another, in the same round: median, lowest and highest."""
    ratios = sorted(total(r[joined]) / (times * total(r[against])) for r in results)
    return f"{statistics.median(ratios):.0%} ({ratios[0]:.0%}–{ratios[-1]:.0%})"


def report_rates(found: dict[str, Any]) -> None:
    """Images a second and efficiencies."""
    print(
        "\nBy the clock: median (lowest–highest) of the rounds' ratios. By CPU time: the same of CPU seconds an image."
    )
    print(
        "\n| what | cores | alone | apart | weak | strong | stolen from alone, from weak | weak ÷ 2 alone | "
        "apart ÷ 2 alone (control) | weak ÷ apart | strong ÷ 2 alone | strong ÷ apart, half |\n" + "| --- " * 12 + "|"
    )
    for name, results in found.items():
        place, kind, *box = name.split("/")
        rates = [statistics.median(total(r[trial]) for r in results) for trial in ("alone", "apart", "weak", "strong")]
        robbed = [
            middle(results, trial, "stolen") / middle(results, trial, SECONDS[kind]) for trial in ("alone", "weak")
        ]
        pairs = (("weak", "alone", 2), ("apart", "alone", 2), ("weak", "apart", 1), ("strong", "alone", 2),
                 ("strong", "apart, half", 1))  # fmt: skip
        shares = [by_wall(results, *pair) for pair in pairs]
        print(f"| {kind}, {box[0]} px | {place} | {' | '.join(f'{rate:.0f}' for rate in rates)} | "
              f"{robbed[0]:.0%}, {robbed[1]:.0%} | {' | '.join(shares)} |")  # fmt: skip
    print("\n| by CPU time | cores | weak ÷ alone | apart ÷ alone (control) | weak ÷ apart | strong ÷ alone | "
          "strong ÷ apart, half |\n" + "| --- " * 7 + "|")  # fmt: skip
    for name, results in found.items():
        place, kind, *box = name.split("/")
        pairs = (("weak", "alone"), ("apart", "alone"), ("weak", "apart"), ("strong", "alone"),
                 ("strong", "apart, half"))  # fmt: skip
        print(f"| {kind}, {box[0]} px | {place} | {' | '.join(by_cpu(results, *pair) for pair in pairs)} |")


def report_step_parts(found: dict[str, Any]) -> None:
    """Where the time of a step goes."""
    print("\n| step | cores | trial | s | CPU s | stolen | compute | sums and waiting for the other | "
          "data wait |\n" + "| --- " * 9 + "|")  # fmt: skip
    for name, results in found.items():
        place, kind, *box = name.split("/")
        if kind != "step":
            continue
        for trial in ("alone", "apart", "weak", "strong", "weak, gradients kept"):
            whole, reduce, read, cpu, robbed = (
                middle(results, trial, key) for key in ("mean", "reduce", "read", "cpu", "stolen")
            )
            print(f"| {box[0]} px | {place} | {trial} | {whole:.3f} | {cpu:.3f} | {robbed / whole:.0%} | "
                  f"{(whole - reduce - read) / whole:.1%} | {reduce / whole:.1%} | {read / whole:.1%} |")  # fmt: skip


def report_iteration_parts(found: dict[str, Any]) -> None:
    """Where the time of an iteration goes."""
    print("\n| iteration | cores | trial | s | CPU s | stolen | local refinement | insert | encoder (its all-reduces "
          "within) | reduce | data wait | the rest |\n" + "| --- " * 12 + "|")  # fmt: skip
    for name, results in found.items():
        place, kind, *box = name.split("/")
        if kind != "iteration":
            continue
        for trial in ("alone", "apart", "weak", "strong"):
            whole, cpu, robbed = (middle(results, trial, key) for key in ("seconds", "cpu", "stolen"))
            parts = [
                middle(results, trial, key) / whole
                for key in ("local_refinement", "insert", "encoder", "reduce", "read")
            ]
            shown = " | ".join(f"{part:.1%}" for part in [*parts, 1 - sum(parts)])
            print(f"| {box[0]} px | {place} | {trial} | {whole:.2f} | {cpu:.2f} | {robbed / whole:.0%} | {shown} |")


def fitted(small: float, large: float, of: int) -> tuple[float, float]:
    """Seconds of a step whatever its batch, and seconds an image, from a batch of `of` // 2 and one of `of`."""
    return 2 * small - large, (large - small) / (of // 2)


def fitted_link(small: float, large: float) -> tuple[float, float]:
    """Bandwidth and seconds a hop, from all-reduces of `LINK_BYTES` between two workers."""
    bandwidth = (LINK_BYTES["large"] - LINK_BYTES["small"]) / max(large - small, 1e-9)
    return bandwidth, max(0.0, small - LINK_BYTES["small"] / bandwidth) / 2


def report_fit(found: dict[str, Any], batch: int, particles: int) -> None:
    """The model's terms fitted to two workers of one core, and how far their sum is from what was measured.

    Compute and overhead come from two workers apart, by two sizes; the link from bare all-reduces.
    Every reduction counts in full: on one core it hides behind nothing.
    """
    print("\n| fitted to the control | seconds by | overhead, s | ms an image | link, GB/s | hop, ms | summed, MB | "
          "model: two joined, s | measured | model ÷ measured |\n" + "| --- " * 10 + "|")  # fmt: skip
    for name, results in found.items():
        place, kind, *rest = name.split("/")
        box, of = int(rest[0]), batch if kind == "step" else particles
        sums = [volume_bytes(box) + 4 * encoder_parameters(box), 8]
        if kind == "iteration":
            steps = ENCODER_STEPS * -(-of // ITERATION_BATCH)
            sums = [4 * grid_encoder_parameters()] * steps + [accumulator_bytes(box)]
        for clock in ("seconds", "cpu"):
            small, large = (middle(results, "all-reduce", f"{size} {clock}") for size in LINK_BYTES)
            bandwidth, latency = fitted_link(small, large)
            reduction = sum(ring_seconds(moved, 2, bandwidth, latency) for moved in sums)
            overhead, each = fitted(middle(results, "apart, half", clock), middle(results, "apart", clock), of)
            model, measured = overhead + each * of + reduction, middle(results, "weak", clock)
            print(f"| {kind}, {box} px, {place} | {'wall' if clock == 'seconds' else 'CPU'} | {overhead:.3f} | "
                  f"{1e3 * each:.2f} | {bandwidth / 1e9:.2f} | {1e3 * latency:.2f} | {sum(sums) / 1e6:.1f} | "
                  f"{model:.3f} | {measured:.3f} | {model / measured:.2f} |")  # fmt: skip
