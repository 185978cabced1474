"""The linear model of variety as it is learnt: means, components, noise, contrast; and its E-step on images."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from scalecryo.data.io import urls
from scalecryo.distributed.world import World
from scalecryo.map.backprojection import PADDING
from scalecryo.map.component_frame import Frame
from scalecryo.map.components import Latents, posterior, products
from scalecryo.map.noise import NoiseSpectrum
from scalecryo.map.reference import ReferenceSet, reference_transform
from scalecryo.physics.fft import FourierPixels, fourier_resize_3d
from scalecryo.physics.fourier_slice import fourier_slice
from scalecryo.physics.fsc import weight_shells
from scalecryo.train.particle_source import RunContext
from scalecryo.train.posed_images import PosedImages

LEAST_CONTRAST, MOST_CONTRAST = 0.3, 2.0
CONTRAST_CHANCE = 4.0  # standard errors above which the contrast is taken to vary
Components = Literal["own", "other", "joint"]
ARRAYS = ("means", "components", "mask", "noise", "curves", "agreement", "spread")


@dataclass(frozen=True, eq=False)
class Expectation:
    """What the E-step finds of b images.

    Attributes:
        latents: of the components.
        contrast: of each image.
        residual: y − a A μ.
        slices: A W.
        mean_power: ‖A μ‖² over the noise.
        mean_product: of y − A μ with A μ, over the noise.
    """

    latents: Latents
    contrast: Float[Tensor, " b"]
    residual: Complex[Tensor, "b p"]
    slices: Complex[Tensor, "b q p"]
    mean_power: Float[Tensor, " b"]
    mean_product: Float[Tensor, " b"]

    def unexplained(self, some: Int[Tensor, " s"]) -> Complex[Tensor, "s p"]:
        """What the model leaves of some images, at the coordinates' mean."""
        explained = torch.einsum("bq,bqp->bp", self.latents.mean[some].to(self.slices), self.slices[some])
        return self.residual[some] - self.contrast[some, None] * explained


class ComponentModel:
    """Means and components of both halves, at the largest level that they were made at.

    Attributes:
        means: filtered by what the halves share; half h (1 or 2) at index h − 1.
        mask: that components are cut to.
        components: of unit variance of their coordinates; None before the sketch.
        noise: variance of each shell over the box, in units of white noise of unit variance.
        curves, agreement: between the halves, of each component; None before the first M-step.
        spread: standard deviation of the images' contrast; 0: none.
        resolution: shell that the mean is resolved to.
        at_last_level: whether components are made at the level that the mean is resolved at.
        settled: whether another pass brings nothing.
        rounds: how often the components were learnt on from poses refined with them.
        pose_rounds: how often poses were refined so.
        poses_at_rest: whether the last of these hardly turned them.
    """

    def __init__(self, means: Float[Tensor, "2 n n n"], mask: Float[Tensor, "n n n"], count: int) -> None:
        self.means, self.mask, self.count = means, mask, count
        self.components: Float[Tensor, "2 q m m m"] | None = None
        self.noise = torch.ones(means.shape[-1] // 2 + 2, device=means.device)
        self.curves: Float[Tensor, "q shells"] | None = None
        self.agreement: Float[Tensor, " q"] | None = None
        self.spread, self.resolution = 0.0, float(means.shape[-1] // 2 - 1)
        self.at_last_level = self.settled = False
        self.rounds = self.pose_rounds = 0
        self.poses_at_rest = False
        self._transforms: dict[int, Tensor] = {}
        self.begin_moments()

    @property
    def has_components(self) -> bool:
        """Whether there is something to begin with."""
        return self.components is not None

    @property
    def level(self) -> int:
        """Box of the means, px."""
        return int(self.means.shape[-1])

    def begin_moments(self) -> None:
        """Forget the sums over images."""
        device = self.means.device
        self._moment = torch.zeros(2, self.count, self.count, dtype=torch.float64, device=device)
        self._weight = torch.zeros(2, dtype=torch.float64, device=device)
        self._contrast = torch.zeros(3, dtype=torch.float64, device=device)
        """Σ (g² − p), Σ p² and Σ (g² − p)² of the products g and powers p of the mean."""

    def begin(self, pixels: FourierPixels) -> None:
        """Prepare for images packed by some Fourier pixels."""
        level = pixels.box_size
        self.variance = self.noise[: level // 2 + 2].clone() * level**2
        self.pixel_weight = pixels.weight / self.variance[pixels.shell]
        self.pixel_weight[0] = 0.0
        self.residuals = NoiseSpectrum(int(pixels.shell.max()) + 1, self.means.device)
        self._pixels, self._transforms = pixels, {}
        self.begin_moments()

    def release(self) -> None:
        """Let go of the transforms that a pass sliced."""
        self._transforms = {}

    def means_at(self, level: int) -> Float[Tensor, "2 n n n"]:
        """Both means in another box."""
        return torch.stack([fourier_resize_3d(mean, level) for mean in self.means])

    def mask_at(self, level: int) -> Float[Tensor, "n n n"]:
        """The mask in another box."""
        if level == self.level:
            return self.mask
        # A density's values follow its box so that projections keep theirs; a mask's must not.
        return (fourier_resize_3d(self.mask, level) * (level / self.level) ** 2).clamp(0, 1)

    def components_at(self, level: int) -> Float[Tensor, "2 q n n n"]:
        """Components in another box."""
        assert self.components is not None, "the sketch comes first"
        flat = [fourier_resize_3d(volume, level) for volume in self.components.flatten(0, 1)]
        return torch.stack(flat).unflatten(0, (2, self.count))

    def transform_at(self, half: int, place: Float[Tensor, " q"]) -> Complex[Tensor, "d d h"]:
        """Padded transform of a half's map at a place of the latent space, at the level of the pass."""
        mean, components = self._prepared(half)[0], self._prepared(half)[1:]
        return mean + torch.einsum("q,qzyx->zyx", place.to(components), components)

    def residual(self, posed: PosedImages) -> tuple[Complex[Tensor, "b p"], Complex[Tensor, "b p"]]:
        """y − A μ and A μ, each image with its half's mean."""
        predicted = torch.empty_like(posed.centred)
        for half, own in self._by_half(posed):
            predicted[own] = self._slices(self._prepared(half)[0], posed, own)
        return posed.centred - predicted, predicted

    def slices(self, posed: PosedImages, which: Components = "own") -> Complex[Tensor, "b q p"]:
        """A W of each image, with its half's components, the other half's, or the mean of both."""
        made = torch.empty(len(posed.centred), self.count, posed.centred.shape[1], dtype=torch.complex64,
                           device=posed.centred.device)  # fmt: skip
        for half, own in self._by_half(posed):
            place = {"own": half, "other": 3 - half, "joint": 0}[which]
            for number, transform in enumerate(self._prepared(place)[-self.count :]):
                made[own, number] = self._slices(transform, posed, own)
        return made

    def expect(self, posed: PosedImages, which: Components = "own") -> Expectation:
        """Posterior of the coordinates of each image, jointly with its contrast where that varies."""
        residual, predicted = self.residual(posed)
        return self.expect_with(residual, predicted, self.slices(posed, which))

    def expect_with(self, residual: Tensor, predicted: Tensor, slices: Tensor) -> Expectation:
        """The same, with what was sliced before."""
        columns = torch.cat([predicted[:, None], slices], 1)
        gram, product = products(columns, residual, self.pixel_weight)
        power, along = gram[:, 0, 0].double(), product[:, 0].double()
        if self.spread == 0:
            one = torch.ones_like(product[:, 0])
            return Expectation(posterior(gram[:, 1:, 1:], product[:, 1:]), one, residual, slices, power, along)
        scale = torch.ones_like(product[0])
        scale[0] = self.spread
        whole = posterior(gram * scale[:, None] * scale, product * scale)
        contrast = (1 + self.spread * whole.mean[:, 0]).clamp(LEAST_CONTRAST, MOST_CONTRAST)
        own = Latents(whole.mean[:, 1:], whole.covariance[:, 1:, 1:], whole.evidence)
        return Expectation(own, contrast, residual - (contrast - 1)[:, None] * predicted, slices, power, along)

    def note(self, found: Expectation, weight: Tensor, half: Tensor) -> None:
        """Take in moments of the coordinates and of the contrast."""
        share = weight.double()
        for number in (0, 1):
            own = share * (half == number + 1)
            self._moment[number] += torch.einsum("b,bkl->kl", own, found.latents.second_moment.double())
            self._weight[number] += own.sum()
        excess = found.mean_product.square() - found.mean_power
        sums = (share * excess).sum(), (share * found.mean_power.square()).sum(), (share * excess.square()).sum()
        self._contrast += torch.stack(sums)

    def update_moments(self, world: World) -> Float[Tensor, "2 q q"]:
        """Second moments of each half's coordinates; and the spread of the contrast. Collective."""
        world.all_reduce_(self._moment, self._weight, self._contrast)
        # E[g²] = p + s² p² for contrasts of variance s².
        excess, power, squared = self._contrast.tolist()  # host sync
        varies = excess > CONTRAST_CHANCE * squared**0.5
        self.spread = (excess / max(power, 1e-30)) ** 0.5 if varies else 0.0
        moments = self._moment / self._weight.clamp_min(1e-30)[:, None, None]
        return moments.float()

    def update_noise(self, world: World) -> None:
        """The noise of what was left of the images; shells that were not seen keep theirs. Collective."""
        world.all_reduce_(*self.residuals.tensors())
        level = self._pixels.box_size
        found = self.residuals.variance() / level**2
        shells = len(found)
        self.noise[:shells] = found
        if level == self.level:
            self.noise[shells:] = self.noise[shells - 1]

    def take(self, frame: Frame) -> None:
        """The components of an M-step."""
        self.components, self.curves, self.agreement = frame.components, frame.fsc, frame.agreement

    def go_on_from(self, before: "ComponentModel") -> None:
        """Keep the components, noise and contrast of a model whose poses were refined since."""
        self.components, self.curves, self.agreement = before.components, before.curves, before.agreement
        shells = min(len(self.noise), len(before.noise))
        self.noise[:shells], self.noise[shells:] = before.noise[:shells], before.noise[shells - 1]
        self.spread, self.at_last_level, self.rounds = before.spread, True, before.rounds + 1
        self.pose_rounds, self.poses_at_rest = before.pose_rounds, before.poses_at_rest

    def to_bytes(self, identity: str, passes: int) -> bytes:
        """The model as a file, with what it was made of and how many passes made it."""
        arrays = {name: getattr(self, name) for name in ARRAYS if name != "spread"}
        held = {name: value.cpu().numpy() for name, value in arrays.items() if value is not None}
        buffer = io.BytesIO()
        where = passes, self.count, self.spread, self.resolution, self.at_last_level, self.settled
        numbers = np.array((*where, self.rounds, self.poses_at_rest))
        np.savez(buffer, allow_pickle=False, identity=np.array(identity), numbers=numbers, **held)
        return buffer.getvalue()

    @classmethod
    def load(cls, context: RunContext, name: str, identity: str | None) -> "tuple[ComponentModel, int] | None":
        """The model in a run's file, and the number of passes; None where there is none, or one of other data."""
        path = context.run.path(name)
        if not urls.exists(path):
            return None
        with np.load(io.BytesIO(urls.read_bytes(path)), allow_pickle=False) as held:
            if identity is not None and str(held["identity"]) != identity:
                return None
            passes, count, spread, resolution, last, settled, *more = held["numbers"].tolist()
            tensors = {key: torch.from_numpy(held[key]).to(context.device) for key in ARRAYS if key in held}
        model = cls(tensors["means"], tensors["mask"], int(count))
        for key, value in tensors.items():
            setattr(model, key, value)
        model.spread, model.resolution = spread, resolution
        model.at_last_level, model.settled = bool(last), bool(settled)
        if more:  # the oldest runs have none
            model.rounds = model.pose_rounds = int(more[0])
            model.poses_at_rest = len(more) == 1 or bool(more[1])
        return model, int(passes)

    def _by_half(self, posed: PosedImages) -> Iterator[tuple[int, Tensor]]:
        for half in (1, 2):
            own = (posed.half == half).nonzero()[:, 0]  # host sync
            if len(own):
                yield half, own

    def _prepared(self, half: int) -> Complex[Tensor, "k d d h"]:
        """Padded transforms of a half's mean and components at the level of the pass; 0: both halves' mean."""
        if half not in self._transforms:
            level = self._pixels.box_size
            volumes = [self.means_at(level)]
            volumes += [] if self.components is None else list(self.components_at(level).transpose(0, 1))
            chosen = [pair.mean(0) if half == 0 else pair[half - 1] for pair in volumes]
            self._transforms[half] = torch.stack([reference_transform(volume, PADDING) for volume in chosen])
        return self._transforms[half]

    def _slices(self, transform: Tensor, posed: PosedImages, own: Tensor) -> Complex[Tensor, "b p"]:
        pixels = self._pixels
        rotation, ctf = posed.rotation[own], posed.ctf[own]
        return fourier_slice(transform, rotation, None, ctf, pixels.kx, pixels.ky, PADDING, pixels.box_size)


def mean_of(references: ReferenceSet, mask: Float[Tensor, "n n n"], count: int) -> ComponentModel:
    """A model that begins with the half-maps, filtered by what they share, and no components."""
    curve = references.curve().clamp(0, 1)
    window = torch.maximum(mask, references.mask[0])
    means = torch.stack([weight_shells(half, curve) * window for half in references.maps[0]])
    return ComponentModel(means, mask, count)
