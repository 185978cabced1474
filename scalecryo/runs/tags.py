"""Names by which TensorBoard shows a run's curves and pictures: in groups, with units, and what each is."""

from types import MappingProxyType
from typing import NamedTuple


class Tag(NamedTuple):
    """Where something is shown.

    Attributes:
        name: group/name.
        title: with its unit.
        help: what it is.
    """

    name: str
    title: str
    help: str


def _tags(*rows: tuple[str, str, str, str]) -> MappingProxyType[str, Tag]:
    return MappingProxyType({curve: Tag(name, title, help) for curve, name, title, help in rows})


#: By the name in metrics.jsonl.
CURVES = _tags(
    ("halves/resolution_angstrom", "map/resolution", "resolution (Å)", "where the halves' masked FSC falls to 0.143"),
    ("halves/fsc_0.143_shell", "map/fsc_0.143_shell", "FSC 0.143 (Fourier shell)", "the same in cycles per box"),
    ("halves/fsc_mean", "map/fsc_mean", "mean FSC", "of the half-maps within the mask, over all shells"),
    ("final/resolution_angstrom", "final/resolution", "final resolution (Å)", "masked, corrected FSC at 0.143"),
    ("final/worst_cone_angstrom", "final/worst_direction", "worst direction (Å)", "FSC 0.143 in the worst cone"),
    ("final/worst_cone_ratio", "final/worst_direction_ratio", "worst direction ÷ whole map", "1: all alike"),
    ("final/cone_area_ratio", "final/cone_area_ratio", "cFAR", "smallest over largest area under the cones' FSC"),
    ("iteration/radius", "refinement/radius", "radius (Fourier px)", "up to which poses were refined"),
    ("iteration/level", "refinement/box", "box (px)", "of the images that were read"),
    ("iteration/modes", "refinement/modes", "modes a particle", "candidates of the search; 0: none was made"),
    ("iteration/moved_share", "refinement/moved_share", "share that jumped", "particles that found another mode"),
    ("iteration/restless_share", "refinement/turning_share", "share that still turn", "particles whose pose changed"),
    ("classes/effective", "classes/effective", "effective number of classes", "1 / sum of squared shares"),
    ("final/effective_classes", "final/effective_classes", "effective number of classes", "of the final table"),
    ("final/structures", "final/structures", "structures", "classes that show something of their own"),
    ("likelihood_gain_per_image", "refinement/likelihood_gain", "log-likelihood gain (nats an image)",
     "of the images over an empty map"),
    ("loss", "optimisation/loss", "loss", "mean of the images of the last steps"),
    ("encoder_loss", "optimisation/encoder_loss", "encoder loss (nats)", "of the encoder that learns the found poses"),
    ("pose_spread", "optimisation/pose_spread", "spread of poses", "0: all alike; a collapsed encoder"),
    ("gradient_norm/volume", "optimisation/gradient_norm_volume", "gradient norm of the volume", "after reduction"),
    ("gradient_norm/poses", "optimisation/gradient_norm_poses", "gradient norm of the pose source", "after reduction"),
    ("radius", "optimisation/radius", "radius (Fourier px)", "that the auto-encoder sees"),
    ("level", "optimisation/box", "box (px)", "that the auto-encoder sees"),
    ("images_per_second", "speed/images_per_second", "images / s", "of all workers together"),
    ("images_per_second_slowest_worker", "speed/images_per_second_slowest_worker", "images / s, slowest worker", ""),
    ("data_wait_share", "speed/data_wait_share", "share of time that waits for data", "mean of the workers"),
    ("world_size", "speed/workers", "workers", "of the run"),
    ("pass_seconds", "speed/pass_seconds", "pass (s)", "wall time of the last pass"),
    ("stream/retries", "speed/stream_retries", "requests made again", "to the store, since the start"),
    ("stream/mib_read", "speed/stream_mib", "read (MiB)", "from the store, since the start"),
    ("reduce/seconds_per_step", "speed/reduce_seconds_per_step", "reduction (s a batch)", "sums over the workers"),
    ("reduce/mib_per_step", "speed/reduce_mib_per_step", "reduction (MiB a batch)", "sums over the workers"),
    ("memory/resident_mib", "memory/resident", "resident memory (MiB)", "of worker 0"),
    ("memory/device_mib", "memory/device", "GPU memory (MiB)", "that worker 0 holds"),
    ("truth/rotation_error_median_deg", "truth/rotation_error_median", "rotation error, median (°)",
     "against the known truth"),
    ("truth/rotation_error_mean_deg", "truth/rotation_error_mean", "rotation error, mean (°)", "against the truth"),
    ("truth/rotation_error_mod_pseudosymmetry_median_deg", "truth/rotation_error_mod_pseudosymmetry",
     "rotation error modulo pseudo-symmetry, median (°)", "against the known truth"),
    ("truth/fsc_0.5_shell", "truth/fsc_0.5_shell", "FSC 0.5 to truth (Fourier shell)", "of the map so far"),
    ("truth/fsc_0.143_shell", "truth/fsc_0.143_shell", "FSC 0.143 to truth (Fourier shell)", "of the map so far"),
    ("truth/fsc_mean", "truth/fsc_mean", "mean FSC to truth", "of the map so far"),
)  # fmt: skip

#: Pictures and spreads, by a short name.
PICTURES = _tags(
    ("surface", "map/surface", "surface", "from +z, −y and +x, at the suggested contour, low-passed to the resolution"),
    ("fsc", "map/fsc", "Fourier shell correlation", "of the half-maps"),
    ("views", "poses/views", "viewing directions", "Mollweide's projection; bright: many particles"),
    ("pairs", "particles/observed_above_predicted", "particles above their projections", ""),
    ("poses/tilt_deg", "poses/tilt", "tilt (°)", "of the viewing directions"),
    ("poses/confidence", "poses/confidence", "confidence", "0: none, 1: certain"),
    ("images_per_second_by_worker", "speed/images_per_second_by_worker", "images / s of each worker", ""),
)

SECONDS, CLASS_SHARE = "seconds/", "classes/share_"
#: What runs are compared by in the table of settings; and those that descend a loss, by that.
COMPARED = ("final/resolution_angstrom", "final/worst_cone_angstrom", "halves/resolution_angstrom")
COMPARED_OF_DESCENT = (*COMPARED, "loss")
FINAL_FSC = Tag(
    "final_fsc/masked_corrected", "final FSC by Fourier shell (the axis «step» is the shell)",
    "correlation of the final half-maps within the mask, freed of the mask's share; 0.143 is the resolution",
)  # fmt: skip


def tag_of(curve: str) -> Tag:
    """Where a curve of metrics.jsonl is shown."""
    if curve in CURVES:
        return CURVES[curve]
    if curve.startswith(SECONDS):
        part = curve.removeprefix(SECONDS)
        return Tag(f"time/{part}", f"{part.replace('_', ' ')} (s)", "wall time on worker 0 since its start")
    if curve.startswith(CLASS_SHARE):
        return Tag(curve, f"class {curve.removeprefix(CLASS_SHARE)}", "share of the particles in it")
    return Tag(curve, curve, "")
