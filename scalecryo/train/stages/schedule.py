"""What each iteration of the refinement does: how far its radius reaches, who is searched, and when it ends.

The radius goes where the halves' correlation says that there is signal, at once. All particles are searched while they
jump between modes; then they are refined locally against their whole half until neither poses nor maps change.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from scalecryo.pose.estimator import EStepPlan

FIRST_RADIUS = 14.0
FIRST_PASSES, PASSES = 3, 2  # Levenberg-Marquardt: from a grid's modes, and from a pose refined before
FIRST_STEP_RADIUS = 16.0  # Fourier pixels of a candidate's first local refinement
CHOICE_RADIUS = 32.0  # Fourier pixels up to which candidates are refined before one is chosen
SEARCH_LEVEL = 64  # largest box at which all particles are searched, and parts of the halves summed apart
SEARCH_RADIUS, FILLED = 12.0, 0.75  # Fourier pixels of a search, of a particle that fills this share of the box
PROBABILITY_RADIUS = 24.0  # Fourier pixels that tell whether an image shows the particle
MARGIN = 2.0  # Fourier pixels that the next iteration reaches for beyond the last shell with signal
JUMPING = 0.02  # the search goes on while more particles than this change their mode in an iteration
PROGRESS = 1.02  # or while the mean FSC grows by this factor
CALMER = 0.8  # and while their number falls below this share of what it was
CREEPING = 2e-3  # strain of an iteration above which the radius waits
RESTING = 0.05  # share of poses that still turn visibly, below which crowded views need not count less any more
FIRST_SEARCHES, FRUITFUL = 1, 0.05  # after so many iterations: share of those that fit nowhere which a search must find
SETTLED = 1.005  # gain in mean FSC below which an iteration brought no progress
SEARCHES_EXPECTED, LOCAL_EXPECTED = 3, 3  # iterations, of most runs
THIN_START, THIN = 20.0, 45.0  # nats that an image gains by a start's map, by an iteration's: below, it says little
THIN_MODES, THIN_REACH, THIN_GRID = 20, 4 / 3, 2  # modes of a search then; radius and rotations, by the usual ones
MAPPED = 8  # modes of such an image that enter the maps, each by its share of the probability
THIN_SHIFTS = 3.0  # standard deviations of the shifts, up to which such an image is sought
DOUBTED = 0.9  # confidence below which a pose is sought anew when the maps are almost what they will be
CLOSING = 3  # iterations before the last possible one, when that is done at the latest
RESTLESS = 0.3  # share of poses that still turn by a visible angle, above which it did


@dataclass(frozen=True)
class IterationPlan:
    """What one iteration does.

    Attributes:
        radius: Fourier pixels that poses are refined with.
        level: box of the store that is read.
        searched: whether all rotations of all particles are searched, each against a map of the other parts of its
            half: a particle's own share in the map would hold it where it is, right or wrong. Else only those of
            particles never posed before.
        modes: that the search offers each particle.
        search_radius: Fourier pixels of the search.
        lost_searched: whether those that fit nowhere are sought anew, at all shifts.
        doubted: confidence below which a known pose is sought anew; 0: none is.
        thin: whether the images on the whole say so little that many modes of each compete.
        thin_radius: Fourier pixels of the search of such an image. It is sought at all shifts, on a finer grid: with
            6VXX at -18 dB the best three modes of the usual search hold the right pose of 50 % of the images, at the
            shift of a wrong pose 40 %, twenty of this one 85 %.
    """

    radius: float
    level: int
    searched: bool
    modes: int
    search_radius: float
    lost_searched: bool = False
    doubted: float = 0.0
    thin: bool = False
    thin_radius: float = 0.0

    def modes_of(self, thin: bool) -> int:
        """Modes that a search offers an image that says little, or one that does not."""
        return THIN_MODES if thin else self.modes

    def search_radius_of(self, thin: bool) -> float:
        """Fourier pixels of that search."""
        return self.thin_radius if thin else self.search_radius

    @property
    def insertion_radius(self) -> float:
        """Up to which images are inserted: beyond local refinement, so that the FSC shows what comes next."""
        return min(self.level / 2 - 1, 1.4 * self.radius + 6)

    def e_step(
        self,
        *,
        left_out: bool,
        fit_shift: bool,
        shift_radius: float = 0.0,
        shift_sigma: float | None = None,
        equivalent: Sequence[Float[Tensor, "_ 3 3"]] = (),
    ) -> EStepPlan:
        """Candidates refined up to a middling radius; the choice, or the remembered pose, at the iteration's.

        Args:
            left_out: the references hold nothing of the particles: all of them are searched.
            fit_shift: whether shifts are unknown.
            shift_radius: of the disc of possible shifts, Å.
            shift_sigma: of the prior of shifts of images that say little, Å; None: not known.
            equivalent: rotations of each class that nothing tells apart.
        """
        highest = min(self.radius, CHOICE_RADIUS)
        radii = [radius for radius in (FIRST_STEP_RADIUS, CHOICE_RADIUS) if radius < 0.8 * highest]
        steps = [(radius, FIRST_PASSES if number == 0 else PASSES) for number, radius in enumerate(radii)]
        steps.append((highest, PASSES if steps else FIRST_PASSES))
        passes = 0 if left_out and highest == self.radius else PASSES
        return EStepPlan(
            self.radius, passes, left_out, tuple(steps), fit_shift=fit_shift, equivalent=equivalent,
            probability_radius=min(self.radius, PROBABILITY_RADIUS), shift_radius=shift_radius,
            modes=MAPPED, shift_sigma=shift_sigma, doubted=self.doubted,
        )  # fmt: skip


def plan_iteration(
    radius: float,
    levels: tuple[int, ...],
    number: int,
    *,
    searched: bool,
    shifted: bool,
    extent: float = 1.0,
    thin: bool = False,
) -> IterationPlan:
    """The iteration at a radius: the smallest level that holds it with room to see beyond, if there is one.

    Where shifts are unknown the search stays at a low radius: another mode may have another shift, and must still be
    seen at the remembered one. A grid of rotations serves a small particle up to a higher radius than one that fills
    the box.
    """
    if searched:
        levels = tuple(level for level in levels if level <= SEARCH_LEVEL) or (min(levels),)
    fits = [level for level in sorted(levels) if level / 2 - 1 >= 1.15 * radius + 1]
    level = fits[0] if fits else max(levels)
    radius = min(radius, level / 2 - 2.0)  # just inside the level's Nyquist
    first = number == 0 or shifted
    reach = SEARCH_RADIUS * min(max(FILLED / max(extent, 1e-3), 1.0), 2.0)
    modes, search_radius = (3, min(radius, reach)) if first else (2, min(radius, 24.0))
    return IterationPlan(
        radius, level, searched, modes, search_radius, thin=thin, thin_radius=min(radius, THIN_REACH * reach)
    )


@dataclass
class Schedule:
    """Where the refinement stands.

    Attributes:
        most_searches: iterations that search all particles at most; 0: none is searched that has a pose.
        most_settled: iterations in a row without progress that end the local refinement.
        patient: whether the search goes on while particles jump, even where the maps gain nothing: with several
            classes, one of them may still be finding itself while the others are done.
        number: finished iterations.
        radius: of the next one; 0: the first.
        searched: whether the next one searches all particles.
        searches: iterations that did, so far.
        settled: iterations in a row that brought no progress.
        moved: share of the particles seen before that changed their mode; of the last two searches (None: nobody was
            seen before).
        balanced: whether crowded views count less in the maps: until the poses creep no more.
        crowded: whether there were any.
        lost_searched: whether particles that fit nowhere are sought anew, at all shifts: as long as that finds some.
        straight: whether the last iteration's maps crept no more, with all views alike.
        doubted: whether poses that nothing is sure of were sought anew by such maps: those found by poor maps may be
            wrong, most of all where views are rare.
        thin: whether evidence is (`IterationPlan`): by the start's gain, then by the last iteration's.
        ended: whether nothing more is to be done.
    """

    most_searches: int
    most_settled: int
    patient: bool = False
    number: int = 0
    radius: float = 0.0
    searched: bool = True
    searches: int = 0
    settled: int = 0
    moved: list[float | None] = field(default_factory=list)
    balanced: bool = True
    crowded: bool = False
    lost_searched: bool = True
    straight: bool = False
    doubted: bool = False
    thin: bool = False
    ended: bool = False

    def __post_init__(self) -> None:
        self.searched = self.searched and self.most_searches > 0

    def plan(self, levels: tuple[int, ...], *, shifted: bool, extent: float, closing: bool = False) -> IterationPlan:
        """The next iteration.

        Args:
            levels: of the store.
            shifted: whether shifts are unknown.
            extent: diameter of the particle as a share of the box.
            closing: whether few iterations are left.
        """
        radius = self.radius or FIRST_RADIUS
        plan = plan_iteration(radius, levels, self.number, searched=self.searched, shifted=shifted, extent=extent,
                              thin=self.thin and self.searched)  # fmt: skip
        due = not self.crowded or self.straight or closing
        anew = due and self.most_searches > 0 and not self.searched and not self.doubted
        lost = shifted and self.most_searches > 0 and (self.lost_searched or anew)
        return replace(plan, lost_searched=lost, doubted=DOUBTED if anew else 0.0)

    def update(
        self,
        plan: IterationPlan,
        *,
        exchanging: bool,
        creep: float,
        weighted: bool,
        even: bool,
        reach: float,
        gain: float | None,
        moved: float | None,
        restless: float | None,
        found_again: float | None,
        evidence: float,
    ) -> None:
        """Take in what an iteration came to.

        Args:
            plan: of that iteration.
            exchanging: whether related poses are still being told apart.
            creep: strain of the maps that the iteration brought.
            weighted: whether crowded views counted less in its maps, which are not the last then.
            even: whether no view was crowded before it.
            reach: shell at which the halves' correlation falls to 0.143.
            gain: mean FSC over that of the iteration before; None where their levels differ.
            moved: share of those searched and seen before that changed their mode.
            restless: share of those seen before that turned by a visible angle.
            found_again: share of those sought anew that fit now; None: none was.
            evidence: log-likelihood that an image gained over an empty map.
        """
        self.number += 1
        self.crowded = self.crowded or weighted
        self.thin = evidence < THIN
        self.lost_searched = self.number <= FIRST_SEARCHES or (found_again or 0.0) >= FRUITFUL
        # Poses at rest are where they belong where no view is crowded, or where crowded ones count less, so that an
        # iteration closes a third of a gap; else it closes 4 %.
        settled = creep < CREEPING or ((weighted or even) and restless is not None and restless < RESTING)
        self.balanced = self.balanced and (plan.searched or not settled)
        if plan.searched or settled:
            self.radius = max(self.radius, plan.radius, min(reach + MARGIN, plan.insertion_radius))
        if plan.searched:
            self._after_search(moved, gain, plan.thin)
        else:
            # Where crowded views have counted less, the creep ended with that: with all alike it would go back.
            straight = creep < CREEPING or (self.crowded and not self.balanced)
            self.straight = straight and not weighted
            self.doubted = self.doubted or self.most_searches == 0 or plan.doubted > 0
            still = self.straight and self.radius <= plan.radius + 1 and gain is not None and gain < SETTLED
            calm = not exchanging and (restless is None or restless < RESTLESS)
            self.settled = self.settled + 1 if still and calm else 0
            self.ended = self.settled >= self.most_settled and self.doubted

    def share(self, most: int) -> float:
        """Share of the iterations that are done, of those expected, at most `most`: a guess, for the time left."""
        if self.ended or self.number >= most:
            return 1.0
        left = SEARCHES_EXPECTED + LOCAL_EXPECTED - self.number
        least = 1 + LOCAL_EXPECTED if self.searched else 1
        return self.number / min(self.number + max(left, least), most)

    def _after_search(self, moved: float | None, gain: float | None, thin: bool) -> None:
        self.searches += 1
        self.moved = [*self.moved[-1:], moved]
        if self.searches >= self.most_searches:
            self.searched = False
        elif moved is not None:
            earlier = self.moved[0] if len(self.moved) > 1 else None
            # Where images say little, maps get better slowly, and for long.
            better = gain is None or gain > (SETTLED if thin else PROGRESS)
            idle = earlier is not None and moved > CALMER * earlier and not better
            if moved < JUMPING or (idle and not self.patient):
                self.searched = False
        elif len(self.moved) > 1:
            self.searched = False  # more than an iteration reads: new ones are searched in any case

    def reopen(self) -> None:
        """Go on: there are particles that it has not seen. They start from modes of their own; no other is searched."""
        self.settled, self.ended, self.searched, self.balanced, self.lost_searched = 0, False, False, True, True
        self.straight = self.doubted = False

    def state_dict(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave, but for what the settings say now."""
        for name in ("number", "radius", "searched", "searches", "settled", "moved", "ended"):
            setattr(self, name, state[name])
        self.lost_searched = state.get("lost_searched", False)  # older ones have none
        self.thin = state.get("thin", False)  # older ones have none
        self.straight, self.doubted = state.get("straight", False), state.get("doubted", False)  # older ones have none
        self.balanced, self.crowded = state.get("balanced", True), state.get("crowded", False)  # older ones have none
