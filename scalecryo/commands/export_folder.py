"""What makes an export a folder to start from: links to the stacks, and commands to type there."""

import csv
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scalecryo.data.conversion.stacks import find_stack
from scalecryo.data.formats.mrc import read_map
from scalecryo.data.io import urls
from scalecryo.errors import ScalecryoError

LEAST_INITIAL_A = 8.0  # low-pass of a reference for a local refinement, at least: detail must be found, not copied


def link_stacks(out: str, names: Sequence[str], table: str, data_dir: str | None) -> list[str]:
    """Links in a folder to the stacks that a table names, so that their relative names lead to them from there.

    Absolute names are left alone: they lead there from anywhere.

    Args:
        out: the folder.
        names: of the stacks, as the table gives them.
        table: address of the table that the store was made of.
        data_dir: folder that the names are relative to; None: near the table.

    Returns:
        What a person must know: which could not be linked, and why.
    """
    told: list[str] = []
    if not urls.is_local(out):
        return [f"{urls.redacted(out)} is no folder on a disk: put links to the stacks there when it is fetched"]
    base = os.path.abspath(urls.local_path(out))
    for name in names:
        if "://" in name or os.path.isabs(name):
            continue
        place = os.path.normpath(os.path.join(base, name))
        if not place.startswith(base + os.sep):
            told.append(f"{name} leads out of the folder")
            continue
        try:
            found = find_stack(name, table, data_dir).url
        except ScalecryoError as error:
            told.append(str(error))
            continue
        if not urls.is_local(found):
            told.append(f"{urls.redacted(found)} is not on a disk: fetch it to {place}")
            continue
        os.makedirs(os.path.dirname(place), exist_ok=True)
        if not os.path.lexists(place):
            os.symlink(os.path.abspath(urls.local_path(found)), place)
    return told


@dataclass(frozen=True)
class Advice:
    """What commands are written with.

    Attributes:
        out: the folder.
        angstrom: resolution of the map.
        pixel_size: Å.
        diameter: of the mask, Å.
        group: point group.
        dark: whether the stacks are protein-dark; None: nobody knows.
        has_mask: whether mask.mrc is there.
        reference: the map to refine against.
    """

    out: str
    angstrom: float
    pixel_size: float
    diameter: float
    group: str
    dark: bool | None
    has_mask: bool
    reference: str

    @classmethod
    def of(cls, run: str, out: str, group: str, dark: bool | None) -> "Advice":
        """From a run's files."""
        density, pixel_size, _ = read_map(urls.join(run, "map.mrc"))
        box_size, angstrom = density.shape[-1], 4 * pixel_size
        if urls.exists(path := urls.join(run, "fsc.csv")):
            # It imports torch, which takes seconds: wrong arguments are refused before.
            from scalecryo.physics.fsc import resolution

            curve = [float(row["fsc_corrected"]) for row in csv.DictReader(io.StringIO(urls.read_text(path)))]
            _, angstrom = resolution(curve, box_size, pixel_size, 0.143)
        has_mask = urls.exists(urls.join(run, "mask.mrc"))
        diameter = 0.9 * box_size * pixel_size
        if has_mask:
            mask, _, _ = read_map(urls.join(run, "mask.mrc"))
            far = np.argwhere(mask > 0.5) - box_size // 2
            if len(far):
                diameter = min(diameter, 2 * float(np.linalg.norm(far, axis=1).max()) * pixel_size)
        plain = urls.exists(urls.join(run, "map_unsharpened.mrc"))
        reference = "map_unsharpened.mrc" if plain else "map.mrc"
        return cls(urls.redacted(out), angstrom, pixel_size, diameter, group, dark, has_mask, reference)

    def commands(self, format: str) -> list[str]:
        """Lines to print: what to do in the folder, in that program."""
        return {"relion": self._relion, "cryosparc": self._cryosparc, "cryodrgn": self._cryodrgn}[format]()

    @property
    def contrast(self) -> str:
        """What is known of the stacks' contrast."""
        if self.dark is None:
            return "contrast of the stacks: not known here (the run's store is gone); look at one"
        return f"contrast of the stacks: protein is {'dark' if self.dark else 'bright'}"

    def _relion(self) -> list[str]:
        initial = max(LEAST_INITIAL_A, math.ceil(2 * self.angstrom))
        mask = " --solvent_mask mask.mrc --solvent_correct_fsc" if self.has_mask else ""
        lines = [
            f"cd {self.out}",
            "# the map again from these poses, as a check",
            f"relion_reconstruct --i particles.star --o check.mrc --ctf --sym {self.group}",
            "# local refinement from these poses (leave out --healpix_order 4 for a search of all orientations)",
            "mkdir -p Refine3D && mpirun -n 3 relion_refine_mpi --i particles.star --o Refine3D/run --auto_refine "
            f"--split_random_halves --ref {self.reference} --firstiter_cc --ini_high {initial:g} --ctf --norm --scale "
            f"--flatten_solvent --zero_mask{mask} --particle_diameter {self.diameter:.0f} --healpix_order 4 "
            "--auto_local_healpix_order 4 --offset_range 3 --offset_step 1 --oversampling 1 --pad 2 "
            f"--dont_check_norm --sym {self.group} --j 4",
            "# resolution and sharpening",
            "mkdir -p PostProcess && relion_postprocess --i half1.mrc --i2 half2.mrc "
            f"{'--mask mask.mrc ' if self.has_mask else ''}--angpix {self.pixel_size:.4g} --o PostProcess/postprocess",
        ]
        if self.dark:
            lines.append(
                "# RELION wants bright protein: relion_image_handler --multiply_constant -1 turns a stack; these "
                "poses hold for the turned ones"
            )
        return lines

    def _cryosparc(self) -> list[str]:
        sign = "" if self.dark is None else f" (blob/sign is {-1 if self.dark else 1})"
        return [
            f"# put {self.out} into the project's folder, and in the project:",
            f"#   Import Result Group    path …/particles.csg{sign}",
            "#   Import 3D Volumes      path …/map.mrc" + (", and …/mask.mrc as a mask" if self.has_mask else ""),
            f"#   Homogeneous Reconstruction Only, symmetry {self.group}: the map again from these poses, as a check",
            "#   Local Refinement       with the particles, the volume and the mask",
        ]

    def _cryodrgn(self) -> list[str]:
        # cryoDRGN's CTF is the negative of ours, so it turns the images' sign, unless they are dark already.
        sign = " --uninvert-data" if self.dark else ""
        given = f"particles.star --datadir . --poses poses.pkl --ctf ctf.pkl{sign}"
        return [
            f"cd {self.out}",
            "# the map again from these poses, as a check",
            f"cryodrgn backproject_voxel {given} -o check",
            "# heterogeneity",
            f"cryodrgn train_vae {given} --zdim 8 -n 25 -o vae",
        ]
