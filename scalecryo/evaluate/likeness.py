"""Which maps show the same structure: as alike as two halves of the particles are, once laid onto each other."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from scalecryo.evaluate.align_maps import align_maps, apply_alignment
from scalecryo.physics.fsc import fsc, full_map_fsc, power_spectrum

AS_STRONG = 1.5  # factor in power over the shells beyond which maps need not be aligned to be told apart


def likeness(
    first: Float[Tensor, "n n n"],
    second: Float[Tensor, "n n n"],
    halves: tuple[Float[Tensor, " s"], Float[Tensor, " s"]],
    shells: slice,
) -> float:
    """Mean correlation of two maps over some shells, over what maps of the same structure would have.

    The first is turned, moved and where needed mirrored onto the second. Two maps of all particles of a class would
    correlate by C = 2 FSC / (1 + FSC) of its halves (Rosenthal & Henderson 2003), those of two classes of the same
    structure by the geometric mean of both.

    Args:
        first, second: maps of all particles of each.
        halves: FSC of the half-maps of each.
        shells: that are compared.
    """
    laid = apply_alignment(first, align_maps(first, second))
    expected = (full_map_fsc(halves[0]) * full_map_fsc(halves[1])).sqrt()[shells]
    return float(fsc(laid, second)[shells].mean() / expected.double().mean().clamp_min(1e-6))


def alike(
    maps: Sequence[Float[Tensor, "n n n"]],
    halves: Sequence[Float[Tensor, " s"]],
    shares: Sequence[float],
    shells: slice,
    threshold: float,
) -> list[int | None]:
    """For each map the number of the one with a larger share that shows the same, in any frame and of either hand.

    None: there is none, as for maps of nothing.

    Args:
        maps: of all particles of each class.
        halves: FSC of each class's half-maps.
        shares: of the particles in each.
        shells: that are compared.
        threshold: of the likeness, from which on two are the same.
    """
    kept: list[int] = []
    found: list[int | None] = [None] * len(maps)
    power = [float(power_spectrum(volume)[shells].sum()) for volume in maps]
    for number in sorted(range(len(maps)), key=lambda n: -shares[n]):
        if not bool(maps[number].any()):
            continue
        for other in kept:
            ratio = power[number] / power[other]
            if not 1 / AS_STRONG < ratio < AS_STRONG:
                continue
            if likeness(maps[number], maps[other], (halves[number], halves[other]), shells) >= threshold:
                found[number] = other
                break
        else:
            kept.append(number)
    return found
