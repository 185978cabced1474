"""Where the user says that the particle lies, at any box of the run."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.physics.fft import fourier_resize_3d
from scalecryo.physics.mask import soft_sphere


@dataclass(frozen=True, eq=False)
class SolventMask:
    """A mask, a diameter, or both.

    Attributes:
        volume: soft mask over the extent of the run's box, in any box size, values 0 to 1; None: none was given.
        diameter_a: of the particle, Å; 0: not given.
    """

    volume: Float[Tensor, "m m m"] | None
    diameter_a: float

    def of_map(self, box_size: int, device: torch.device) -> Float[Tensor, "n n n"] | None:
        """The given mask in another box; None where none was given."""
        if self.volume is None:
            return None
        # A density's values follow its box so that projections keep theirs; a mask's must not.
        scale = (box_size / self.volume.shape[-1]) ** 2
        resized = fourier_resize_3d(self.volume.to(device), box_size) * scale
        return resized.clamp(0, 1)  # a cropped transform overshoots at the mask's edge

    def sphere(self, box_size: int, pixel_size: float, device: torch.device) -> Float[Tensor, "n n n"] | None:
        """Soft sphere of the diameter, `pixel_size` in Å, its edge outside of it; None where no diameter was given."""
        if not self.diameter_a:
            return None
        return soft_sphere(box_size, self.diameter_a / 2 / pixel_size, device=device)
