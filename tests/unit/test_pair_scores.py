"""What the CPU's kernels make of pairs of scores, against the same in double precision by plain torch."""

import math

import pytest
import torch

from scalecryo.pose.pair_scores import PairProducts, add_images, pair_evidence, pair_scores, pair_shares

IMAGES, SHIFTS, PIXELS = 5, 3, 9


def products(rotations: int, spread: float, dtype: torch.dtype, rows: int = IMAGES) -> PairProducts:
    """As of images: scores that differ by tens of nats."""
    generator = torch.Generator().manual_seed(rotations)
    even, odd = (spread * torch.randn(IMAGES, SHIFTS, rotations, generator=generator) for _ in range(2))
    bias = torch.rand(rows, rotations, generator=generator)
    return PairProducts(even.to(dtype), odd.to(dtype), bias.to(dtype))


def scores(of: PairProducts) -> torch.Tensor:
    """In double precision, whatever the products are."""
    own = PairProducts(*(part.double() for part in of))
    return pair_scores(own, torch.empty(2 * own.even.numel(), dtype=torch.float64)).clone()


@pytest.mark.parametrize("rotations", [7, 16, 37, 200])  # with and without a rest beside whole vectors
@pytest.mark.parametrize("rows", [1, IMAGES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # kernels, torch
def test_mass_is_the_softmax_of_the_scores(rotations: int, rows: int, dtype: torch.dtype) -> None:
    # Reference: torch's softmax and logsumexp. 1e-5: scores of up to 100 have errors of 1e-5 in single precision.
    wanted = scores(products(rotations, 20.0, dtype, rows))
    mass = wanted.flatten(1).softmax(1).view(wanted.shape)
    shares = pair_shares(products(rotations, 20.0, dtype, rows))
    near = {"rtol": 1e-4, "atol": 1e-5}
    by = shares.total[:, None, None].double()
    torch.testing.assert_close(shares.sum / by, mass[:, 0] + mass[:, 1], **near)
    torch.testing.assert_close(shares.difference / by, mass[:, 0] - mass[:, 1], **near)
    torch.testing.assert_close(shares.mass / by[:, 0], mass.sum((1, 2)), **near)
    evidence = wanted.flatten(1).logsumexp(1)
    torch.testing.assert_close(shares.log_evidence.double(), evidence, **near)
    torch.testing.assert_close(pair_evidence(products(rotations, 20.0, dtype, rows)).double(), evidence, **near)


def test_flat_scores_share_evenly() -> None:
    """Closed form: equal scores."""
    flat = PairProducts(torch.full((2, 3, 50), 7.0), torch.zeros(2, 3, 50), torch.ones(1, 50))
    assert torch.allclose(pair_evidence(flat), torch.full((2,), 6 + math.log(300)))
    shares = pair_shares(flat)
    assert torch.allclose(shares.mass / shares.total[:, None], torch.full((2, 50), 0.02))


def test_what_is_no_number_stays_none() -> None:
    spoilt = products(37, 1.0, torch.float32)
    spoilt.even[1, 2, 5] = math.nan
    evidence = pair_evidence(spoilt)
    assert evidence.isnan().tolist() == [False, True, False, False, False]
    assert torch.equal(pair_shares(spoilt).log_evidence.isnan(), evidence.isnan())


@pytest.mark.parametrize("spread", [0.1, 2.0, 20.0])  # all hypotheses, most, and a few of them count
def test_sums_hold_all_but_next_to_nothing(spread: float) -> None:
    # Reference: the matrix product with all hypotheses, in double precision. What is left out is 1 % at most.
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, SHIFTS, PIXELS, dtype=torch.complex64, generator=generator)
    found = {}
    for dtype in (torch.float32, torch.float64):
        shares = pair_shares(products(400, spread, dtype))
        own = (images / shares.total[:, None, None]).to(torch.complex64 if dtype == torch.float32 else torch.complex128)
        sums = torch.zeros(2, 400, PIXELS, dtype=dtype)
        for _ in range(2):  # they are added to
            add_images(shares, own, sums)
        found[dtype] = sums.double()
    off = (found[torch.float32] - found[torch.float64]).norm() / found[torch.float64].norm()
    assert off < (1e-5 if spread < 1 else 1e-2)


def test_threads_change_nothing() -> None:
    many = torch.get_num_threads()
    found = []
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, SHIFTS, PIXELS, dtype=torch.complex64, generator=generator)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            shares = pair_shares(products(20_000, 20.0, torch.float32))
            sums = torch.zeros(2, 20_000, PIXELS)
            add_images(shares, images, sums)
            found.append((shares.mass, sums))
    finally:
        torch.set_num_threads(many)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
