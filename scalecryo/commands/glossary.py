"""The words that help texts, log and report use, for those who come from another program."""

from collections.abc import Mapping
from types import MappingProxyType

TERMS: Mapping[str, str] = MappingProxyType(
    {
        "ab initio": "map and poses from the particles alone, without a reference map",
        "assign": "give particles poses by what a run has learnt",
        "B-factor": "fall-off of the map's amplitudes with resolution, Å²; map.mrc has it undone (sharpened)",
        "box": "side of a particle image, pixels",
        "class": "one of several structures that particles are sorted into (--classes)",
        "confidence": "probability that an image shows the particle, in the pose given (rlnMaxValueProbDistribution)",
        "contrast": "whether protein is bright or dark in the images; stores are protein-bright",
        "CTF": "contrast transfer function: how the microscope weights and turns the frequencies of an image",
        "encoder": "network from an image to its pose",
        "ensemble": "many cheap starts of several classes; what they agree on tells how many classes there are",
        "final pass": "the last pass: every particle gets a pose, and the half-maps are made at the full box",
        "Fourier pixel": "one cycle per box: shell s of a box of N pixels of p Å is N·p/s Å",
        "frequency marching": "refining at rising resolution, as far as the half-maps agree",
        "FSC": "Fourier shell correlation of two maps, by resolution; 0.143 between half-maps is the resolution",
        "half-maps": "maps of two halves of the particles, refined apart; where they agree there is signal",
        "hand": "a structure or its mirror image: projections cannot tell them apart",
        "held out": "particles that a start does not learn from, by which it is judged",
        "iteration": "one pass of the refinement: particles are posed against the maps, then the maps are rebuilt",
        "junk": "images that show no particle",
        "level": "one of the box sizes at which a store holds the particles",
        "local refinement": "small improvements of a pose and shift, from where they are",
        "mode": "one of several separate likely poses of an image",
        "Nyquist": "finest resolution that pixels can hold: twice the pixel size",
        "optics group": "particles that share microscope settings",
        "point group": "symmetry of the particle: C3, D7, T, O, I",
        "pose": "rotation and shift of a particle",
        "recipe": "the stages that a run is made of, chosen by pose.source and guided.start",
        "refinement": "iterations until neither poses nor maps get better",
        "run": "folder with all that a training leaves",
        "SNR": "signal-to-noise ratio: variance of the signal over that of the noise; dB are 10·log10 of it",
        "start": "from random poses to a first map of low resolution",
        "store": "particles as chunked, sharded Zarr arrays, made by convert",
        "worker": "one process of a distributed run, on a CPU core or a GPU",
    }
)  # fmt: skip
