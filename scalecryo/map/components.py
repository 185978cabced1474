"""Continuous variety as a low-rank linear model: probabilistic PCA by expectation maximisation, at known poses.

An image is y = A (a μ + W z) + e with z ~ N(0, 1) of q dimensions and noise e whose variance is that of its Fourier
shell; A slices at the image's pose, moves and applies the CTF, a is the image's contrast. E-step: with the slices of
the q components, G = Wᴴ Aᴴ σ⁻² A W and h = Wᴴ Aᴴ σ⁻² (y − A μ), z is normal with the covariance (1 + G)⁻¹ and the mean
(1 + G)⁻¹ h (Tipping & Bishop 1999). M-step: at every voxel W = M⁻¹ B from the sums M = Σ A² σ⁻² E[z zᵀ] and
B = Σ A σ⁻² E[z] (y − A μ), which are insertions. All are sums over images, so those of several workers add.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from scalecryo.map.backprojection import PADDING
from scalecryo.physics.fft import FourierPixels, irfft3_centred
from scalecryo.physics.fourier_slice import gridding_correction, padded_box
from scalecryo.physics.fsc import shell_index_3d
from scalecryo.physics.kernels.backend import choose_backend
from scalecryo.physics.kernels.cpu_channels import insert_channels_cpu
from scalecryo.physics.kernels.reference import locate

SOLVED_AT_ONCE = 1 << 18  # voxels


@dataclass(frozen=True, eq=False)
class Latents:
    """Posterior of the latent coordinates of b images.

    Attributes:
        mean: E[z].
        covariance: of z.
        evidence: logarithm of the likelihood over that of z = 0.
    """

    mean: Float[Tensor, "b q"]
    covariance: Float[Tensor, "b q q"]
    evidence: Float[Tensor, " b"]

    @property
    def second_moment(self) -> Float[Tensor, "b q q"]:
        """E[z zᵀ]."""
        return self.covariance + self.mean[:, :, None] * self.mean[:, None, :]

    def first(self, count: int) -> "Latents":
        """The marginal posterior of the first coordinates."""
        return Latents(self.mean[:, :count], self.covariance[:, :count, :count], self.evidence)


def products(
    slices: Complex[Tensor, "b q p"], residual: Complex[Tensor, "b p"], pixel_weight: Float[Tensor, " p"]
) -> tuple[Float[Tensor, "b q q"], Float[Tensor, "b q"]]:
    """G and h of every image.

    Args:
        slices: A W.
        residual: y − A μ.
        pixel_weight: Hermitian weight over the noise variance.
    """
    root = pixel_weight.sqrt()
    flat = torch.view_as_real(slices * root).flatten(2)
    seen = torch.view_as_real(residual * root).flatten(1)
    return flat @ flat.mT, (flat @ seen[:, :, None])[:, :, 0]


def posterior(gram: Float[Tensor, "b q q"], product: Float[Tensor, "b q"]) -> Latents:
    """Posterior of z from G and h, for z ~ N(0, 1)."""
    precision = gram.double() + torch.eye(gram.shape[-1], dtype=torch.float64, device=gram.device)
    factor, _ = torch.linalg.cholesky_ex(precision)
    right = product.double()[:, :, None]
    mean = torch.cholesky_solve(right, factor)
    evidence = 0.5 * (right * mean).sum((1, 2)) - factor.diagonal(dim1=1, dim2=2).log().sum(1)
    return Latents(mean[:, :, 0].float(), torch.cholesky_inverse(factor).float(), evidence)


def nested_evidence(gram: Float[Tensor, "b q q"], product: Float[Tensor, "b q"], free: int) -> Float[Tensor, "b k"]:
    """What each coordinate past the first `free` adds to the evidence, given those before it."""
    precision = gram.double() + torch.eye(gram.shape[-1], dtype=torch.float64, device=gram.device)
    factor, _ = torch.linalg.cholesky_ex(precision)
    # Forward substitution goes coordinate by coordinate: each adds ½ x² − log L of its own.
    solved = torch.linalg.solve_triangular(factor, product.double()[:, :, None], upper=False)[:, :, 0]
    return (0.5 * solved.square() - factor.diagonal(dim1=1, dim2=2).log())[:, free:]


class ComponentSums:
    """B and the lower triangle of M on the padded Fourier grid, one for each half: all that an M-step needs.

    Attributes:
        grid: real and imaginary part of each component's numerator, then the triangle row by row.
    """

    def __init__(self, box_size: int, components: int, device: torch.device | str = "cpu") -> None:
        self.box_size, self.components = box_size, components
        self.padded_box = padded_box(box_size, PADDING)
        self._row, self._column = torch.tril_indices(components, components, device=device)
        shape = (2, self.padded_box, self.padded_box, self.padded_box // 2 + 1, self.channels)
        self.grid = torch.zeros(shape, dtype=torch.float32, device=device)

    @property
    def channels(self) -> int:
        """Real values at each voxel."""
        return 2 * self.components + self.components * (self.components + 1) // 2

    @property
    def scale(self) -> float:
        """Samples of the padded grid per cycle and box."""
        return self.padded_box / self.box_size

    def add(
        self,
        data: Complex[Tensor, "b p"],
        power: Float[Tensor, "b p"],
        latents: Latents,
        rotation: Float[Tensor, "b 3 3"],
        weight: Float[Tensor, " b"],
        half: Int[Tensor, " b"],
        pixels: FourierPixels,
    ) -> None:
        """Insert images.

        Args:
            data: (y − A μ) a CTF σ⁻², centred.
            power: a² CTF² σ⁻².
            latents: of each image.
            rotation: image frame to volume frame.
            weight: of each image.
            half: 1 or 2.
            pixels: that data and power are packed by.
        """
        once = pixels.weight / 2
        triangle = latents.second_moment[:, self._row, self._column] * weight[:, None]
        parts = data * once, power * once, latents.mean * weight[:, None], triangle
        on_cpu = choose_backend(data) == "cpu"
        for number in (0, 1):
            own = ((half == number + 1) & (weight > 0)).nonzero()[:, 0]  # host sync
            if len(own):
                values, powers, first, second = (part[own] for part in parts)
                where = rotation[own], pixels.kx, pixels.ky, self.scale, self.grid[number]
                insert = insert_channels_cpu if on_cpu else insert_channels
                insert(values, powers, first, second, *where)

    def reached(self, radius: float) -> Int[Tensor, " k"]:
        """Flat positions of the grid within a radius (Fourier pixels) and the neighbours a sample is shared among."""
        squared = _squared_radius(self.padded_box, self.grid.device)
        return (squared <= (radius * self.scale + 2) ** 2).nonzero()[:, 0]  # host sync: once a pass

    def mean_weight(self, half: int, radius: float) -> Float[Tensor, "q shells"]:
        """Mean of M's diagonal in each shell of the image box, of a half (1 or 2)."""
        shells, last = self._shells(), int(radius) + 1
        diagonal = 2 * self.components + torch.arange(self.components) * (torch.arange(self.components) + 3) // 2
        count = torch.bincount(shells, minlength=last + 1)[: last + 1].clamp_min(1)
        grid = self.grid[half - 1].flatten(0, 2)
        sums = torch.zeros(int(shells.max()) + 1, self.components, device=grid.device)
        return sums.index_add_(0, shells, grid[:, diagonal.to(grid.device)])[: last + 1].T / count

    def solve(self, half: int, ridge: Float[Tensor, "q shells"], radius: float) -> Float[Tensor, "q n n n"]:
        """Components of a half, gridding-corrected: W = (M + ridge)⁻¹ B up to a radius (Fourier pixels).

        Args:
            half: 1 or 2.
            ridge: inverse prior variance of each component's Fourier coefficients, by shell of the image box.
            radius: voxels beyond are zero.
        """
        shells = self._shells()
        inside = (_squared_radius(self.padded_box, self.grid.device) <= (radius * self.scale) ** 2).nonzero()[:, 0]
        box = self.padded_box
        correction = gridding_correction(self.box_size, self.scale, self.grid.device)
        grid = _with_friedel_pairs(self.grid[half - 1], 2 * self.components).flatten(0, 2)
        solved = torch.zeros(self.components, len(grid), dtype=torch.complex64, device=grid.device)
        for where in inside.split(SOLVED_AT_ONCE):
            prior = ridge[:, shells[where].clamp_max(ridge.shape[-1] - 1)].T
            solved[:, where] = self._solve(grid[where], prior).T
        made = solved.unflatten(1, (box, box, box // 2 + 1))
        return torch.stack([irfft3_centred(transform, self.box_size) * correction for transform in made])

    def _solve(self, voxels: Float[Tensor, "v c"], prior: Float[Tensor, "v q"]) -> Complex[Tensor, "v q"]:
        count = self.components
        numerator = voxels[:, : 2 * count].unflatten(1, (count, 2))
        matrix = voxels.new_zeros(len(voxels), count, count)
        matrix[:, self._row, self._column] = voxels[:, 2 * count :]
        matrix[:, self._column, self._row] = voxels[:, 2 * count :]
        matrix.diagonal(dim1=1, dim2=2).add_(prior)
        # Symmetric and positive up to rounding: a little of the trace keeps voxels that hardly any image covers.
        trace = matrix.diagonal(dim1=1, dim2=2).sum(1)
        matrix.diagonal(dim1=1, dim2=2).add_(1e-5 * trace[:, None] + 1e-20)
        factor, _ = torch.linalg.cholesky_ex(matrix)
        return torch.view_as_complex(torch.cholesky_solve(numerator, factor).nan_to_num().contiguous())

    def _shells(self) -> Int[Tensor, " voxels"]:
        """Shell of the image box of every voxel of the padded grid."""
        return (shell_index_3d(self.padded_box, self.grid.device).flatten() / self.scale).round().long()


def insert_channels(
    values: Complex[Tensor, "b p"],
    power: Float[Tensor, "b p"],
    first: Float[Tensor, "b q"],
    second: Float[Tensor, "b t"],
    rotation: Float[Tensor, "b 3 3"],
    kx: Float[Tensor, " p"],
    ky: Float[Tensor, " p"],
    scale: float,
    grid: Float[Tensor, "d d h c"],
) -> None:
    """`insert_channels_cpu` in plain torch, on any device."""
    samples = locate(rotation, kx, ky, scale, grid.shape[0])
    x, y, z = (fraction[:, :, None] for fraction in samples.fraction)
    turned = torch.stack([values.real, values.imag * samples.sign], 2)
    parts = (turned[:, :, None] * first[:, None, :, None]).flatten(2), power[:, :, None] * second[:, None]
    added = torch.cat(parts, 2) * samples.inside[:, None]
    flat, far = grid.view(-1, grid.shape[-1]), added * z
    for plane, rows in ((added - far, samples.rows[:2]), (far, samples.rows[2:])):
        outer = plane * y
        for line, row in zip((plane - outer, outer), rows, strict=True):
            right = line * x
            flat.index_add_(0, row, (line - right).flatten(0, 1))
            flat.index_add_(0, row + 1, right.flatten(0, 1))


def _with_friedel_pairs(grid: Float[Tensor, "d d h c"], signed: int) -> Float[Tensor, "d d h c"]:
    """`fourier_slice.add_friedel_pairs` of every channel, on a copy."""
    grid = grid.clone()
    plane = grid[:, :, 0]
    friedel = plane.flip(0, 1).roll((1, 1), (0, 1))
    friedel[:, :, 1:signed:2] *= -1
    grid[:, :, 0] = plane + friedel
    return grid


def _squared_radius(box: int, device: torch.device) -> Float[Tensor, " voxels"]:
    line = torch.fft.fftfreq(box, 1 / box, device=device).square()
    return (line[:, None, None] + line[:, None] + line[: box // 2 + 1]).flatten()
