"""The loss along one line through the model, beside the parabola that its derivatives predict."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from workbench.figure import AnyMark, Axis, Band, Figure, Panel, Points, fitting
from workbench.figure import Line as Curve
from workbench.landscape.directions import Direction, Normalization, mover, norm, random_direction, unmoved_share
from workbench.landscape.evaluation.runner import in_bfloat16
from workbench.landscape.grid import levels
from workbench.landscape.points import PlanePoints, expected_bytes
from workbench.landscape.preview import PREVIEWED, Checks, Preview, caption, check_precision, doubt, summary_of
from workbench.landscape.settings import LossScale, Metric
from workbench.numerics.basis import dot
from workbench.numerics.krylov import lanczos
from workbench.numerics.persistence import excess_variation, persistence
from workbench.numerics.sampling import Draw
from workbench.operators.hessian import Hessian
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Choice, Doc, Range
from workbench.subject import Subject

Array = NDArray[np.float64]
AGREES = 0.1
"""The parabola agrees with the loss where it misses the loss's change by at most this share of it."""
CHECKED = 9
"""Points of a preview that are evaluated in full precision too, the model among them where it is on the line."""
SHALLOW = 0.01
"""Minima count that are deeper than this share of the curve's range."""


@dataclass(frozen=True)
class Line(Probe[Subject]):
    """The loss along a line through a model: ``loss[i] = L(θ + α_i d)``, with the parabola predicted at the model.

    What it measures: mean loss with its standard error over the examples and the error rate at ``points`` positions
    α in [-extent, extent], the model itself among them when their number is odd. ``predicted`` = L + α gᵀd + ½ α² dᵀHd
    from the gradient and one Hessian product; ``agreement_radius`` is how far from the model it misses the loss's
    change by at most a tenth. ``roughness`` is the excess total variation: 0 for a valley with one minimum;
    ``minima`` counts those deeper than 1 % of the range.
    Directions: Gaussian, scaled to the filters (Li et al. 2018, arXiv:1712.09913); the gradient, or the Hessian's
    eigenvector of the largest or smallest eigenvalue, of unit length.

    How to read it: with filter-normalised directions α = 1 moves each filter by its own length. Where curve and
    parabola part, sharpness has stopped describing the loss.

    What it costs: a forward pass over the examples for each point, one Hessian product, and some 10 to 40 more for
    an eigenvector. The ends and the middle come first.

    When it misleads: one direction out of millions; a random one is nearly orthogonal to everything that matters, so
    a smooth line is no proof of a smooth loss. Roughness depends on how finely the line is sampled. BatchNorm
    statistics stay frozen unless the subject's policy is "recompute".

    Errors: ``loss_error`` is the standard error over examples; NaN and Inf are kept as they are. With ``preview``
    forward passes run in bfloat16, but for ``loss_here`` and the parabola: ``loss_preview_error`` is the largest
    difference from full precision at nine even points, the model and the ends among them (elsewhere up to some three
    times as large). ``roughness``, ``minima`` and ``agreement_radius`` are then not told: they would be those of the
    rounding.
    """

    points: Annotated[int, Range(3, 1001, 2, soft=(11, 201)), Doc("Points on the line.")] = 51
    extent: Annotated[
        float,
        Range(1e-4, 100.0, log=True, soft=(0.01, 10.0)),
        Doc("Half-length of the line: in filter lengths for random directions, else in weight distance."),
    ] = 1.0
    direction: Annotated[
        Literal["random", "gradient", "sharpest", "negative"],
        Doc("Along what."),
        Choice(
            {
                "random": "a Gaussian direction, normalised as below",
                "gradient": "uphill, unit length",
                "sharpest": "the Hessian's eigenvector of the largest eigenvalue",
                "negative": "the Hessian's eigenvector of the smallest eigenvalue",
            }
        ),
    ] = "random"
    normalization: Annotated[
        Literal["filter", "layer", "none"],
        Doc("How a random direction is scaled to the weights."),
        Choice({"filter": "to each filter's norm", "layer": "to each tensor's norm", "none": "plain Gaussian"}),
    ] = "filter"
    preview: Preview = False
    metric: Metric = "loss"
    scale: LossScale = "linear"

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("loss", ("alpha",), "mean loss", "loss per example", "loss_error"),
        Variable("loss_error", ("alpha",), "standard error of the mean loss over examples", "loss per example"),
        Variable("error_rate", ("alpha",), "share of examples classified wrongly", "", "error_rate_error"),
        Variable("error_rate_error", ("alpha",), "standard error of the error rate over examples"),
        *PREVIEWED,
        Variable("evaluated", ("alpha",), "whether the point was evaluated", kind="bool"),
        Variable("predicted", ("alpha",), "loss predicted by gradient and curvature at the model", "loss per example"),
        Variable("loss_here", (), "mean loss at the model itself", "loss per example", "loss_here_error"),
        Variable("loss_here_error", (), "standard error of loss_here over examples", "loss per example"),
        Variable("slope", (), "derivative of the loss along the line at the model"),
        Variable("curvature", (), "second derivative of the loss along the line at the model"),
        Variable("agreement_radius", (), "distance up to which the parabola is right to a tenth of the change"),
        Variable("roughness", (), "excess total variation of the curve over its range"),
        Variable("minima", (), "minima deeper than a hundredth of the range"),
        Variable("direction_norm", (), "length of the direction", "parameter distance"),
        Variable("unmoved_share", (), "share of coordinates that the smallest step left unmoved by rounding"),
    )

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """The model and its parabola, then the line from coarse to fine; a reading as soon as points are known."""
        along, said = line_direction(subject, draw, self.direction, self.normalization)
        curve = _Curve(self, subject, along, said)
        yield curve.reading()
        for level in levels(self.points):
            for _ in curve.evaluate([i for i in level.tolist() if not curve.evaluated[i]]):
                yield curve.reading()

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """Loss, slope and curvature at the model, how far they predict, and how rough the line is."""
        return {
            "loss_here": float(data.loss_here),
            "loss_here_error": float(data.loss_here_error),
            "slope": float(data.slope),
            "curvature": float(data.curvature),
            "agreement_radius": float(data.agreement_radius),
            "roughness": float(data.roughness),
            "minima": float(data.minima),
            **summary_of(data),
        }

    def figure(self, data: xr.Dataset) -> Figure:
        """The curve with its error band, the parabola as far as it stays in sight, and the model."""
        alpha, value, error = data["alpha"].values, data[self.metric].values, data[f"{self.metric}_error"].values
        seen = data.evaluated.values
        x, y, e, said = alpha[seen], value[seen], error[seen] + doubt(data, self.metric), caption(data)
        words = "± standard error" + " and bfloat16" * bool(said)
        marks: list[AnyMark] = [Band(x, y - e, y + e, words)] if np.isfinite(e).any() else []
        marks.append(Curve(x, y, self.metric.replace("_", " ")))
        if self.metric == "loss":
            marks += [_parabola(data)] if np.isfinite(data.predicted).any() else []
            marks.append(Points([0.0], [float(data.loss_here)], label="model", role="reference"))
        upright = Axis("error rate") if self.metric == "error_rate" else fitting("loss", self.scale, y)
        along = Axis(data["alpha"].attrs.get("long_name", self._words()))
        return Figure((Panel(tuple(marks), along, upright),), note=said)

    def _words(self) -> str:
        if self.direction == "random":
            unit = {"filter": "filter lengths", "layer": "layer lengths", "none": "of N(0, 1) in each weight"}
            return f"along a random direction ({unit[self.normalization]})"
        names = {"gradient": "the gradient", "sharpest": "the sharpest direction", "negative": "the lowest curvature"}
        return f"along {names[self.direction]} (distance)"

    def estimate(self, subject: Subject) -> Cost:
        """A direction, a moved copy and the forward pass of a chunk; the gradient's graph for the parabola."""
        hessian = Hessian(subject)
        kept, working = hessian.expected_bytes()
        vectors = 4 + (40 if self.direction in ("sharpest", "negative") else 2) + self.preview
        words = f"{self.points + 1} forward passes over {subject.examples} examples"
        size = vectors * subject.size * subject.dtype.itemsize
        return Cost(size + max(expected_bytes(subject), kept + working), self.points + 1, words)


def line_direction(subject: Subject, draw: Draw, kind: str, normalization: Normalization) -> tuple[Direction, str]:
    """The direction of a line (see :class:`Line`), the same for the same draw, and what has to be said about it.

    Raises:
        ValueError: the gradient is wanted and is zero.
    """
    if kind == "random":
        fixed = "" if normalization == "none" else "; biases and norm parameters do not move"
        words = {"none": "plain Gaussian"}.get(normalization, f"scaled to each {normalization}")
        return random_direction(subject, draw, 0, normalization), f"the random direction is {words}{fixed}"
    if kind == "gradient":
        gradient = subject.gradient()
        length = norm(gradient)
        if not length > 0:
            raise ValueError("the gradient is zero here, so it has no direction; choose direction='random'.")
        return {k: g / length for k, g in gradient.items()}, "along the gradient of the examples, unit length"
    return _eigenvector(subject, draw, kind)


def _eigenvector(subject: Subject, draw: Draw, kind: str) -> tuple[Direction, str]:
    """A unit eigenvector, signed so that the loss first rises along it."""
    top = int(kind == "sharpest")
    with Hessian(subject) as hessian:
        states = lanczos(
            hessian,
            draw(0),
            top=top,
            bottom=1 - top,
            tolerance=0.01,
            near_zero=0.05,
            fresh=lambda i: draw(100 + i),
        )
        *_, last = states
        place = 0 if top else last.values.size - 1
        vector = last.vectors([place])[0]
        uphill = float(dot(vector, hessian.gradient.to(vector.dtype)))
    said = f"along the eigenvector of eigenvalue {last.values[place]:.4g} ± {last.residuals[place]:.1g}, unit length"
    return subject.unflatten(-vector if uphill < 0 else vector), said


def _parabola(data: xr.Dataset) -> Curve:
    """The prediction where it lies within sight of the measured curve."""
    alpha, predicted, loss = data["alpha"].values, data.predicted.values, data.loss.values
    known = loss[np.isfinite(loss)]
    high = known.max() if known.size else float(data.loss_here)
    low = known.min() if known.size else float(data.loss_here)
    room = 0.15 * (high - low) or 1.0
    inside = (predicted <= high + room) & (predicted >= low - room)
    return Curve(alpha, np.where(inside, predicted, np.nan), "predicted by the Hessian", "second")


@dataclass(eq=False)
class _Curve:
    """The arrays of a line while it is being filled."""

    probe: Line
    subject: Subject
    along: Direction
    said: str
    values: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        n, extent = self.probe.points, self.probe.extent
        self.alpha = np.linspace(-extent, extent, n)
        if n % 2:
            self.alpha[n // 2] = 0.0
        zero = {name: torch.zeros_like(d) for name, d in self.along.items()}
        self.at = mover(self.subject, self.along, zero)
        self.points = PlanePoints(self.subject, self.along, expected=n, preview=self.probe.preview)
        checked = np.linspace(0, n - 1, CHECKED if self.probe.preview else 0).round()
        self.checked = set(checked.astype(int).tolist())
        self.arrays = {name: np.full(n, np.nan) for name in ("loss", "loss_error", "error_rate", "error_rate_error")}
        self.evaluated = np.zeros(n, dtype=bool)
        self.here, self.checks = self.subject.evaluate(), Checks()
        self.middle = self._roughly() if self.probe.preview else self.here
        self.values = self._fixed()

    def _roughly(self) -> dict[str, float]:
        """The model's own values as a preview has them, checked at once."""
        check_precision(self.subject)
        rough = in_bfloat16(self.subject)
        found = rough.evaluate(rough.params)  # a loss that is not finite is kept
        self.checks.add(found, {name: self.here[name] for name in ("loss", "error_rate")})
        return found

    def _fixed(self) -> dict[str, Any]:
        flat = self.subject.flatten(self.along)
        with Hessian(self.subject) as hessian:
            curvature = float(dot(flat, hessian.matvec(flat)))
            slope = float(dot(flat.double(), hessian.gradient))
        moved = self.at(float(np.diff(self.alpha)[0]), 0.0)
        return {
            "loss_here": self.here["loss"],
            "loss_here_error": self.here["loss_error"],
            "slope": slope,
            "curvature": curvature,
            "predicted": self.here["loss"] + self.alpha * slope + self.alpha**2 * curvature / 2,
            "direction_norm": norm(self.along),
            "unmoved_share": unmoved_share(self.subject.params, moved, self.along),
        }

    def evaluate(self, places: list[int]) -> Iterator[None]:
        """The values at some positions, as many at a time as are evaluated at once."""
        elsewhere = [i for i in places if self.alpha[i]]
        for i in places:
            if not self.alpha[i]:
                self._keep(i, self.middle)
                yield
        for group in self.points.in_turn(self.alpha[elsewhere]):
            for found in group:
                self._keep(elsewhere.pop(0), found)
            yield

    def _keep(self, i: int, found: dict[str, float]) -> None:
        for name, array in self.arrays.items():
            array[i] = found.get(name, np.nan)
        self.evaluated[i] = True
        if i in self.checked and self.alpha[i]:
            exact = self.subject.evaluate(self.at(float(self.alpha[i]), 0.0))
            self.checks.add(found, {name: exact[name] for name in ("loss", "error_rate")})

    def reading(self) -> Reading:
        """What is known now."""
        seen, total = int(self.evaluated.sum()), self.probe.points
        return self.probe.reading(
            (seen + 1) / (total + 1),
            self.values | self.arrays | self.checks.values | self._shape() | {"evaluated": self.evaluated},
            coords={"alpha": self.alpha},
            converged=seen == total,
            notes=(*self.checks.words, *self.subject.notes, self.said, self.points.how),
        )

    def _shape(self) -> dict[str, float]:
        """How far the parabola holds and how rough the curve is, as far as it is known."""
        loss = self.arrays["loss"][self.evaluated]
        if loss.size < 3 or self.probe.preview:
            return {}
        alpha, predicted = self.alpha[self.evaluated], self.values["predicted"][self.evaluated]
        finite = loss[np.isfinite(loss)]
        span = float(finite.max() - finite.min()) if finite.size else 0.0
        return {
            "agreement_radius": agreement_radius(alpha, loss, predicted, self.here["loss"]),
            "roughness": excess_variation(loss),
            "minima": float(persistence(loss).count(SHALLOW * span)) if span > 0 else math.nan,
        }


def agreement_radius(alpha: Array, loss: Array, predicted: Array, here: float) -> float:
    """The largest |α| up to which ``predicted`` misses ``loss`` by at most a tenth of the loss's change from ``here``.

    All (n,). 0 when it misses at the nearest point already; NaN counts as a miss.
    """
    wrong = ~(np.abs(loss - predicted) <= AGREES * np.abs(loss - here) + 1e-9 * abs(here))
    reach = np.abs(alpha)
    nearest_miss = reach[wrong].min() if wrong.any() else math.inf
    return float(reach[reach < nearest_miss].max(initial=0.0))
