"""Half-maps drawn towards a symmetry that they almost have, as far as their particles do not say otherwise.

Poses that a pseudo-symmetry relates must be told apart by what is asymmetric in the particle alone. A map that few
particles have been seen along some directions for is empty there, and loses to its turned copies where it should only
be silent: poses gather away from its holes, and the holes stay.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.physics.fft import irfft3_centred, rfft3_centred
from scalecryo.physics.fsc import shell_index_3d, shell_mean, transform_correlation

SMOOTH = 2  # shells to either side that a shell's correlation is taken with
LEAST, MOST = 1e-3, 1 - 1e-3  # of that correlation
TINY = 1e-20
LOW = slice(2, 11)  # shells whose asymmetric power is told


def drawn_to_symmetry(
    maps: Float[Tensor, "2 n n n"], symmetric: Float[Tensor, "2 n n n"], weight: Float[Tensor, "2 n n h"]
) -> tuple[Float[Tensor, "2 n n n"], Float[Tensor, ""]]:
    """(N + λ V_s) / (D + λ) of each half: the likeliest map if its asymmetric part V - V_s is Gaussian; and how much
    of the power of low shells is asymmetric in both.

    λ of a shell is the noise over the asymmetric signal, D̄ (1 - F) / F, where F is the correlation of the halves'
    asymmetric parts where particles were seen: the halves' noise does not correlate, so a map of exact symmetry is
    drawn to it altogether, and one that has none is only filled where it is empty.

    Args:
        maps: half-maps V = N / D.
        symmetric: the same from sums with their copies under the symmetry, V_s.
        weight: D, on the grid of the maps' transforms.
    """
    box_size = maps.shape[-1]
    own, alike = (torch.stack([rfft3_centred(half) for half in halves]) for halves in (maps, symmetric))
    mean = torch.stack([_over_shells(shell_mean(half)) for half in weight])
    first, second = (own - alike) * (weight / (weight + mean).clamp_min(TINY)).sqrt()  # where particles were seen
    shared = transform_correlation(first, second, SMOOTH).clamp(LEAST, MOST)
    pull = mean * _over_shells((1 - shared) / shared)
    drawn = (weight * own + pull * alike) / (weight + pull).clamp_min(TINY)
    power = torch.stack([shell_mean(one.abs().square()) for one in (*(own - alike), *own)])[:, LOW]
    share = (shared[LOW] * (power[0] * power[1] / (power[2] * power[3]).clamp_min(TINY)).sqrt()).mean()
    return torch.stack([irfft3_centred(half, box_size) for half in drawn]), share


def _over_shells(curve: Float[Tensor, " s"]) -> Float[Tensor, "n n h"]:
    """A curve over shells 0 .. n/2 on the grid of a transform; the corners beyond have its last value."""
    return curve.float()[shell_index_3d(2 * (len(curve) - 1), curve.device).clamp_max(len(curve) - 1)]


def symmetry_centre(rotation: Float[Tensor, "g 3 3"], offset: Float[Tensor, "g 3"]) -> Float[Tensor, "3"]:
    """The point c that all operations V(S (x - u)) ≈ V(x) keep, u = (1 - Sᵀ) c, in the least-squares sense.

    Along an axis that all rotations share it is as near to the box's centre as can be.
    """
    parts = torch.eye(3).to(rotation) - rotation.mT
    left, right = parts.reshape(-1, 3).double().cpu(), offset.reshape(-1, 1).double().cpu()
    return (torch.linalg.pinv(left, rcond=1e-3) @ right)[:, 0].to(offset)
