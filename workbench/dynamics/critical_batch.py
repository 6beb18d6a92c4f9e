"""Critical batch size from trainings: steps against examples that are needed to reach one loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import optimize, stats

from workbench.dynamics.labels import batch_size, learning_rate, missing, trajectories
from workbench.figure import AnyMark, Axis, Figure, Line, Panel, Points, Rule, Text
from workbench.numerics.sampling import Draw
from workbench.probe import Cost, Look, Probe, Reading, Value, Variable
from workbench.schema import Doc, Range
from workbench.several import Runs

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class CriticalBatch(Probe[Runs]):
    """Critical batch size: the trade of optimizer steps against examples, over runs that differ in batch size.

    What it measures: for each run with batch size B, the first step S at which ``series`` has stayed at or below
    ``target`` for ``sustain`` records, and E = B · S examples; over all runs that got there, the hyperbola
    (S/S_min - 1)(E/E_min - 1) = 1, which is S = S_min + E_min/B, fitted to log S by least squares. ``critical_batch``
    = E_min/S_min: there, twice the fewest steps and twice the fewest examples are needed.

    Where a batch size comes with several learning rates, the one that needs the fewest steps (geometric mean over its
    runs, all of which must get there) is its own, and only its runs are ``counted`` in the fit.

    How to read it: runs left of the corner waste steps, those right of it examples. Compare ``critical_batch`` with the
    noise scale of ``GradientNoise`` along the path; it grows as ``target`` falls.

    What it costs: reading scalars; no model is looked at. Batch sizes are the scalar ``batch_size`` or what the labels
    say ("batch 64"), learning rates those of the recorded optimizer or what the labels say ("lr 0.1").

    When it misleads: each batch size needs its own best learning rate, else the hyperbola is that of the tuning. Batch
    sizes on one side of the corner leave the other end to extrapolation, and the interval says so. A target that only
    large batches reach selects runs.

    Errors: 95 % intervals of the fit in the logarithms of S_min and E_min, from the scatter of log S with n - 2 degrees
    of freedom; nan ("undefined") with fewer than two batch sizes that got there, and no intervals with two runs.

    Source: McCandlish, Kaplan, Amodei et al. 2018.
    """

    series: Annotated[str, Doc("The recorded scalar that is to reach the target.")] = "train_loss"
    target: Annotated[
        float | None, Range(-1e9, 1e9), Doc("What it is to reach; None: the lowest that every batch size reaches.")
    ] = None
    sustain: Annotated[int, Range(1, 10_000, soft=(1, 50)), Doc("Records for which it must stay there.")] = 1
    best_rate: Annotated[bool, Doc("Whether only the quickest learning rate of each batch size counts.")] = True

    looks_at: ClassVar[Look] = "runs"
    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("batch_size", ("run",), "batch size of the run", "examples"),
        Variable("learning_rate", ("run",), "learning rate, where one batch size has several"),
        Variable("counted", ("run",), "whether the run's learning rate is its batch size's best", kind="bool"),
        Variable("steps", ("run",), "steps to the target", "steps"),
        Variable("examples", ("run",), "examples to the target", "examples"),
        Variable("reached", (), "runs that reached the target"),
        Variable("target_value", (), "what was to be reached"),
        Variable("fewest_steps", (), "S_min", "steps", "fewest_steps_error"),
        Variable("fewest_steps_error", (), "half the width of its 95 % interval", "steps"),
        Variable("fewest_examples", (), "E_min", "examples", "fewest_examples_error"),
        Variable("fewest_examples_error", (), "half the width of its 95 % interval", "examples"),
        Variable("critical_batch", (), "E_min/S_min", "examples", "critical_batch_error"),
        Variable("critical_batch_error", (), "half the width of its 95 % interval", "examples"),
        Variable("critical_batch_low", (), "lower end of its 95 % interval", "examples"),
        Variable("critical_batch_high", (), "upper end of its 95 % interval", "examples"),
        Variable("misfit", (), "root mean square of log S about the hyperbola"),
    )

    def stream(self, subject: Runs, draw: Draw) -> Iterator[Reading]:
        """All at once."""
        runs = trajectories(subject, self.name)
        curves: list[tuple[Floats, Floats]] = []
        for label, run in runs.items():
            if self.series not in run.scalars:
                raise ValueError(missing(run, label, self.series))
            column = run.scalars[self.series].dropna()
            curves.append((column.index.to_numpy(dtype=np.float64), column.to_numpy(dtype=np.float64)))
        sizes = np.array([batch_size(label, run) for label, run in runs.items()])
        rates = np.full(len(sizes), np.nan)
        if self.best_rate and len(np.unique(sizes)) < len(sizes):
            rates = np.array([learning_rate(label, run) for label, run in runs.items()])
        least = np.array([float(v.min()) if len(v) else np.nan for _, v in curves])
        target = self.target if self.target is not None else lowest_for_all(sizes, rates, least)
        steps = np.array([first_reached(t, v, target, self.sustain) for t, v in curves])
        counted = quickest(sizes, rates, steps)
        values: dict[str, Any] = {"batch_size": sizes, "learning_rate": rates, "counted": counted}
        values |= {"steps": steps, "examples": sizes * steps, "target_value": target}
        values |= {"reached": np.isfinite(steps).sum(), **fit_hyperbola(sizes[counted], steps[counted])}
        coords = {"run": np.array(list(runs))}
        yield self.reading(1.0, values, coords=coords, converged=True, notes=self._notes(list(runs), sizes, values))

    def _notes(self, labels: list[str], sizes: Floats, values: dict[str, Any]) -> tuple[str, ...]:
        words = ["recorded scalars only: no example was looked at"]
        silent = [label for label, size in zip(labels, sizes, strict=True) if not size > 0]
        if silent:
            words.append(f"{silent[0]!r} does not tell its batch size: record batch_size, or label it 'batch 64'")
        if not math.isfinite(values.get("critical_batch", math.nan)):
            words.append("the critical batch size is undefined: two batch sizes at least must reach the target")
        return tuple(words)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """The critical batch size with its interval, and both ends of the hyperbola."""
        names = ("critical_batch", "fewest_steps", "fewest_examples")
        found: dict[str, Value] = {n + end: float(data[n + end]) for n in names for end in ("", "_error")}
        ends = {n: float(data[n]) for n in ("critical_batch_low", "critical_batch_high", "target_value")}
        return found | ends | {"reached": int(data.reached)}

    def figure(self, data: xr.Dataset) -> Figure:
        """Steps against examples, with the hyperbola and its asymptotes."""
        return Figure((trade_panel(data),))

    def estimate(self, subject: Runs) -> Cost:
        """The scalars of each run."""
        return Cost(2**20 * len(subject), 1, "reading the scalars")


def trade_panel(data: xr.Dataset) -> Panel:
    """Steps against examples of data with the names of :class:`CriticalBatch`, one entry a run or a batch size."""
    axes = Axis("examples to the target", "log"), Axis("steps to the target", "log")
    x, y = data.examples.values, data.steps.values
    if not np.isfinite(x).any():
        return Panel((Text(1.0, 1.0, "no run with a known batch size reached the target"),), *axes)
    counted = data.counted.values if "counted" in data else np.ones(len(x), dtype=bool)
    marks: list[AnyMark] = [Points(x[counted], y[counted], label="runs")]
    if np.isfinite(x[~counted]).any():
        marks.append(Points(x[~counted], y[~counted], label="other learning rates", role="reference"))
    fewest, most = float(data.fewest_steps), float(data.fewest_examples)
    if math.isfinite(fewest):
        known = data.batch_size.values[counted & np.isfinite(x)]
        sizes = np.geomspace(known.min() / 3, known.max() * 3, 100)
        steps = fewest + most / sizes
        marks += [Line(steps * sizes, steps, "hyperbola", "second"), Rule(fewest, "y", "S_min")]
        marks += [Rule(most, "x", "E_min")]
    return Panel(tuple(marks), *axes)


def _alike(sizes: Floats, rates: Floats) -> list[list[NDArray[np.intp]]]:
    """For each batch size, the runs of each of its learning rates; a run of no known batch size stands alone."""
    known = [np.flatnonzero(sizes == size) for size in np.unique(sizes[np.isfinite(sizes)])]
    rate = np.nan_to_num(rates, nan=-1.0)
    groups = [[runs[rate[runs] == r] for r in np.unique(rate[runs])] for runs in known]
    return groups + [[np.array([run])] for run in np.flatnonzero(~np.isfinite(sizes))]


def lowest_for_all(sizes: Floats, rates: Floats, least: Floats) -> float:
    """The lowest value that every batch size reaches in all runs of one of its learning rates; from runs (n,)."""
    each = [min(_largest(least[runs]) for runs in groups) for groups in _alike(sizes, rates)]
    found = [value for value in each if math.isfinite(value)]
    return max(found) if found else math.nan


def _largest(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.max()) if len(known) else math.inf


def quickest(sizes: Floats, rates: Floats, steps: Floats) -> NDArray[np.bool_]:
    """Which runs (n,) are of their batch size's quickest learning rate; all of them where none brings all runs there.

    Rates are compared by the geometric mean of ``steps``; nan, for a run that did not get there, loses.
    """
    counted = np.ones(len(sizes), dtype=bool)
    for groups in _alike(sizes, rates):
        means = np.array([np.log(np.maximum(steps[runs], 1)).mean() for runs in groups])
        if len(groups) > 1 and np.isfinite(means).any():
            counted[np.concatenate(groups)] = False
            counted[groups[int(np.nanargmin(means))]] = True
    return counted


def first_reached(steps: Floats, values: Floats, target: float, sustain: int) -> float:
    """The first step from which ``sustain`` records in a row are at or below the target; nan where there is none."""
    below = values <= target
    if len(below) < sustain:
        return math.nan
    whole = np.lib.stride_tricks.sliding_window_view(below, sustain).all(1)
    return float(steps[int(np.argmax(whole))]) if whole.any() else math.nan


def fit_hyperbola(sizes: Floats, steps: Floats) -> dict[str, float]:
    """S = S_min + E_min/B by least squares in log S over runs (n,), with 95 % intervals; {} below two batch sizes."""
    known = np.isfinite(sizes) & np.isfinite(steps) & (sizes > 0) & (steps > 0)
    b, logs = sizes[known], np.log(steps[known])
    if len(np.unique(b)) < 2:
        return {}

    def off(p: Floats) -> Floats:
        return np.logaddexp(p[0], p[1] - np.log(b)) - logs

    start = np.array([logs.min() - 0.7, (logs + np.log(b)).min() - 0.7])
    found = optimize.least_squares(off, start, x_scale=1.0, xtol=1e-14, ftol=1e-14, gtol=1e-14)
    fewest, most = np.exp(found.x)
    freedom, rss = len(b) - 2, float((found.fun**2).sum())
    values = {"fewest_steps": fewest, "fewest_examples": most, "critical_batch": most / fewest}
    values |= {"misfit": math.sqrt(rss / len(b))}
    if freedom < 1:
        return values
    covariance = np.linalg.pinv(found.jac.T @ found.jac) * rss / freedom
    reach = float(stats.t.ppf(0.975, freedom))
    across = {"fewest_steps": (1, 0), "fewest_examples": (0, 1), "critical_batch": (-1, 1)}
    for name, direction in across.items():
        width = reach * math.sqrt(max(float(np.array(direction) @ covariance @ np.array(direction)), 0.0))
        values[f"{name}_error"] = values[name] * math.sinh(min(width, 700.0))
        if name == "critical_batch":
            values |= {f"{name}_low": values[name] * math.exp(-width), f"{name}_high": values[name] * _exp(width)}
    return values


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
