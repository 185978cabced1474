"""report.html of a run that stopped with an error: what it said, and what it had seen by then."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from scalecryo.config import Config
from scalecryo.data.io import urls
from scalecryo.data.storage.store import ParticleStore
from scalecryo.errors import InputError, ScalecryoError
from scalecryo.evaluate.report import (
    Section,
    Surface,
    particles_figure,
    projections_figure,
    report_html,
    slices_figure,
    surface_picture,
    viewer_html,
)
from scalecryo.evaluate.verdict import Verdict
from scalecryo.physics.mask import mask_from_map
from scalecryo.runs.folder import RunFolder
from scalecryo.runs.pictures import EXAMPLES, Pairs
from scalecryo.runs.report_parts import about_run, training_curves

logger = logging.getLogger(__name__)
SEEN_BOX = 64  # level whose images are shown, or the next larger
AVERAGED = 256  # images whose mean is shown


@dataclass
class Seen:
    """What passes have shown until now.

    Attributes:
        messages: lines of the log.
        density: the newest map, on the CPU.
        pixel_size: of that map, Å.
        pairs: the newest images beside their predictions.
    """

    messages: list[str] = field(default_factory=list)
    density: Float[Tensor, "n n n"] | None = None
    pixel_size: float = 0.0
    pairs: Pairs | None = None


def write_failure_report(config: Config, store: ParticleStore, run: RunFolder, error: Exception, seen: Seen) -> None:
    """Write report.html of a run that an error ended; what cannot be shown is left out."""
    sections: list[Section] = []
    for make in (_images, _map):
        try:
            sections += make(store, seen)
        except (ScalecryoError, OSError) as other:
            logger.warning("report.html lacks a picture: %s", other)
    if seen.messages:
        sections.append(Section("How far it came", "\n".join(seen.messages)))
    sections += [*training_curves(run, config), *about_run(config, store, run, None)]
    verdict = Verdict("failed", "No result: the run was stopped", str(error), (), {})
    title = f"scalecryo: {store.count:,} particles, {store.box_size} px, {store.pixel_size:g} Å/px"
    try:
        run.write("report.html", report_html(title, sections, verdict).encode())
    except OSError as other:
        logger.warning("%s cannot be written: %s", urls.redacted(run.path("report.html")), other)


def _images(store: ParticleStore, seen: Seen) -> Iterable[Section]:
    """The first particles as they are stored, and their mean."""
    level = min((level for level in store.levels if level >= SEEN_BOX), default=max(store.levels))
    images = store.read_images(level, 0, min(store.count, AVERAGED)).astype("float32")
    yield Section(
        "What the images look like", png=particles_figure(images[:EXAMPLES], images.mean(0)),
        caption=f"The first particles at {level} px of {store.level_pixel_size(level):.3g} Å, as stored (bright: "
        f"protein), the same smoothed, and the mean of the first {len(images)}.",
    )  # fmt: skip


def _map(_: ParticleStore, seen: Seen) -> Iterable[Section]:
    """The newest map, and what it explained."""
    if seen.density is not None:
        planes = {"newest map": seen.density.numpy()}
        yield Section("The map so far", png=slices_figure(planes, seen.pixel_size))
        try:
            mask = mask_from_map(seen.density, seen.pixel_size)
        except InputError:  # nothing stands out of it
            return
        surface = Surface.of_map(seen.density, mask, seen.pixel_size)
        yield Section("Its surface", png=surface_picture(surface), body=viewer_html(surface))
    if seen.pairs is not None:
        observed, predicted = (pictures.numpy() for pictures in seen.pairs)
        yield Section("Particles and predictions", png=projections_figure(observed, predicted))
