"""What a run came to, in words: good, limited by the pixel size, doubtful and why, or failed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Grade = Literal["good", "limited", "doubtful", "failed"]

# Of Nyquist, from which on pixels and not particles set the resolution: corners and masks cut the last shells.
NYQUIST_SHARE = 0.93
# A particle's shape is decided by some shells within its diameter; below so many its map is a blob with any poses.
LEAST_SHELLS_ACROSS = 6.0
UNCERTAIN, JUNK = 0.5, 0.5
UNFIT = 0.15  # share of images that do not fit, above which it is worth a word
# Of the signal that right poses of even views would add up: as if four of five particles were not there. Right runs had
# 0.9 to 1.2 of it, and 0.22 to 0.6 where a symmetric particle's poses gathered in a part of the sphere; runs in a local
# optimum of the poses 0.07 to 0.18 (docs/measured.md).
LEAST_COHERENT = 0.2


@dataclass(frozen=True)
class Verdict:
    """What a page begins with.

    Attributes:
        grade: good, limited, doubtful, failed.
        headline: in a few words.
        text: what it means.
        reasons: why, one sentence each.
        figures: the numbers that people look for first, by name, with their units.
    """

    grade: Grade
    headline: str
    text: str = ""
    reasons: tuple[str, ...] = ()
    figures: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Evidence:
    """What a verdict is judged by.

    Attributes:
        angstrom: resolution of the masked, corrected FSC at 0.143.
        pixel_size: Å.
        diameter: of the density, Å.
        confidence: mean probability of the pose and the particle; None: the recipe gives none.
        junk: share of the images that show no particle.
        independent: whether the halves were posed against maps of their own.
        warnings: what was found otherwise, one sentence each.
        uneven: what to say where directions are resolved very differently; nothing where they are not.
        coherent: half-maps' share of the signal that right poses of even views would add up; None: not known.
        coverage: what the views leave of that signal.
        noticed: whether the page tells of anything else that was found on the way.
        classes: maps that the images were compared with.
    """

    angstrom: float
    pixel_size: float
    diameter: float
    confidence: float | None
    junk: float
    independent: bool
    warnings: Sequence[str] = ()
    uneven: str = ""
    coherent: float | None = None
    coverage: float = 1.0
    noticed: bool = False
    classes: int = 1


HAND = "The hand cannot be known from images: compare with a known structure, or look at helices from about 7 Å on."


def judge(evidence: Evidence, figures: Mapping[str, str]) -> Verdict:
    """The verdict on a finished run.

    Args:
        evidence: see there.
        figures: to be shown beside it.
    """
    nyquist, angstrom = 2 * evidence.pixel_size, evidence.angstrom
    told = tuple(filter(None, (*evidence.warnings, unfit(evidence.junk, evidence.classes))))
    doubts = _doubts(evidence, told)
    if doubts:
        return Verdict(
            "doubtful", f"Doubtful: the half-maps agree to {angstrom:.2f} Å, but",
            "Look at surface, slices and particles before you use this map. " + HAND, tuple(doubts), figures,
        )  # fmt: skip
    if nyquist >= NYQUIST_SHARE * angstrom:
        return Verdict(
            "limited", f"Good, and limited by the pixel size: {angstrom:.2f} Å at a Nyquist limit of {nyquist:.2f} Å",
            f"The half-maps agree up to what {evidence.pixel_size:g} Å per pixel can hold: extract the particles with "
            "smaller pixels to see more. " + HAND, told, figures,
        )  # fmt: skip
    certain = "" if evidence.confidence is None else "most poses are certain, "
    checks = "and no check found anything against the map"
    if told or evidence.noticed:
        checks = "but read what was noticed on the way"
    return Verdict(
        "good", f"Good: the half-maps agree to {angstrom:.2f} Å", "The halves agree within the mask after correction "
        f"for it, {certain}{checks}. " + HAND,
        told, figures,
    )  # fmt: skip


def incoherent(share: float | None, coverage: float) -> str:
    """What to say where half-maps hold too little of the signal that right poses would add up; else nothing.

    Args:
        share: of that signal; None: not known.
        coverage: what would be left of it by the views alone.
    """
    if share is None or share >= LEAST_COHERENT:
        return ""
    held = f"the half-maps hold {share:.0%} of the signal that right poses of even views would add up, by the images' "
    if coverage < share / coverage:
        return (
            f"{held}power above their noise: by how uneven the found views are {coverage:.0%} would be left. Most "
            "particles lie alike, or the map is symmetric and its poses are not spread over its copies, or both halves "
            "are distorted alike: try another train.seed, or pose.source guided, with --symmetry if it has one"
        )
    return (
        f"{held}power above their noise: many poses are likely to be wrong, alike in both halves. Try another "
        "train.seed, or pose.source guided"
    )


def unfit(share: float, classes: int = 1) -> str:
    """What to say of many images that are unlike the map, else nothing: a map of one conformation looks as good as one
    of all.

    Args:
        share: of the images.
        classes: maps that they were compared with.
    """
    if not UNFIT < share <= JUNK:
        return ""
    where, more = ("any of the maps", "more classes") if classes > 1 else ("the map", "--classes 4 or --components 4")
    return (
        f"{share:.0%} of the images do not fit {where}: they show no particle, or another composition or conformation, "
        f"which {more} would show"
    )


def _doubts(evidence: Evidence, warnings: Sequence[str]) -> list[str]:
    """What speaks against the map, and then the warnings; nothing where nothing speaks against it."""
    found = []
    if evidence.diameter < LEAST_SHELLS_ACROSS * evidence.angstrom:
        found.append(
            f"that is {evidence.diameter / evidence.angstrom:.1f} resolution elements across a particle of "
            f"{evidence.diameter:.0f} Å: a map so coarse can look alike with wrong poses"
        )
    if told := incoherent(evidence.coherent, evidence.coverage):
        found.append(told)
    if evidence.uneven:
        found.append(
            f"{evidence.uneven}. Where the views do not explain it, the poses of both halves are distorted alike: try "
            "another train.seed, or pose.source guided"
        )
    if not evidence.independent:
        found.append("both halves were posed by one model, so their agreement is optimistic: it measures noise alone")
    if evidence.confidence is not None and evidence.confidence < UNCERTAIN:
        found.append(
            f"most poses are uncertain: on average a pose is right with a probability of {evidence.confidence:.0%}"
        )
    if evidence.junk > JUNK:
        found.append(
            f"{evidence.junk:.0%} of the images seem to show no particle, or another one, or are too noisy to tell: "
            "look at the least sure ones; if they show none, clean the set and train again, else try --classes 4"
        )
    return found + [f"{warning[0].upper()}{warning[1:]}" for warning in warnings] if found else found
