"""report.md and its pictures out of report.json."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

Rows = list[dict[str, Any]]
ROOFLINE, BUSY = "share of the roofline", "device busy, share of the iteration"
LEAST_ROOFLINE, LEAST_BUSY = 0.5, 0.8
#: How the tables of a part are to be read.
NOTES = {
    "device": "Medians. The copy and the products are the roofline of what follows.",
    "D": "Parts are counted to the end of the last iteration; on a GPU a kernel counts where it is awaited.",
    "kernels": "GB and GFLOP: the least that the formula moves and computes. The roofline: the seconds that these take "
    "at the rates of the copy and the product in float32. Error: largest deviation from the reference in double "
    "precision, as a share of its largest value, or as the kernel says; – where there is none, or it is too large.",
    "iteration": "Of dataset D, at the last radius, after one to warm up. Calls and copies are those that make the "
    "host wait; then the operations that took longest, without what they call.",
    "guided": "The search compares images with all rotations at all shifts, up to a low frequency.",
    "steps": "Peak of the device's memory beside that of `tools/step_memory.py`.",
    "precision": "Beside double precision (search) and single precision (encoder).",
}


def write(found: dict[str, Any], parts: Sequence[Any], out: Path) -> None:
    """Everything that is known so far."""
    identity = found["identity"]
    rehearsal = identity.get("rehearsal")
    lines = [f"# {identity['device']}", "", "| | |", "| --- | --- |"]
    lines += [f"| {key} | {_cell(value)} |" for key, value in identity.items()]
    if rehearsal:
        lines += ["", "A rehearsal: its sizes are tiny, and no figure of it says anything of the device."]
    elif goals := list(_goals(found["parts"])):
        lines += ["", "## What was to be reached", "", *_table(goals)]
    for part in parts:
        one = found["parts"].get(part.name)
        lines += ["", f"## {part.title}", ""]
        if one is None:
            lines.append("Not reached: the same command again goes on with it.")
            continue
        lines.append(f"{one['status']}, {one['seconds']:g} s, {one['date']}")
        if part.name in NOTES and one["rows"]:
            lines += ["", NOTES[part.name]]
        for rows in _tables(one["rows"]):
            lines += ["", *_table(rows)]
        draw = PICTURES.get(part.name)
        if draw and one["rows"]:
            figure = Figure(figsize=(8, 4.5), layout="constrained")
            if draw(figure, one["rows"]):
                figure.suptitle(f"{part.title}: {identity['device']}{' (rehearsal)' if rehearsal else ''}", fontsize=11)
                figure.savefig(out / f"{part.name}.png", dpi=110)
                lines += ["", f"![{part.title}]({part.name}.png)"]
    (out / "report.md").write_text("\n".join(lines) + "\n")


def _goals(parts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What was wanted of the parts that told it, and whether it was reached."""
    rows = {name: one["rows"] for name, one in parts.items()}
    for name in ("D", "ribosome"):
        for row in rows.get(name, ()):
            if row.get("goal, s"):
                yield _goal(f"{row['set']}: seconds from star to final map", f"≤ {row['goal, s']}", row["seconds"],
                            row["seconds"] <= row["goal, s"])  # fmt: skip
    timed = [row for row in rows.get("kernels", ()) if ROOFLINE in row]
    for name in dict.fromkeys(row["kernel"] for row in timed):
        least = min((row for row in timed if row["kernel"] == name), key=lambda row: float(row[ROOFLINE]))
        share = least[ROOFLINE]
        what = f"{name.partition(' (')[0]}: {ROOFLINE}, least of all boxes (at {least['box']} px)"
        yield _goal(what, f"≥ {LEAST_ROOFLINE}", share, share >= LEAST_ROOFLINE)
    for row in rows.get("iteration", ()):
        if row.get("what") == BUSY:
            yield _goal(BUSY, f"≥ {LEAST_BUSY}", row["value"], row["value"] >= LEAST_BUSY)


def _goal(what: str, wanted: str, found: float, reached: bool) -> dict[str, Any]:
    return {"what": what, "wanted": wanted, "found": found, "reached": reached}


def _tables(rows: Rows) -> list[Rows]:
    """Rows of the same columns, together."""
    found: dict[tuple[str, ...], Rows] = {}
    for row in rows:
        found.setdefault(tuple(row), []).append(row)
    return list(found.values())


def _table(rows: Rows) -> list[str]:
    columns = list(rows[0])
    return ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |",
            *("| " + " | ".join(_cell(row[name]) for name in columns) + " |" for row in rows)]  # fmt: skip


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return text.replace("|", "\\|")


def _bars(axes: Axes, names: Sequence[str], values: Sequence[float]) -> None:
    """From the top down, each with its value."""
    drawn = axes.barh(range(len(names)), values)
    axes.bar_label(drawn, labels=[_cell(float(value)) for value in values], padding=3, fontsize=7)
    axes.set_yticks(range(len(names)), labels=list(names))
    axes.invert_yaxis()
    axes.margins(x=0.1)


def _kernels(figure: Figure, rows: Rows) -> bool:
    """Share of the roofline by kernel and box."""
    timed = [row for row in rows if "ms" in row]
    names, boxes = list(dict.fromkeys(row["kernel"] for row in timed)), sorted({row["box"] for row in timed})
    axes = figure.subplots()
    height = 0.8 / max(len(boxes), 1)
    for number, box in enumerate(boxes):
        share = {row["kernel"]: row[ROOFLINE] for row in timed if row["box"] == box}
        at = [names.index(name) + height * (number - (len(boxes) - 1) / 2) for name in share]
        axes.barh(at, list(share.values()), height=height, label=f"{box} px")
    axes.set_yticks(range(len(names)), labels=[name.partition(" (")[0] for name in names])
    axes.invert_yaxis()
    axes.axvline(LEAST_ROOFLINE, color="grey", lw=0.8, ls="--", label="wanted")
    axes.set(xlabel=f"{ROOFLINE} (more than 1: caches held the volume)")
    figure.legend(fontsize=7, loc="outside right upper")
    return bool(timed)


def _steps(figure: Figure, rows: Rows) -> bool:
    """Images a second, and where it was counted peak memory beside the prediction."""
    timed = [row for row in rows if row.get("ms")]
    counted = [row for row in timed if row["peak, GB"]]
    left, *others = figure.subplots(1, 2 if counted else 1, squeeze=False)[0]
    for precision in dict.fromkeys(row["precision"] for row in timed):
        for batch in dict.fromkeys(row["batch"] for row in timed):
            own = [row for row in timed if (row["precision"], row["batch"]) == (precision, batch)]
            left.plot([row["box"] for row in own], [row["images/s"] for row in own], "o-",
                      label=f"{precision}, batches of {batch}")  # fmt: skip
    boxes = sorted({row["box"] for row in timed})
    left.set(xlabel="box, px", ylabel="images/s", xscale="log", yscale="log")
    left.set_xticks(boxes, labels=[str(box) for box in boxes])
    left.legend(fontsize=7)
    for right in others:
        right.plot([row["predicted, GB"] for row in counted], [row["peak, GB"] for row in counted], "o")
        reach = [function(row["predicted, GB"] for row in counted) for function in (min, max)]
        right.plot(reach, reach, color="grey", lw=0.8, label="as predicted")
        right.set(xlabel="predicted peak, GB", ylabel="measured, GB", xscale="log", yscale="log")
        right.legend(fontsize=7)
    for axis in (left.xaxis, left.yaxis, *(axis for one in others for axis in (one.xaxis, one.yaxis))):
        axis.set_minor_formatter(NullFormatter())
    left.yaxis.set_major_formatter(ScalarFormatter())
    if len({row["images/s"] for row in timed}) < 4:  # too few for the ticks of a logarithm
        left.set_yscale("linear")
        left.set_ylim(bottom=0)
    return bool(timed)


def _iteration(figure: Figure, rows: Rows) -> bool:
    """What took the device's time."""
    longest = [row for row in rows if "calls" in row]
    axes = figure.subplots()
    _bars(axes, [row["what"].removesuffix(", ms")[:50] for row in longest], [row["value"] for row in longest])
    axes.set(xlabel="ms of the iteration, without what the operation calls")
    axes.tick_params(axis="y", labelsize=6)
    return bool(longest)


def _run(figure: Figure, rows: Rows) -> bool:
    """Seconds by part of the work."""
    parts = [row for row in rows if "part" in row and "not counted" not in row["part"]]
    axes = figure.subplots()
    _bars(axes, [row["part"].partition(":")[0].replace("_", " ") for row in parts], [row["seconds"] for row in parts])
    axes.set(xlabel="s, from star to final map")
    return bool(parts)


PICTURES: dict[str, Callable[[Figure, Rows], bool]] = {
    "kernels": _kernels, "steps": _steps, "iteration": _iteration, "D": _run, "G": _run, "ribosome": _run,
}  # fmt: skip
