"""A run's own figures under the names by which Prometheus knows them: once, for Ray's exporter and for a text file."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

PREFIX = "scalecryo_"


class Exported(NamedTuple):
    """A gauge.

    Attributes:
        curve: that it follows, as in metrics.jsonl.
        help: what it is, with its unit.
    """

    curve: str
    help: str


GAUGES: dict[str, Exported] = {
    "images_per_second": Exported("images_per_second", "images that all workers together worked on, per second"),
    "images_per_second_slowest_worker": Exported(
        "images_per_second_slowest_worker", "images per second of the slowest worker"
    ),
    "data_wait_share": Exported("data_wait_share", "share of the last pass that workers waited for data"),
    "workers": Exported("world_size", "workers of the run"),
    "pass_seconds": Exported("pass_seconds", "seconds that the last pass took"),
    "reduce_seconds_per_step": Exported("reduce/seconds_per_step", "seconds a batch in sums over the workers"),
    "stream_retries": Exported("stream/retries", "requests to the store that were made again, since the start"),
    "stream_mib_read": Exported("stream/mib_read", "MiB read from the store, since the start"),
    "step": Exported("step", "iterations or steps of optimisation that are done"),
    "resolution_angstrom": Exported("halves/resolution_angstrom", "resolution at which the half-maps agree, FSC 0.143"),
    "loss": Exported("loss", "loss of the last steps"),
    "likelihood_gain_per_image": Exported(
        "likelihood_gain_per_image", "log-likelihood over an empty map, nats an image"
    ),
    "device_memory_mib": Exported("memory/device_mib", "MiB that worker 0 holds of its GPU"),
    "resident_memory_mib": Exported("memory/resident_mib", "MiB of worker 0 in memory"),
    "final_resolution_angstrom": Exported("final/resolution_angstrom", "resolution of the final map, FSC 0.143"),
}
"""By name without the prefix."""
LOST_WORKERS = "lost_workers"
LOST_WORKERS_HELP = "workers that were lost since the run's driver started"


def exported_values(curves: Mapping[str, object]) -> dict[str, float]:
    """The gauges that a pass's curves have a finite number for, by name without the prefix."""
    found = {}
    for name, gauge in GAUGES.items():
        value = curves.get(gauge.curve)
        if isinstance(value, int | float) and math.isfinite(value):
            found[name] = float(value)
    return found


def write_text_file(path: Path, values: Mapping[str, float], run: str) -> None:
    """Gauges in Prometheus' text format, whole or not at all, for node_exporter's textfile collector.

    Args:
        path: ends in .prom, else the collector does not see it.
        values: by name without the prefix.
        run: address of the run, the label by which runs are told apart.
    """
    label = run.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    lines = []
    for name, value in values.items():
        lines += [
            f"# HELP {PREFIX}{name} {GAUGES[name].help}",
            f"# TYPE {PREFIX}{name} gauge",
            f'{PREFIX}{name}{{run="{label}"}} {value!r}',
        ]
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text("\n".join(lines) + "\n")
    part.replace(path)
