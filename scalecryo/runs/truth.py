"""A known truth to follow while training on a simulation: pose errors and FSC, as in the paper's figures 2 and 3."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scalecryo.data.formats import mrc, relion
from scalecryo.data.io import urls
from scalecryo.data.storage.store import ParticleStore
from scalecryo.errors import InputError
from scalecryo.evaluate.align import align_poses
from scalecryo.evaluate.align_maps import align_maps, apply_alignment, rotational_symmetry
from scalecryo.evaluate.metrics import map_errors, rotation_errors
from scalecryo.physics.fft import fourier_resize_3d


@dataclass(frozen=True)
class Truth:
    """True rotations by row of the store, the true map at the training level, and its pseudo-symmetry."""

    rotation: Float[Tensor, "particles 3 3"]
    volume: Float[Tensor, "n n n"]
    pixel_size: float
    symmetry: Float[Tensor, "g 3 3"]

    @classmethod
    def load(cls, folder: str, store: ParticleStore, level: int) -> "Truth":
        """Read truth.star and truth.mrc and match their rows to the store's by image name.

        Raises:
            MissingInputError: a file is missing.
            InputError: the truth does not name every particle of the store, or its map has another box.
        """
        path = urls.join(folder, "truth.star")
        poses = relion.read_poses(path)
        row_of = {relion.image_key(name): row for row, name in enumerate(poses.names)}
        columns = store.read_columns(0, store.count, ("stack", "stack_index"))
        stacks = store.stacks
        rows = []
        for stack, index in zip(columns["stack"], columns["stack_index"], strict=True):
            key = relion.image_key(f"{index + 1}@{stacks[stack]}")
            if key not in row_of:
                raise InputError(
                    f"{path}: has no row for particle {key[0]}@{key[1]} of {store.url}: name its own truth"
                )
            rows.append(row_of[key])
        volume, _, _ = mrc.read_map(urls.join(folder, "truth.mrc"))
        if volume.shape[-1] < level:
            raise InputError(f"{folder}/truth.mrc: box {volume.shape[-1]} px, the run trains at {level} px")
        resized = fourier_resize_3d(torch.from_numpy(volume), level)
        rotation = torch.from_numpy(poses.rotation[rows]).float()
        return cls(rotation, resized, store.level_pixel_size(level), rotational_symmetry(resized))

    def compare(
        self,
        rows: Int[Tensor, " b"],
        rotation: Float[Tensor, "b 3 3"],
        volume: Float[Tensor, "n n n"],
    ) -> dict[str, float | list[float]]:
        """Errors of some particles' rotations, and of the map: its own origin and frame are refined from theirs."""
        truth = self.rotation[rows]
        alignment = align_poses(rotation, truth)
        aligned = alignment.rotations(rotation)
        errors, modulo = rotation_errors(aligned, truth), rotation_errors(aligned, truth, self.symmetry)
        laid = align_maps(volume, self.volume, [alignment], search=False)
        found = map_errors(apply_alignment(volume, laid), self.volume, self.pixel_size)
        return {
            "truth/rotation_error_median_deg": errors.median_deg,
            "truth/rotation_error_mean_deg": errors.mean_deg,
            "truth/rotation_error_mod_pseudosymmetry_median_deg": modulo.median_deg,
            "truth/fsc_0.5_shell": found.shell_05,
            "truth/fsc_0.143_shell": found.shell_0143,
            "truth/fsc_mean": found.mean,
            "truth/fsc": [round(float(value), 4) for value in found.curve],
        }
