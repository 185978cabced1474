"""Which failures pass, how long they are borne, and what is said in the end; against a clock that is not real."""

import errno
import threading
import time

import pytest

from scalecryo.data.io import retry
from scalecryo.data.io.retry import RetryPolicy, ShortBodyError, cause, is_past_end, is_transient, with_retries
from scalecryo.errors import StoreError


class Clock:
    """Time that passes only while somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.pauses.append(seconds)
        self.now += seconds
        return False


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(retry.time, "monotonic", made.monotonic)
    return made


def failing(times: int, error: Exception) -> tuple[list[int], object]:
    tries: list[int] = []

    def call() -> str:
        tries.append(len(tries))
        if len(tries) <= times:
            raise error
        return "done"

    return tries, call


def test_an_outage_of_half_a_minute_is_outlasted(clock: Clock) -> None:
    def call() -> str:
        if clock.now < 30:
            raise ConnectionRefusedError("refused")
        return "done"

    retries: list[float] = []
    result = with_retries(call, RetryPolicy(), "x", stopped=clock, on_retry=lambda: retries.append(clock.now))  # type: ignore[arg-type]
    assert result == "done"
    assert 30 <= clock.now < 30 + 1.5 * RetryPolicy().longest_wait
    assert len(retries) == len(clock.pauses)
    # Waits double from the first to the longest, each between half and one and a half of it.
    for number, pause in enumerate(clock.pauses):
        planned = min(RetryPolicy().first_wait * 2**number, RetryPolicy().longest_wait)
        assert 0.5 * planned <= pause <= 1.5 * planned
    assert len({round(pause / min(0.2 * 2**n, 8.0), 6) for n, pause in enumerate(clock.pauses)}) > 1


def test_patience_ends(clock: Clock) -> None:
    tries, call = failing(10**6, TimeoutError("slow\n down"))
    with pytest.raises(
        StoreError, match=r"^s3://b/x \(bytes 0 to 9\): no good answer in \d+ s and \d+ tries, the last"
    ):
        with_retries(call, RetryPolicy(seconds=60), "s3://b/x (bytes 0 to 9)", stopped=clock)  # type: ignore[arg-type]
    assert 40 < clock.now <= 60
    assert len(tries) == len(clock.pauses) + 1


def test_what_does_not_pass_is_raised_at_once(clock: Clock) -> None:
    for error in (FileNotFoundError("no"), PermissionError("no"), OSError(errno.EINVAL, "no")):
        tries, call = failing(1, error)
        with pytest.raises(type(error)):
            with_retries(call, RetryPolicy(), "x", stopped=clock)  # type: ignore[arg-type]
        assert len(tries) == 1
    tries, call = failing(1, KeyError("a bug"))
    with pytest.raises(KeyError):
        with_retries(call, RetryPolicy(), "x", stopped=clock)  # type: ignore[arg-type]
    assert not clock.pauses


def test_bodies_that_stay_short_are_not_waited_for(clock: Clock) -> None:
    tries, call = failing(10**6, ShortBodyError("3 bytes came instead of 9"))
    with pytest.raises(ShortBodyError):
        with_retries(call, RetryPolicy(seconds=1000), "x", stopped=clock)  # type: ignore[arg-type]
    assert 2 <= len(tries) <= 5


def test_waiting_can_be_stopped() -> None:
    stopped = threading.Event()
    threading.Timer(0.1, stopped.set).start()
    _, call = failing(10**6, TimeoutError())
    begun = time.monotonic()
    with pytest.raises(StoreError):
        with_retries(call, RetryPolicy(seconds=600, first_wait=300), "x", stopped=stopped)  # type: ignore[arg-type]
    assert time.monotonic() - begun < 5


def test_kinds_of_errors() -> None:
    from obstore.exceptions import GenericError, PermissionDeniedError

    gives = "Error performing GET http://h/k in 416.5µs - Server returned non-2xx status code: "
    passing = [GenericError(gives + "503 Slow Down"), GenericError(gives + "429 Too Many"),
               GenericError(gives + "408 Timeout"), GenericError("HTTP error: error sending request"),
               ConnectionResetError(), TimeoutError(), OSError(errno.EBUSY, "Reduce your request rate"),
               OSError(errno.EIO, "?")]  # fmt: skip
    lasting = [GenericError(gives + "400 Bad Request"), GenericError(gives + "416 Range Not Satisfiable"),
               PermissionDeniedError("403"), FileNotFoundError(), PermissionError(),
               OSError(errno.ENOSPC, "full")]  # fmt: skip
    assert [is_transient(error) for error in passing] == [True] * len(passing)
    assert [is_transient(error) for error in lasting] == [False] * len(lasting)
    # 416 among the microseconds is no status.
    assert [is_past_end(error) for error in (passing[0], lasting[1])] == [False, True]


def test_causes_carry_no_credentials() -> None:
    error = OSError(
        "GET http://user:pass@host/b/k?X-Amz-Signature=abc123\n failed: <Error><AWSAccessKeyId>AKIA1</AWSAccessKeyId>"
    )
    assert cause(error) == "GET http://host/b/k failed:"
    assert cause(ValueError()) == "ValueError"
    assert len(cause(ValueError("x" * 999))) == 200
