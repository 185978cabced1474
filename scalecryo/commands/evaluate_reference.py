"""`scalecryo evaluate` against one map or structure: any box, pixel size and orientation, in either hand."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.data.formats.mrc import read_map
from scalecryo.data.formats.structure import potential_map, read_structure
from scalecryo.data.io import urls
from scalecryo.errors import InputError
from scalecryo.evaluate.compare import MapComparison, compare_maps, summary
from scalecryo.evaluate.metrics import MapErrors, map_errors
from scalecryo.physics.fft import fourier_resize_3d
from scalecryo.physics.mask import mask_from_map
from scalecryo.physics.resample import density_centre, resample

MAPS, STRUCTURES = (".mrc", ".map", ".ccp4"), (".pdb", ".ent", ".cif", ".mmcif", ".mcif")
_OFF_CENTRE = 1 / 16  # of the box, from which on a reference is first moved to the middle: a search covers an eighth


@dataclass(frozen=True)
class ReferenceComparison:
    """A map on a reference.

    Attributes:
        maps: both on one grid, aligned, compared without a mask.
        masked: the same within a soft mask around the reference.
    """

    maps: MapComparison
    masked: MapErrors

    def line(self) -> dict[str, Any]:
        """What the JSON line says of it."""
        return summary(None, None, self.maps) | {
            "fsc_masked_0.5_angstrom": self.masked.angstrom_05, "fsc_masked_0.143_angstrom": self.masked.angstrom_0143,
            "box_size": self.maps.truth.shape[-1], "pixel_size": self.maps.pixel_size,
        }  # fmt: skip


def is_reference(path: str) -> bool:
    """Whether a path names a map or a structure, by its ending; otherwise it is a folder with a known truth."""
    name = path.lower().removesuffix(".gz").removesuffix(".bz2")
    return name.endswith(MAPS + STRUCTURES)


def compare_with_reference(density: str, reference: str) -> ReferenceComparison:
    """Bring a reference onto a map's grid and compare them.

    Args:
        density: address of the map.
        reference: address of another map, or of a structure (PDB, mmCIF), of which a map is made.

    Raises:
        MissingInputError: one of them is not there.
        InputError: one cannot be used: no pixel size, or a structure that is larger than the map's box.
    """
    volume, pixel_size = _even_cube(*_read(density))
    extent = volume.shape[-1] * pixel_size
    known = None if _is_structure(reference) else _read(reference)
    # Nothing finer than the coarser of the two can be compared.
    coarsest = max(pixel_size, known[1] if known else 0.0)
    box_size = volume.shape[-1] if coarsest <= pixel_size else 2 * int(extent / coarsest / 2 + 1e-6)
    if known is None:
        truth = torch.from_numpy(potential_map(read_structure(reference), box_size, extent / box_size))
    else:
        truth = _on_grid(*known, box_size, extent / box_size)
    maps = compare_maps(fourier_resize_3d(volume, box_size), truth, extent, None, torch.eye(3)[None])
    mask = mask_from_map(maps.truth, maps.pixel_size)
    return ReferenceComparison(maps, map_errors(maps.aligned * mask, maps.truth * mask, maps.pixel_size))


def _is_structure(path: str) -> bool:
    return path.lower().removesuffix(".gz").removesuffix(".bz2").endswith(STRUCTURES)


def _read(path: str) -> tuple[Float[Tensor, "d h w"], float]:
    volume, pixel_size, _ = read_map(path)
    if not pixel_size > 0:
        raise InputError(f"{urls.redacted(path)}: no pixel size in its header: set the cell's lengths there")
    return torch.from_numpy(volume).float(), pixel_size


def _even_cube(volume: Float[Tensor, "d h w"], pixel_size: float) -> tuple[Float[Tensor, "n n n"], float]:
    """As it is, or in the smallest even cube that holds it."""
    if len(set(volume.shape)) == 1 and volume.shape[0] % 2 == 0:
        return volume, pixel_size
    return resample(volume, pixel_size, 2 * -(-max(volume.shape) // 2), pixel_size), pixel_size


def _on_grid(volume: Float[Tensor, "d h w"], pixel_size: float, box_size: int, wanted: float) -> Float[Tensor, "n n n"]:
    """A reference on another grid; density far from the middle is brought there."""
    middle = [length // 2 for length in reversed(volume.shape)]
    centre = density_centre(volume)
    off = max(abs(a - b) for a, b in zip(centre, middle, strict=True)) * pixel_size
    return resample(volume, pixel_size, box_size, wanted, centre if off > _OFF_CENTRE * box_size * wanted else None)
