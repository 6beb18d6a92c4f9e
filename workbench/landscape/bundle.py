"""The loss along many random lines through the model: what one of them alone would not tell."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from workbench.figure import AnyMark, Axis, Band, Figure, Panel, Points, fitting
from workbench.figure import Line as Curve
from workbench.landscape.directions import random_direction
from workbench.landscape.grid import levels
from workbench.landscape.points import PlanePoints, expected_bytes
from workbench.landscape.settings import LineExtent, LineNormalization, Lines, LossScale
from workbench.numerics.sampling import Draw
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Doc, Range
from workbench.subject import Subject

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Bundle(Probe[Subject]):
    """The loss along many random lines through a model: ``loss[k, i] = L(θ + α_i d_k)``, with their spread.

    What it measures: mean loss at ``points`` positions α in [-extent, extent] on each of ``lines`` independent Gaussian
    directions d_k, scaled to the filters (Li et al. 2018, arXiv:1712.09913); at each α the mean over the lines with its
    standard error (a Student's t interval's half-width at 95 %), the lowest and the highest; and ``spread``, the
    standard deviation of the loss's rise over the lines, relative to the mean rise, at the ends.

    How to read it: the band is what another seed would have drawn. Two models differ along random lines only where
    their bands part. With filter-normalised directions α = 1 moves each filter by its own length.

    What it costs: lines × points forward passes over the examples; all lines are drawn coarsely first.

    When it misleads: however many, random lines hardly ever meet the few directions of large curvature. Lines share
    the model, so their spread says nothing about other models of the same kind.

    Errors: ``loss_mean_error`` is for the mean over all directions, on these examples; NaN and Inf stay, and make the
    mean there unknown.
    """

    lines: Lines = 10
    points: Annotated[int, Range(3, 401, 2, soft=(5, 101)), Doc("Points on each line.")] = 21
    extent: LineExtent = 1.0
    normalization: LineNormalization = "filter"
    scale: LossScale = "linear"

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("loss", ("line", "alpha"), "mean loss over the examples", "loss per example"),
        Variable("loss_mean", ("alpha",), "mean over the lines", "loss per example", "loss_mean_error"),
        Variable("loss_mean_error", ("alpha",), "half-width of its 95 % interval over directions", "loss per example"),
        Variable("loss_low", ("alpha",), "lowest line", "loss per example"),
        Variable("loss_high", ("alpha",), "highest line", "loss per example"),
        Variable("loss_here", (), "mean loss at the model itself", "loss per example", "loss_here_error"),
        Variable("loss_here_error", (), "standard error of loss_here over examples", "loss per example"),
        Variable("spread", (), "standard deviation of the rise at the ends over lines, relative to its mean"),
        Variable("rise", (), "mean rise of the loss at the ends", "loss per example", "rise_error"),
        Variable("rise_error", (), "half-width of its 95 % interval over directions", "loss per example"),
    )

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """All lines from coarse to fine; a reading for each line of a level."""
        alpha = np.linspace(-self.extent, self.extent, self.points)
        if self.points % 2:
            alpha[self.points // 2] = 0.0
        here, loss = subject.evaluate(metrics=("loss",)), np.full((self.lines, self.points), np.nan)
        seen = np.zeros(loss.shape, dtype=bool)
        yield self._reading(subject, alpha, loss, here, seen)
        for level in levels(self.points):
            for line in range(self.lines):
                fresh = [int(i) for i in level if not seen[line, i]]
                if fresh:
                    loss[line, fresh] = self._along(subject, draw, line, alpha[fresh], here["loss"])
                    seen[line, fresh] = True
                    yield self._reading(subject, alpha, loss, here, seen)

    def _along(self, subject: Subject, draw: Draw, line: int, alpha: Array, here: float) -> list[float]:
        """Losses on one line; its direction is drawn again each time, so that one at a time is held."""
        direction = random_direction(subject, draw, line, self.normalization)
        points = PlanePoints(subject, direction, expected=len(alpha), series=self.lines * self.points)
        found = iter(points.evaluate(alpha[alpha != 0], ("loss",)))
        return [here if a == 0 else next(found)["loss"] for a in alpha]

    def _reading(self, subject: Subject, alpha: Array, loss: Array, here: dict[str, float], seen: Any) -> Reading:
        done = int(seen.sum())
        values: dict[str, Any] = {"loss": loss, "loss_here": here["loss"], "loss_here_error": here["loss_error"]}
        fixed = "" if self.normalization == "none" else "; biases and norm parameters do not move"
        return self.reading(
            (done + 1) / (loss.size + 1),
            values | summarised(loss, here["loss"]),
            coords={"alpha": alpha},
            converged=done == loss.size,
            notes=(*subject.notes, f"{self.lines} Gaussian directions, scaled: {self.normalization}{fixed}"),
        )

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """Loss at the model, mean rise at the ends of the lines, and how much lines differ."""
        return {
            "loss_here": float(data.loss_here),
            "loss_here_error": float(data.loss_here_error),
            "rise": float(data.rise),
            "rise_error": float(data.rise_error),
            "spread": float(data.spread),
        }

    def figure(self, data: xr.Dataset) -> Figure:
        """The band between lowest and highest line, the mean with its interval, and the model."""
        known = np.isfinite(data.loss_low.values)
        x, mean, error = (a[known] for a in (data["alpha"].values, data.loss_mean.values, data.loss_mean_error.values))
        marks: list[AnyMark] = [
            Band(x, data.loss_low.values[known], data.loss_high.values[known], f"all {self.lines} lines"),
            Band(x, mean - error, mean + error, "mean, 95 % interval", "main"),
            Curve(x, mean, "mean"),
            Points([0.0], [float(data.loss_here)], label="model", role="reference"),
        ]
        unit = {"filter": "filter lengths", "layer": "layer lengths", "none": "of N(0, 1) in each weight"}
        along = Axis(f"along random directions ({unit[self.normalization]})")
        return Figure((Panel(tuple(marks), along, fitting("loss", self.scale, mean)),))

    def estimate(self, subject: Subject) -> Cost:
        """One direction and a moved copy at a time, and the forward pass of a chunk."""
        passes = self.lines * self.points + 1
        size = 3 * subject.size * subject.dtype.itemsize + expected_bytes(subject) + 40 * self.lines * self.points
        return Cost(size, passes, f"{passes} forward passes over {subject.examples} examples")


def summarised(loss: Array, here: float) -> dict[str, Any]:
    """Mean, interval and extremes over lines at each α where all lines are known, and the rise at the ends.

    ``loss`` (lines, points); points that some line lacks are nan in the result.
    """
    from scipy.stats import t as student

    lines = len(loss)
    factor = float(student.ppf(0.975, lines - 1)) / math.sqrt(lines)
    rise = loss[:, [0, -1]].mean(axis=1) - here
    with np.errstate(invalid="ignore"):  # infinite losses have no spread: nan
        mean, deviation, deviations = float(rise.mean()), float(rise.std(ddof=1)), loss.std(axis=0, ddof=1)
    return {
        "loss_mean": loss.mean(axis=0),
        "loss_mean_error": factor * deviations,
        "loss_low": loss.min(axis=0),
        "loss_high": loss.max(axis=0),
        "rise": mean,
        "rise_error": factor * deviation,
        "spread": deviation / abs(mean) if mean else math.nan,
    }
