"""How particles are simulated: settings that check themselves. Imports no torch."""

import math
from dataclasses import dataclass

from scalecryo.errors import InputError


@dataclass(frozen=True)
class Imaging:
    """How the simulated particles are imaged.

    `defocus_um` (low, high) is the range of the mean defocus, µm underfocus, uniform; None leaves the CTF out.
    `astigmatism_um` is the largest U − V, µm, uniform from 0, at a uniform angle. `shift_a` is the standard deviation
    of each component of the shift, Å.
    """

    pixel_size: float
    defocus_um: tuple[float, float] | None = None
    astigmatism_um: float = 0.0
    shift_a: float = 0.0

    def __post_init__(self) -> None:
        if self.pixel_size <= 0 or not math.isfinite(self.pixel_size):
            raise InputError(f"pixel size {self.pixel_size:g} Å cannot be used: give a positive number, e.g. 0.8")
        if self.defocus_um is not None and not 0 < self.defocus_um[0] <= self.defocus_um[1]:
            low, high = self.defocus_um
            raise InputError(f"defocus range {low:g} to {high:g} µm cannot be used: give 0 < low <= high, e.g. 0.4 1.2")
        if self.astigmatism_um < 0 or self.shift_a < 0:
            raise InputError(
                f"astigmatism {self.astigmatism_um:g} µm and shift {self.shift_a:g} Å are spreads: "
                "they cannot be negative"
            )
        if self.astigmatism_um > 0 and self.defocus_um is None:
            raise InputError("astigmatism without a CTF means nothing: give a defocus range too")


@dataclass(frozen=True)
class Imperfections:
    """What is added to an ideal simulation; nothing by default.

    `colour` is the share of the noise's variance that is low-pass (`noise.Noise`). `scale_sd` is the standard deviation
    of the logarithm of each micrograph's signal scale (median 1), `gain_sd` that of each image's intensity, by which
    signal and noise are multiplied; each image's grey level is then moved by a normal number of standard deviation
    3 × gain_sd × that of the noise. `junk` is the share of the images that show no particle: half of them nothing, half
    another object (`Recording`). `neighbours` is the share that also show another particle, 0.9 to 1.3 diameters away.
    `prefer` (share, degrees) is the share of the views within so many degrees of the volume's +z axis; the rest is
    uniform over all views. `defocus_error_a` is the standard deviation of the error of the defocus that is told, Å.
    """

    colour: float = 0.0
    scale_sd: float = 0.0
    gain_sd: float = 0.0
    junk: float = 0.0
    neighbours: float = 0.0
    prefer: tuple[float, float] | None = None
    defocus_error_a: float = 0.0

    def __post_init__(self) -> None:
        shares = {"colour": self.colour, "junk": self.junk, "neighbours": self.neighbours}
        shares |= {"share of preferred views": self.prefer[0]} if self.prefer else {}
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise InputError(f"{name} {value:g} is no share: give a number from 0 to 1, e.g. 0.3")
        spreads = {"scale": self.scale_sd, "gain": self.gain_sd, "defocus error": self.defocus_error_a}
        for name, value in spreads.items():
            if not 0 <= value < math.inf:
                raise InputError(f"{name} {value:g} is no standard deviation: give a number from 0")
        if self.prefer and not 0 < self.prefer[1] <= 180:
            raise InputError(f"views within {self.prefer[1]:g}° of an axis cannot be drawn: give 0 < degrees <= 180")
