"""A known truth to follow while training on a simulation: pose errors and FSC, as in the paper's figures 2 and 3."""

from dataclasses import dataclass, field
from functools import cached_property

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
    """True rotations by row of the store, and the true map."""

    rotation: Float[Tensor, "particles 3 3"]
    volume: Float[Tensor, "n n n"]
    """Of the file's own box."""
    _at_level: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)
    """The map at the level that was asked for last."""

    @cached_property
    def symmetry(self) -> Float[Tensor, "g 3 3"]:
        """Rotations of the map's pseudo-symmetry; searched for a second or two when it is first asked for."""
        return rotational_symmetry(self.volume)

    @classmethod
    def load(cls, folder: str, store: ParticleStore, level: int) -> "Truth":
        """Read truth.star and truth.mrc and match their rows to the store's by image name.

        Args:
            folder: where they lie.
            store: of the particles.
            level: the largest at which maps are to be compared, px.

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
        return cls(torch.from_numpy(poses.rotation[rows]).float(), torch.from_numpy(volume))

    def compare(
        self,
        rows: Int[Tensor, " b"],
        rotation: Float[Tensor, "b 3 3"],
        volume: Float[Tensor, "m m m"],
        pixel_size: float,
    ) -> dict[str, float | list[float]]:
        """Errors of some particles' rotations, and of the map: its own origin and frame are refined from theirs.

        Args:
            rows: of the particles.
            rotation: found for them.
            volume: the map, of any level.
            pixel_size: of that level, Å.
        """
        truth, true_map = self.rotation[rows], self._resized(volume.shape[-1])
        alignment = align_poses(rotation, truth)
        aligned = alignment.rotations(rotation)
        errors, modulo = rotation_errors(aligned, truth), rotation_errors(aligned, truth, self.symmetry)
        laid = align_maps(volume, true_map, [alignment], search=False)
        found = map_errors(apply_alignment(volume, laid), true_map, pixel_size)
        return {
            "truth/rotation_error_median_deg": errors.median_deg,
            "truth/rotation_error_mean_deg": errors.mean_deg,
            "truth/rotation_error_mod_pseudosymmetry_median_deg": modulo.median_deg,
            "truth/fsc_0.5_shell": found.shell_05,
            "truth/fsc_0.143_shell": found.shell_0143,
            "truth/fsc_mean": found.mean,
            "truth/fsc": [round(float(value), 4) for value in found.curve],
        }

    def _resized(self, level: int) -> Float[Tensor, "m m m"]:
        if level not in self._at_level:
            self._at_level.clear()
            self._at_level[level] = fourier_resize_3d(self.volume, level)
        return self._at_level[level]
