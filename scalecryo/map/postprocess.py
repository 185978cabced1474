"""From two half-maps to the map that people look at: masked FSC freed of the mask's share, weighting, B-factor."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.map.reference import ReferenceSet, c_ref
from scalecryo.physics.fsc import fsc, full_map_fsc, phase_randomise, power_spectrum, resolution, weight_shells

RANDOM_FROM = 0.8  # phases are randomised past the shell where the unmasked FSC falls below this
FIT_FROM_ANGSTROM = 10.0  # below this resolution the fall-off is the molecule's shape, not its B-factor


@dataclass(frozen=True)
class FinalMap:
    """A finished reconstruction.

    Attributes:
        map: mean of the halves, weighted by C_ref of the corrected FSC and sharpened.
        unsharpened: the same without the B-factor undone.
        fsc_random: within the mask, of half-maps with random phases past `random_from`: what the mask alone gives.
        fsc_corrected: within the mask, with that taken out; the curve that resolution is read from.
        random_from: shell.
        b_factor: Å², of the fall-off that was undone; 0: none.
    """

    map: Float[Tensor, "n n n"]
    unsharpened: Float[Tensor, "n n n"]
    fsc_random: Float[Tensor, " shells"]
    fsc_corrected: Float[Tensor, " shells"]
    random_from: int
    b_factor: float


def postprocess(references: ReferenceSet, generator: torch.Generator, class_index: int = 0) -> FinalMap:
    """Correct the masked FSC by phase randomisation (Chen et al. 2013), weight and sharpen the mean map.

    Weights are C_ref of the corrected curve, the B-factor is fitted to the Guinier plot between 10 Å and the resolution
    (Rosenthal & Henderson 2003).

    Args:
        references: solved half-maps, their masks and curves.
        generator: of the random phases, on the CPU.
        class_index: which class.
    """
    halves, mask, masked = (part[class_index] for part in (references.maps, references.mask, references.fsc_masked))
    box_size, pixel_size = references.level, references.pixel_size
    shell, _ = resolution(references.fsc[class_index], box_size, pixel_size, RANDOM_FROM)
    start = max(1, min(int(shell), box_size // 2 - 1))
    random = [phase_randomise(half, start, generator) * mask for half in halves]
    curve_random = fsc(random[0], random[1])
    corrected = freed_of_mask(masked, curve_random, start)
    mean = references.mean(class_index)
    b_factor = guinier_b_factor(mean * mask, corrected, pixel_size)
    frequency = torch.arange(len(corrected), device=corrected.device) / (box_size * pixel_size)
    weight = c_ref(corrected)
    unsharpened = weight_shells(mean, weight.float())
    sharpened = weight_shells(mean, (weight * torch.exp(b_factor / 4 * frequency.square())).float())
    return FinalMap(sharpened, unsharpened, curve_random, corrected, start, b_factor)


def freed_of_mask(
    masked: Float[Tensor, "*d shells"], random: Float[Tensor, " shells"], random_from: int
) -> Float[Tensor, "*d shells"]:
    """Take the mask's share out of curves (Chen et al. 2013): (FSC_masked - FSC_random) / (1 - FSC_random).

    From two shells past the one where randomising starts; before, the curves are left as they are.

    Args:
        masked: one curve or several, within the mask.
        random: of half-maps with random phases, within the same mask.
        random_from: shell where randomising starts.
    """
    past = torch.arange(len(random), device=masked.device) >= random_from + 2
    freed = (masked - random) / (1 - random).clamp_min(1e-6)
    return torch.where(past, freed, masked).clamp(-1, 1)


def guinier_b_factor(volume: Float[Tensor, "n n n"], curve: Float[Tensor, " shells"], pixel_size: float) -> float:
    """B-factor, Å², of the map's fall-off: ln amplitude against 1/d² between 10 Å and FSC 0.143; 0 where none is seen.

    Args:
        volume: masked.
        curve: FSC that the resolution is read from.
        pixel_size: Å.
    """
    box_size = volume.shape[-1]
    last, _ = resolution(curve, box_size, pixel_size, 0.143)
    first = math.ceil(box_size * pixel_size / FIT_FROM_ANGSTROM)
    if int(last) - first < 4:  # a line needs a few points
        return 0.0
    shells = torch.arange(first, int(last) + 1, device=curve.device)
    known = curve[shells].clamp(1e-3, 1)
    # The mean power of signal and noise, less the noise's share.
    signal = power_spectrum(volume).to(known)[shells] * full_map_fsc(known)
    squared = (shells.double() / (box_size * pixel_size)).square()
    design = torch.stack([squared, torch.ones_like(squared)], 1)
    slope = torch.linalg.lstsq(design, 0.5 * signal.clamp_min(1e-30).log().double()[:, None]).solution[0, 0]
    return max(0.0, -4 * float(slope))
