"""Many candidate poses of each particle, locally refined at rising radii until the likeliest are left."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scalecryo.map.reference import Reference
from scalecryo.physics.particle_images import ParticleImages
from scalecryo.physics.poses import PoseCandidates, PoseEstimates
from scalecryo.physics.rotation import geodesic_angle
from scalecryo.pose.local_refinement import refine_poses
from scalecryo.pose.related import angle_modulo
from scalecryo.pose.shift_spread import shift_log_prior

# A candidate is pruned on the way where it is further behind its image's best than a share of what the best gains over
# an empty image, and than so many nats: one that starts at a grid's point has still some way to go.
PRUNE_FRACTION, PRUNE_MARGIN_NATS = 0.1, 20.0
SAME = 15.0  # degrees times Fourier pixels: a quarter of the turn that moves the outermost pixel by one
RIVAL_DEG = 1.0  # between poses that share the probability
MODE_DEG = 3.0  # between modes: where images say little, what one pose is refined to is no sharper
# By so much likelihood ratios between modes are too sharp: the modes that are kept do not hold all of the probability.
# At -18 dB (6VXX) their shares are then as often right as they say, 0.40 for 0.42 instead of 0.57, and the maps hold a
# third more of the signal, by power, beside the same noise.
SHARPNESS = 1.6


@dataclass(frozen=True, eq=False)
class _Refined:
    """The candidates that are left of b images, with their costs at the last radius.

    Attributes:
        image, slot: which image's candidate each is, and which of its candidates; in rising order.
        rotation, shift_px, cost: as `refine_poses` gives them.
        lead: least cost of each image.
    """

    image: Int[Tensor, " c"]
    slot: Int[Tensor, " c"]
    rotation: Float[Tensor, "c 3 3"]
    shift_px: Float[Tensor, "c 2"]
    cost: Float[Tensor, " c"]
    lead: Float[Tensor, " b"]


def refine_candidates(
    images: ParticleImages,
    candidates: PoseCandidates,
    reference: Reference,
    steps: Sequence[tuple[float, int]],
    *,
    fit_shift: bool,
    prune_fraction: float = PRUNE_FRACTION,
    equivalent: Float[Tensor, "e 3 3"] | None = None,
) -> PoseEstimates:
    """Refine every candidate at rising radii, so many passes at each, then keep the likeliest at the last one.

    On the way, those far behind their image's best are pruned (see `PRUNE_FRACTION`), as are those that have arrived
    where the best is. Two candidates that end within a degree of each other, or of an equivalent pose, are one: only
    separate ones share the probability.
    """
    left = _refined(images, candidates, reference, steps, fit_shift, prune_fraction)
    image, cost, lead = left.image, left.cost, left.lead
    best = _leaders(cost, lead, image)
    apart = angle_modulo(left.rotation, left.rotation[best[image]], equivalent) > RIVAL_DEG
    rivals = torch.where(apart, (lead[image] - cost).exp(), torch.zeros_like(cost))
    others = torch.zeros_like(lead).scatter_add_(0, image, rivals)
    shift = left.shift_px[best] * images.pixel_size
    return _estimates(left.rotation[best], shift, (1 / (1 + others)).float(), -lead.float())


def refined_modes(
    images: ParticleImages,
    candidates: PoseCandidates,
    reference: Reference,
    steps: Sequence[tuple[float, int]],
    count: int,
    *,
    fit_shift: bool,
    prune_fraction: float = PRUNE_FRACTION,
    equivalent: Float[Tensor, "e 3 3"] | None = None,
    shift_sigma: float | None = None,
) -> list[PoseEstimates]:
    """As `refine_candidates`, but the `count` likeliest separate poses, each with its share of their probability (see
    `SHARPNESS`), with a Gaussian prior of shifts where its standard deviation, Å, is given.

    Of poses that nothing tells apart only the likeliest is one. An image with fewer has its best pose at share 0 for
    the rest.
    """
    left = _refined(images, candidates, reference, steps, fit_shift, prune_fraction)
    b, each = candidates.rotation.shape[:2]
    cost = left.cost.new_full((b, each), torch.inf)
    cost[left.image, left.slot] = left.cost
    rotation, shift_px = candidates.rotation.clone(), candidates.shift / images.pixel_size
    rotation[left.image, left.slot], shift_px[left.image, left.slot] = left.rotation, left.shift_px
    if shift_sigma is not None:
        cost = cost - shift_log_prior(shift_px, images.pixel_size, shift_sigma)
    row = torch.arange(b, device=cost.device)
    picks: list[Tensor] = []
    costs: list[Tensor] = []
    for _ in range(min(count, each)):
        least, pick = cost.min(1)
        mode = rotation[row, pick].repeat_interleave(each, 0)
        near = angle_modulo(rotation.flatten(0, 1), mode, equivalent).view(b, each) <= MODE_DEG
        near[row, pick] = True
        cost = cost.masked_fill(near, torch.inf)
        picks.append(torch.where(least.isinf(), picks[0], pick) if picks else pick)
        costs.append(least)
    shares = (-torch.stack(costs, 1) / SHARPNESS).softmax(1).float()
    modes = [
        _estimates(rotation[row, pick], shift_px[row, pick] * images.pixel_size, shares[:, number], -left.lead.float())
        for number, pick in enumerate(picks)
    ]
    nothing = _estimates(modes[0].rotation, modes[0].shift, torch.zeros_like(shares[:, 0]), -left.lead.float())
    return modes + [nothing] * (count - len(modes))


def empty_cost(transforms: Tensor, pixel_weight: Tensor) -> Float[Tensor, " b"]:
    """Cost of each image, as in `refine_poses`, against an empty map."""
    return 0.5 * (transforms.abs().square().double() @ pixel_weight.double())


def _refined(
    images: ParticleImages,
    candidates: PoseCandidates,
    reference: Reference,
    steps: Sequence[tuple[float, int]],
    fit_shift: bool,
    prune_fraction: float,
) -> _Refined:
    count, each = candidates.rotation.shape[:2]
    device = candidates.rotation.device
    image = torch.arange(count, device=device).repeat_interleave(each)
    slot = torch.arange(each, device=device).repeat(count)
    rotation, shift_px = candidates.rotation.flatten(0, 1), candidates.shift.flatten(0, 1) / images.pixel_size
    for number, (radius, passes) in enumerate(steps):
        near = images.within(radius)
        part = near if len(image) == count else near.select(image)  # one each: in the images' own order
        weight = reference.noise.pixel_weight(near.pixels)
        found = refine_poses(
            reference.packed, part.transforms, rotation, shift_px, part.ctf, weight, near.pixels, reference.scale,
            passes=passes, fit_shift=fit_shift,
        )  # fmt: skip
        rotation, shift_px, cost = found.rotation, found.shift_px, found.cost
        lead = cost.new_full((count,), torch.inf).scatter_reduce_(0, image, cost, "amin")
        if each > 1 and number < len(steps) - 1:
            gain = empty_cost(near.transforms, weight) - lead
            margin = PRUNE_MARGIN_NATS + prune_fraction * gain.clamp_min(0)
            best = _leaders(cost, lead, image)
            apart = geodesic_angle(rotation, rotation[best[image]]) > SAME / radius
            apart[best] = True
            hopeful = ((cost <= (lead + margin)[image]) & apart).nonzero()[:, 0]  # host sync
            image, slot, rotation, shift_px = image[hopeful], slot[hopeful], rotation[hopeful], shift_px[hopeful]
    return _Refined(image, slot, rotation, shift_px, cost, lead)


def _leaders(cost: Float[Tensor, " c"], lead: Float[Tensor, " b"], image: Int[Tensor, " c"]) -> Int[Tensor, " b"]:
    """Which candidate is each image's best; of equals, which are the same pose twice, the last."""
    number = torch.arange(len(cost), device=image.device)
    leading = torch.where(cost == lead[image], number, 0)
    return torch.zeros(len(lead), dtype=torch.long, device=image.device).scatter_reduce_(0, image, leading, "amax")


def _estimates(
    rotation: Float[Tensor, "b 3 3"],
    shift: Float[Tensor, "b 2"],
    confidence: Float[Tensor, " b"],
    log_likelihood: Float[Tensor, " b"],
) -> PoseEstimates:
    """Poses in the only class, of images that show the particle."""
    one = torch.ones(len(rotation), device=rotation.device)
    first = torch.zeros(len(rotation), dtype=torch.long, device=rotation.device)
    return PoseEstimates(rotation, shift, first, one, confidence, one, log_likelihood)
