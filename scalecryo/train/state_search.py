"""Another pose for an image, sought against maps of several states: what a reference of all states cannot tell.

A mean over states draws images into poses that suit the mean. Every image is compared with the maps of a few places of
the latent space over a grid of rotations; the likeliest pose of all is refined with the image's own state beside the
present one, and the one of greater evidence stays.
"""

import math

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from scalecryo.map.backprojection import PADDING
from scalecryo.map.noise import NoiseSpectrum
from scalecryo.map.reference import Reference
from scalecryo.physics.fft import FourierPixels
from scalecryo.physics.so3_grid import so3_grid
from scalecryo.pose.candidate_refinement import refine_candidates
from scalecryo.pose.candidate_sources import GridSearch
from scalecryo.train.component_model import ComponentModel
from scalecryo.train.posed_images import PosedImages
from scalecryo.train.state_poses import refine_with_states

HALF_GRID = 2304  # rotations, without their flips
RADIUS, MODES = 12.0, 2  # Fourier pixels that are searched; modes of each state
STEPS = ((12.0, 2), (20.0, 1))  # radius and passes of their refinement
MARGIN = 1e-3  # nats that another pose must be better by


class StateSearch:
    """Maps at places of the latent space, of both halves, ready to be searched."""

    def __init__(
        self,
        model: ComponentModel,
        places: Float[Tensor, "k q"],
        pixels: FourierPixels,
        seed: int,
        *,
        fit_shift: bool,
    ) -> None:
        """
        Args:
            model: prepared for the pixels.
            places: coordinates of the states that are searched.
            pixels: of the images.
            seed: of the turns of the grids.
            fit_shift: False leaves shifts as they are.
        """
        self._model, self._fit_shift = model, fit_shift
        noise = NoiseSpectrum(int(pixels.shell.max()) + 1, places.device)
        noise.power[:], noise.count[:] = model.variance[: len(noise.power)], 1.0
        grid, near = so3_grid(HALF_GRID).to(places.device), pixels.prefix(RADIUS)
        self._steps = tuple((radius, passes) for radius, passes in STEPS if radius <= pixels.radius_limit) or STEPS[:1]
        self._states: list[list[tuple[Reference, GridSearch]]] = []
        for half in (1, 2):
            made = []
            for number, place in enumerate(places):
                reference = Reference(_cropped(model.transform_at(half, place), STEPS[-1][0]), PADDING, noise)
                generator = torch.Generator().manual_seed(seed + number)  # of each state another turn
                made.append((reference, GridSearch(reference, grid, near, generator)))
            self._states.append(made)

    def refined(self, posed: PosedImages) -> PosedImages:
        """The images at the better of their present pose and the best of the search, each refined with its state."""
        rotation, shift = posed.rotation.clone(), posed.poses.shift.clone()
        for half in (1, 2):
            own = (posed.half == half).nonzero()[:, 0]  # host sync
            if len(own):
                rotation[own], shift[own] = self._searched(posed, own, half)
        present, cost = refine_with_states(self._model, posed, fit_shift=self._fit_shift)
        other, elsewhere = refine_with_states(self._model, posed.at(rotation, shift), fit_shift=self._fit_shift)
        return present.where(other, elsewhere < cost - MARGIN)

    def _searched(self, posed: PosedImages, own: Tensor, half: int) -> tuple[Tensor, Tensor]:
        """Rotation and shift of the likeliest pose over all states."""
        images, shift = posed.images.select(own), posed.poses.shift[own]
        best = None
        for reference, search in self._states[half - 1]:
            candidates = search.modes_near(images, shift, MODES)
            found = refine_candidates(images, candidates, reference, self._steps, fit_shift=self._fit_shift)
            if best is None:
                best = found
                continue
            at = (found.log_likelihood > best.log_likelihood).nonzero()[:, 0]  # host sync
            best = best.put(at, found.select(at))
        assert best is not None, "there is a place at least"
        return best.rotation, best.shift


def _cropped(transform: Complex[Tensor, "d d h"], radius: float) -> Complex[Tensor, "c c k"]:
    """What slices up to a radius (Fourier pixels of the image) need of a padded transform."""
    half = math.ceil(PADDING * radius) + 2
    if 2 * half >= transform.shape[0]:
        return transform
    kept = torch.cat([torch.arange(half), torch.arange(-half, 0)]).to(transform.device) % transform.shape[0]
    return transform[kept][:, kept][:, :, : half + 1].contiguous()


def places_of(points: Float[Tensor, "n q"], count: int, passes: int = 10) -> Float[Tensor, "k q"]:
    """So many places that points lie near: k-means, from points evenly through the given ones (Lloyd 1982)."""
    places = points[:: max(1, len(points) // count)][:count].clone()
    for _ in range(passes):
        nearest = torch.cdist(points, places).argmin(1)
        held = torch.zeros(len(places), device=points.device).index_add_(0, nearest, torch.ones_like(points[:, 0]))
        sums = torch.zeros_like(places).index_add_(0, nearest, points)
        places = torch.where(held[:, None] > 0, sums / held.clamp_min(1)[:, None], places)
    return places
