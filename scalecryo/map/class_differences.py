"""Maps of the classes of one assembly as a common map and each one's difference from it.

Compositions differ in a small region and at low frequencies, so that most of what two maps differ by is noise, and the
map with more particles, the less noisy one, fits every image better: it draws all of them. So of a difference only that
is kept which both halves show, shell by shell and then place by place; the common map, of all particles, is filtered by
itself. A class that says little is the common map. One that is unlike the others, a conformation far from theirs,
stands by itself: tied to the common map its particles would keep the poses that they had there.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.physics.fsc import fsc, full_map_fsc, weight_shells
from scalecryo.physics.mask import gaussian_low_pass

# Power of a class's difference over that of the common map, over these shells, from which on the class is unlike.
# Compositions that lack 8 to 16 % of the mass, a fifth of the particles or half of them: 0.02 to 0.09; open and closed
# adenylate kinase: 0.16 to 0.27.
UNLIKE, SHELLS = 0.13, slice(2, 9)
LOCAL_PX = 16.0  # over which signal and noise are compared (half-amplitude of a Gaussian filter)


def alike_shares(
    maps: Float[Tensor, "classes 2 n n n"], shares: Float[Tensor, " classes"]
) -> Float[Tensor, " classes"]:
    """Shares of the classes that are to be tied, 0 for the others: those without particles, and those unlike the rest.

    Args:
        maps: half-maps of every class, in one frame; where a class has few views, the common map's.
        shares: of the particles in each class.
    """
    mean = torch.einsum("k,khzyx->hzyx", shares.to(maps), maps)
    common = _cross_power(mean)
    unlike = [float(_cross_power(own - mean) / common) > UNLIKE for own in maps]  # host sync: once per class
    return shares * (~torch.tensor(unlike, device=shares.device))


def tied_classes(
    maps: Float[Tensor, "classes 2 n n n"],
    shares: Float[Tensor, " classes"],
    mask: Float[Tensor, "n n n"],
    *,
    joined: bool = False,
) -> Float[Tensor, "classes halves n n n"]:
    """Wiener-filtered maps of every class, each half's (`joined`: the mean of both alone) by itself.

    A half-map's filter is the correlation of the halves, FSC; that of their mean is 2 FSC / (1 + FSC).

    Args:
        maps: half-maps of every class, those that are tied in one frame.
        shares: of the particles in each class that is tied to the common map; 0: it stands by itself.
        mask: around all that any class shows.
        joined: whether one map is made of both halves.
    """
    weight = shares.to(maps) / shares.sum().clamp_min(1e-30)
    mean = torch.einsum("k,khzyx->hzyx", weight, maps)
    common, _ = _shared(mean, mask, joined)
    return torch.stack([
        common + _shared_locally(own - mean, mask, joined) if share > 0 else _shared(own, mask, joined)[0]
        for own, share in zip(maps, shares.tolist(), strict=True)  # host sync
    ])  # fmt: skip


def _cross_power(halves: Float[Tensor, "2 n n n"]) -> Float[Tensor, ""]:
    """What the half-maps share, over the shells."""
    low = torch.zeros(halves.shape[-1] // 2 + 1, device=halves.device)
    low[SHELLS] = 1.0
    return (weight_shells(halves[0], low) * halves[1]).sum()


def _shared(
    halves: Float[Tensor, "2 n n n"], mask: Float[Tensor, "n n n"], joined: bool
) -> tuple[Float[Tensor, "h n n n"], Float[Tensor, "2 n n n"]]:
    """What both halves show, shell by shell, and the half-maps filtered alike."""
    curve = fsc(halves[0] * mask, halves[1] * mask).float().clamp(0, 1)
    weight = full_map_fsc(curve) if joined else curve
    filtered = torch.stack([weight_shells(half, weight) for half in halves])
    return (filtered.mean(0, keepdim=True) if joined else filtered), filtered


def _shared_locally(
    halves: Float[Tensor, "2 n n n"], mask: Float[Tensor, "n n n"], joined: bool
) -> Float[Tensor, "h n n n"]:
    """The same, and at each place by the share of signal in the power there."""
    shown, filtered = _shared(halves, mask, joined)
    signal, power = (gaussian_low_pass(volume, 1.0, LOCAL_PX) for volume in (filtered.prod(0), shown.square().mean(0)))
    return shown * (signal / power.clamp_min(torch.finfo(power.dtype).tiny)).clamp(0, 1)
