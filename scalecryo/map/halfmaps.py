"""Two half-maps from one stream, their FSC and the map that they support together."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scalecryo.map.backprojection import MapAccumulator
from scalecryo.physics.fft import FourierPixels, irfft3_centred, rfft3_centred
from scalecryo.physics.fsc import fsc, shell_index_3d
from scalecryo.physics.image_formation import CtfWeightedImages
from scalecryo.physics.mask import mask_from_map


@dataclass(frozen=True)
class HalfMapResult:
    """Maps of a finished reconstruction, all (n, n, n), and the curves between the halves.

    Attributes:
        half_maps: the two independent sums, solved.
        map: their mean, each shell weighted by C_ref = sqrt(2 FSC / (1 + FSC)) (Rosenthal & Henderson 2003).
        mask: soft mask around the density.
        fsc: between the half-maps, unmasked, by integer shell.
        fsc_masked: the same within the mask.
    """

    half_maps: tuple[Float[Tensor, "n n n"], Float[Tensor, "n n n"]]
    map: Float[Tensor, "n n n"]
    mask: Float[Tensor, "n n n"]
    fsc: Float[Tensor, " shells"]
    fsc_masked: Float[Tensor, " shells"]


class HalfMaps:
    """Two accumulators fed from one stream by each particle's half."""

    def __init__(self, box_size: int, padding: float = 2.0, device: torch.device | str = "cpu") -> None:
        self.halves = tuple(MapAccumulator(box_size, padding, device) for _ in range(2))

    def add(
        self,
        images: CtfWeightedImages,
        rotation: Float[Tensor, "b 3 3"],
        shift_px: Float[Tensor, "b 2"],
        weight: Float[Tensor, " b"],
        half: Int[Tensor, " b"],
        pixels: FourierPixels,
    ) -> None:
        """Insert images into the half-map, 1 or 2, that each belongs to."""
        for number, accumulator in enumerate(self.halves, start=1):
            own = ((half == number) & (weight > 0)).nonzero()[:, 0]  # host sync
            if len(own):
                accumulator.add(images.select(own), rotation[own], shift_px[own], weight[own], pixels)

    def reduce(self, all_reduce_: Callable[..., None], radius: float) -> None:
        """Add what several workers inserted. Collective.

        Args:
            all_reduce_: adds tensors over the workers, in place.
            radius: Fourier pixels up to which images were inserted.
        """
        for half in self.halves:
            parts = half.within(radius)
            all_reduce_(*parts)
            half.put_within(radius, *parts)

    def solve(self, pixel_size: float) -> HalfMapResult:
        """Solve both halves, compare them and combine them.

        Args:
            pixel_size: Å, for the mask's low-pass filter.
        """
        first, second = (half.solve() for half in self.halves)
        curve = fsc(first, second)
        mean = (first + second) / 2
        filtered = weight_shells(mean, (2 * curve.clamp(0, 1) / (1 + curve.clamp(0, 1))).sqrt())
        mask = mask_from_map(filtered, pixel_size)
        return HalfMapResult((first, second), filtered, mask, curve, fsc(first * mask, second * mask))


def weight_shells(volume: Float[Tensor, "n n n"], weight: Float[Tensor, " shells"]) -> Float[Tensor, "n n n"]:
    """Multiply each Fourier shell of a map by a weight; shells past the last keep none."""
    box_size = volume.shape[-1]
    shells = shell_index_3d(box_size, volume.device)
    padded = torch.cat([weight, weight.new_zeros(int(shells.max()) + 1 - len(weight))])  # host sync: once per map
    return irfft3_centred(rfft3_centred(volume) * padded[shells], box_size)
