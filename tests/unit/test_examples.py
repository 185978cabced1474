"""The surest and the least sure particles of a stream, whatever its batches."""

import torch

from scalecryo.runs.pictures import EXAMPLES, Examples


def shown(score: torch.Tensor, batch: int) -> Examples:
    """After a stream of images that are their own scores."""
    found = Examples.none()
    for part in score.split(batch):
        at = found.wanted(part)
        if len(at):
            images = part[at].view(-1, 1, 1)
            found = found.with_more((images, -images), part[at])
    return found


def test_extremes_of_any_stream() -> None:
    score = torch.rand(500, generator=torch.Generator().manual_seed(0))
    ordered = score.sort(descending=True).values
    for batch in (3, 64, 500):
        found = shown(score, batch)
        assert torch.equal(found.score, torch.cat([ordered[: EXAMPLES // 2], ordered[-(EXAMPLES // 2) :]]))
        assert torch.equal(found.pairs[0][:, 0, 0], found.score)
        assert torch.equal(found.pairs[1][:, 0, 0], -found.score)


def test_fewer_than_are_shown() -> None:
    assert len(shown(torch.rand(3), 2)) == 3
    assert len(shown(torch.zeros(0), 1)) == 0


def test_equal_scores_are_not_looked_at_again() -> None:
    found = shown(torch.ones(100), 10)
    assert len(found.wanted(torch.ones(50))) == 0
