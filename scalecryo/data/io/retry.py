"""Retries with object stores: calls that fail for passing reasons are made again, later and later, up to a limit."""

import errno
import logging
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from obstore.exceptions import BaseError, GenericError, JoinError

from scalecryo.errors import StoreError

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

#: What the clients raise for a failed request; `is_transient` tells which may pass.
REQUEST_ERRORS = (OSError, BaseError)
# OSError's numbers that mean "not now". s3fs gives EBUSY for 503, EREMOTEIO for 500 and EIO for what it cannot name.
_PASSING = {
    errno.EAGAIN, errno.EBUSY, errno.EIO, errno.EPIPE, errno.ESTALE, errno.ETIMEDOUT, errno.ENETUNREACH,
    errno.EHOSTUNREACH, errno.ENETDOWN, getattr(errno, "EREMOTEIO", None), None,
}  # fmt: skip
_SHORT_TRIES = 3  # a body that stays short is the object's fault, not the network's
_PAST_END = re.compile(r"status(?: code)?:? 416|InvalidRange|range not satisfiable", re.IGNORECASE)
_ABSENT = re.compile(r"status(?: code)?:? (?:404|405|501)")
_LASTING = re.compile(r"status(?: code)?:? (?:4(?!08|29)\d\d|501)")


@dataclass(frozen=True)
class RetryPolicy:
    """How long a reader waits for an object store that does not answer as it should.

    Args:
        seconds: after which a request that keeps failing is given up.
        first_wait, longest_wait: pause before the second try, and the longest one; each is doubled and jittered.
        request_seconds: after which one try counts as failed.
    """

    seconds: float = 120.0
    first_wait: float = 0.2
    longest_wait: float = 8.0
    request_seconds: float = 30.0


class ShortBodyError(ConnectionError):
    """A body ended before the length that was announced or asked for."""


def is_transient(error: Exception) -> bool:
    """Whether trying again may help: after 5xx, throttling, timeouts, broken connections and bodies."""
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError | PermissionError) and error.errno in _PASSING
    return isinstance(error, GenericError | JoinError) and not _LASTING.search(str(error))


def is_past_end(error: Exception) -> bool:
    """Whether a range began behind the end of the object."""
    return bool(_PAST_END.search(str(error)))


def is_absent(error: Exception) -> bool:
    """Whether a server has no such bucket, or no such operation."""
    return bool(_ABSENT.search(str(error)))


def cause(error: BaseException) -> str:
    """An error in one short line, without what could be a credential."""
    text = str(error).partition("<")[0].partition("Debug source")[0]  # a server's XML may repeat the key's name
    line = " ".join(text.split())
    line = re.sub(r"//[^/@\s]*@", "//", line)
    line = re.sub(r"\?\S*", "", line)
    line = re.sub(r"Error performing \w+ \S+ in \S+ - ", "", line)  # obstore: the address is told already
    return line[:200] or type(error).__name__


def with_retries(
    call: Callable[[], Result],
    patience: RetryPolicy,
    where: str,
    *,
    stopped: threading.Event | None = None,
    on_retry: Callable[[], None] = lambda: None,
) -> Result:
    """The result of a call, made again while it fails for passing reasons.

    Args:
        call: a request that may be repeated.
        patience: for how long.
        where: address and part, for messages.
        stopped: gives up at once when set.
        on_retry: called before each further try.

    Raises:
        StoreError: it kept failing.
        OSError: it failed for a reason that does not pass, such as a missing object (as the client says it).
    """
    begun, wait, tries = time.monotonic(), patience.first_wait, 0
    stopped = stopped or threading.Event()
    while True:
        try:
            return call()
        except REQUEST_ERRORS as error:
            tries += 1
            if not is_transient(error) or (isinstance(error, ShortBodyError) and tries > _SHORT_TRIES):
                raise
            pause = wait * random.SystemRandom().uniform(0.5, 1.5)  # workers that failed together must not come back so
            wait = min(2 * wait, patience.longest_wait)
            spent = time.monotonic() - begun
            if spent + pause > patience.seconds or stopped.wait(pause):
                raise StoreError(
                    f"{where}: no good answer in {spent:.0f} s and {tries} tries, the last: {cause(error)}; "
                    "check the object store and the network, then go on with --resume"
                ) from error
            if tries == 1:
                logger.warning("%s: %s; trying again for up to %.0f s", where, cause(error), patience.seconds)
            on_retry()
