"""Encoder and maps trained together: one step, and what it needs to know of the noise.

Winner takes all: every image's candidates (copies of the image times heads) are compared with it at low frequencies;
only the best gets the gradient of the reconstruction loss, and the image is inserted at its pose.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from scalecryo.distributed.gradients import replicated
from scalecryo.distributed.world import World
from scalecryo.map.background_noise import BackgroundNoise
from scalecryo.map.reference import Reference, ReferenceSet
from scalecryo.model.circle_encoder import Candidates, CircleEncoder, CircleTransform
from scalecryo.physics.fft import FourierPixels
from scalecryo.physics.fourier_slice import fourier_slice
from scalecryo.physics.image_formation import CtfWeightedImages
from scalecryo.physics.kernels.packed_volume import PackedVolume
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import Poses
from scalecryo.physics.rotation import random_rotations
from scalecryo.pose.circle_source import CircleSource, encoder_input
from scalecryo.pose.local_refinement import evaluate_poses, refine_poses
from scalecryo.pose.related import RelatedPoses
from scalecryo.settings import ReduceDtype
from scalecryo.train.encoder_training import TrainingBatch

# Where the maps have a pseudo-symmetry: which related pose is right shows at a share of the radius that is compared, up
# to so many Fourier pixels; so many of the best candidates are asked.
CHOICE_SHARE, CHOICE_RADIUS, LEADERS = 0.8, 32.0, 2
MOST_SYMMETRIES = 4
CHOICE_PASSES = 1
JUDGED_PASSES = 3  # of local refinement, before starts are compared
FIRST_SEARCH_RADIUS = 10.0  # Fourier pixels by which candidates are compared at first
MODES = 4  # candidates that are locally refined
SCORE_WIDTH_DEG = 8.0  # how near a candidate is to a known pose counts by a Gaussian of this width
KNOWN_RATE = 0.3  # learning rate once poses come from local refinement, as a share of the first


class Maps(Protocol):
    """What is sliced: `RunningMaps` or `VoxelMaps`."""

    transforms: tuple[Complex[Tensor, "d d h"], Complex[Tensor, "d d h"]]

    @property
    def level(self) -> int:
        """Box of the images, px."""

    @property
    def scale(self) -> float:
        """Samples of the transform per cycle and box."""

    def insert(
        self, images: CtfWeightedImages, rotation: Tensor, shift_px: Tensor, weight: Tensor, half: Int[Tensor, " b"],
        pixels: FourierPixels, *, keep: float,
    ) -> None:  # fmt: skip
        """Take in a batch."""

    def refresh(self, all_reduce_: Callable[..., None] | None, joined_radius: float) -> None:
        """Make the transforms anew. Collective."""

    def grown(self, level: int) -> "Maps":
        """The same maps at a larger level."""

    def maps(self) -> Float[Tensor, "2 n n n"]:
        """Half-maps."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from it."""


@dataclass(frozen=True)
class StepPlan:
    """What a step does.

    Attributes:
        radius: Fourier pixels that are compared.
        rate: learning rate.
        keep: what earlier sums decay to.
        refresh: whether the maps are solved anew after it.
    """

    radius: float
    rate: float
    keep: float
    refresh: bool = True


class Whitening:
    """Noise and signal of the images, once they were looked at: what brings noise to unit variance."""

    def __init__(self, noise: BackgroundNoise) -> None:
        """Host sync: once a run."""
        self.variance: Float[Tensor, "groups shells"] = noise.variance()
        share = noise.count / noise.count.sum()
        self.pooled: Float[Tensor, " shells"] = (share[:, None] * self.variance).sum(0).float()
        power = noise.mean_image_power() / self.pooled
        power[0] = 0.0
        self._power = power
        self._norms: dict[int, list[float]] = {}

    def __call__(self, images: ParticleImages) -> ParticleImages:
        """The same particles with unit noise in every coefficient, their CTF divided alike; transforms over the box."""
        pixels = images.pixels
        group = images.optics_group.long().clamp(0, len(self.variance) - 1)
        weight = self.variance[group].rsqrt()[:, pixels.shell]
        weight[:, 0] = 0.0  # the mean carries no pose
        ctf = weight if images.ctf is None else images.ctf * weight
        return images.with_transforms(images.transforms * weight / pixels.box_size, ctf)

    def image_power(self, pixels: FourierPixels, radius: float) -> float:
        """Mean power of white images up to a radius, what losses are shares of."""
        if pixels.box_size not in self._norms:
            total = (pixels.weight * self._power[pixels.shell]).cumsum(0)
            self._norms[pixels.box_size] = total.tolist()  # host sync: once a level
        return self._norms[pixels.box_size][pixels.count(radius) - 1]


class AutoEncoderTrainer:
    """An encoder, its optimiser, and the maps that it learns with; once they stand still, a source of candidates."""

    def __init__(
        self,
        encoder: CircleEncoder,
        circles: CircleTransform,
        pixels: FourierPixels,
        pixel_size: float,
        *,
        rate: float,
        search_radius: float,
        world: World,
        reduce_dtype: ReduceDtype,
    ) -> None:
        """
        Args:
            encoder: to be trained.
            circles: what it reads of images.
            pixels: of the smallest level, as many as it reads.
            pixel_size: Å, of that level.
            rate: first learning rate.
            search_radius: Fourier pixels by which candidates are compared.
            world: the workers.
            reduce_dtype: that gradients travel in.
        """
        self.encoder, self.circles, self.pixels, self.pixel_size = encoder, circles, pixels, pixel_size
        self._rate, self._search_radius, self._world = rate, search_radius, world
        self._replica: nn.Module = replicated(encoder, reduce_dtype) if world.size > 1 else encoder
        self._optimiser = torch.optim.Adam(encoder.parameters(), lr=rate, fused=True)
        self._packed: PackedVolume | None = None
        self._maps: Maps | None = None
        self.related = RelatedPoses.none(pixels.kx.device)
        """By the maps' pseudo-symmetries."""

    @property
    def maps(self) -> Maps:
        """That it learns with."""
        assert self._maps is not None, "set_maps() comes first"
        return self._maps

    def restart(self, seed: int) -> None:
        """Draw the weights anew and forget what the optimiser knows; how bright images are is kept."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for module in self.encoder.modules():
                if isinstance(module, nn.Linear):
                    module.reset_parameters()
        self._optimiser = torch.optim.Adam(self.encoder.parameters(), lr=self._rate, fused=True)

    def set_maps(self, maps: Maps) -> None:
        """Learn with these maps from now on. Collective."""
        self._maps = maps
        self._refresh()

    def look_for_symmetry(self) -> None:
        """Find the maps' pseudo-symmetries: at low frequencies related poses look alike, and half the images would stay
        in the wrong one. Collective.
        """
        mean = self.maps.maps().mean(0)
        self.related = RelatedPoses.of_leader(mean, MOST_SYMMETRIES, self._world, centred=self.encoder.centred)

    def insert_at_random(self, white: ParticleImages, generator: torch.Generator) -> None:
        """First maps: a batch at random rotations, the same for any number of workers. Collective."""
        rank, count = self._world.rank, len(white)
        rotation = random_rotations(count * self._world.size, generator)[rank * count : (rank + 1) * count]
        rotation = rotation.to(white.transforms.device)
        self._insert(white, rotation, torch.zeros_like(rotation[:, 0, :2]), 1.0)
        self._refresh()

    def step(self, images: ParticleImages, white: ParticleImages, plan: StepPlan, norm: float) -> tuple[Tensor, Tensor]:
        """One step; returns the global batch's mean loss, a share of the images' power, and rotations. Collective.

        The global loss is Σ weight·loss / Σ weight over all workers. Gradients are averaged over workers, so each
        worker's share is scaled by their number: any split of the batch gives the same step.

        Args:
            images: as they came, for the encoder.
            white: the same with unit noise.
            plan: what to do.
            norm: mean power of white images up to the plan's radius.
        """
        timer, world, weight = self._world.timer, self._world, images.weight
        total = weight.sum()
        wait = world.all_reduce_async(total)
        with timer.part("encoder"):
            circles = encoder_input(images, self.circles)
            found, hidden = self.encoder.candidates(circles)
        with timer.part("candidates"):
            cost = self.costs(white, found, plan.radius)
            best, turn = self._best(white, found, cost, plan.radius)
        with timer.part("encoder"):
            rotation, shift, score = self._replica(circles, best, hidden)
            rotation, shift = self.related.at(turn, rotation, shift)
        shift_px = shift * images.box_size
        with timer.part("slices"):
            residual = (weight * self._residual(white.within(plan.radius), rotation, shift_px)).sum() / norm
        # The scores learn which candidates are likely: a pose then costs a forward pass and no map.
        unlike = nn.functional.cross_entropy(score, (-cost).softmax(1).float(), reduction="none")
        wait()
        self._descend((residual + (weight * unlike).sum()) * (world.size / total), plan.rate)
        with timer.part("insert"):
            self._insert(white, rotation.detach(), shift_px.detach(), plan.keep)
        if plan.refresh:
            self._refresh()
        loss = residual.detach()
        world.all_reduce_(loss)
        return loss / total, rotation.detach()

    @torch.no_grad()
    def costs(self, white: ParticleImages, found: Candidates, radius: float = math.inf) -> Float[Tensor, "b k"]:
        """Negative log-likelihood of candidates at low frequencies, up to a constant per image.

        Args:
            white: images with unit noise.
            found: candidates.
            radius: Fourier pixels that maps are learnt up to so far.
        """
        assert self._packed is not None, "set_maps() comes first"
        radius = min(self._search_radius, max(FIRST_SEARCH_RADIUS, radius), white.pixels.radius_limit)
        near = white.within(radius)
        return evaluate_poses(
            self._packed, near.transforms, found.rotation, found.shift * white.box_size, near.ctf, near.pixels.weight,
            near.pixels, self.maps.scale,
        )  # fmt: skip

    @torch.no_grad()
    def _best(
        self, white: ParticleImages, found: Candidates, cost: Float[Tensor, "b k"], radius: float
    ) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"]]:
        """The best candidate of each image, and which of its related poses."""
        related = len(self.related)
        if related == 1:
            best = cost.argmin(1)
            return best, torch.zeros_like(best)
        near = white.within(min(CHOICE_SHARE * radius, CHOICE_RADIUS))
        best = cost.argmin(1)
        row = torch.arange(len(best), device=best.device)
        rotation, shift = self.related.all(found.rotation[row, best], found.shift[row, best])
        image = row.repeat(related)
        every = near.select(image)
        given = every.transforms, rotation.flatten(0, 1), shift.flatten(0, 1) * white.box_size, every.ctf
        costs = [
            refine_poses(
                transform, *given, near.pixels.weight, near.pixels, self.maps.scale, passes=CHOICE_PASSES,
                fit_shift=not self.encoder.centred,
            ).cost.unflatten(0, (related, -1))
            for transform in self._distinct_transforms()
        ]  # fmt: skip
        if len(costs) > 1:
            # By the other half: an image's own share in its half's map would hold it where it was.
            costs = [torch.where(near.half == 1, costs[1], costs[0])]
        return best, costs[0].argmin(0)

    def _distinct_transforms(self) -> list[Tensor]:
        """One where the halves are joined, else each half's."""
        first, second = self.maps.transforms
        return [first] if first is second else [first, second]

    def gains(self, white: ParticleImages, found: Candidates) -> Float[Tensor, " b"]:
        """Logarithm of the likelihood ratio over an empty map, at even odds for all candidates."""
        near = white.within(min(self._search_radius, white.pixels.radius_limit))
        empty = near.transforms.abs().square() @ near.pixels.weight / 2
        gain = empty[:, None] - self.costs(white, found)
        return gain.logsumexp(1) - math.log(gain.shape[1])

    @torch.no_grad()
    def refined_gains(self, circles: Float[Tensor, "b c a"], white: ParticleImages) -> Float[Tensor, " b"]:
        """Logarithm of the likelihood ratio over an empty map, of the best candidate after local refinement.

        Refined, since what an encoder still lacks in accuracy is no sign of a wrong map.

        Args:
            circles: of the images, for the encoder.
            white: the same images with unit noise.
        """
        assert self._packed is not None, "set_maps() comes first"
        found, _ = self.encoder.candidates(circles)
        best = self.costs(white, found).argmin(1)
        row = torch.arange(len(best), device=best.device)
        near = white.within(min(self._search_radius, white.pixels.radius_limit))
        refined = refine_poses(
            self._packed, near.transforms, found.rotation[row, best], found.shift[row, best] * white.box_size, near.ctf,
            near.pixels.weight, near.pixels, self.maps.scale, passes=JUDGED_PASSES, fit_shift=not self.encoder.centred,
        )  # fmt: skip
        return near.transforms.abs().square() @ near.pixels.weight / 2 - refined.cost

    def train_step(self, batch: TrainingBatch, reference: Reference) -> Tensor:
        """One step on images with known poses, each by its nearest candidate; returns the loss. Collective."""
        values = batch.transforms if batch.ctf is None else batch.transforms * batch.ctf
        circles, truth = self.circles(values / self.pixels.box_size), batch.poses.rotation
        found, hidden = self.encoder.candidates(circles)
        # The squared chord is 8 sin² of half the angle.
        chord = (found.rotation - truth[:, None]).square().sum((2, 3))
        rotation, shift, score = self._replica(circles, chord.argmin(1), hidden)
        likely = (-chord / (4 * torch.deg2rad(chord.new_tensor(SCORE_WIDTH_DEG)).square())).softmax(1)
        loss = (rotation - truth).square().sum((1, 2)).mean() + nn.functional.cross_entropy(score, likely)
        wanted = batch.poses.shift / (self.pixels.box_size * self.pixel_size)
        loss = loss + self.pixels.box_size * (shift - wanted).square().sum(1).mean()
        self._descend(loss, KNOWN_RATE * self._rate)
        return loss.detach()

    def begin(self, iteration: int) -> None:
        """Nothing is drawn at random."""

    def source(self, references: ReferenceSet) -> CircleSource:
        """Candidates for local refinement."""
        modes = MODES if len(self.related) == 1 else LEADERS
        return CircleSource(self.encoder, self.circles, self._search_radius, modes, self.related)

    def own_poses(self, images: ParticleImages, references: ReferenceSet) -> Poses:
        """Poses by the encoder alone."""
        return self.source(references).own_poses(images)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, but for the maps."""
        return {"encoder": self.encoder.state_dict(), "optimiser": self._optimiser.state_dict(),
                "related": self.related.state_dict()}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.encoder.load_state_dict(state["encoder"])
        self._optimiser.load_state_dict(state["optimiser"])
        device = self.related.rotation.device
        self.related = RelatedPoses(**{name: part.to(device) for name, part in state["related"].items()})

    def _descend(self, loss: Tensor, rate: float) -> None:
        self._optimiser.param_groups[0]["lr"] = rate
        self._optimiser.zero_grad(set_to_none=True)
        with self._world.timer.part("encoder"):
            loss.backward()
            self._optimiser.step()

    def _refresh(self) -> None:
        with self._world.timer.part("solve"):
            # Below the radius that candidates are compared at both halves share one map: they keep one frame.
            self.maps.refresh(self._world.all_reduce_ if self._world.size > 1 else None, self._search_radius + 1)
        self._packed = PackedVolume(self.maps.transforms[0])

    def _residual(
        self, near: ParticleImages, rotation: Float[Tensor, "b 3 3"], shift_px: Float[Tensor, "b 2"]
    ) -> Float[Tensor, " b"]:
        """Squared residual of each image against its own half's map."""
        found = [self._against(transform, near, rotation, shift_px) for transform in self._distinct_transforms()]
        # Both for all images: to pick them by half would wait for the device.
        return found[0] if len(found) == 1 else torch.where(near.half == 1, found[0], found[1])

    def _against(self, transform: Tensor, near: ParticleImages, rotation: Tensor, shift_px: Tensor) -> Tensor:
        pixels = near.pixels
        geometry = pixels.kx, pixels.ky, self.maps.scale, pixels.box_size
        residual = fourier_slice(transform, rotation, shift_px, near.ctf, *geometry) - near.transforms
        return (residual.real.square() + residual.imag.square()) @ pixels.weight

    def _insert(self, white: ParticleImages, rotation: Tensor, shift_px: Tensor, keep: float) -> None:
        assert white.ctf is not None, "white images carry the noise in their CTF"
        weighted = CtfWeightedImages(white.transforms * white.ctf, white.ctf.square())
        self.maps.insert(weighted, rotation, shift_px, white.weight, white.half, white.pixels, keep=keep)
