"""The maps that poses are sought against: two independent half-maps for every class, and what they share."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from scalecryo.map.backprojection import PADDING
from scalecryo.map.class_differences import tied_classes
from scalecryo.map.noise import NoiseSpectrum
from scalecryo.map.solvent import SolventMask
from scalecryo.physics.fft import FourierPixels, fourier_resize_3d, rfft3_centred
from scalecryo.physics.fourier_slice import gridding_correction
from scalecryo.physics.fsc import fsc, full_map_fsc, resolution, weight_shells
from scalecryo.physics.kernels.packed_volume import PackedVolume
from scalecryo.physics.mask import density_radius, mask_from_map, soft_sphere


@dataclass(frozen=True, eq=False)
class Reference:
    """One map, ready to be sliced.

    Attributes:
        transform: padded, inside its sphere, corrected for the slices' trilinear interpolation.
        scale: samples per cycle and box.
        noise: spectrum in the units of the images' transforms at the same level.
        diameter: of the density, as a share of the box.
    """

    transform: Complex[Tensor, "d d h"]
    scale: float
    noise: NoiseSpectrum
    diameter: float = 1.0

    @cached_property
    def packed(self) -> PackedVolume:
        """The transform as local refinement takes it; what it prepares is kept for the next batch."""
        return PackedVolume(self.transform)


References = Mapping[tuple[int, int], Reference]
"""By class (from 0) and half (1 or 2)."""


@dataclass(frozen=True, eq=False)
class ReferenceSet:
    """Half-maps of every class, not filtered, with their correlation and the noise that all share.

    Attributes:
        maps: at the level where they were made; half h (1 or 2) at index h - 1.
        pixel_size: Å, of that level.
        mask: soft mask around the density of each class.
        fsc: between the half-maps of each class, unmasked, by integer shell.
        fsc_masked: the same within the mask.
        noise: variance of each shell, in units of unscaled transforms of unit-variance white noise divided by N².
        radius: Fourier pixels up to which poses were refined.
        reference_mask: soft mask that references are cut to, where the user gave one; None: made from the maps.
        shares: of the particles in each class of one assembly, whose maps have one frame, 0 for a class that is unlike
            the others (`alike_shares`); None: classes are unrelated.
    """

    maps: Float[Tensor, "classes 2 n n n"]
    pixel_size: float
    mask: Float[Tensor, "classes n n n"]
    fsc: Float[Tensor, "classes shells"]
    fsc_masked: Float[Tensor, "classes shells"]
    noise: Float[Tensor, " noise_shells"]
    radius: float
    reference_mask: Float[Tensor, "n n n"] | None = None
    shares: Float[Tensor, " classes"] | None = None

    @classmethod
    def of_maps(
        cls,
        maps: Float[Tensor, "classes 2 n n n"],
        pixel_size: float,
        *,
        noise: Float[Tensor, " noise_shells"],
        radius: float,
        mask: Float[Tensor, "classes n n n"] | None = None,
        solvent: SolventMask | None = None,
        shares: Float[Tensor, " classes"] | None = None,
    ) -> "ReferenceSet":
        """Compare half-maps that were just solved; without a mask it is made from their FSC-weighted mean.

        What the user said of the solvent comes first: a mask replaces any other, a diameter cuts it to a sphere.
        """
        curves = torch.stack([fsc(*halves) for halves in maps])
        own_mask = None if solvent is None else solvent.of_map(maps.shape[-1], maps.device)
        sphere = None if solvent is None else solvent.sphere(maps.shape[-1], pixel_size, maps.device)
        if own_mask is not None:
            mask = own_mask.expand(len(maps), -1, -1, -1)
        elif mask is None:
            means = [weight_shells(pair.mean(0), c_ref(curve)) for pair, curve in zip(maps, curves, strict=True)]
            mask = torch.stack([_mask_of_class(mean, pixel_size, len(maps)) for mean in means])
        if own_mask is None and sphere is not None:
            mask = mask * sphere
        masked = torch.stack([fsc(pair[0] * own, pair[1] * own) for pair, own in zip(maps, mask, strict=True)])
        reference_mask = sphere if own_mask is None else own_mask
        return cls(maps, pixel_size, mask, curves, masked, noise, radius, reference_mask, shares)

    def select(self, order: Int[Tensor, " k"]) -> "ReferenceSet":
        """Some classes, in this order."""
        parts = {name: getattr(self, name)[order] for name in ("maps", "mask", "fsc", "fsc_masked")}
        return replace(self, **parts, shares=None if self.shares is None else self.shares[order])

    @property
    def level(self) -> int:
        """Box of the level where the maps were made, px."""
        return int(self.maps.shape[-1])

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.maps)

    def mean(self, class_index: int = 0) -> Float[Tensor, "n n n"]:
        """Mean of a class's half-maps."""
        return (self.maps[class_index, 0] + self.maps[class_index, 1]) / 2

    def curve(self, class_index: int = 0) -> Float[Tensor, " shells"]:
        """A class's masked FSC in single precision: what maps are filtered by."""
        return self.fsc_masked[class_index].float()

    def fsc_mean(self) -> Float[Tensor, ""]:
        """Mean of the masked FSC of all classes."""
        return self.fsc_masked.float().mean()

    def resolution(self, threshold: float) -> tuple[float, float]:
        """Shell and Å at which the best class's masked FSC falls to a threshold."""
        return max(self.class_resolution(number, threshold) for number in range(self.classes))

    def class_resolution(self, class_index: int, threshold: float) -> tuple[float, float]:
        """Shell and Å at which a class's masked FSC falls to a threshold."""
        return resolution(self.curve(class_index), self.level, self.pixel_size, threshold)

    def extent(self) -> float:
        """Diameter of the largest class's density, as a share of the box."""
        each = [density_radius(self.mean(number) * self.mask[number]) for number in range(self.classes)]
        return 2 * max(each) / self.level

    def at(self, level: int, pixels: FourierPixels) -> References:
        """Every map, filtered by what its halves share, at another level, for images packed by some Fourier pixels.

        A half-map's Wiener filter is the half-map correlation itself: FSC = signal / (signal + noise of one half).
        Classes of one assembly are filtered together (`tied_classes`).
        """
        noise, found = self.level_noise(level, pixels), {}
        for number, halves in enumerate(self._filtered()):
            mask = self._mask_of_references(self.mean(number))  # one for both halves
            for half, volume in enumerate(halves, 1):
                found[number, half] = self._reference(volume, mask, level, noise)
        return found

    def _filtered(self) -> Iterable[Float[Tensor, "2 n n n"]]:
        """The half-maps of each class, by what they share."""
        if self.shares is not None and self.classes > 1:
            yield from tied_classes(self.maps, self.shares, self.mask.amax(0))
            return
        for number, halves in enumerate(self.maps):
            yield torch.stack([weight_shells(half, self.curve(number).clamp(0, 1)) for half in halves])

    def mean_at(self, level: int, pixels: FourierPixels, class_index: int = 0) -> Reference:
        """The mean of a class's half-maps, prepared alike."""
        mean = self.mean(class_index)
        noise = self.level_noise(level, pixels)
        filtered = weight_shells(mean, self.curve(class_index).clamp(0, 1))
        return self._reference(filtered, self._mask_of_references(mean), level, noise)

    def _mask_of_references(self, mean: Float[Tensor, "n n n"]) -> Float[Tensor, "n n n"]:
        return _mask_of_class(mean, 1.0, self.classes) if self.reference_mask is None else self.reference_mask

    def _reference(
        self,
        volume: Float[Tensor, "n n n"],
        mask: Float[Tensor, "n n n"],
        level: int,
        noise: NoiseSpectrum,
    ) -> Reference:
        filtered = volume * mask
        if self.level != level:
            filtered = fourier_resize_3d(filtered, level)
        diameter = min(2 * density_radius(filtered) / level, 1.0)
        return Reference(reference_transform(filtered, PADDING), PADDING, noise, diameter)

    def level_noise(self, level: int, pixels: FourierPixels) -> NoiseSpectrum:
        """The noise spectrum in the units of a level; shells beyond those that were seen get the last one's."""
        noise = NoiseSpectrum(int(pixels.shell.max()) + 1, self.noise.device)
        shells = len(noise.power)
        known = self.noise[:shells]
        noise.power[:] = torch.cat([known, known[-1:].expand(shells - len(known))]) * level**2
        noise.count[:] = 1.0
        return noise

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        tensors = {name: getattr(self, name).cpu() for name in ("maps", "mask", "fsc", "fsc_masked", "noise")}
        others = {"reference_mask": self.reference_mask, "shares": self.shares}
        tensors |= {name: value.cpu() for name, value in others.items() if value is not None}
        return tensors | {"pixel_size": self.pixel_size, "radius": self.radius}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], device: torch.device) -> "ReferenceSet":
        """What `state_dict` gave."""
        tensors = {name: value.to(device) for name, value in state.items() if isinstance(value, Tensor)}
        return cls(**tensors, pixel_size=float(state["pixel_size"]), radius=float(state["radius"]))


def _mask_of_class(mean: Float[Tensor, "n n n"], pixel_size: float, classes: int) -> Float[Tensor, "n n n"]:
    """Around a map's density; of many classes one may hold nothing, and gets a sphere."""
    if classes > 1 and float(mean.amax()) <= 0:  # host sync: once per map
        return soft_sphere(mean.shape[-1], mean.shape[-1] / 2 - 2, edge_px=2, device=mean.device)
    return mask_from_map(mean, pixel_size)


def reference_transform(volume: Float[Tensor, "n n n"], padding: float) -> Complex[Tensor, "d d h"]:
    """Padded transform of a map inside its sphere, corrected for the slices' trilinear interpolation."""
    box_size = volume.shape[-1]
    window = soft_sphere(box_size, box_size / 2 - 2, edge_px=2, device=volume.device)
    correction = gridding_correction(box_size, padding, volume.device)
    return rfft3_centred(volume * window * correction, int(box_size * padding))


def c_ref(curve: Float[Tensor, " shells"]) -> Float[Tensor, " shells"]:
    """Expected correlation of the halves' mean with the truth, sqrt(2 FSC / (1 + FSC)) (Rosenthal & Henderson 2003)."""
    return full_map_fsc(curve).sqrt()
