"""Mutations of good files: an answer or one ScalecryoError, whatever the bytes; support/fuzz_parsers.py goes on.

`fuzz_corpus/` holds the inputs that once found something.
"""

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from scalecryo.errors import ScalecryoError
from tests.support import fuzz_parsers

HERE = Path(__file__).resolve().parent
CORPUS = sorted((HERE / "fuzz_corpus").iterdir())
KINDS = ["star", "mrc", "cs", "csg", "pkl"]
RANDOM_CASES = 400


def answer(kind: str, data: bytes) -> str:
    """What became of an input; anything but an answer or our own error fails the test."""
    try:
        fuzz_parsers.TARGETS[kind](data)
    except ScalecryoError as error:
        return "several lines" if "\n" in str(error) else "refused"
    return "read"


@pytest.mark.parametrize("path", CORPUS, ids=[path.name for path in CORPUS])
def test_what_was_found_stays_found(path: Path) -> None:
    assert answer(path.suffix[1:], path.read_bytes()) in ("read", "refused")


@pytest.mark.parametrize("kind", KINDS)
def test_random_mutations(kind: str) -> None:
    seeds = fuzz_parsers.made(kind)
    draw = random.Random(7)
    seen = {answer(kind, fuzz_parsers.mutate(draw.choice(seeds), seeds, draw)) for _ in range(RANDOM_CASES)}
    # A group's other files are not there; any other kind is also read now and then.
    assert seen == ({"refused"} if kind == "csg" else {"read", "refused"})


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_cut_and_spliced(kind: str, data: st.DataObject) -> None:
    seed = data.draw(st.sampled_from(fuzz_parsers.made(kind)))
    start = data.draw(st.integers(0, len(seed)))
    stop = data.draw(st.integers(start, len(seed)))
    assert answer(kind, seed[:start] + data.draw(st.binary(max_size=16)) + seed[stop:]) in ("read", "refused")


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=10, max_size=10), st.sampled_from("<>"), st.integers(0, 4096)
)
@example([4, 4, 10**9, 2, 0, 0, 0, 4, 4, 1], "<", 512)
@example([2**23, 2**23, 2**23, 2, 0, 0, 0, 1, 1, 1], ">", 512)
def test_any_mrc_header(words: list[int], order: str, extra: int) -> None:
    header = np.zeros(256, order + "i4")
    header[:10] = words
    assert answer("mrc", header.tobytes() + bytes(extra)) in ("read", "refused")
