"""Sections that a finished and a failed run share: how it went, its settings, and what to do with its files."""

import json
import platform
from collections.abc import Iterable
from datetime import UTC, datetime

import numpy as np
import torch
from numpy.typing import NDArray

from scalecryo import __version__
from scalecryo.config import Config, config_to_toml, settings_of
from scalecryo.data.io import urls
from scalecryo.data.storage.store import ParticleStore
from scalecryo.evaluate.report import Section, table_html, training_figure
from scalecryo.runs.final_results import FinalResults
from scalecryo.runs.folder import RunFolder

PANELS = {
    "halves/resolution_angstrom": "resolution (Å)",
    "iteration/radius": "radius (Fourier px)",
    "iteration/moved_share": "share that jumped",
    "pass_seconds": "seconds",
    "loss": "loss",
    "images_per_second": "images / s",
    "pose_spread": "pose spread",
    "truth/rotation_error_median_deg": "rotation error (°)",
    "truth/fsc_0.5_shell": "truth FSC 0.5 (shell)",
}


def training_sections(results: FinalResults) -> Iterable[Section]:
    """Curves of the iterations or steps."""
    return training_curves(results.run, results.config)


def run_section(results: FinalResults) -> Iterable[Section]:
    """Settings, command, version, date and times."""
    return about_run(results.config, results.store, results.run, results.kept)


def next_steps_section(results: FinalResults) -> Iterable[Section]:
    """Commands that take the map and the poses further."""
    run, level = urls.redacted(results.run.url), results.surface.map_level
    lines = [
        "# look at the map (mirror it if its helices are left-handed)",
        f"chimerax {run}/map.mrc --cmd 'volume #1 style surface step 1 level {level:.3g}'",
        "#   in ChimeraX: volume flip #1 axis z", "",
        "# keep the sure particles, and go on from them",
        f"scalecryo select {run} good.star --min-confidence 0.5", "",
        "# refine further: each writes a folder that the program takes as it is, and prints its commands",
        f"scalecryo export {run} --format relion --out for_relion",
        f"scalecryo export {run} --format cryosparc --out for_cryosparc",
        f"scalecryo export {run} --format cryodrgn --out for_cryodrgn", "",
        "# compare with a known structure, any box and pixel size",
        f"scalecryo evaluate {run} --truth structure.pdb",
    ]  # fmt: skip
    yield Section("What to do next", "\n".join(lines))


def about_run(config: Config, store: ParticleStore, run: RunFolder, kept: int | None) -> Iterable[Section]:
    """Settings, command, version, date and times; `kept`: particles that the map is made of, where it is known."""
    rows = {
        "command": command_of(config),
        "store": f"{urls.redacted(store.url)}, {store.count:,} particles of {store.box_size} px",
        "written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "version": f"scalecryo {__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}",
    }
    metrics = _metrics(run)
    if metrics:
        begun = metrics[0]["time"] - (metrics[0].get("pass_seconds") or 0)
        rows["first pass began"] = f"{datetime.fromtimestamp(begun, UTC):%Y-%m-%d %H:%M} UTC"
        rows["since then"] = _duration(datetime.now(UTC).timestamp() - begun)
    if kept is not None:
        rows["particles kept"] = f"{kept:,} of {store.count:,}"
    yield Section("The run", body=table_html(rows))
    yield Section("Settings", config_to_toml(config), folded=True)


def training_curves(run: RunFolder, config: Config) -> Iterable[Section]:
    """The curves of metrics.jsonl; nothing where there are none (an assignment written elsewhere)."""
    steps, panels = _training_curves(run)
    if panels:
        label = "iteration" if config.pose.source == "guided" else "step"
        yield Section("Training", name="training", png=training_figure(steps, panels, x_label=label))


def command_of(config: Config) -> str:
    """A command that trains the same: what differs from the defaults."""
    plain = settings_of(Config())
    words = ["scalecryo", "train", "--data", urls.redacted(config.run.data), "--out", urls.redacted(config.run.out)]
    for name, value in settings_of(config).items():
        if name not in ("run.data", "run.out") and value != plain.get(name):
            words += [f"--{name}", json.dumps(list(value) if isinstance(value, tuple) else value).strip('"[]')]
    return " ".join(words)


def _metrics(run: RunFolder) -> list[dict]:
    path = run.local / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _training_curves(run: RunFolder) -> tuple[NDArray[np.int64], dict[str, NDArray[np.float64]]]:
    rows = _metrics(run)
    steps = np.array(sorted({row["step"] for row in rows}), dtype=np.int64)
    panels = {}
    for key, label in PANELS.items():
        values = {row["step"]: row[key] for row in rows if row.get(key) is not None}
        if values:
            panels[label] = np.array([values.get(int(step), np.nan) for step in steps], dtype=np.float64)
    return steps, panels


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
