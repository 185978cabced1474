"""How far the auto-encoder has got at every step: which level of the store it learns from, and up to which radius."""

from dataclasses import dataclass

FIRST_RADIUS, MARCH_SHARE = 4.0, 0.7  # Fourier pixels; share of a level's steps after which its last one is reached
REFRESH = {1: 1, 2: 2, 4: 4}  # steps between two solutions of the maps, by level over the smallest; beyond: 8


@dataclass(frozen=True)
class Place:
    """Where in the march a step lies."""

    level: int
    radius: float
    refresh: bool


class March:
    """Level and radius of every step: a pure function of the settings."""

    def __init__(self, levels: tuple[int, ...], first_steps: int, level_steps: int) -> None:
        self.levels = tuple(sorted(levels))
        self._counts = [first_steps, *[level_steps] * (len(levels) - 1)]
        self.steps = sum(self._counts)

    def at(self, step: int) -> Place:
        """The place of a step, from 0."""
        number, within = 0, step
        while number < len(self._counts) - 1 and within >= self._counts[number]:
            within -= self._counts[number]
            number += 1
        level, count = self.levels[number], self._counts[number]
        low = self.levels[number - 1] / 2 - 1 if number else FIRST_RADIUS
        high = level / 2 - 1
        radius = low + (high - low) * min(1.0, within / (MARCH_SHARE * count))
        every = REFRESH.get(level // self.levels[0], 8)
        return Place(level, radius, refresh=within % every == 0 or within == count - 1)

    def rest(self, step: int) -> int:
        """Steps left at the level of a step, itself included."""
        return sum(self._counts[: self.levels.index(self.at(step).level) + 1]) - step
