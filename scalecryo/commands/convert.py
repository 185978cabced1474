"""`scalecryo convert`: a particle table and its stacks become a store."""

import time

from scalecryo.commands.console import note, say
from scalecryo.data import files
from scalecryo.data.convert import ConvertPlan, check_destination, convert, plan
from scalecryo.errors import UsageError


def run(
    source: str,
    store: str,
    *,
    data_dir: str | None,
    box: int | None,
    dtype: str,
    workers: int,
    overwrite: bool,
    invert: bool,
    uninvert: bool,
) -> None:
    """Plan, say what was found, and write the store."""
    if invert and uninvert:
        raise UsageError("convert takes --invert or --uninvert, not both")
    check_destination(store, overwrite)
    sign = "invert" if invert else "uninvert" if uninvert else None
    made = plan(source, data_dir, box, dtype, sign)
    _describe(made, source)
    progress = _Progress()
    attrs = convert(made, store, workers=workers, overwrite=overwrite, report=progress)
    say(f"{files.shown(store)}: {attrs['count']:,} particles in {made.shards} shards, complete")


def _describe(made: ConvertPlan, source: str) -> None:
    table, attrs = made.source.table, made.attrs
    known = "CTF and poses" if table.has_ctf and table.has_pose else "CTF" if table.has_ctf else "poses"
    cropped = f", cropped from {made.source.box_size} px" if made.source.box_size != attrs["box_size"] else ""
    scale = "by each background's mean and σ"
    if made.recipe.normalisation == "common":
        scale = f"no noise found, one scale for all images ({made.recipe.common_scale:.4g})"
    say(
        f"{files.shown(source)}: {made.count:,} particles in {len(table.stacks)} stacks"
        + (f", with {known}" if table.has_ctf or table.has_pose else ", without CTF or poses")
    )
    say(f"  box {attrs['box_size']} px, {made.pixel_size:.4g} Å/px{cropped}; {made.dtype}")
    say(f"  levels {', '.join(map(str, made.levels))} px; {made.shards} shards of {made.shard_rows:,} particles")
    say(f"  normalisation: {scale}")
    say(f"  contrast: {'turned' if made.recipe.sign < 0 else 'kept'} ({made.sign_reason})")


class _Progress:
    """Notes of the rate and the time left, at most one every two seconds."""

    def __init__(self) -> None:
        self._start = self._told = time.monotonic()
        self._first: int | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = done
            if done:
                note(f"going on after {done:,} of {total:,} particles")
            return
        if done < total and now - self._told < 2:
            return
        self._told = now
        rate = (done - self._first) / max(now - self._start, 1e-9)
        left = (total - done) / rate if rate else float("inf")
        note(f"{done:,} of {total:,} particles, {rate:,.0f} a second, {left:,.0f} s left")
