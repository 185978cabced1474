"""A map as a surface: the grid that the viewer contours, a contour to begin with, pictures from three sides.

The viewer and the pictures show the same grid, cut to the mask's box and sampled finely enough to look smooth.
"""

import base64
import math
import zlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from scalecryo.evaluate.report.figure import png_of_pixels
from scalecryo.physics.fft import fourier_resize_3d
from scalecryo.physics.mask import gaussian_low_pass

GRID = 80  # voxels across the viewer's grid; 64 and 96 take half and twice the file
SAMPLES = 2.6  # voxels of the grid to the finest detail
PICTURE = 240  # pixels across one side's picture
SOLVENT_SD, LEAST_SD = (
    7.0,
    4.0,
)  # standard deviations of the solvent that a contour lies above it, where the density is that strong
ENVELOPE_A = 12.0  # low-pass that the particle's mass is read at: 43 to 46 kDa of adenylate kinase's 44 in four maps
DALTON_PER_A3 = 0.81  # of protein: partial specific volume 0.74 cm³/g
COLOUR = np.array([0.56, 0.71, 0.86])


@dataclass(frozen=True, eq=False)
class Surface:
    """A map within its mask, ready to be contoured.

    Attributes:
        density: cube around the mask, finely sampled; values are the map's.
        spacing: Å between its voxels.
        level: suggested contour of that density.
        map_level: of the map before it was low-passed.
        mass_kda: of protein that would fill the particle's envelope, roughly.
    """

    SIDES: ClassVar = ("from +z with x to the right", "from −y with x to the right", "from +x with y to the right")

    density: Float[Tensor, "n n n"]
    spacing: float
    level: float
    map_level: float
    mass_kda: float

    @classmethod
    def of_map(
        cls,
        volume: Float[Tensor, "n n n"],
        mask: Float[Tensor, "n n n"],
        pixel_size: float,
        size: int = GRID,
        angstrom: float = 0.0,
    ) -> "Surface":
        """Cut a map to its mask, low-pass it and sample it `size` voxels across, on the CPU.

        Args:
            volume: the map.
            mask: soft, of the same box.
            pixel_size: Å.
            size: even.
            angstrom: resolution that it is low-passed to, at least by as much as the grid can hold without ringing.
        """
        start, width = _cube_around(mask)
        place = tuple(slice(at, at + width) for at in start)
        whole, inside = volume[place].detach().cpu().float(), mask[place].cpu().float()
        spacing = pixel_size * width / size
        finest = max(angstrom, SAMPLES * spacing if spacing > pixel_size else 0.0)
        low = gaussian_low_pass(whole, pixel_size, finest) if finest else whole
        blurred = gaussian_low_pass(whole, pixel_size, ENVELOPE_A) * inside
        envelope = float((blurred >= otsu_level(blurred, inside)).sum()) * pixel_size**3
        level, map_level = _contour(low, inside), _contour(whole, inside)
        return cls(_sampled(low * inside, size), spacing, level, map_level, envelope * DALTON_PER_A3 / 1000)

    @property
    def text(self) -> str:
        """The suggested contour and the particle's mass in words."""
        return (
            f"Suggested contour {self.level:.3g} (of map.mrc as it is: {self.map_level:.3g}). At {ENVELOPE_A:g} Å the "
            f"map's envelope holds as much as about {self.mass_kda:,.0f} kDa of protein would fill."
        )

    def data(self) -> dict[str, str]:
        """What the viewer reads: values from `low` (0) to `high` (255), row-major [z, y, x], deflated, base64."""
        # Below a fifth of the contour there is nothing to look at, and zeros pack well.
        low, high = 0.2 * self.level, max(float(self.density.max()), 1.2 * self.level, 1e-12)
        bytes_ = ((self.density - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8).numpy().tobytes()
        return {
            "grid": base64.b64encode(zlib.compress(bytes_, 9)).decode("ascii"), "size": str(len(self.density)),
            "spacing": f"{self.spacing:.5g}", "low": f"{low:.6g}", "high": f"{high:.6g}", "level": f"{self.level:.6g}",
        }  # fmt: skip

    def picture(self, size: int = PICTURE) -> NDArray[np.uint8]:
        """The surface from +z, −y and +x beside each other, (rows, columns, 3), with a bar of `bar_a` Å."""
        fine = _sampled(self.density, size).numpy()
        # Each is put so that the viewer looks along the first axis, rows go down and columns to the right.
        sides = (fine[::-1, ::-1], fine.transpose(1, 0, 2)[:, ::-1], fine.transpose(2, 0, 1)[::-1, ::-1])
        panels = [_shaded(side, self.level) for side in sides]
        image = (np.concatenate(panels, axis=1) * 255).round().astype(np.uint8)
        length = max(1, round(self.bar_a / (self.spacing * len(self.density) / size)))
        image[-7:-4, 6 : 6 + length] = 40
        return image

    @property
    def bar_a(self) -> float:
        """Length of the scale bar, Å: 1, 2 or 5 times a power of ten, about a quarter of the picture."""
        wanted = self.spacing * len(self.density) / 4
        power = 10 ** math.floor(math.log10(wanted))
        return max(step * power for step in (1, 2, 5) if step * power <= wanted)


def surface_picture(surface: Surface, size: int = PICTURE) -> bytes:
    """The surface from three sides, each so many pixels across, as PNG bytes."""
    return png_of_pixels(surface.picture(size))


def _contour(density: Float[Tensor, "n n n"], mask: Float[Tensor, "n n n"]) -> float:
    """Well above the solvent's noise, where the density is that strong, and between density and solvent."""
    otsu, outside = otsu_level(density * mask, mask), density[mask < 0.01]
    if len(outside) < 2:
        return otsu
    sigma = float(outside.std())
    return max(min(max(SOLVENT_SD * sigma, otsu / 2), otsu), LEAST_SD * sigma, 1e-12)


def otsu_level(masked: Float[Tensor, "n n n"], mask: Float[Tensor, "n n n"]) -> float:
    """Threshold between density and solvent within a soft mask, by Otsu's criterion (1979).

    It parts the voxels into two groups so that as little as possible of the variance is within them. The mask's rim
    is solvent, so both are there.
    """
    values = masked[mask > 0.5].double()
    if len(values) < 2 or float(values.max() - values.min()) < 1e-12:
        return max(float(values.max()) if len(values) else 0.0, 1e-12)
    low, high = float(values.min()), float(values.max())
    counts = torch.histc(values.float(), 256, low, high).double()
    centres = low + (torch.arange(256).double() + 0.5) * (high - low) / 256
    below, sums = counts.cumsum(0), (counts * centres).cumsum(0)
    above = below[-1] - below
    between = (sums[-1] * below / below[-1] - sums).square() / (below * above).clamp_min(1e-12)
    return max(float(centres[int(between[:-1].argmax())]), 1e-12)


def _cube_around(mask: Float[Tensor, "n n n"]) -> tuple[list[int], int]:
    """Corner and even width of the smallest cube that holds a mask, with a little room, inside the box."""
    n = mask.shape[-1]
    spans = []
    for axis in range(3):
        others = tuple({0, 1, 2} - {axis})
        used = (mask.amax(others) > 0.01).nonzero()[:, 0]
        spans.append((int(used[0]), int(used[-1])) if len(used) else (0, n - 1))
    width = min(n, 2 * math.ceil((max(last - first for first, last in spans) + 5) / 2))
    return [min(max((first + last + 1 - width) // 2, 0), n - width) for first, last in spans], width


def _sampled(volume: Float[Tensor, "n n n"], size: int) -> Float[Tensor, "m m m"]:
    """Another sampling of the same cube; values are kept."""
    return fourier_resize_3d(volume, size) * (size / volume.shape[-1]) ** 2


def _shaded(volume: NDArray[np.float32], level: float) -> NDArray[np.float64]:
    """The first surface along the first axis, lit from the viewer's upper left, on white: (rows, columns, 3)."""
    inside = volume >= level
    inside[0] = False  # so that a voxel before every hit exists
    depth = inside.argmax(0)
    hit = np.take_along_axis(inside, depth[None], 0)[0]
    rows, columns = np.nonzero(hit)
    at = depth[hit]
    near, far = volume[at - 1, rows, columns], volume[at, rows, columns]
    part = ((level - near) / np.maximum(far - near, 1e-12)).clip(0, 1)
    normal = part * _gradient(volume, at, rows, columns) + (1 - part) * _gradient(volume, at - 1, rows, columns)
    normal = normal / np.maximum(np.linalg.norm(normal, axis=0), 1e-12)
    # The gradient points inwards, along the view and down.
    lamp = np.array([0.75, 0.5, 0.43]) / np.linalg.norm([0.75, 0.5, 0.43])
    diffuse, facing = (lamp @ normal).clip(0, 1), normal[0].clip(0, 1)
    # What lies deeper is paler, as in fog.
    place = at - 1 + part
    fog = 0.45 * (place - place.min(initial=len(volume))) / len(volume)
    shade = (0.3 + 0.6 * diffuse + 0.1 * facing)[:, None] * COLOUR + 0.25 * (diffuse**20)[:, None]
    image = np.ones((*hit.shape, 3))
    image[hit] = (shade * (1 - fog[:, None]) + fog[:, None]).clip(0, 1)
    return image


def _gradient(
    volume: NDArray[np.float32], at: NDArray[np.intp], rows: NDArray[np.intp], columns: NDArray[np.intp]
) -> NDArray[np.float32]:
    """Central differences at some voxels, (3, n)."""
    last = len(volume) - 1
    place, found = (at, rows, columns), []
    for axis in range(3):
        up, down = list(place), list(place)
        up[axis], down[axis] = np.minimum(place[axis] + 1, last), np.maximum(place[axis] - 1, 0)
        found.append(volume[tuple(up)] - volume[tuple(down)])
    return np.stack(found)
