"""Settings that several probes of landscapes have, in the same words for the same thing."""

from __future__ import annotations

from typing import Annotated, Literal

from workbench.schema import Choice, Display, Doc, Range

_SCALINGS = Choice({"filter": "to each filter's norm", "layer": "to each tensor's norm", "none": "plain Gaussian"})

PlaneDirections = Annotated[
    Literal["random", "hessian", "pca"],
    Doc("Which two directions span the plane."),
    Choice(
        {
            "random": "two Gaussian directions, normalised as below",
            "hessian": "the two leading Hessian eigenvectors, unit length",
            "pca": "principal components of the recorded path; needs a trajectory",
        }
    ),
]
PlaneExtent = Annotated[
    float, Range(1e-3, 100.0, log=True, soft=(0.01, 10.0)), Doc("Half-width of the plane, as for Plane.")
]
PlaneNormalization = Annotated[
    Literal["filter", "layer", "none"], Doc("How random directions are scaled to the weights."), _SCALINGS
]

Lines = Annotated[int, Range(2, 500, soft=(2, 50)), Doc("Random directions.")]
LineExtent = Annotated[
    float, Range(1e-4, 100.0, log=True, soft=(0.01, 10.0)), Doc("Half-length of each line, in filter lengths.")
]
LineNormalization = Annotated[
    Literal["filter", "layer", "none"], Doc("How directions are scaled to the weights."), _SCALINGS
]

NormBetween = Annotated[
    Literal["recompute", "eval", "batch"],
    Doc("BatchNorm's statistics at each point; without such layers it does not matter."),
    Choice(
        {
            "recompute": "estimated anew from the examples",
            "eval": "of each model at its end, interpolated in between",
            "batch": "of each micro-batch",
        }
    ),
]
"""Between two models."""

Metric = Annotated[Literal["loss", "error_rate"], Doc("Which of the recorded values is drawn."), Display()]
LossScale = Annotated[Literal["log", "linear"], Doc("How the loss is drawn."), Display()]
ColourScale = Annotated[
    Literal["log", "linear", "symlog"],
    Doc("How loss is coloured; log becomes symlog where losses are not positive."),
    Display(),
]
View = Annotated[
    Literal["both", "contour", "surface"], Doc("Contour map, three-dimensional surface, or both."), Display()
]
