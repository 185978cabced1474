"""How much of the particles each class holds, and what is expected of a class."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

LEAST_SHARE = 0.2  # of an even share, that a class counts at least with: a small one is still found
RATE = 0.3  # of a class's distance from an even share, in nats, by which its prior follows in a step


def floored(mass: Float[Tensor, "starts classes"]) -> Float[Tensor, "starts classes"]:
    """Shares of each start's classes, from the posterior mass that each got; small ones are raised."""
    share = mass / mass.sum(1, keepdim=True).clamp_min(1e-30)
    share = share.clamp_min(LEAST_SHARE / mass.shape[1])
    return share / share.sum(1, keepdim=True)


def shares_of_labels(
    class_index: Int[Tensor, " b"], class_probability: Float[Tensor, " b"], classes: int
) -> Float[Tensor, "b classes"]:
    """How much each image belongs to each class by its label: what is left of its probability is the others' evenly."""
    own, label = class_probability[:, None], torch.nn.functional.one_hot(class_index.long(), classes)
    return torch.where(label > 0, own, (1 - own) / max(classes - 1, 1))


class Balance:
    """Running posterior mass of the classes of several starts, and their prior.

    Attributes:
        mass: decaying sums.
        log_prior: up to a constant of each start.
        gone: 1 where a class was given up, and stays empty; else 0.
    """

    def __init__(self, starts: int, classes: int, device: torch.device | str) -> None:
        self.mass = torch.zeros(starts, classes, dtype=torch.float64, device=device)
        self.log_prior, self.gone = torch.zeros_like(self.mass), torch.zeros_like(self.mass)

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
            prior = self.log_prior.where(self.gone == 0, 0) - RATE * off
            self.log_prior = prior - prior.mean(1, keepdim=True)
        else:
            self.log_prior = floored(self.mass).log()
        self.log_prior[self.gone > 0] = -math.inf

    def give_up(self, start: int, classes: Int[Tensor, " g"]) -> None:
        """Some classes of a start get no particle any more."""
        self.mass[start, classes], self.gone[start, classes] = 0, 1
        self.log_prior[start, classes] = -math.inf

    def split(self, start: int, number: int, other: int, share: Float[Tensor, " two"]) -> None:
        """A class of a start gives the second part of what it holds to another one, which was empty."""
        self.mass[start, other], self.gone[start, other] = self.mass[start, number] * share[1], 0
        self.mass[start, number] *= share[0]
        self.log_prior[start] = floored(self.mass)[start].log().where(self.gone[start] == 0, -math.inf)

    def tensors(self) -> tuple[Tensor, ...]:
        """What a checkpoint keeps."""
        return self.mass, self.log_prior, self.gone
