"""Every particle's place in the linear model of variety, and what the places show."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from scalecryo.evaluate.mixture import Mixture
from scalecryo.map.components import Latents
from scalecryo.runs.folder import RunFolder
from scalecryo.train.particle_state import RowColumns


@dataclass(frozen=True)
class Coordinates:
    """What the last pass finds.

    Attributes:
        table: of every particle: coordinates `z` and their standard deviations `sd`.
        gain: of each component, in log-likelihood per image with the components of the other half, given those before.
        error: its standard error.
        moment: second moment of each coordinate.
        passing: number of components that both halves confirm; those after the first that fails do not count.
        mixture: states among the passing components; None where there are none.
        encoder: of each passing component how the encoder's coordinates correlate with these, and their root mean
            square error over the spread, of particles that it has not learnt from; None: there is none.
    """

    table: RowColumns
    gain: Float[NDArray, " q"]
    error: Float[NDArray, " q"]
    moment: Float[NDArray, " q"]
    passing: int
    mixture: Mixture | None
    encoder: tuple[Float[NDArray, " p"], Float[NDArray, " p"]] | None = None

    @property
    def z(self) -> Float[NDArray, "n q"]:
        """Coordinates of every particle."""
        return self.table.columns()["z"]

    @property
    def sd(self) -> Float[NDArray, "n q"]:
        """Their standard deviations."""
        return self.table.columns()["sd"]


def coordinate_table(run: RunFolder, count: int, components: int) -> RowColumns:
    """For coordinates `z` and their standard deviations `sd` of every particle."""
    return RowColumns(run, count, {"z": (components,), "sd": (components,)})


def note_coordinates(table: RowColumns, rows: Int[Tensor, " b"], latents: Latents) -> None:
    """Keep what a batch's E-step found."""
    spread = latents.covariance.diagonal(dim1=1, dim2=2).sqrt()
    table.note_columns(rows, {"z": latents.mean, "sd": spread})
