"""Random starts that compete: all learn for some steps, the same held-out images judge, and the better half goes on.

Successive halving (Jamieson & Talwalkar 2016); the best then learns on, round by round, as long as it gains. Whether a
start is right shows late, and in the loss of its own batches hardly at all: how well images can be explained varies
more than the starts do. On the same held-out images that cancels; and a start that is wrong falls behind the more, the
longer both learn.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# The best start has settled when a round gains less than this share. On seven sets of different noise the third round
# gained 0.1 to 0.7 %; on a symmetric particle, whose poses leave a smooth distortion slowly, 4 to 20 % for five rounds.
SETTLED = 0.015
MOST_ALONE = 12  # rounds of the best start alone


class RandomStarts:
    """Which starts are left, what they have learnt, and whose turn it is.

    Attributes:
        going: numbers of the starts that are left, from 0.
        states: what each has learnt, by number; of those left.
        steps: that each has learnt for, before the present round; not counting those of the best one alone.
        gains: mean of the held-out images, of the best start of each round.
        rounds_alone: that the best one has learnt for alone.
    """

    def __init__(self, count: int, steps: int, most_steps: int) -> None:
        """
        Args:
            count: starts.
            steps: of each start in a round.
            most_steps: of one start in all.
        """
        self.count = count
        self.going = list(range(count))
        self.states: dict[int, Any] = {}
        self.steps = 0
        self.gains: list[float] = []
        self.rounds_alone = 0
        self._round_steps, self._most_steps = steps, most_steps
        self._trained = 0  # of those left, in this round

    @property
    def over(self) -> bool:
        """Whether one is left that has learnt and gains no more, or none may learn on."""
        return len(self.going) == 1 and self.going[0] in self.states and not self.gaining

    @property
    def gaining(self) -> bool:
        """Whether the best one left goes on alone for another round."""
        spent = self.steps >= self._most_steps or self.rounds_alone == MOST_ALONE
        if len(self.going) > 1 or len(self.gains) < 2 or spent:
            return False
        before, now = self.gains[-2:]
        return now > 0 and now - before > SETTLED * abs(before)

    @property
    def alone(self) -> bool:
        """Whether the round under way is of the best one alone: none of its steps counts in the march."""
        return len(self.going) == 1 and bool(self.gains)

    @property
    def judging(self) -> bool:
        """Whether all have learnt in this round, and held-out images are due."""
        return self._trained == len(self.going)

    def place(self, learnt: int) -> int:
        """Which step of the march the next one is, after so many of this round."""
        return self.steps if self.alone else self.steps + learnt

    @property
    def current(self) -> int:
        """Number of the start whose turn it is."""
        return self.going[self._trained]

    def turn(self, learnt: int) -> str:
        """Who is learning, in words, after so many steps of this round."""
        where = f"round {self.rounds_alone + 1} alone" if self.alone else f"step {self.place(learnt)}"
        return f"random start {self.current + 1} of {self.count}, {where}"

    @property
    def next_steps(self) -> int:
        """Steps of each start in this round."""
        return self._round_steps if self.alone else min(self._round_steps, self._most_steps - self.steps)

    def learnt(self, state: Any) -> None:
        """The current start has learnt for its steps of the round.

        Args:
            state: its own tensors, kept as they are.
        """
        self.states[self.current] = state
        self._trained += 1
        if self.count == 1:  # nobody judges
            self.steps += self.next_steps

    def judged(self, gains: Float[Tensor, " k"]) -> None:
        """The better half goes on; the best alone where none may learn on.

        Args:
            gains: mean of the held-out images, of those left, in their order.
        """
        if self.alone:
            self.rounds_alone += 1
        else:
            self.steps += self.next_steps
        self.gains.append(float(gains.max()))
        order = sorted(range(len(self.going)), key=lambda place: -float(gains[place]))  # on the host
        keep = len(order) // 2 if self._most_steps > self.steps else 1
        self.going = sorted(self.going[place] for place in order[: max(1, keep)])
        self.states = {number: self.states[number] for number in self.going}
        self._trained = 0

    def release(self) -> None:
        """Forget what the last one has learnt: it goes on elsewhere."""
        self.states = dict.fromkeys(self.states)

    def state_dict(self) -> dict[str, Any]:
        """Where it stands."""
        return {"going": list(self.going), "states": self.states, "steps": self.steps, "trained": self._trained,
                "gains": list(self.gains), "alone": self.rounds_alone}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on there."""
        self.going, self.states = list(state["going"]), dict(state["states"])
        self.steps, self._trained = int(state["steps"]), int(state["trained"])
        self.gains = list(state.get("gains", []))  # older checkpoints have none
        self.rounds_alone = int(state.get("alone", 0))


class PairedGains:
    """Sums over held-out images of each start's gain and of the products of any two: means, errors of differences.

    How hard an image is to explain is common to all starts, and cancels in differences.
    """

    def __init__(self, starts: int, device: torch.device | str) -> None:
        self.sums: Float[Tensor, "k+1 k+1"] = torch.zeros(starts + 1, starts + 1, dtype=torch.float64, device=device)
        """The last row and column are of ones."""

    def add(self, gains: Float[Tensor, "k b"], weight: Float[Tensor, " b"]) -> None:
        """Take in images, each with a weight, 0 or 1."""
        every = torch.cat([gains.double(), torch.ones_like(weight, dtype=torch.float64)[None]])
        self.sums += (every * weight) @ every.T

    def mean(self) -> Float[Tensor, " k"]:
        """Of each start."""
        return self.sums[:-1, -1] / self.sums[-1, -1].clamp_min(1)

    def error(self, one: int, other: int) -> float:
        """Standard error of the difference of two means. Host sync."""
        count = self.sums[-1, -1].clamp_min(1)
        squares = self.sums[one, one] - 2 * self.sums[one, other] + self.sums[other, other]
        difference = (self.sums[one, -1] - self.sums[other, -1]) / count
        return math.sqrt(max(float((squares / count - difference.square()) / count), 0.0))


def round_told(before: list[int], going: list[int], mean: Tensor, paired: PairedGains) -> str:
    """How a round of random starts ended, in words."""
    best = int(mean.argmax())
    if len(before) == 1:
        return f"auto-encoder: random start {before[0] + 1} learns on; held-out images gain {float(mean[0]):.1f} nats"
    told = [f"{number + 1}: {float(mean[place]):.1f}" for place, number in enumerate(before) if place != best]
    errors = [paired.error(best, place) for place in range(len(before)) if place != best]
    left = f"{len(going)} of {len(before)} random starts go on" if len(going) > 1 else "the best random start goes on"
    return (
        f"auto-encoder: {left}; held-out images gain {float(mean[best]):.1f} nats in start {before[best] + 1} "
        f"(others {', '.join(told)}; errors of the differences {min(errors):.1f} to {max(errors):.1f})"
    )


def copied(state: Any) -> Any:
    """A state whose tensors are its own."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, Mapping):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [copied(value) for value in state]
    return state
