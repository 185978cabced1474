"""What a run leaves of each class: maps, curves, and what is to be said of them."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scalecryo.data.formats import mrc
from scalecryo.data.io import urls
from scalecryo.evaluate.classes import effective_classes
from scalecryo.evaluate.likeness import alike
from scalecryo.evaluate.report import orientation_figure
from scalecryo.map.postprocess import FinalMap, postprocess
from scalecryo.map.reference import ReferenceSet
from scalecryo.physics.fft import fourier_resize_3d
from scalecryo.physics.fsc import resolution
from scalecryo.physics.poses import FITTING, PoseEstimates
from scalecryo.runs.folder import RunFolder

EMPTY_SHARE = 0.01  # of the particles, below which a class is all but empty
SAME = 0.97  # of what two maps of one structure correlate by, from which on two classes show the same
SAME_BOX, SAME_FROM = 48, 2  # largest box, px, in which classes are compared, and their first shell
POOR = 0.5  # of the best class's resolution in Fourier shells, below which a class is no structure of its own
SIGNAL, HALF = 0.143, 0.5


@dataclass(frozen=True)
class ClassSummary:
    """One class of a finished run.

    Attributes:
        number: from 1, the largest first.
        particles: in it.
        share: of all.
        shell: to which its half-maps agree (FSC 0.143, masked, corrected).
        angstrom: the same in Å.
        verdict: what it is in words; empty: a structure of its own.
    """

    number: int
    particles: int
    share: float
    shell: float
    angstrom: float
    verdict: str

    def __str__(self) -> str:
        text = f"class {self.number}: {self.particles:,} particles ({100 * self.share:.1f} %), to {self.angstrom:.2f} Å"
        return f"{text}: {self.verdict}" if self.verdict else text


def write_maps(run: RunFolder, folder: str, maps: ReferenceSet, final: FinalMap, class_index: int = 0) -> None:
    """Write a class's map.mrc, map_unsharpened.mrc, half1.mrc, half2.mrc and mask.mrc.

    Args:
        run: where to.
        folder: of the run; "": the run itself.
        maps: half-maps and masks.
        final: the finished map.
        class_index: which class.
    """
    first, second = maps.maps[class_index]
    volumes = {"map": final.map, "map_unsharpened": final.unsharpened, "half1": first, "half2": second,
               "mask": maps.mask[class_index]}  # fmt: skip
    if folder:
        urls.make_folder(run.path(folder))
    for name, volume in volumes.items():
        mrc.write_map(run.path(*filter(None, (folder, f"{name}.mrc"))), _numpy(volume), maps.pixel_size)


def fsc_table(maps: ReferenceSet, final: FinalMap, class_index: int = 0) -> str:
    """A class's curves as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["shell", "resolution_angstrom", "fsc_unmasked", "fsc_masked", "fsc_random", "fsc_corrected"])
    own = maps.fsc[class_index], maps.fsc_masked[class_index]
    curves = torch.stack([*own, final.fsc_random, final.fsc_corrected], 1)
    for shell, values in enumerate(curves.tolist()):
        angstrom = maps.level * maps.pixel_size / shell if shell else float("inf")
        writer.writerow([shell, f"{angstrom:.4f}", *(f"{value:.5f}" for value in values)])
    return text.getvalue()


def write_classes(
    run: RunFolder, poses: PoseEstimates, maps: ReferenceSet, first: FinalMap, generator: torch.Generator
) -> tuple[list[FinalMap], list[ClassSummary]]:
    """Write the folders class1, class2, …; returns the finished map of each class and what each is.

    Args:
        run: where to.
        poses: of all particles.
        maps: of all classes, the largest first.
        first: the finished map of the first one.
        generator: of the random phases.
    """
    finals = [first, *(postprocess(maps, generator, number) for number in range(1, maps.classes))]
    for number, final in enumerate(finals):
        folder = f"class{number + 1}"
        write_maps(run, folder, maps, final, number)
        run.write(f"{folder}/fsc.csv", fsc_table(maps, final, number).encode())
        own = poses.rotation[poses.class_index == number]
        run.write(f"{folder}/orientations.png", orientation_figure(_numpy(own)))
    return finals, summaries_of(poses, maps, finals)


def summaries_of(poses: PoseEstimates, maps: ReferenceSet, finals: list[FinalMap]) -> list[ClassSummary]:
    """What each class is."""
    same = _alike(poses, maps)
    reached = [resolution(final.fsc_corrected, maps.level, maps.pixel_size, SIGNAL) for final in finals]
    best = max(shell for shell, _ in reached)
    made, total = [], len(poses.class_index)
    for number, (shell, angstrom) in enumerate(reached):
        own = poses.particle_probability[poses.class_index == number]
        share, verdict = len(own) / total, ""
        if share < EMPTY_SHARE:
            verdict = "all but empty"
        elif float(own.median()) < FITTING:
            verdict = "images that show no particle"
        elif shell < POOR * best:
            verdict = "no structure of its own: a mixture, junk, or too few particles"
        elif (other := same[number]) is not None:
            verdict = f"the same structure as class {other + 1}, or next to it"
        made.append(ClassSummary(number + 1, len(own), share, shell, angstrom, verdict))
    return made


def told_of(classes: Sequence[ClassSummary]) -> str:
    """How many structures there are, in words."""
    return (
        f"{len(structures(classes))} of {len(classes)} classes show a structure of their own; effective number of "
        f"classes (1 / sum of squared shares): {_effective(classes):.2f}"
    )


def figures_of(classes: Sequence[ClassSummary]) -> dict[str, float]:
    """The same for the curves; nothing of a run of one class."""
    if not classes:
        return {}
    return {"final/structures": float(len(structures(classes))), "final/effective_classes": _effective(classes)}


def _effective(classes: Sequence[ClassSummary]) -> float:
    return effective_classes(np.array([own.share for own in classes]))


def structures(classes: Sequence[ClassSummary]) -> list[ClassSummary]:
    """Those that show something of their own."""
    return [own for own in classes if not own.verdict]


def _alike(poses: PoseEstimates, maps: ReferenceSet) -> list[int | None]:
    """For each class the larger one that shows the same, as far as the halves of both can tell."""
    box_size = min(maps.level, SAME_BOX)
    shares = torch.bincount(poses.class_index, minlength=maps.classes).double() / max(len(poses), 1)
    means = [fourier_resize_3d(maps.mean(k) * maps.mask[k], box_size).cpu() for k in range(maps.classes)]
    for number, share in enumerate(shares.tolist()):
        if share < EMPTY_SHARE:
            means[number].zero_()
    curves = [curve[: box_size // 2 + 1].cpu() for curve in maps.fsc_masked]
    last = int(min(maps.resolution(HALF)[0], box_size // 2 - 1))
    return alike(means, curves, shares.tolist(), slice(SAME_FROM, max(last, SAME_FROM + 1) + 1), SAME)


def _numpy(tensor: Tensor) -> NDArray:
    return tensor.detach().cpu().numpy()
