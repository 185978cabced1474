"""What a start goes on with after each round: with its halves apart, with all images for both, or not at all.

Two maps from independent random starts are the structure if they are alike. Where few images say little, a half may be
too small to be found at all: 1,500 images of a ribosome's part at -10 dB, a fifth of them junk, stayed at a wrong map
in each half, whatever the start; in maps from all images one found the structure after some rounds. Such maps share
their images' noise, so that the halves go on apart before they are compared for good.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

# Shares of the compared radius up to which the halves agree by 0.5: less is no common structure, and a start that ends
# has at least so much. Starts that the refinement took up reached 10 to 16 Fourier pixels of 12 (one of 45 6.1), wrong
# ones 3 to 5, though they agreed by 0.7 over shells 2 to 6, as right ones may; wrong ones from the same images 8.
FOUND, KEPT = 2 / 3, 1 / 2
UNLIKE = 3  # rounds after which halves that are unlike learn from all images
LEAD = 4.0  # standard errors by which a map that found the structure explains images better than one that did not
# A round is the last if it brings less than this factor in likelihood gain, and the halves' mean correlation over
# shells 2 to 6 is at least so much. Halves that agree less may share a distortion, which more rounds lessen and the
# refinement may keep: halves of a map sheared by 9°, crowded views, 800 of 2,000 images junk, agreed by 0.83 and gained
# 1.6 % still.
QUIET = ((0.0, 1.01), (0.9, 1.03))


@dataclass(frozen=True, eq=False)
class Choice:
    """What a round came to.

    Attributes:
        maps: the best, and the other half's best laid onto it.
        agreement: their mean correlation over shells 2 to 6.
        reach: up to which they agree by 0.5, masked, as a share of the compared radius.
        lead: of the best over the other: mean gain of held-out images, in standard errors.
        told: all of this in words.
    """

    maps: Float[Tensor, "2 n n n"]
    agreement: float
    reach: float
    lead: float
    told: str


@dataclass
class StartCourse:
    """Where a start stands.

    Attributes:
        pooled: whether each map learns from the images of both halves.
        since: rounds before that last changed.
        ended: whether nothing more is to be learnt.
        taken_over: whether the other map is to go on from the best one.
    """

    pooled: bool = False
    since: int = 0
    ended: bool = False
    taken_over: bool = False

    def update(self, gains: Sequence[float], choice: Choice) -> None:
        """Take in a round.

        Args:
            gains: likelihood gain of the best map in each round so far.
            choice: of the last one.
        """
        found, rounds = choice.reach >= FOUND, len(gains) - self.since
        self.taken_over = self.pooled and not found and choice.lead >= LEAD
        if self.pooled:
            change = found or self.taken_over
        else:
            self.ended = choice.reach >= KEPT and quiet(gains[self.since :], choice.agreement)
            change = not self.ended and not found and rounds >= UNLIKE
        if change:
            self.pooled, self.since = not self.pooled, len(gains)


def quiet(gains: Sequence[float], agreement: float) -> bool:
    """Whether the last of some rounds brought next to nothing; the first never does.

    Args:
        gains: likelihood gain of the best map in each.
        agreement: of the halves after the last one.
    """
    if len(gains) < 2:
        return False
    return any(agreement >= least and gains[-1] < factor * gains[-2] for least, factor in QUIET)
