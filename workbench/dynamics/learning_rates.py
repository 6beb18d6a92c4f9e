"""How much the final loss depends on the learning rate, over runs that differ in it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from workbench.dynamics.labels import learning_rate, missing, trajectories
from workbench.figure import AnyMark, Axis, Figure, Line, Panel, Points, Rule, Text, fitting
from workbench.numerics.sampling import Draw
from workbench.numerics.stats import error_of_mean
from workbench.probe import Cost, Look, Probe, Reading, Value, Variable
from workbench.schema import Doc, Range
from workbench.several import Runs

Floats = NDArray[np.float64]
FEW = 7
"""Learning rates that a sensitivity should rest on."""
UNEVEN = 0.2
"""Relative spread of the distances between log learning rates above which their mean is that of no even grid."""


@dataclass(frozen=True)
class LearningRateSensitivity(Probe[Runs]):
    """Learning-rate sensitivity: how much worse the final loss is, on average, than at the best learning rate.

    What it measures, over runs with learning rates η: ``sensitivity`` = mean over η of min(ℓ(η), ℓ_0) - ℓ*, with ℓ(η)
    the final loss (mean over runs with this rate), ℓ_0 the loss at initialisation (the first that was recorded, mean
    over runs) and ℓ* the least ℓ(η); runs that diverged (nan, infinity, or worse than they began) count as ℓ_0. Rates
    within ``decades`` around the best one are taken, uniform on a logarithmic grid.

    How to read it: 0 says that the rate does not matter in this range; compare models only over the same grid, the same
    number of tokens and the same ``decades``. The curve shows where it matters: where larger rates diverge.

    What it costs: reading scalars; no model is looked at. The learning rate of a run is the largest that its optimizer
    had at checkpoints, or what its label says ("lr 0.1").

    When it misleads: too few rates, or unevenly spaced ones (both are said), and ranges that do not hold the best rate
    inside, make the mean that of the grid. Final losses of mini-batches scatter: record an evaluated loss.

    Errors: standard errors over runs with equal rates; nan with one run for each. They leave out that ℓ* is a least
    value, which biases the sensitivity upwards by about its error.

    Source: Wortsman et al. 2023.
    """

    loss: Annotated[str, Doc("The recorded scalar whose last value is the final loss.")] = "train_loss"
    decades: Annotated[float, Range(0.1, 12.0), Doc("Range of learning rates around the best one, in decades.")] = 3.0

    looks_at: ClassVar[Look] = "runs"
    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("rate", ("run",), "learning rate of the run"),
        Variable("final", ("run",), "final loss of the run"),
        Variable("initial", ("run",), "first recorded loss of the run"),
        Variable("mean", ("learning_rate",), "final loss, diverged runs as at initialisation", error="mean_error"),
        Variable("mean_error", ("learning_rate",), "its standard error over runs"),
        Variable("included", ("learning_rate",), "whether the rate lies in the range", kind="bool"),
        Variable("initial_loss", (), "loss at initialisation, mean over runs"),
        Variable("best", (), "least final loss ℓ*"),
        Variable("best_rate", (), "learning rate with the least final loss"),
        Variable("sensitivity", (), "mean excess of the final loss over the best", error="sensitivity_error"),
        Variable("sensitivity_error", (), "its standard error over runs"),
    )

    def stream(self, subject: Runs, draw: Draw) -> Iterator[Reading]:
        """All at once."""
        runs = trajectories(subject, self.name)
        rates = np.array([learning_rate(label, run) for label, run in runs.items()])
        if unknown := [label for label, rate in zip(runs, rates, strict=True) if not rate > 0]:
            raise ValueError(
                f"{unknown[0]!r} does not tell its learning rate: give the optimizer to the Recorder, or write the "
                'rate into the label, as in Runs({"lr 0.1": trajectory}).'
            )
        ends: list[tuple[float, float]] = []
        for label, run in runs.items():
            if self.loss not in run.scalars or not len(run.scalars[self.loss]):
                raise ValueError(missing(run, label, self.loss))
            values = run.scalars[self.loss].to_numpy()
            recorded = values[run.scalars[self.loss].notna()]
            # a last line without a value is one that was not recorded, unless nothing but nan came after it
            ends.append((float(recorded[0]), _final(values)) if len(recorded) else (math.nan, math.nan))
        initial, final = np.array(ends).T
        curve = self._curve(rates, final, initial)
        coords = {"run": np.array(list(runs)), "learning_rate": np.unique(rates)}
        notes = self._notes(np.unique(rates)[np.asarray(curve["included"])])
        values = {"rate": rates, "final": final, "initial": initial, **curve}
        yield self.reading(1.0, values, coords=coords, converged=True, notes=notes)

    def _curve(self, rates: Floats, final: Floats, initial: Floats) -> dict[str, Any]:
        """Losses by learning rate, and the mean excess over the best."""
        start = float(initial[np.isfinite(initial)].mean()) if np.isfinite(initial).any() else math.nan
        kept = np.where(np.isfinite(final), np.minimum(final, start), start)
        grid = np.unique(rates)
        groups = [kept[rates == rate] for rate in grid]
        mean = np.array([g.mean() for g in groups])
        error = np.array([error_of_mean(g) for g in groups])
        best = int(np.argmin(mean))
        inside = np.abs(np.log10(grid / grid[best])) <= self.decades / 2 + 1e-9
        count, spread = int(inside.sum()), error.copy()
        # the best rate stands in every difference: its own weight is 1/k - 1
        weights = inside / count - (np.arange(len(grid)) == best)
        terms = np.where(weights == 0, 0.0, weights * spread)
        found: dict[str, Any] = {
            "mean": mean,
            "mean_error": error,
            "included": inside,
            "initial_loss": start,
            "best": mean[best],
        }
        found |= {"best_rate": grid[best], "sensitivity": mean[inside].mean() - mean[best]}
        return found | {"sensitivity_error": math.sqrt(float((terms**2).sum()))}

    def _notes(self, grid: Floats) -> tuple[str, ...]:
        steps, words = np.diff(np.log(grid)), ["recorded scalars only: no example was looked at"]
        if len(grid) < FEW:
            words.append(f"{len(grid)} learning rates; a sensitivity should rest on {FEW} at least")
        if len(steps) > 1 and steps.std() > UNEVEN * steps.mean():
            words.append("learning rates are not evenly spaced on a logarithm, so their mean leans to the dense part")
        return tuple(words)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """The sensitivity, and the best learning rate with its loss."""
        found: dict[str, Value] = {n: float(data[n]) for n in ("sensitivity", "sensitivity_error", "best_rate", "best")}
        return found | {"rates": int(data.included.sum())}

    def figure(self, data: xr.Dataset) -> Figure:
        """Final loss against the learning rate, with the loss at initialisation."""
        x, y = data["learning_rate"].values, data["mean"].values
        axes = Axis("learning rate", "log"), fitting("final loss", "log", y, data.final.values)
        if not np.isfinite(y).any():
            return Figure((Panel((Text(float(x[0]), 0.0, "no finite loss"),), *axes),))
        marks: list[AnyMark] = [Line(x, y), Points(x, y, data.mean_error.values, "mean over runs")]
        marks.append(Points(data.rate.values, data.final.values, label="one run", role="second"))
        marks.append(Rule(float(data.initial_loss), label="at initialisation"))
        return Figure((Panel(tuple(marks), *axes),))

    def estimate(self, subject: Runs) -> Cost:
        """The scalars of each run."""
        return Cost(2**20 * len(subject), 1, "reading the scalars")


def _final(values: Floats) -> float:
    """The last value where something was recorded; nan where the record of it ends in nan for good."""
    known = np.flatnonzero(~np.isnan(values))
    if not len(known) or len(known) == len(values):
        return float(values[-1])
    # evaluated now and then: gaps as long as those between records are no divergence
    gap = int(np.diff(known).max()) if len(known) > 1 else len(values)
    return float(values[known[-1]]) if len(values) - 1 - known[-1] < gap else math.nan
