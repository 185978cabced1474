"""How much of the particles each class holds, what is expected of a class, and which classes are the same."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from scalecryo.evaluate.align_maps import align_maps, apply_alignment
from scalecryo.physics.fsc import fsc

LEAST_SHARE = 0.2  # of an even share, that a class counts at least with: a small one is still found
RATE = 0.3  # of a class's distance from an even share, in nats, by which its prior follows in a step

ALIKE, SHELLS = 0.85, slice(2, 9)  # mean correlation over these shells, aligned, of maps that are the same structure


def alike(maps: Sequence[Float[Tensor, "n n n"]], shares: Sequence[float]) -> list[bool]:
    """Which maps show, in any frame and of either hand, what a map with a larger share shows; not maps of nothing."""
    kept: list[int] = []
    found = [False] * len(maps)
    for number in sorted(range(len(maps)), key=lambda n: -shares[n]):
        if not bool(maps[number].any()):
            continue
        for other in kept:
            laid = apply_alignment(maps[number], align_maps(maps[number], maps[other]))
            if float(fsc(laid, maps[other])[SHELLS].mean()) >= ALIKE:
                found[number] = True
                break
        else:
            kept.append(number)
    return found


def floored(mass: Float[Tensor, "starts classes"]) -> Float[Tensor, "starts classes"]:
    """Shares of each start's classes, from the posterior mass that each got; small ones are raised."""
    share = mass / mass.sum(1, keepdim=True).clamp_min(1e-30)
    share = share.clamp_min(LEAST_SHARE / mass.shape[1])
    return share / share.sum(1, keepdim=True)


class Balance:
    """Running posterior mass of the classes of several starts, and their prior.

    Attributes:
        mass: decaying sums.
        log_prior: up to a constant of each start.
    """

    def __init__(self, starts: int, classes: int, device: torch.device | str) -> None:
        self.mass = torch.zeros(starts, classes, dtype=torch.float64, device=device)
        self.log_prior = torch.zeros_like(self.mass)

    @property
    def share(self) -> Float[Tensor, "starts classes"]:
        """Of the particles in each class."""
        return self.mass / self.mass.sum(1, keepdim=True).clamp_min(1e-30)

    def add(self, mass: Float[Tensor, "starts classes"], keep: float, *, even: bool) -> None:
        """Take in what a step found.

        Args:
            mass: posterior mass of each class, of all workers.
            keep: factor by which earlier steps decay.
            even: whether the prior is to draw all classes to the same share; else it is their share.
        """
        self.mass = keep * self.mass + mass
        if even:
            off = (self.share * self.mass.shape[1]).clamp_min(1e-2).log()
            self.log_prior = self.log_prior - RATE * off
            self.log_prior -= self.log_prior.mean(1, keepdim=True)
        else:
            self.log_prior = floored(self.mass).log()

    def tensors(self) -> tuple[Tensor, Tensor]:
        """What a checkpoint keeps."""
        return self.mass, self.log_prior
