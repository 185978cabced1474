"""Where a run's time goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timer:
    """Wall-clock seconds by part of the work, on this worker. On a GPU, kernels still in flight count where awaited.

    Attributes:
        seconds: by part.
        reduced_bytes: that this worker gave to reductions over the workers.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.reduced_bytes = 0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of a block to a part."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - start)

    def add(self, name: str, seconds: float) -> None:
        """Count time that was measured elsewhere."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def summary(self) -> str:
        """The parts in one line, longest first."""
        longest = sorted(self.seconds.items(), key=lambda item: -item[1])
        return ", ".join(f"{name} {seconds:.0f} s" for name, seconds in longest)
