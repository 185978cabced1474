"""How long a run will take, said before it begins and corrected by what it has taken so far. Imports no torch.

Every stage is given the seconds that it takes on one core of the machine where README's figures were measured, or on a
GPU of `cost_model`. How much slower or faster the run goes than that is learnt from the first pass on.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from scalecryo.config import Config
from scalecryo.settings import AutoencoderConfig
from scalecryo.train.requirements import one_assembly

# Images a second of one CPU core: of one pair of half-maps in the start; searched, and refined locally, at 64 px; in
# the final pass at 128 px; of the auto-encoder, and of the paper's, at 128 px.
START, JUDGED, SEARCHED, REFINED, POSED, ENCODED, DESCENDED = 550.0, 1000.0, 800.0, 1400.0, 1100.0, 600.0, 300.0
FASTEST_ENCODED = 2000.0  # images a second of the auto-encoder at 32 px
VOLUME_SECONDS = 1.0  # of a step of gradient descent for the volume's transforms at 128 px
SOLVE_SECONDS = 2.0  # of an iteration's maps at 128 px
RESULT_SECONDS = 10.0  # maps, curves and pictures at 128 px
LEARNT = 8000.0  # images a second and component of a pass that learns components, at 64 px
COMPONENT_PASSES, COMPONENT_PARTICLES, COMPONENT_LEVEL = 10, 200_000, 128
POSE_ROUNDS, SEARCHED_ROUNDS, ROUNDS_EXPECTED, ROUND_PASSES, ENCODED_SECONDS = 6, 2, 4, 4, 30.0
ROUND = ", round "  # in the name of a stage that is one of several
SEARCHED_AS, TURNED_AS = 8, 3  # a pass that refines poses with the components, over one that places particles
ROUNDS = 3  # of the start; assumption, as is the number of iterations
CLASS_ROUNDS, FRESH_ROUNDS = 7, 2  # of the start of several classes, and of them with fresh maps; both FRESH at first
FRESH = 2
IN_FULL = 0.4  # share of the classes that an image of their start is compared with in full
ENSEMBLE, LABELLED = 3400.0, 20_000  # images a second and class of a cheap start; particles that are labelled at most
SEARCHES, LOCAL = 3, 3
JUDGING = 8000  # particles that a round of the start reads to judge, at most
SEARCH_LEVEL = 64
CORES_SHARE = 0.7  # one process on c cores is c to this power as fast as on one
PRIOR_SHARE = 0.05  # of the run, as which the prediction counts beside what was seen
_OF_GPU = {"start": ("start",), "refinement": ("iterations",), "final pass": ("final pass", "results")}


@dataclass(frozen=True)
class Part:
    """A stage of the run.

    Attributes:
        name: the stage's own.
        seconds: that its passes are predicted to take.
        tail: seconds after its last batch, such as the results after the final pass.
        passes: that it is predicted to make.
    """

    name: str
    seconds: float
    tail: float = 0.0
    passes: int = 1


def parts_of(config: Config, particles: int, levels: Sequence[int]) -> list[Part]:
    """The stages of a run and what each is predicted to take, on this machine's CPU cores or on the run's workers.

    Args:
        config: of the run.
        particles: that take part.
        levels: boxes of the store, px.
    """
    box = config.train.box or max(levels)
    used = [level for level in levels if level <= box]
    if config.run.device == "cuda" and config.recipe == "guided":
        return _on_gpus(config, particles, box)
    _, workers = config.run.worker_range
    speed = float(workers) if workers else _cores() ** CORES_SHARE
    parts = [*_starts(config, particles, used), *_refinements(config, particles, box)]
    if config.train.final_pass:
        full = max(levels)
        posing = particles / (POSED * (128 / full) ** 1.5)
        parts.append(Part("final pass", posing, RESULT_SECONDS * speed * (full / 128) ** 3 * config.foreseen_classes))
        parts += _variety(config, particles, max(levels))
    return [Part(part.name, part.seconds / speed, part.tail / speed, part.passes) for part in parts]


def _variety(config: Config, particles: int, full: int) -> list[Part]:
    """Passes that learn components, place the particles, and make the maps of states."""
    count = config.train.components
    if not count:
        return []
    solving = 0.3 * SOLVE_SECONDS * count * (min(full, COMPONENT_LEVEL) / 128) ** 3
    one = min(particles, COMPONENT_PARTICLES) / (LEARNT / count * (64 / min(full, COMPONENT_LEVEL)) ** 1.3) + solving
    placed = particles / (4 * LEARNT / count * (64 / min(full, COMPONENT_LEVEL)) ** 1.3)
    rounds = []
    for number in range(1, (POSE_ROUNDS if config.recipe in ("guided", "poses") else 0) + 1):
        made = float(number <= ROUNDS_EXPECTED)
        posed = SEARCHED_AS if config.guided.start == "nothing" and number <= SEARCHED_ROUNDS else TURNED_AS
        rounds += [Part(f"poses of states{ROUND}{number}", made * posed * placed),
                   Part(f"components{ROUND}{number}", made * ROUND_PASSES * one, 0, ROUND_PASSES)]  # fmt: skip
    return [
        Part("components", COMPONENT_PASSES * one, 0, COMPONENT_PASSES), *rounds, Part("coordinates", placed),
        Part("latent encoder", ENCODED_SECONDS, 0, 2),
        Part("state maps", particles / (POSED * (128 / full) ** 1.5), RESULT_SECONDS * (full / 128) ** 3),
    ]  # fmt: skip


def _starts(config: Config, particles: int, levels: Sequence[int]) -> list[Part]:
    """What comes before a refinement, or in its place."""
    guided, many = config.guided, config.foreseen_classes
    if config.recipe == "guided":
        judged = ROUNDS * min(JUDGING, particles) / JUDGED
        learnt = guided.bootstrap_steps * guided.bootstrap_batch / START * (guided.starts + ROUNDS - 1)
        passes = ROUNDS * (guided.bootstrap_steps // 20 + 1)
        if not config.train.classes:
            return [_ensemble(config, particles), replace(_class_start(config, particles), name="class start")]
        if many > 1 and config.train.class_mode == "independent":
            return [_class_start(config, particles)]
        return [Part("start", learnt + judged, 0, passes), *_class_parts(config, particles)]
    if config.recipe == "poses":
        return [Part("imported poses", particles / POSED), *_class_parts(config, particles)]
    if config.recipe == "autoencoder":
        own = config.autoencoder
        passes, more = _of_random_starts(own)
        steps = dict.fromkeys(levels, own.level_steps) | {min(levels): own.steps + more}
        rates = {level: min(FASTEST_ENCODED, ENCODED * (128 / level) ** 1.3) for level in levels}
        seconds = sum(count * own.batch_size / rates[level] for level, count in steps.items())
        return [Part("auto-encoder", seconds, 0, passes + sum(steps.values()) // config.monitor.every)]
    box, train = max(levels), config.train
    step = train.batch_size / (DESCENDED * (128 / box) ** 2) + VOLUME_SECONDS * (box / 128) ** 3
    return [Part("gradient descent", train.steps * step, 0, max(1, train.steps // config.monitor.every))]


def _of_random_starts(settings: AutoencoderConfig) -> tuple[int, int]:
    """Passes of the auto-encoder's random starts, and their steps but for those of the one that goes on."""
    left, passes, steps, learnt = settings.starts, 0, 0, 0
    while learnt < settings.steps and (left > 1 or not learnt):
        more = min(settings.start_steps, settings.steps - learnt)
        passes, steps, learnt = passes + left + 1, steps + left * more, learnt + more
        left = max(1, left // 2)
    return passes, steps - learnt


def _class_start(config: Config, particles: int) -> Part:
    """Each image is compared with a map of every class, and for some rounds with fresh ones of its own class too."""
    guided, many = config.guided, config.foreseen_classes
    rounds = min(CLASS_ROUNDS + FRESH_ROUNDS, guided.bootstrap_rounds)
    images = guided.bootstrap_steps * guided.bootstrap_batch * max(1, many / 2)
    learnt = images / START * (IN_FULL * many * (guided.starts + rounds - 1) + FRESH + FRESH_ROUNDS - 1)
    judged = rounds * min(JUDGING, particles) / 10 / JUDGED * (many + 1)
    return Part("start", learnt + judged, 0, rounds * (guided.bootstrap_steps // 20 + 1))


def _ensemble(config: Config, particles: int) -> Part:
    """Cheap starts, and the labels that each gives."""
    guided = config.guided
    images = [guided.ensemble_steps * guided.bootstrap_batch * max(1, k / 4) * k for k in guided.ensemble_classes]
    labelled = min(particles, LABELLED) * sum(guided.ensemble_classes)
    starts = guided.ensemble_starts
    passes = -(-starts * len(guided.ensemble_classes) // max(config.run.worker_range[1], 1)) + 1
    return Part("ensemble", starts * (sum(images) + labelled) / ENSEMBLE, 0, passes)


def _class_parts(config: Config, particles: int) -> list[Part]:
    if not config.train.several:
        return []
    read = min(particles, config.guided.iteration_particles) * config.foreseen_classes
    return [Part("classes", 4 * read / SEARCHED, 0, 4), Part("class maps", 2 * read / SEARCHED, 0, 2)]


def _refinements(config: Config, particles: int, box: int) -> list[Part]:
    if config.recipe not in ("guided", "poses") and not (config.recipe == "autoencoder" and config.autoencoder.refine):
        return []
    settings, many = config.guided, config.foreseen_classes
    read = min(particles, settings.iteration_particles)
    searches = min(SEARCHES, settings.search_iterations) if settings.start == "nothing" else 0
    local = max(min(LOCAL, settings.iterations - searches), 0)
    search = read / SEARCHED + SOLVE_SECONDS * (min(box, SEARCH_LEVEL) / 128) ** 3 * many
    refine = read / (REFINED * (64 / box) ** 1.3) + SOLVE_SECONDS * (box / 128) ** 3 * many
    found = [Part("refinement", searches * search + local * refine, 0, max(searches + local, 1))]
    if one_assembly(config):
        found.append(Part("class labels", 4 * read * many / SEARCHED, 0, 4))
    return found


def _on_gpus(config: Config, particles: int, box: int) -> list[Part]:
    """By the model of GPUs, which none has confirmed."""
    # Imports torch, which a run on GPUs has to wait for anyway.
    from scalecryo.train.cost_model import H100
    from scalecryo.train.sizing import plan

    made = plan(
        particles, box, max(config.run.worker_range[1], 1), H100, iteration_particles=config.guided.iteration_particles,
        batch_size=config.guided.batch_size,
    )  # fmt: skip
    passes = {"start": ROUNDS * 4, "refinement": SEARCHES + LOCAL, "final pass": 1}
    return [
        Part(name, made.seconds[terms[0]], sum(made.seconds[term] for term in terms[1:]), passes[name])
        for name, terms in _OF_GPU.items()
        if name != "final pass" or config.train.final_pass
    ]


def _cores() -> int:
    """That torch's threads run on."""
    if os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Forecast:
    """What is left of a run, from what was predicted and how fast it goes; times are seconds of any clock."""

    def __init__(self, parts: Sequence[Part]) -> None:
        """
        Args:
            parts: in the order of the stages.
        """
        self._parts = list(parts)
        self._done, self._taken = 0.0, 0.0  # predicted seconds of what was finished here, and how long that took
        self._current, self._share = "", 0.0
        self._first: tuple[float, float] | None = None  # share and time from which the present stage is timed

    def __str__(self) -> str:
        told: dict[str, float] = {}
        for part in self._parts:
            name = "rounds of poses and components" if ROUND in part.name else part.name
            told[name] = told.get(name, 0.0) + part.seconds + part.tail
        return ", ".join(f"{name} {about(seconds)}" for name, seconds in told.items())

    @property
    def total(self) -> float:
        """Seconds that all parts are predicted to take."""
        return sum(part.seconds + part.tail for part in self._parts)

    def part(self, name: str) -> Part:
        """The prediction for a stage; one that is not known is taken for as long as the mean of the others."""
        known = next((part for part in self._parts if part.name == name), None)
        return known or Part(name, self.total / max(len(self._parts), 1))

    def begin(self, name: str, now: float, *, resumed: bool = False) -> None:
        """A stage begins; `resumed`: at a share of it that its first pass will tell."""
        if self._first is not None:
            share, since = self._first
            self._done += self._predicted(self._current) * (1 - share)
            self._taken += now - since
        self._current, self._share, self._first = name, 0.0, None if resumed else (0.0, now)

    def at(self, share: float, now: float) -> None:
        """So much of the present stage is done, 0 to 1."""
        self._share = min(max(share, self._share), 1.0)
        if self._first is None:
            self._first = self._share, now

    def pace(self, now: float) -> float:
        """Seconds that pass for each that was predicted; 1 until something was seen."""
        share, since = self._first or (self._share, now)
        seen = self._done + self._predicted(self._current) * (self._share - share)
        prior = PRIOR_SHARE * self.total
        return (self._taken + now - since + prior) / (seen + prior) if prior else 1.0

    def left(self, now: float) -> float:
        """Seconds until the end of the run."""
        names = [part.name for part in self._parts]
        later = self._parts[names.index(self._current) + 1 :] if self._current in names else self._parts
        own = self._predicted(self._current) * (1 - self._share) if self._current else 0.0
        return self.pace(now) * (own + sum(part.seconds + part.tail for part in later))

    def _predicted(self, name: str) -> float:
        part = self.part(name)
        return part.seconds + part.tail


def about(seconds: float) -> str:
    """A time in the words that suit a guess: ~20 s, ~4 min, ~2 h 10 min."""
    if seconds < 55:
        return f"~{max(5, 5 * round(seconds / 5))} s"
    minutes = max(1, round(seconds / 60))
    if minutes < 60:
        return f"~{minutes} min"
    hours, rest = divmod(10 * round(minutes / 10), 60)
    return f"~{hours} h {rest} min" if rest else f"~{hours} h"
