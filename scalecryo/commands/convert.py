"""`scalecryo convert`: a particle table and its stacks become a store, or are added to one."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from scalecryo.commands.console import Progress, check_conversion, note, say
from scalecryo.data.conversion.addition import read_addition
from scalecryo.data.conversion.places import check_destination
from scalecryo.data.conversion.report import report_lines
from scalecryo.data.conversion.source import ReadOptions
from scalecryo.data.io import urls
from scalecryo.data.storage.store import REPORT, ParticleStore

if TYPE_CHECKING:
    from scalecryo.data.conversion.convert import ConvertPlan
    from scalecryo.data.conversion.quality import BadImage


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
    bad_images: Literal["refuse", "exclude"] = "refuse",
    scheduler: str | None = None,
    add: bool = False,
    reading: Mapping[str, Any] | None = None,
) -> None:
    """Plan, say what was found, and write the store or add to it; `reading` holds the fields of `ReadOptions`."""
    check_conversion(invert=invert, uninvert=uninvert, append=add, overwrite=overwrite, box=box)
    sign = "invert" if invert else "uninvert" if uninvert else None
    looked = Progress("looked at")
    options = ReadOptions(**(reading or {}))
    particles = read_addition(source, ParticleStore.open(store), data_dir, bad_images, options) if add else None
    # torch takes seconds to import: by now it is known that the particles fit the store that they are added to.
    from scalecryo.data.conversion.append import append, complete_append
    from scalecryo.data.conversion.append_plan import plan_append
    from scalecryo.data.conversion.convert import convert, plan

    if particles is not None:
        complete_append(store)
        adding = plan_append(source, store, data_dir, sign, bad_images, workers=workers, scheduler=scheduler,
                             progress=looked, options=options, particles=particles)  # fmt: skip
        _say_excluded(adding.excluded)
        for line in adding.notes:
            note(line)
        attrs = append(adding, workers=workers, scheduler=scheduler, progress=Progress())
        added = f", {adding.count:,} of them new"
    else:
        check_destination(store, overwrite)
        made = plan(source, data_dir, box, dtype, sign, bad_images, workers=workers, scheduler=scheduler,
                    progress=looked, options=options)  # fmt: skip
        _describe(made, source)
        _say_excluded(made.excluded)
        attrs = convert(made, store, workers=workers, scheduler=scheduler, overwrite=overwrite, progress=Progress())
        added = ""
    for line in report_lines(json.loads(urls.read_bytes(urls.join(store, REPORT)))):
        say(f"  {line}")
    shards = -(-attrs["count"] // attrs["shard_rows"])
    say(f"{urls.redacted(store)}: {attrs['count']:,} particles{added} in {shards} shards, complete")


def _say_excluded(excluded: "tuple[BadImage, ...]") -> None:
    if excluded:
        from scalecryo.data.conversion.quality import listed

        note(f"left out {len(excluded):,}: {listed(excluded)}")


def _describe(made: "ConvertPlan", source: str) -> None:
    table, attrs = made.source.table, made.attrs
    known = "CTF and poses" if table.has_ctf and table.has_pose else "CTF" if table.has_ctf else "poses"
    cropped = f", cropped from {made.source.box_size} px" if made.source.box_size != attrs["box_size"] else ""
    scale = "by each background's mean and σ"
    if made.normalisation.kind == "common":
        scale = f"no noise found, one scale for all images ({made.normalisation.common_scale:.4g})"
    say(
        f"{urls.redacted(source)}: {made.count:,} particles in {len(set(table.stacks))} stacks"
        + (f", with {known}" if table.has_ctf or table.has_pose else ", without CTF or poses")
    )
    say(f"  box {attrs['box_size']} px, {made.pixel_size:.4g} Å/px{cropped}; {made.dtype}")
    if made.source.resampling:
        sizes = table.stack_pixel_sizes
        error = max(abs(item.error) for item in made.source.resampling)
        say(
            f"  pixel sizes from {min(sizes):.4g} to {max(sizes):.4g} Å resampled to {max(sizes):.4g} Å; even boxes "
            f"leave an error of the pixel size of up to {100 * error:.2f} %"
        )
    if table.has_aberrations:
        say("  beam tilt, Zernike phases and magnification of the optics are undone when images are read")
    if made.source.notes:
        note(f"kept in the table, but not applied to the images: {', '.join(made.source.notes)}")
    say(f"  levels {', '.join(map(str, made.levels))} px; {made.shards} shards of {made.shard_rows:,} particles")
    say(f"  normalisation: {scale}")
    say(f"  contrast: {'turned' if made.normalisation.sign < 0 else 'kept'} ({made.sign_reason})")
