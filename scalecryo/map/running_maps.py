"""Half-maps that follow their poses: exponentially decaying sums of inserted slices, solved every few steps."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from scalecryo.map.backprojection import Backprojection
from scalecryo.physics.fft import FourierPixels
from scalecryo.physics.fourier_slice import add_friedel_pairs, gridding_correction
from scalecryo.physics.fsc import shell_index_3d
from scalecryo.physics.image_formation import CtfWeightedImages
from scalecryo.physics.mask import soft_sphere

REGULARISATION = 0.05  # share of a shell's mean weight that is added to each voxel's


class RunningMaps:
    """Sums of both halves on the padded grid of one level, and the transforms that are sliced.

    Images come in units of unit-variance noise: unscaled transforms over the box. In these units a slice has the same
    values at every level, so sums move to a larger level as they are.

    Attributes:
        sums: of all workers, up to the last refreshing.
        transforms: of half 1 and 2, ready for slicing, from the last refreshing on; one tensor twice where halves are
            joined.
    """

    def __init__(self, level: int, padding: float, device: torch.device | str) -> None:
        self.sums = Backprojection(level, padding, device)
        self._fresh = Backprojection(level, padding, device)  # this worker's, since the last refreshing
        self._kept = 1.0  # what earlier sums have decayed to since
        self.transforms: tuple[Complex[Tensor, "d d h"], Complex[Tensor, "d d h"]]
        box, shells = self.sums.padded_box, shell_index_3d(self.sums.padded_box, device)
        self._shells: Int[Tensor, " k"] = shells.flatten()
        # Where images reach and their samples are shared out: this is what crosses the network between workers.
        reach = (level / 2 - 1) * self.sums.scale + 2
        self._reached: Int[Tensor, " r"] = (self._shells <= reach).nonzero()[:, 0]  # host sync: once a level
        largest = int(torch.tensor(3.0).sqrt() * box / 2) + 2  # on the host
        self._in_shell = self._shell_sums(torch.ones(len(self._shells), device=device), largest).clamp_min(1)
        # Trilinear insertion and slicing each multiply the density by sinc squared: divide by both, inside a sphere.
        window = soft_sphere(level, level / 2 - 2, edge_px=2, device=device)
        window = window * gridding_correction(level, self.sums.scale, device).square()
        margin = (box - level) // 2
        padded = torch.nn.functional.pad(window, (margin, box - level - margin) * 3)
        self._window: Float[Tensor, "d d d"] = torch.fft.ifftshift(padded)

    @property
    def level(self) -> int:
        """Box of the images, px."""
        return self.sums.box_size

    @property
    def scale(self) -> float:
        """Samples of the padded grid per cycle and box."""
        return self.sums.scale

    def insert(
        self,
        images: CtfWeightedImages,
        rotation: Float[Tensor, "b 3 3"],
        shift_px: Float[Tensor, "b 2"],
        weight: Float[Tensor, " b"],
        half: Int[Tensor, " b"],
        pixels: FourierPixels,
        *,
        keep: float,
    ) -> None:
        """Add this worker's part of a batch; what was there decays by a factor first."""
        # New images weigh more instead of old ones less: that needs no pass over the grid.
        self._kept *= keep
        for which in (1, 2):  # by weight: to pick images by half would wait for the device
            own = weight * (half == which) / self._kept
            self._fresh.insert(images, rotation, shift_px, own, pixels, half=which)

    def refresh(self, all_reduce_: Callable[..., None] | None, joined_radius: float) -> None:
        """Add up what all workers inserted since the last time, and solve. Collective.

        Args:
            all_reduce_: adds tensors over the workers, in place; None: this one is alone.
            joined_radius: below it both halves' sums are used for both maps, so that they keep one frame.
        """
        if all_reduce_ is not None:
            # Each half's sums on both halves' workers: below the joined radius either map is made of both, and worker 0
            # saves all. There are two maps, so that further workers would own none.
            parts = [grid.flatten(2).index_select(2, self._reached) for grid in self._fresh.tensors()]
            all_reduce_(*parts)
            for grid, part in zip(self._fresh.tensors(), parts, strict=True):
                grid.view(1, 2, -1).index_copy_(2, self._reached, part)
        for total, fresh in zip(self.sums.tensors(), self._fresh.tensors(), strict=True):
            total.add_(fresh).mul_(self._kept)
            fresh.zero_()
        self._kept = 1.0
        numerators, denominators = (part[0] for part in self.sums.tensors())
        if joined_radius >= self.level / 2 - 1:
            joined = self._solve(numerators.sum(0), denominators.sum(0))
            self.transforms = joined, joined
            return
        near = (self._shells <= joined_radius * self.scale).view(denominators[0].shape)
        self.transforms = (
            self._solve(numerators[0] + near * numerators[1], denominators[0] + near * denominators[1]),
            self._solve(numerators[1] + near * numerators[0], denominators[1] + near * denominators[0]),
        )

    def grown(self, level: int) -> "RunningMaps":
        """The same sums at a larger level of the store; to be refreshed before they are sliced."""
        made = RunningMaps(level, self.scale, self.sums.numerator.device)
        small, columns = self.sums.padded_box // 2, self.sums.padded_box // 2
        for new, old in zip(made.sums.tensors(), self.sums.tensors(), strict=True):
            for z in (slice(0, small), slice(-small, None)):
                for y in (slice(0, small), slice(-small, None)):
                    new[..., z, y, :columns] = old[..., z, y, :columns]
        return made

    def maps(self) -> Float[Tensor, "2 n n n"]:
        """Half-maps from each half's own sums alone, in the units of `Backprojection.solve`."""
        return self.sums.solve(REGULARISATION)[0] * self.level

    def density(self) -> Float[Tensor, "n n n"]:
        """The mean of the half-maps."""
        return self.maps().mean(0)

    def state_dict(self) -> dict[str, Any]:
        """Sums of all workers; call after `refresh`."""
        return {"level": self.level, "sums": [part.cpu() for part in self.sums.tensors()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up sums of the same level; to be refreshed before they are sliced."""
        for own, saved in zip(self.sums.tensors(), state["sums"], strict=True):
            own.copy_(saved)

    def _solve(self, numerator: Tensor, denominator: Tensor) -> Complex[Tensor, "d d h"]:
        weight = add_friedel_pairs(denominator).flatten()
        floor = REGULARISATION * self._shell_sums(weight, len(self._in_shell)) / self._in_shell
        weight = weight + floor[self._shells] + 1e-9
        solved = add_friedel_pairs(numerator) / weight.view(numerator.shape)
        density = torch.fft.irfftn(solved, s=self._window.shape)
        return torch.fft.rfftn(density * self._window)

    def _shell_sums(self, values: Tensor, shells: int) -> Tensor:
        return torch.zeros(shells, device=values.device).index_add_(0, self._shells, values)
