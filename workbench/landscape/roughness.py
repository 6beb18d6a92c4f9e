"""How rough the loss is along random lines through a model, with its spread over directions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from workbench.figure import AnyMark, Axis, Figure, Panel, Points, Rule, fitting
from workbench.figure import Line as Curve
from workbench.landscape.directions import random_direction
from workbench.landscape.points import PlanePoints, expected_bytes
from workbench.landscape.settings import LineExtent, LineNormalization, Lines, LossScale
from workbench.numerics.persistence import excess_variation, persistence, second_difference_spread
from workbench.numerics.sampling import Draw
from workbench.numerics.stats import Moments
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Doc, Range
from workbench.subject import Subject

Array = NDArray[np.float64]
DRAWN = 20
"""Lines that are drawn at most."""
MEASURES = ("excess_variation", "second_differences", "minima", "coarse_excess_variation")


@dataclass(frozen=True)
class Roughness(Probe[Subject]):
    """How rough the loss is along random lines through a model: three measures of each, and their means over lines.

    What it measures: L at ``points`` even positions α in [-extent, extent] on ``lines`` Gaussian directions. For each
    line ``excess_variation`` R = [Σ|ΔL| - (L_first + L_last - 2 min L)] / (max L - min L), 0 exactly for a valley with
    one minimum; ``second_differences``, the standard deviation of Δ²L over max L - min L, 0 for a parabola; ``minima``,
    how many are at least ``threshold`` · (max L - min L) deep, by sublevel-set persistence: 1 for a valley.
    ``coarse_excess_variation`` is R of every second point of the same samples.

    How to read it: roughness belongs to a step of the grid, here 2 · extent / (points - 1). Where the coarse value is
    much below the fine one there is structure between the points, and a finer grid would show more. Compare models
    only at equal extent, points, examples and normalisation.

    What it costs: lines × points forward passes over the examples, which are the same at every point.

    When it misleads: there is no standard definition; these are this project's. Random lines average over millions of
    coordinates and look smooth; few of them meet steep directions. Kinks of ReLU networks show in the second
    differences at any step. A curve that only falls has one minimum, at its end, and no excess variation. Float32
    noise counts as roughness where the loss hardly changes along the line.

    Errors: standard errors of the means over directions, on these examples; nan for one line. NaN and Inf stay, and
    make a line's measures and their mean unknown.

    Source: total variation, second differences and persistence as they are; their use here is a convention.
    """

    lines: Lines = 10
    points: Annotated[int, Range(5, 1001, 2, soft=(11, 201)), Doc("Points on each line; roughness depends on it.")] = 51
    extent: LineExtent = 1.0
    threshold: Annotated[
        float, Range(0.0, 1.0, soft=(0.0, 0.2)), Doc("Least depth of a minimum that counts, as a share of the range.")
    ] = 0.01
    normalization: LineNormalization = "filter"
    scale: LossScale = "linear"

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("loss", ("line", "alpha"), "mean loss over the examples", "loss per example", "loss_error"),
        Variable("loss_error", ("line", "alpha"), "standard error of the loss over examples", "loss per example"),
        Variable("loss_here", (), "mean loss at the model itself", "loss per example", "loss_here_error"),
        Variable("loss_here_error", (), "standard error of loss_here over examples", "loss per example"),
        Variable("excess_variation", ("line",), "excess total variation over the range"),
        Variable("second_differences", ("line",), "standard deviation of second differences over the range"),
        Variable("minima", ("line",), "minima deeper than the threshold"),
        Variable("coarse_excess_variation", ("line",), "excess total variation of every second point"),
        Variable("excess_variation_mean", (), "mean excess variation", "", "excess_variation_mean_error"),
        Variable("excess_variation_mean_error", (), "its standard error over directions"),
        Variable(
            "second_differences_mean", (), "mean spread of second differences", "", "second_differences_mean_error"
        ),
        Variable("second_differences_mean_error", (), "its standard error over directions"),
        Variable("minima_mean", (), "mean number of minima", "", "minima_mean_error"),
        Variable("minima_mean_error", (), "its standard error over directions"),
        Variable(
            "coarse_excess_variation_mean", (), "mean excess variation of every second point", "",
            "coarse_excess_variation_mean_error",
        ),
        Variable("coarse_excess_variation_mean_error", (), "its standard error over directions"),
        Variable("spacing", (), "distance of neighbouring points in α"),
    )  # fmt: skip

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """Line after line; a reading whenever points come in."""
        alpha = np.linspace(-self.extent, self.extent, self.points)
        here, seen = subject.evaluate(metrics=("loss",)), 0
        loss, error = (np.full((self.lines, self.points), np.nan) for _ in range(2))
        each = np.full((self.lines, len(MEASURES)), np.nan)
        held = {"loss": loss, "loss_error": error}
        yield self._reading(subject, alpha, held, here, each, seen)
        for line in range(self.lines):
            direction = random_direction(subject, draw, line, self.normalization)
            along = PlanePoints(subject, direction, expected=self.points, series=loss.size)
            for group in along.in_turn(alpha, ("loss",)):
                for found in group:
                    loss.flat[seen], error.flat[seen] = found["loss"], found["loss_error"]
                    seen += 1
                if seen == (line + 1) * self.points:
                    each[line] = measures(loss[line], self.threshold)
                yield self._reading(subject, alpha, held, here, each, seen)

    def _reading(
        self,
        subject: Subject,
        alpha: Array,
        held: dict[str, Array],
        here: dict[str, float],
        each: Array,
        seen: int,
    ) -> Reading:
        values: dict[str, Any] = {**held, "spacing": alpha[1] - alpha[0]}
        values |= {"loss_here": here["loss"], "loss_here_error": here["loss_error"]}
        fixed = "" if self.normalization == "none" else "; biases and norm parameters do not move"
        return self.reading(
            (seen + 1) / (held["loss"].size + 1),
            values | summarised(each, seen // self.points),
            coords={"alpha": alpha},
            converged=seen == held["loss"].size,
            notes=(*subject.notes, f"{self.lines} Gaussian directions, scaled: {self.normalization}{fixed}"),
        )

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """The means over lines with their standard errors, and the spacing that they belong to."""
        means = [f"{name}_mean{kind}" for name in MEASURES for kind in ("", "_error")]
        return {name: float(data[name]) for name in (*means, "loss_here", "loss_here_error", "spacing")}

    def figure(self, data: xr.Dataset) -> Figure:
        """The curves, and the excess variation of each line with the mean over all."""
        x, marks = data["alpha"].values, list[AnyMark]()
        for line in data.loss.values[:DRAWN]:
            known = np.isfinite(line)
            marks += [Curve(x[known], line[known])] if known.any() else []
        marks.append(Points([0.0], [float(data.loss_here)], label="model", role="reference"))
        unit = {"filter": "filter lengths", "layer": "layer lengths", "none": "of N(0, 1) in each weight"}
        curves = Panel(
            tuple(marks),
            Axis(f"along random directions ({unit[self.normalization]})"),
            fitting("loss", self.scale, data.loss.values[:DRAWN]),
        )
        number = np.arange(1, self.lines + 1)
        fine, coarse = (data[n].values for n in ("excess_variation", "coarse_excess_variation"))
        each: list[AnyMark] = [
            Points(number, fine, label="all points"),
            Points(number, coarse, label="every second point", role="second"),
        ]
        mean, error = float(data.excess_variation_mean), float(data.excess_variation_mean_error)
        if math.isfinite(mean):
            each.append(Rule(mean, label=f"mean {mean:.2g} ± {error:.1g}"))
        return Figure((curves, Panel(tuple(each), Axis("line"), Axis("excess variation"))))

    def estimate(self, subject: Subject) -> Cost:
        """One direction and a moved copy at a time, the forward pass of a chunk, and the curves."""
        passes = self.lines * self.points + 1
        size = 4 * subject.size * subject.dtype.itemsize + expected_bytes(subject) + 40 * passes
        return Cost(size, passes, f"{passes} forward passes over {subject.examples} examples")


def summarised(each: Array, whole: int) -> dict[str, Any]:
    """The measures (lines, measures) by name, and means with standard errors over the first ``whole`` lines."""
    made: dict[str, Any] = dict(zip(MEASURES, each.T, strict=True))
    if whole:
        moments = Moments.of(each[:whole])
        for name, mean, error in zip(MEASURES, moments.mean, moments.standard_error, strict=True):
            made |= {f"{name}_mean": mean, f"{name}_mean_error": error}
    return made


def measures(values: Array, threshold: float) -> tuple[float, float, float, float]:
    """The four :data:`MEASURES` of a curve (n,) at even steps; nan where it is constant or not finite.

    Minima count where they are at least ``threshold`` of the range deep; the last is of every second sample.
    """
    span = float(values.max() - values.min())
    known = math.isfinite(span) and span > 0
    minima = float(persistence(values).count(threshold * span)) if known else math.nan
    return excess_variation(values), second_difference_spread(values), minima, excess_variation(values[::2])
