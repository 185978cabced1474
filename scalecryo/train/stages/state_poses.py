"""Passes that refine the pose of every particle against the map of its own state, and seek others where that pays."""

import torch
from torch import Tensor

from scalecryo.data.io import urls
from scalecryo.distributed.world import World
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.rotation import geodesic_angle
from scalecryo.pose.candidate_refinement import SAME
from scalecryo.runs.monitor import PassReport
from scalecryo.train.particle_source import BatchRequest, RunContext
from scalecryo.train.particle_state import FOLDER
from scalecryo.train.stage import Learned
from scalecryo.train.stages.component_stage import ComponentStage, posed_parts
from scalecryo.train.stages.coordinates import BATCH, pixels_of
from scalecryo.train.state_poses import refine_with_states
from scalecryo.train.state_search import StateSearch, places_of

ROUNDS, SEARCHED_ROUNDS = 6, 2  # of poses and components in turn, at most; those in which other poses are sought
PROBES = 3  # a part of a batch is at most as large as with so many components: it has derivatives too
LOOKED_AT, PLACES = 4096, 12  # particles that tell which places of the latent space are searched, and how many


class StatePoses(ComponentStage):
    """One pass over all particles, each with its own half's components; they are learnt on from its poses.

    Where poses were found from nothing, other ones are sought first: a pass over some particles finds the places of the
    latent space whose maps are searched. A map that poses were found with holds their errors, so that they come to rest
    only over several rounds (a hinge from nothing: 3.0, 2.5, 2.35, 2.29, 2.27° about the frame of their state).
    """

    def __init__(self, context: RunContext, learned: Learned, rounds: int) -> None:
        """
        Args:
            context: of the run.
            learned: components and poses; gets better poses.
            rounds: how often that was done before.
        """
        super().__init__(context, learned)
        self._seen: list[Tensor] = []
        self._points: Tensor | None = None
        self._search: StateSearch | None = None
        self._searched = context.config.guided.start == "nothing" and rounds < SEARCHED_ROUNDS
        self._rounds = rounds
        self.name = f"poses of states, round {rounds + 1}"
        self._images, self._done = 0, False

    def request(self) -> BatchRequest:
        """Some particles for the places that are searched; then every particle in order."""
        context, model, posed = self._context, self._model, self._learned.posed
        assert posed is not None, "the final pass comes first"
        self._pixels = pixels_of(model, context)
        model.begin(self._pixels)
        if self._searched and self._points is None:
            self._images = 0
            order = context.order(self._pixels.box_size, BATCH)
            batches = min(order.steps_per_epoch, LOOKED_AT // BATCH)
            return BatchRequest((self._pixels,), BATCH, batches=batches)
        if self._points is not None:
            places = places_of(self._points, PLACES)
            seed = context.config.train.seed + 100 * self._rounds
            self._search = StateSearch(model, places, self._pixels, seed, fit_shift=context.fit_shift)
        posed.begin(self._part)
        self._images, self._turned = 0, torch.zeros(2, dtype=torch.float64, device=context.device)
        return BatchRequest((self._pixels,), BATCH, shuffled=False, training_rows=False)

    @torch.no_grad()
    def step(self, *images: ParticleImages) -> None:
        """Pose and coordinates together."""
        model, kept = self._model, self._learned.posed
        assert kept is not None, "the final pass comes first"
        for posed in posed_parts(images[0], self._context, self._learned, max(PROBES, model.count)):
            if self._searched and self._search is None:
                self._images += len(posed.images)
                self._seen.append(model.expect(posed).latents.mean)
                continue
            if self._search is not None:
                found = self._search.refined(posed)
            else:
                found, _ = refine_with_states(model, posed, fit_shift=self._context.fit_shift)
            kept.note(posed.images.rows, found.poses, posed.half)
            turned = geodesic_angle(posed.rotation, found.rotation).double()
            self._turned += torch.stack([posed.weight.double() @ turned, posed.weight.double().sum()])
            self._images += len(posed.images)

    def finish_pass(self, world: World) -> PassReport:
        """The places that are searched, or all workers' poses. Collective."""
        if self._searched and self._search is None:
            # Workers see batches of other sizes: each has room of its own.
            room = torch.zeros(world.size, LOOKED_AT + 1, self._model.count, device=self._context.device)
            own = torch.cat(self._seen)[:LOOKED_AT] if self._seen else room[0, :0]
            room[world.rank, 0], room[world.rank, 1 : 1 + len(own)] = len(own), own
            world.all_reduce_(room)
            self._points = torch.cat([part[1 : 1 + int(part[0, 0])] for part in room])  # host sync
            return PassReport("components: places of the latent space to be searched", self._images, checkpoint=False)
        assert self._learned.posed is not None, "the final pass comes first"
        self._learned.posed.commit(world)
        world.all_reduce_(self._turned)
        self._model.release()
        self._search, self._done = None, True
        turned = float(self._turned[0] / self._turned[1].clamp_min(1e-30))  # host sync
        self._model.pose_rounds = self._rounds + 1
        self._model.poses_at_rest = turned <= SAME / self._pixels.radius_limit
        message = f"components: poses refined with each particle's own state, turned by {turned:.2f}° on average"
        return PassReport(message, self._images, checkpoint=False)

    def done(self) -> bool:
        """Whether the pass was made, by a run that was killed too; or is not needed, since the last one changed little.

        Of a run that was finished the components are there and the parts are not: its last round is made anew, without
        a search.
        """
        ahead = self._model.rounds - self._rounds
        if not self._done and ahead > 0:
            assert self._learned.posed is not None, "the final pass comes first"
            kept = urls.exists(self._context.run.path(FOLDER, self._part))
            if kept:
                self._learned.posed.load_pass(self._part)
            self._done, self._searched = kept or ahead > 1, False
        return self._done or (ahead <= 0 and self._model.poses_at_rest)

    @property
    def _part(self) -> str:
        return states_part(self._learned.identity, self._rounds)


def states_part(identity: str, rounds: int) -> str:
    """Name of the pass of a round, for the parts that it writes."""
    return f"{identity}_states{rounds + 1}"
