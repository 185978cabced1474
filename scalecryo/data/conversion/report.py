"""What a conversion found, in words. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from scalecryo.data.selection.subset import unequal_halves
from scalecryo.data.storage.store import EXCLUDED, REPORT

_LINES = 20  # of optics groups


def report_lines(found: Mapping[str, Any]) -> list[str]:
    """What a person should know of a report: one line per optics group, and one for each kind of finding."""
    lines = []
    for group in found["optics_groups"][:_LINES]:
        background = f"background {group['background_mean']:.4g} ± {group['scale']:.4g}"
        reason = f"; {group['reason']}" if "reason" in group else ""
        lines.append(f"optics group {group['optics_group']}: {group['particles']:,} particles, {background}{reason}")
    if len(found["optics_groups"]) > _LINES:
        lines.append(f"and {len(found['optics_groups']) - _LINES:,} more optics groups ({REPORT})")
    signs = {group["sign"] for group in found["optics_groups"] if "unclear" not in group.get("reason", "unclear")}
    if len(signs) > 1:
        lines.append("WARNING: optics groups differ in contrast; convert them apart, or turn some of their stacks")
    if found["excluded"]:
        lines.append(f"left out: {found['excluded']:,} images that cannot be stored ({EXCLUDED})")
    for key, what in (
        ("duplicates", "named twice in the table"),
        ("identical_images", "with the very pixels of another image"),
    ):
        item = found.get(key, {"count": 0})
        if item["count"]:
            lines.append(
                f"WARNING: {item['count']:,} particles {what}, such as {item['first'][0]}; copies share a half"
            )
    if found.get("apart"):
        lines.append(f"WARNING: {found['apart']:,} of them are in the other half by the table; they are moved")
    if unequal_halves(found.get("halves", (0, 0, 0))):
        lines.append(
            "WARNING: the table's half-sets hold {1:,} and {2:,} particles; training makes halves anew".format(
                *found["halves"]
            )
        )
    return lines
