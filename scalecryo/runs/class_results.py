"""What a run leaves of each class: maps, curves, and what is to be said of them."""

import csv
import io
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scalecryo.data.formats import mrc
from scalecryo.data.io import urls
from scalecryo.evaluate.report import Section, fsc_figure, orientation_figure, slices_figure
from scalecryo.map.postprocess import FinalMap, postprocess
from scalecryo.map.reference import ReferenceSet
from scalecryo.physics.fsc import resolution
from scalecryo.physics.poses import PoseEstimates
from scalecryo.runs.folder import RunFolder

EMPTY_SHARE = 0.01  # of the particles, below which a class is all but empty
SHOWN = 0.5  # median probability that its images show a particle, below which a class is junk
POOR = 0.5  # of the best class's resolution in Fourier shells, below which a class is no structure of its own
SIGNAL = 0.143


@dataclass(frozen=True)
class ClassSummary:
    """One class of a finished run.

    Attributes:
        number: from 1, the largest first.
        particles: in it.
        share: of all.
        shell: to which its half-maps agree (FSC 0.143, masked, corrected).
        angstrom: the same in Å.
        verdict: what it is in words; empty: a structure.
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
) -> list[tuple[Section, str]]:
    """Write the folders class1, class2, …; returns the report's sections, each with the name of its picture.

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
    summaries = summaries_of(poses, maps, finals)
    share = np.array([summary.share for summary in summaries])
    text = "".join(f"{summary}\n" for summary in summaries)
    text += f"effective number of classes (1 / sum of squared shares): {1 / np.square(share).sum():.2f}"
    planes = {str(summary): _numpy(final.map) for summary, final in zip(summaries, finals, strict=True)}
    curves = {f"class {n}": _numpy(final.fsc_corrected) for n, final in enumerate(finals, 1)}
    found = [
        (Section("Classes", text, slices_figure(planes, maps.pixel_size)), "classes"),
        (Section("Classes: correlation of the halves", png=fsc_figure(curves, maps.level, maps.pixel_size)),
         "classes_fsc"),
    ]  # fmt: skip
    for section, name in found:
        assert section.png is not None, "drawn above"
        run.write(f"{name}.png", section.png)
    return found


def summaries_of(poses: PoseEstimates, maps: ReferenceSet, finals: list[FinalMap]) -> list[ClassSummary]:
    """What each class is."""
    reached = [resolution(final.fsc_corrected, maps.level, maps.pixel_size, SIGNAL) for final in finals]
    best = max(shell for shell, _ in reached)
    made, total = [], len(poses.class_index)
    for number, (shell, angstrom) in enumerate(reached):
        own = poses.particle_probability[poses.class_index == number]
        share, verdict = len(own) / total, ""
        if share < EMPTY_SHARE:
            verdict = "all but empty"
        elif float(own.median()) < SHOWN:
            verdict = "images that show no particle"
        elif shell < POOR * best:
            verdict = "no structure of its own: a mixture, junk, or too few particles"
        made.append(ClassSummary(number + 1, len(own), share, shell, angstrom, verdict))
    return made


def _numpy(tensor: Tensor) -> NDArray:
    return tensor.detach().cpu().numpy()
