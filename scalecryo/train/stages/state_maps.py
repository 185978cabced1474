"""Maps at places of the latent space: images weighted by how near they lie, each moved there by the linear model.

A map at z0 is a local linear regression: an image enters with the weight exp(−½ Σ ((z − z0) / (h sd))²), less what the
model says that it would show otherwise at z0, A W (z − z0). What remains to the kernel is what the model cannot say, so
a wide kernel blurs little. Each place has several kernels, the widest of which is the linear model itself with what all
images say otherwise; every voxel takes that which serves it (`map.kernel_widths`).
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from scalecryo.distributed.world import World
from scalecryo.evaluate.components import ComponentCurves
from scalecryo.map.backprojection import PADDING, Backprojection
from scalecryo.map.kernel_widths import locally_best
from scalecryo.map.reference import ReferenceSet
from scalecryo.physics.image_formation import CtfWeightedImages
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.runs.component_results import Variety, write_variety
from scalecryo.runs.monitor import PassReport
from scalecryo.train.owned_sums import OwnedSums
from scalecryo.train.particle_source import BatchRequest, RunContext
from scalecryo.train.stage import Learned
from scalecryo.train.stages.component_stage import posed_parts
from scalecryo.train.stages.state_poses import states_part

BATCH = 256
BYTES = 1 << 30  # of the sums of one pass
LEAST_KERNEL = 1e-3  # weights below are none
LEAST_PARTICLES = 300  # that a kernel is widened to
SHARE = 0.5  # of a state's particles, as the sum of the kernel's weights at its centre
WIDTHS = (1 / 3, 1.0, 3.0)  # of the particles that a kernel should hold; more than most of all are none
MOST = 0.6


class StateMaps:
    """As many passes as the memory for sums asks for; the last one writes all that the components leave behind."""

    name = "state maps"

    def __init__(
        self,
        context: RunContext,
        learned: Learned,
        centres: Float[NDArray, "k q"] | None = None,
        particles: Float[NDArray, " k"] | None = None,
    ) -> None:
        """
        Args:
            context: of the run.
            learned: poses, components and coordinates.
            centres: places in the latent space; None: those of the states, and the results are written.
            particles: that each map is made of, as the sum of the kernel's weights.
        """
        self._context, self._learned = context, learned
        self._given = None if centres is None else (centres, particles)
        self._centres: Tensor | None = None
        self._rest: Tensor | None = None
        self._some, self._narrower = slice(0), list[Tensor]()
        self._maps: list[Tensor] = []
        self._images = 0

    @property
    def references(self) -> ReferenceSet:
        """The half-maps at every place, when all passes were made."""
        context = self._context
        level = self._maps[0].shape[-1]
        noise = torch.ones(level // 2 + 1, device=context.device)
        pixel_size = context.store.level_pixel_size(level)
        maps = torch.stack(self._maps)
        return ReferenceSet.of_maps(maps, pixel_size, noise=noise, radius=level / 2 - 1, solvent=context.solvent)

    def request(self) -> BatchRequest:
        """Every particle in order, at the full box."""
        context = self._context
        if self._centres is None:
            self._set_places()
        assert self._centres is not None, "set above"
        self._images, self._pixels = 0, context.pixels(context.training_level)
        level, box = self._pixels.box_size, int(PADDING * self._pixels.box_size)
        at_once = max(1, BYTES // (2 * 12 * box * box * (box // 2 + 1)))
        self._some = slice(self._some.stop, min(self._some.stop + at_once, len(self._kernels)))
        self._sums = Backprojection(level, device=context.device, classes=max(1, self._some.stop - self._some.start))
        assert self._learned.components is not None, "the components come first"
        self._learned.components.begin(self._pixels)
        if not len(self._centres):  # no component passes: there is nothing to read for
            return BatchRequest((self._pixels,), BATCH, batches=0)
        return BatchRequest((self._pixels,), BATCH, shuffled=False, training_rows=False)

    @torch.no_grad()
    def step(self, *images: ParticleImages) -> None:
        """Insert what lies near a place, moved to it."""
        model, coordinates = self._learned.components, self._learned.coordinates
        assert model is not None and coordinates is not None, "they come first"  # noqa: PT018
        assert self._centres is not None, "request() comes first"
        for posed in posed_parts(images[0], self._context, self._learned, model.count):
            rows = posed.images.rows.cpu().numpy()  # host sync
            z = torch.from_numpy(coordinates.z[rows]).to(posed.weight)
            sd = torch.from_numpy(coordinates.sd[rows]).to(posed.weight)
            slices = model.slices(posed)
            self._images += len(rows)
            for number, (place, width) in enumerate(self._kernels[self._some]):
                away, weight = z, posed.weight
                if place >= 0:
                    away = z - self._centres[place]
                    weight = weight * _kernel(away / sd, width)
                near = (weight > 0).nonzero()[:, 0]  # host sync
                if not len(near):
                    continue
                moved = torch.einsum("bq,bqp->bp", away[near].to(slices), slices[near])
                ctf = posed.ctf[near]
                weighted = CtfWeightedImages((posed.centred[near] - moved) * ctf, ctf.square())
                shift = torch.zeros_like(posed.poses.shift[near])
                index = torch.full_like(near, number)
                half = posed.half[near]
                self._sums.add(weighted, posed.rotation[near], shift, weight[near], half, self._pixels, index)

    def finish_pass(self, world: World) -> PassReport:
        """Solve; after the last pass worker 0 writes. Collective."""
        assert self._centres is not None, "request() comes first"
        if len(self._centres):
            owned = OwnedSums(self._sums, world)
            owned.reduce_(self._pixels.radius_limit)
            self._choose(owned.solve())
        if self.done() and self._given is None and world.is_leader:
            self._write()
        told = f"components: {len(self._maps)} of {len(self._centres)} maps of states"
        return PassReport(told, self._images, checkpoint=False)

    def done(self) -> bool:
        """Whether all maps were made."""
        return self._centres is not None and len(self._maps) == len(self._centres)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: it is made anew."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to take up."""

    def _choose(self, solved: Float[Tensor, "k 2 n n n"]) -> None:
        """Of the kernels of a pass, in their order: what each place with all of its widths makes of them."""
        model = self._learned.components
        assert model is not None and self._centres is not None, "they come first"  # noqa: PT018
        parts = model.components_at(solved.shape[-1])
        for index, maps in enumerate(solved, self._some.start):
            place, _ = self._kernels[index]
            if place < 0:
                self._rest = maps
                continue
            self._narrower.append(maps)
            if any(later == place for later, _ in self._kernels[index + 1 :]):
                continue
            assert self._rest is not None, "its kernel is the first"
            widest = self._rest + torch.einsum("q,hqzyx->hzyx", self._centres[place].to(parts), parts)
            self._maps.append(locally_best(torch.stack([*self._narrower, widest])))
            self._narrower = []

    def _set_places(self) -> None:
        """Places, and the widths of the kernels at each."""
        coordinates, device = self._learned.coordinates, self._context.device
        assert coordinates is not None, "they come first"
        count = coordinates.z.shape[1]
        if self._given is not None:
            centres, particles = self._given
            wanted = np.full(len(centres), LEAST_PARTICLES) if particles is None else particles
        elif coordinates.mixture is None:
            centres, wanted = np.zeros((0, count)), np.zeros(0)
        else:
            mixture = coordinates.mixture
            centres = np.zeros((len(mixture), count))
            centres[:, : coordinates.passing] = mixture.mean
            wanted = np.maximum(SHARE * mixture.share * self._context.count, LEAST_PARTICLES)
        self._centres = torch.from_numpy(np.asarray(centres, dtype=np.float32)).to(device)
        #: Place and width of each kernel, the narrowest of a place first; before them, at no place, that of all images.
        self._kernels = [(-1, math.inf)]
        for place, (centre, number) in enumerate(zip(centres, wanted, strict=True)):
            held = [part * float(number) for part in WIDTHS if part <= 1 or part * number < MOST * len(coordinates.z)]
            self._kernels += [(place, kernel_width(coordinates.z, coordinates.sd, centre, each)) for each in held]

    def _write(self) -> None:
        learned, context = self._learned, self._context
        model, coordinates = learned.components, learned.coordinates
        assert model is not None and coordinates is not None and learned.posed is not None, "they come first"  # noqa: PT018
        mean, halves = model.means.mean(0), model.components_at(model.level)
        components = halves.mean(0) * torch.from_numpy(coordinates.moment).sqrt().to(halves)[:, None, None, None]
        assert model.curves is not None, "the M-steps come first"
        curves = ComponentCurves(
            components.square().sum((1, 2, 3)).cpu().numpy(), coordinates.gain, coordinates.error,
            model.curves.cpu().numpy(), coordinates.passing, 2 * (model.curves.shape[1] - 1),
            context.store.level_pixel_size(2 * (model.curves.shape[1] - 1)), coordinates.encoder,
        )  # fmt: skip
        references = self.references if self._maps else None
        poses, _ = learned.posed.all()
        confidence = (poses.confidence * poses.particle_probability).cpu().numpy()
        found = Variety(
            mean, components, model.mask, confidence, curves, coordinates.z, coordinates.sd, coordinates.mixture,
            references, poses if model.rounds else None,
        )  # fmt: skip
        write_variety(context.run, context.store, found, context.config.train.seed)
        for name in (learned.identity, *(states_part(learned.identity, number) for number in range(model.rounds))):
            learned.posed.remove_pass(name)
        coordinates.table.remove_pass()


def _kernel(away: Float[Tensor, "b q"], width: float) -> Float[Tensor, " b"]:
    """Weights by the distance in standard deviations."""
    weight = torch.exp(-0.5 * away.square().sum(1) / width**2)
    return torch.where(weight > LEAST_KERNEL, weight, torch.zeros_like(weight))


def kernel_width(
    z: Float[NDArray, "n q"], sd: Float[NDArray, "n q"], centre: Float[NDArray, " q"], particles: float
) -> float:
    """The h with which the kernel's weights at a place sum up to so many particles, by bisection."""
    step = max(1, len(z) // 50_000)
    distance = np.square((z[::step] - centre) / np.maximum(sd[::step], 1e-6)).sum(1)
    low, high = -7.0, 14.0
    for _ in range(40):
        middle = 0.5 * (low + high)
        total = step * np.exp(-0.5 * distance * np.exp(-2 * middle)).sum()
        low, high = (middle, high) if total < particles else (low, middle)
    return float(np.exp(high))
