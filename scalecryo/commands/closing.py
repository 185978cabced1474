"""What a finished run says last: how good, where to look, what to do next."""

import shlex

from scalecryo.commands.console import say
from scalecryo.data.io import urls
from scalecryo.runs.folder import RunFolder


def say_results(run: RunFolder) -> None:
    """Say the resolution, the report, the maps and the next command; of a run without its final pass, how to get them.

    Args:
        run: on disk or at a URL.
    """
    where = shlex.quote(urls.redacted(run.url))
    if not urls.exists(run.path("map.mrc")):
        say(f"next: scalecryo assign {where}   (a pose for every particle, and the map)")
        return
    reached = run.final_resolution()
    classes = len(run.class_folders())
    say(f"resolution: {reached:.2f} Å (FSC 0.143)" if reached else "resolution: see the report")
    say(f"report: {urls.redacted(run.path('report.html'))}")
    more = f"; of each class in class1/ to class{classes}/" if classes else ""
    say(f"map: {urls.redacted(run.path('map.mrc'))}, not sharpened: map_unsharpened.mrc beside it{more}")
    say(f"curves: tensorboard --logdir {shlex.quote(urls.redacted(run.path('tb')))}")
    out = shlex.quote(urls.redacted(run.url).rstrip("/") + "_relion")
    say(f"next: scalecryo export {where} --format relion --out {out}   (or cryosparc, cryodrgn)")
