"""`scalecryo train --follow`: a run that goes on while particles are appended to its store."""

import logging
import math
import time
from collections.abc import Callable

from scalecryo.config import Config
from scalecryo.data.io import urls
from scalecryo.errors import ConfigError
from scalecryo.runs.folder import RunFolder

POLL_SECONDS = 5.0
STOP = "stop"
FOLLOWING = ("guided", "poses")  # recipes that go on from a map and the encoder
logger = logging.getLogger(__name__)


def check_following(config: Config) -> None:
    """
    Raises:
        ConfigError: the recipe cannot take in new particles.
    """
    train = config.train
    if config.recipe not in FOLLOWING or train.several or train.components or train.rows:
        raise ConfigError(
            "config: --follow goes with the recipes guided and poses, one class, no components and train.rows = 0: "
            "leave out what says otherwise"
        )


class Follower:
    """Looks at a store now and then, and at the clock."""

    def __init__(self, config: Config, known: str, hours: float, *, poll_seconds: float = POLL_SECONDS) -> None:
        """
        Args:
            config: of the run; a word to stop from before it is taken away.
            known: content hash of the store that it sees first.
            hours: how long to wait for particles, from `follow` on; infinity: for ever.
            poll_seconds: between two looks.
        """
        self._store, self._run, self._poll = config.run.data, RunFolder(config.run.out), poll_seconds
        self._hours, self._deadline, self._known = hours, math.inf, known
        # A word that was said to an earlier run is not meant for this one; one that is said from now on is.
        urls.remove_tree(self._run.path(STOP))

    def follow(self, go_on: Callable[[], None]) -> None:
        """Call `go_on` each time that the store has grown, until the time is over or `stop` lies in the folder."""
        self._deadline = time.monotonic() + 3600 * self._hours
        until = "" if math.isinf(self._hours) else f" for {self._hours:g} h, or"
        while True:
            logger.info("waiting for particles that are appended to %s%s until %s is there",
                        urls.redacted(self._store), until, urls.redacted(self._run.path(STOP)))  # fmt: skip
            if not self._grows():
                return
            self._known = self._content()  # before: what comes while it works is for the next time
            go_on()

    def _grows(self) -> bool:
        """Wait for new particles; false when it is time to end."""
        while True:
            if urls.exists(self._run.path(STOP)):
                urls.remove_tree(self._run.path(STOP))
                return False
            if self._content() != self._known:
                return True
            if time.monotonic() >= self._deadline:
                return False
            time.sleep(min(self._poll, max(0.0, self._deadline - time.monotonic())))

    def _content(self) -> str:
        from scalecryo.data.storage.store import ParticleStore  # with numpy and zarr: not for wrong arguments

        return ParticleStore.open(self._store).content_hash
