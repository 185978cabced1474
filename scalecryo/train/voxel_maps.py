"""The paper's volume in the place of running maps: voxels in real space, learnt by Adam from the same residuals."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from scalecryo.model.volume import Volume
from scalecryo.physics.fft import FourierPixels, fourier_resize_3d
from scalecryo.physics.image_formation import CtfWeightedImages


class VoxelMaps:
    """One volume for both halves, with the interface of `RunningMaps`; it must be refreshed after every step."""

    def __init__(self, volume: Volume, rate: float) -> None:
        self.volume, self._rate = volume, rate
        self._optimiser = torch.optim.Adam([volume.voxels], lr=rate)
        self.transforms: tuple[Complex[Tensor, "d d h"], Complex[Tensor, "d d h"]]

    @property
    def level(self) -> int:
        """Box of the images, px."""
        return self.volume.box_size

    @property
    def scale(self) -> float:
        """Samples of the sliced transform per cycle and box."""
        return self.volume.scale

    def insert(
        self, images: CtfWeightedImages, rotation: Tensor, shift_px: Tensor, weight: Tensor, half: Int[Tensor, " b"],
        pixels: FourierPixels, *, keep: float,
    ) -> None:  # fmt: skip
        """Nothing: the voxels' gradient says what the images do."""

    def refresh(self, all_reduce_: Callable[..., None] | None, joined_radius: float) -> None:
        """One step of Adam where there is a gradient; transform the volume. Collective."""
        gradient = self.volume.voxels.grad
        if gradient is not None:
            if all_reduce_ is not None:
                all_reduce_(gradient)  # the sum does as well as the mean: Adam does not see its size
            self._optimiser.step()
            self._optimiser.zero_grad(set_to_none=True)
        transform = self.volume() / self.level
        self.transforms = transform, transform

    def grown(self, level: int) -> "VoxelMaps":
        """The same density at a larger level of the store."""
        old = self.volume
        volume = Volume(level, old.scale, True, old.voxel_scale * old.box_size, torch.Generator()).to(old.voxels.device)
        with torch.no_grad():
            volume.voxels.copy_(fourier_resize_3d(old.density(), level) / volume.voxel_scale)
        return VoxelMaps(volume, self._rate)

    def maps(self) -> Float[Tensor, "2 n n n"]:
        """The density, twice."""
        return self.volume.density().detach().expand(2, -1, -1, -1).clone()

    def state_dict(self) -> dict[str, Any]:
        """Voxels and the optimiser's moments."""
        return {"level": self.level, "voxels": self.volume.voxels.detach().cpu().clone(),
                "optimiser": self._optimiser.state_dict()}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up voxels of the same level; to be refreshed before they are sliced."""
        with torch.no_grad():
            self.volume.voxels.copy_(state["voxels"])
        self._optimiser.load_state_dict(state["optimiser"])
