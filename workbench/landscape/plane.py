"""The loss on a plane through the model: two directions, one grid, coarse to fine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, cast

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from workbench.figure import AnyMark, Axis, Contour, Figure, Line, Panel, Points, Surface
from workbench.landscape.axes import PlaneAxes, plane_axes
from workbench.landscape.directions import mover, norm, unmoved_share
from workbench.landscape.grid import coarse_to_fine, drawable
from workbench.numerics.sampling import Draw
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Choice, Display, Doc, Range
from workbench.subject import Subject

Array = NDArray[np.float64]
_SAMPLED = ("sample_u", "sample_v", "sample_loss", "sample_loss_error")


@dataclass(frozen=True)
class Plane(Probe[Subject]):
    """The loss around a model on a plane: ``loss[i, j] = L(θ + u_i d1 + v_j d2)``.

    What it measures: mean loss, its standard error over the examples, and the error rate, at every point of a
    points × points grid centred on the model, which is also evaluated exactly at (0, 0) (``loss_here``). Directions:
    filter-normalised Gaussian (Li et al. 2018, arXiv:1712.09913), the two leading Hessian eigenvectors (unit length),
    or the principal components of a recorded path (mean-centred axes, origin at this checkpoint).
    Units: loss per example; coordinates in the lengths of the directions, which the reading states.

    How to read it: with filter-normalised directions a step of 1 moves each filter by its own length: pictures of
    networks that differ only by a rescaling of ReLU units are the same. The centre is where the model stands.

    What it costs: one forward pass over the examples for each point (plus about 30 curvature products for
    ``directions="hessian"``). A rough map of 3 × 3, 5 × 5, 9 × 9 points comes first.

    When it misleads: two directions out of millions, so a smooth picture is no proof of a smooth loss. Random
    directions are nearly but not exactly orthogonal (``cosine`` says how nearly). BatchNorm statistics stay frozen
    unless the subject's policy is "recompute". A path's plane shows as large a share as ``explained_variance`` says,
    and a random walk alone gives about 0.76 for two components.

    Errors: ``loss_error`` is the standard error over examples of the mean; NaN and Inf are kept as they are.
    """

    points: Annotated[
        int, Range(3, 201, 2, soft=(5, 51)), Doc("Grid points on each axis; cost grows as its square.")
    ] = 25
    extent: Annotated[
        float,
        Range(1e-3, 100.0, log=True, soft=(0.01, 10.0)),
        Doc(
            "Half-width of the plane: in filter lengths, in weight distance (hessian), or times the path's reach (pca)."
        ),
    ] = 1.0
    directions: Annotated[
        Literal["random", "hessian", "pca"],
        Doc("Which two directions span the plane."),
        Choice(
            {
                "random": "two Gaussian directions, normalised as below",
                "hessian": "the two leading Hessian eigenvectors, unit length",
                "pca": "principal components of the recorded path; needs a trajectory",
            }
        ),
    ] = "random"
    normalization: Annotated[
        Literal["filter", "layer", "none"],
        Doc("How random directions are scaled to the weights; the other directions keep unit length."),
        Choice(
            {
                "filter": "each filter of the direction gets the norm of the model's filter",
                "layer": "each tensor of the direction gets the norm of the model's tensor",
                "none": "plain Gaussian",
            }
        ),
    ] = "filter"
    scale: Annotated[
        Literal["log", "linear", "symlog"], Doc("How loss is coloured; log needs positive losses."), Display()
    ] = "log"
    view: Annotated[
        Literal["both", "contour", "surface"], Doc("Contour map, three-dimensional surface, or both."), Display()
    ] = "both"
    metric: Annotated[Literal["loss", "error_rate"], Doc("Which of the recorded values is drawn."), Display()] = "loss"

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("loss", ("u", "v"), "mean loss", "loss per example", "loss_error"),
        Variable("loss_error", ("u", "v"), "standard error of the mean loss over examples", "loss per example"),
        Variable("error_rate", ("u", "v"), "share of examples classified wrongly", "", "error_rate_error"),
        Variable("error_rate_error", ("u", "v"), "standard error of the error rate over examples", ""),
        Variable("evaluated", ("u", "v"), "whether the point was evaluated", kind="bool"),
        Variable("loss_here", (), "mean loss at the model itself", "loss per example", "loss_here_error"),
        Variable("loss_here_error", (), "standard error of loss_here over examples", "loss per example"),
        Variable("sample_u", ("sample",), "first coordinate of each evaluation, in order"),
        Variable("sample_v", ("sample",), "second coordinate of each evaluation, in order"),
        Variable("sample_loss", ("sample",), "mean loss, in order", "loss per example", "sample_loss_error"),
        Variable("sample_loss_error", ("sample",), "standard error of sample_loss", "loss per example"),
        Variable("direction_norm", ("direction",), "length of each direction", "parameter distance"),
        Variable("cosine", (), "cosine of the angle between the directions"),
        Variable("explained_variance", ("direction",), "share of the path's variance along each direction"),
        Variable("path_u", ("path",), "first coordinate of the recorded path, projected"),
        Variable("path_v", ("path",), "second coordinate of the recorded path, projected"),
        Variable("path_distance", ("path",), "distance of the recorded path from the plane", "parameter distance"),
        Variable("unmoved_share", (), "share of coordinates that the smallest step left unmoved by rounding"),
    )

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """Evaluate the origin, then the grid from coarse to fine; one reading for each point."""
        axes = plane_axes(subject, draw, self.directions, self.normalization, self.extent, self.points)
        filling = _Filling(self, subject, axes)
        yield filling.reading(0)
        for seen, (i, j) in enumerate(coarse_to_fine(self.points), 1):
            filling.evaluate(i, j, seen)
            yield filling.reading(seen)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """Loss at the model and the extremes on the plane, with the share of points that are not finite."""
        seen = data.loss.values[data.evaluated.values]
        finite = seen[np.isfinite(seen)]
        return {
            "loss_here": float(data.loss_here),
            "loss_here_error": float(data.loss_here_error),
            "loss_min": float(finite.min()) if finite.size else float("nan"),
            "loss_max": float(finite.max()) if finite.size else float("nan"),
            "points": int(seen.size),
            "not_finite": int(seen.size - finite.size),
            "cosine": float(data.cosine),
        }

    def figure(self, data: xr.Dataset) -> Figure:
        """Contour map and surface of the finest complete grid, the model and its path marked."""
        at = drawable(data.evaluated.values)
        u, v = data["u"].values[at], data["v"].values[at]
        z = data[self.metric].values[np.ix_(at, at)].T
        words = self._axis_words(data)
        colour = Axis("loss" if self.metric == "loss" else "error rate", *self._scale(data))
        panels: list[Panel] = []
        if self.view != "surface":
            marks = cast("tuple[AnyMark, ...]", (Contour(u, v, z), *self._path(data), _here()))
            panels.append(Panel(marks, Axis(words[0]), Axis(words[1]), colour, square=self.directions != "pca"))
        if self.view != "contour":
            # A turned axis has little room for words.
            first, second = (Axis(w.split(" (")[0].removeprefix("along Hessian ")) for w in words)
            panels.append(Panel((Surface(u, v, z),), first, second, colour))
        return Figure(tuple(panels), note=self._note(data, len(at)))

    def _scale(self, data: xr.Dataset) -> tuple[Literal["linear", "log", "symlog"]]:
        """The scale asked for; linear for error rates, which are zero in places."""
        return ("linear" if self.metric == "error_rate" else self.scale,)

    def _note(self, data: xr.Dataset, drawn: int) -> str:
        rough = "" if drawn == self.points else f"{drawn} × {drawn} of {self.points} × {self.points} points"
        lost = int((data.evaluated & ~np.isfinite(data.loss)).sum())
        hatched = f"{lost} points are not finite (hatched)" if lost else ""
        return " · ".join(part for part in (rough, hatched) if part)

    def _axis_words(self, data: xr.Dataset) -> tuple[str, str]:
        if self.directions == "random":
            unit = {"filter": "filter lengths", "layer": "layer lengths", "none": "of N(0, 1) in each weight"}
            return f"direction 1 ({unit[self.normalization]})", f"direction 2 ({unit[self.normalization]})"
        if self.directions == "hessian":
            return "along Hessian eigenvector 1 (distance)", "along Hessian eigenvector 2 (distance)"
        share = data.explained_variance.values
        return f"component 1 ({share[0]:.0%} of variance)", f"component 2 ({share[1]:.0%} of variance)"

    def _path(self, data: xr.Dataset) -> tuple[AnyMark, ...]:
        known = np.isfinite(data.path_u.values)
        if not known.any():
            return ()
        return (Line(data.path_u.values[known], data.path_v.values[known], "recorded path", "second"),)

    def estimate(self, subject: Subject) -> Cost:
        """Two directions, a moved copy, the forward pass of a chunk, and for eigenvectors a Lanczos basis."""
        vectors = 4 + (40 if self.directions == "hessian" else 0)
        weights = subject.size * subject.dtype.itemsize
        surface = 8 * 6 * self.points**2
        passes = self.points**2 + 1
        return Cost(
            vectors * weights + surface + subject.memory(), passes, f"{passes} forward passes over the examples"
        )

    def context(self, subject: Subject) -> str:
        """A plane of a recorded path depends on the whole path."""
        path: Any = getattr(subject, "path", None)
        return path.fingerprint() if self.directions == "pca" and path is not None else ""


def _here() -> Points:
    return Points([0.0], [0.0], label="model", role="reference")


@dataclass(eq=False)
class _Filling:
    """The arrays of a plane while its grid is being filled."""

    probe: Plane
    subject: Subject
    axes: PlaneAxes
    arrays: dict[str, Array] = field(init=False)

    def __post_init__(self) -> None:
        n = self.probe.points
        self.at = mover(self.subject, self.axes.first, self.axes.second)
        self.arrays = {
            name: np.full((n, n), np.nan) for name in ("loss", "loss_error", "error_rate", "error_rate_error")
        } | {name: np.full(n * n, np.nan) for name in _SAMPLED}
        self.evaluated = np.zeros((n, n), dtype=bool)
        self.here = self.subject.evaluate()
        self.fixed = self._fixed()

    def _fixed(self) -> dict[str, Any]:
        step = float(np.diff(self.axes.u)[0])
        moved = self.at(step, 0.0)
        return {
            "loss_here": self.here["loss"],
            "loss_here_error": self.here["loss_error"],
            "direction_norm": [norm(self.axes.first), norm(self.axes.second)],
            "unmoved_share": unmoved_share(self.subject.params, moved, self.axes.first),
            **self.axes.values,
        }

    def evaluate(self, i: int, j: int, seen: int) -> None:
        """The values at grid point (i, j), the ``seen``-th evaluation."""
        u, v = float(self.axes.u[i]), float(self.axes.v[j])
        found = self.here if u == 0.0 == v else self.subject.evaluate(self.at(u, v))
        for name in ("loss", "loss_error", "error_rate", "error_rate_error"):
            self.arrays[name][i, j] = found.get(name, np.nan)
        for name, value in zip(_SAMPLED, (u, v, found["loss"], found["loss_error"]), strict=True):
            self.arrays[name][seen - 1] = value
        self.evaluated[i, j] = True

    def reading(self, seen: int) -> Reading:
        """What is known after ``seen`` points."""
        total = self.probe.points**2
        values = self.arrays | self.fixed | {"evaluated": self.evaluated}
        return self.probe.reading(
            (seen + 1) / (total + 1),
            values,
            coords={"u": self.axes.u, "v": self.axes.v},
            converged=seen == total,
            notes=(*self.subject.notes, *self.axes.notes),
            sizes={"path": 0},
        )
