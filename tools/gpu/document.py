"""report.md and its pictures out of report.json."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

Rows = list[dict[str, Any]]


def write(found: dict[str, Any], parts: Sequence[Any], out: Path) -> None:
    """Everything that is known so far."""
    identity = found["identity"]
    rehearsal = identity.get("rehearsal")
    lines = [f"# {identity['device']}", "", "| | |", "| --- | --- |"]
    lines += [f"| {key} | {_cell(value)} |" for key, value in identity.items()]
    if rehearsal:
        lines += ["", "A rehearsal: its sizes are tiny, and no figure of it says anything of the device."]
    for part in parts:
        one = found["parts"].get(part.name)
        lines += ["", f"## {part.title}", ""]
        if one is None:
            lines.append("Not reached: the same command again goes on with it.")
            continue
        lines.append(f"{one['status']}, {one['seconds']:g} s, {one['date']}")
        for rows in _tables(one["rows"]):
            lines += ["", *_table(rows)]
        draw = PICTURES.get(part.name)
        if draw and one["rows"]:
            figure = Figure(figsize=(8, 4.5), layout="constrained")
            if draw(figure, one["rows"]):
                figure.suptitle(f"{identity['device']}{' (rehearsal)' if rehearsal else ''}")
                figure.savefig(out / f"{part.name}.png", dpi=110)
                lines += ["", f"![{part.title}]({part.name}.png)"]
    (out / "report.md").write_text("\n".join(lines) + "\n")


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
    text = f"{value:,.6g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
    return text.replace("|", "\\|")


def _kernels(figure: Figure, rows: Rows) -> bool:
    """Share of the roofline by kernel and box."""
    timed = [row for row in rows if "ms" in row]
    names, boxes = list(dict.fromkeys(row["kernel"] for row in timed)), sorted({row["box"] for row in timed})
    axes = figure.subplots()
    for number, box in enumerate(boxes):
        share = {row["kernel"]: row["share of the roofline"] for row in timed if row["box"] == box}
        at = [names.index(name) + 0.8 * number / len(boxes) for name in share]
        axes.barh(at, list(share.values()), height=0.8 / len(boxes), label=f"{box} px")
    axes.set_yticks([index + 0.4 for index in range(len(names))], labels=names)
    axes.axvline(0.5, color="grey", lw=0.8)
    axes.set(xlabel="share of the roofline (more than 1: caches held the volume)")
    axes.legend(fontsize=7)
    return bool(timed)


def _steps(figure: Figure, rows: Rows) -> bool:
    """Images a second, and peak memory beside the prediction."""
    timed = [row for row in rows if row.get("ms")]
    left, right = figure.subplots(1, 2)
    for precision in dict.fromkeys(row["precision"] for row in timed):
        for batch in dict.fromkeys(row["batch"] for row in timed):
            own = [row for row in timed if (row["precision"], row["batch"]) == (precision, batch)]
            left.loglog([row["box"] for row in own], [row["images/s"] for row in own], "o-",
                        label=f"{batch}, {precision}")  # fmt: skip
    right.loglog([row["predicted, GB"] for row in timed], [max(row["peak, GB"], 1e-3) for row in timed], "o")
    reach = [
        min((row["predicted, GB"] for row in timed), default=1),
        max((row["predicted, GB"] for row in timed), default=1),
    ]
    right.loglog(reach, reach, color="grey", lw=0.8)
    left.set(xlabel="box, px", ylabel="images/s")
    right.set(xlabel="predicted peak, GB", ylabel="measured, GB")
    left.legend(fontsize=6)
    return bool(timed)


def _iteration(figure: Figure, rows: Rows) -> bool:
    """What took the device's time."""
    longest = [row for row in rows if "calls" in row]
    axes = figure.subplots()
    axes.barh([row["what"].removesuffix(", ms")[:50] for row in longest][::-1], [row["value"] for row in longest][::-1])
    axes.set(xlabel="ms of the iteration")
    axes.tick_params(axis="y", labelsize=6)
    return bool(longest)


def _run(figure: Figure, rows: Rows) -> bool:
    """Seconds by part of the work."""
    parts = [row for row in rows if "part" in row and "not counted" not in row["part"]]
    axes = figure.subplots()
    axes.barh([row["part"] for row in parts][::-1], [row["seconds"] for row in parts][::-1])
    axes.set(xlabel="s")
    return bool(parts)


PICTURES: dict[str, Callable[[Figure, Rows], bool]] = {
    "kernels": _kernels, "steps": _steps, "iteration": _iteration, "D": _run, "G": _run, "ribosome": _run,
}  # fmt: skip
