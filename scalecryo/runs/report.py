"""report.html of a run: a verdict, then sections, each made by a function from the run's results.

A new section needs one function here (or in a module of its own) and one line in `SECTIONS`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

from numpy.typing import NDArray

from scalecryo.evaluate.report import (
    Section,
    cones_figure,
    confidence_figure,
    fsc_figure,
    orientation_figure,
    paragraphs_html,
    projections_figure,
    report_html,
    slices_figure,
    surface_picture,
    viewer_html,
)
from scalecryo.evaluate.verdict import Evidence, Verdict, judge
from scalecryo.physics.symmetry import PointGroup
from scalecryo.runs.class_results import structures, told_of
from scalecryo.runs.final_results import INDEPENDENT, SHOWN, FinalResults, as_numpy
from scalecryo.runs.report_parts import next_steps_section, run_section, training_sections
from scalecryo.settings import POSED

MOST_VIEWS = 200_000  # related poses that the picture of orientations counts
CLASS_GRID, CLASS_VIEWERS = 56, 8  # voxels across the viewer's grid of a class, and how many classes get one

SectionMaker = Callable[[FinalResults], Iterable[Section]]


def surface_section(results: FinalResults) -> Iterable[Section]:
    """The map as a surface, to turn and contour, and from three sides."""
    surface = results.surface
    yield Section(
        "The map", png=surface_picture(surface), name="surface",
        body=paragraphs_html(surface.text) + viewer_html(surface),
        caption=f"At the suggested contour: {', '.join(surface.SIDES)}. The bar is {surface.bar_a:g} Å.",
    )  # fmt: skip


def fsc_section(results: FinalResults) -> Iterable[Section]:
    """The halves' correlation, with what was done to it in words."""
    maps, final = results.maps, results.final
    curves = {
        "half-maps": as_numpy(maps.fsc[0]), "masked": as_numpy(maps.fsc_masked[0]),
        "masked, phases randomised": as_numpy(final.fsc_random), "masked, corrected": as_numpy(final.fsc_corrected),
    }  # fmt: skip
    text = (
        f"Half-maps agree (FSC 0.143, masked, corrected) to {results.angstrom():.2f} Å, at FSC 0.5 to "
        f"{results.angstrom(0.5):.2f} Å; Nyquist is {2 * results.pixel_size:.3g} Å. Phases were randomised from shell "
        f"{final.random_from}; a B-factor of {final.b_factor:.0f} Å² was undone."
    )
    yield Section(
        "Fourier shell correlation", name="fsc", body=paragraphs_html(text, _independence(results)),
        png=fsc_figure(curves, maps.level, results.pixel_size),
    )  # fmt: skip


def slices_section(results: FinalResults) -> Iterable[Section]:
    """Central planes: the map before and after sharpening, and the mask."""
    planes = {
        "map_unsharpened.mrc: mean of the half-maps, weighted by the FSC": as_numpy(results.final.unsharpened),
        "map.mrc: the same, sharpened": as_numpy(results.final.map),
        "mask": as_numpy(results.maps.mask[0]),
    }
    yield Section("Slices", name="slices", png=slices_figure(planes, results.pixel_size))


def views_section(results: FinalResults) -> Iterable[Section]:
    """Where particles were seen from, and how far each direction is resolved."""
    yield Section("Views", name="orientations", png=orientation_figure(_views(results)))
    cones = results.cones
    figure = cones_figure(cones, as_numpy(results.final.fsc_corrected))
    yield Section("Resolution by direction", cones.text, figure, name="fsc_cones")


def particles_section(results: FinalResults) -> Iterable[Section]:
    """The surest and the least sure particles beside their projections, and the spread of confidence."""
    examples = results.particles.examples
    labels = [f"{value:.2f}" for value in examples.score.tolist()]
    text = (
        f"{results.kept:,} of {len(results.particles.poses):,} images show the particle more probably than not; "
        f"{results.junk:.1%} do not. On average an image shows it in the pose given with a probability of "
        f"{results.mean_confidence:.0%}."
    )
    yield Section(
        "Best and worst particles", name="projections", body=paragraphs_html(text if results.has_probability else ""),
        png=projections_figure(as_numpy(examples.pairs[0]), as_numpy(examples.pairs[1]), labels),
        caption="By confidence, the surest on the left. An image that is nothing like its projection shows no particle "
        "or has a wrong pose.",
    )  # fmt: skip
    yield Section("Confidence", name="confidence", png=confidence_figure(as_numpy(results.particles.confidence)))


def classes_section(results: FinalResults) -> Iterable[Section]:
    """Each structure of a run with several."""
    if not results.classes:
        return
    text = "".join(f"{summary}\n" for summary in results.classes) + told_of(results.classes)
    curves = {f"class {n}": as_numpy(final.fsc_corrected) for n, final in enumerate(results.finals, 1)}
    planes = {str(summary): as_numpy(f.map) for summary, f in zip(results.classes, results.finals, strict=True)}
    yield Section("Classes", text, slices_figure(planes, results.pixel_size), name="classes")
    yield Section("Classes: correlation of the halves", name="classes_fsc",
                  png=fsc_figure(curves, results.maps.level, results.pixel_size))  # fmt: skip
    for number, summary in enumerate(results.classes):
        surface = results.class_surface(number, CLASS_GRID)
        # The first is the map at the top of the page.
        viewer = viewer_html(surface) if 0 < number < CLASS_VIEWERS else ""
        yield Section(
            f"Class {number + 1}", png=surface_picture(surface), name=f"class{number + 1}/surface",
            body=paragraphs_html(f"{summary}. {surface.text}") + viewer,
            caption=f"{', '.join(surface.SIDES)}. The bar is {surface.bar_a:g} Å.",
        )  # fmt: skip


def notes_section(results: FinalResults) -> Iterable[Section]:
    """What was found on the way."""
    notes = [f"{note[0].upper()}{note[1:]}." for note in (*results.particles.notes, *_symmetry(results)) if note]
    if notes:
        yield Section("What was noticed", body=paragraphs_html(*notes))


#: In the order of the page.
SECTIONS: tuple[SectionMaker, ...] = (
    notes_section,
    surface_section,
    classes_section,
    fsc_section,
    slices_section,
    views_section,
    particles_section,
    training_sections,
    next_steps_section,
    run_section,
)


def write_report(results: FinalResults, makers: Sequence[SectionMaker] = SECTIONS) -> None:
    """Write report.html and each section's picture, NAME.png."""
    sections = [section for make in makers for section in make(results)]
    for section in sections:
        if section.png is not None and section.name:
            results.run.write(f"{section.name}.png", section.png)
    store = results.store
    title = f"scalecryo: {store.count:,} particles, {store.box_size} px, {store.pixel_size:g} Å/px"
    results.run.write("report.html", report_html(title, sections, verdict_of(results)).encode())


def verdict_of(results: FinalResults) -> Verdict:
    """What a run came to, in words."""
    certain = results.has_probability
    told = results.cones.warning or ""
    evidence = Evidence(
        angstrom=results.angstrom(), pixel_size=results.pixel_size, diameter=results.diameter,
        confidence=results.mean_confidence if certain else None, junk=results.junk,
        independent=results.config.recipe in (*INDEPENDENT, "known"),
        warnings=(told,) if told and not results.cones.uneven else (), uneven=told if results.cones.uneven else "",
        coherent=results.coherent_share, coverage=results.coverage,
        noticed=any(results.particles.notes), classes=max(len(results.classes), 1),
    )  # fmt: skip
    figures = {
        "resolution (FSC 0.143)": f"{results.angstrom():.2f} Å", "Nyquist": f"{2 * results.pixel_size:.2f} Å",
        "particles": f"{results.store.count:,}",
    }  # fmt: skip
    if certain:
        figures |= {"kept": f"{results.kept:,}", "no particle": f"{results.junk:.1%}",
                    "mean confidence": f"{results.mean_confidence:.0%}"}  # fmt: skip
    if results.coherent_share is not None:
        figures["of the signal of right poses"] = f"{results.coherent_share:.0%}"
    figures["worst direction"] = f"{results.cones.worst_angstrom:.2f} Å"
    figures["symmetry"] = _group_name(results)
    if results.classes:
        figures["classes"] = str(len(results.classes))
        figures["structures"] = str(len(structures(results.classes)))
    return judge(evidence, MappingProxyType(figures))


def _group_name(results: FinalResults) -> str:
    return results.config.train.symmetry.strip().upper() if results.config.recipe in POSED else "C1"


def _symmetry(results: FinalResults) -> tuple[str, ...]:
    group = _group_name(results)
    if group == "C1":
        return ()
    return (
        f"symmetry {group}, axes as RELION's: sums are symmetrised, so the curves are of symmetric half-maps; poses "
        "are known modulo the group",
    )


def _independence(results: FinalResults) -> str:
    """How far the halves know nothing of each other."""
    told: Mapping[str, str] = {
        "guided": "Both halves began with one map of low resolution (12 Fourier pixels); since then each was posed "
        "against its own: beyond that shell the curve is a gold standard.",
        "known": "Poses are those that came with the particles: the halves are as independent as they were where those "
        "were found.",
        "poses": "Each half was posed against its own map, made with the poses that came with the particles.",
        "autoencoder": "Each half was posed against its own map, from candidates of one encoder; at low frequencies "
        "both halves shared one map while it learnt.",
    }
    optimistic = "Both halves were posed by one model, so this curve is optimistic: it measures noise, not wrong poses."
    return told.get(results.config.recipe, optimistic)


def _views(results: FinalResults) -> NDArray:
    """Rotations of the particles kept, in all related poses of a point group's; of as many as that figure needs."""
    poses = results.particles.poses
    rotation = poses.rotation[poses.particle_probability >= SHOWN]
    if len(group := PointGroup.of(_group_name(results))) == 1:
        return as_numpy(rotation)
    some = rotation[:: max(1, len(rotation) * len(group) // MOST_VIEWS)].cpu()
    return as_numpy((group.rotations[:, None] @ some).flatten(0, 1))
