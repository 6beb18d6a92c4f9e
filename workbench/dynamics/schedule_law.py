"""Loss as a law of the learning rate's schedule: of what was gone forwards, and of what was annealed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import optimize, signal, stats

from workbench.dynamics.labels import missing, trajectories
from workbench.figure import ROLES, AnyMark, Axis, Figure, Line, Panel, Text
from workbench.numerics.crossings import known
from workbench.numerics.sampling import Draw
from workbench.probe import Cost, Look, Probe, Reading, Value, Variable
from workbench.schema import Doc, Range
from workbench.several import Runs
from workbench.trajectory import Trajectory

Floats = NDArray[np.float64]
POINTS = 200
"""Points of each curve that are fitted and listed, evenly spread over its records."""
STEEPEST = 3.0
"""Largest exponent that is tried."""
_RATES = ("lr", "learning_rate")
_NAMES = ("floor", "scale", "exponent", "annealing")


@dataclass(frozen=True)
class ScheduleLaw(Probe[Runs]):
    """Loss against the forward and the annealing area of the learning rate's schedule, one law for several schedules.

    What it measures: with rates η_i of the steps, forward area S₁ = Σ η_i and annealing area S₂ = Σ m_i,
    m_i = ``decay`` · m_(i-1) + η_(i-1) - η_i, the law ℓ = L₀ + A S₁^(-α) - C S₂ fitted by least squares to all runs
    that ``held_out`` does not name: ``floor`` L₀, ``scale`` A, ``exponent`` α, ``annealing`` C. ``error`` is the mean
    relative error of each run's curve, ``error_without`` that of the law with C = 0, fitted likewise.

    How to read it: if one law fits constant and cosine schedules and predicts a held-out one with warm-up, plateau and
    decay, then the schedule acts through two areas only. C > 0 is the gain by annealing.

    What it costs: reading scalars; no model is looked at. Rates are the scalar ``lr`` or ``learning_rate``, else those
    of the optimizer at checkpoints, linear in between: keep enough checkpoints where the rate changes.

    When it misleads: where gradient noise is small there is no gain by annealing, and C is fitted to nothing. All
    schedules constant: C is unknown (nan). The law is about SGD and Adam after warm-up: leave early steps out with
    ``start``. One run alone cannot tell S₂ from S₁ unless its rate both stays and falls.

    Errors: 95 % intervals for independent residuals, which those along a curve are not: they are too small.

    Source: Tissue, Wang and Wang 2024.
    """

    loss: Annotated[str, Doc("The recorded scalar that is fitted.")] = "train_loss"
    decay: Annotated[float, Range(0.0, 1.0, soft=(0.9, 1.0)), Doc("How slowly annealing takes effect, λ.")] = 0.999
    start: Annotated[int, Range(1, 10_000_000, log=True, soft=(1, 1000)), Doc("First step that is fitted.")] = 1
    held_out: Annotated[str, Doc("Labels and globs of runs that are predicted only, between commas.")] = ""

    looks_at: ClassVar[Look] = "runs"
    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("step", ("run", "point"), "step", "steps"),
        Variable("recorded", ("run", "point"), "recorded loss"),
        Variable("law", ("run", "point"), "loss by the law"),
        Variable("forward", ("run", "point"), "forward area S₁"),
        Variable("annealed", ("run", "point"), "annealing area S₂"),
        Variable("error", ("run",), "mean relative error of the law"),
        Variable("error_without", ("run",), "mean relative error of the law without annealing"),
        Variable("predicted_only", ("run",), "whether the run was held out of the fit", kind="bool"),
        Variable("floor", (), "L₀", error="floor_error"),
        Variable("floor_error", (), "half-width of its 95 % interval"),
        Variable("scale", (), "A", error="scale_error"),
        Variable("scale_error", (), "half-width of its 95 % interval"),
        Variable("exponent", (), "α", error="exponent_error"),
        Variable("exponent_error", (), "half-width of its 95 % interval"),
        Variable("annealing", (), "C", error="annealing_error"),
        Variable("annealing_error", (), "half-width of its 95 % interval"),
    )

    def stream(self, subject: Runs, draw: Draw) -> Iterator[Reading]:
        """All at once."""
        runs = trajectories(subject, self.name)
        curves = np.stack([self._curve(label, run) for label, run in runs.items()], axis=1)
        step, recorded, first, second = curves
        words = [w.strip() for w in self.held_out.split(",") if w.strip()]
        out = np.array([any(fnmatchcase(label, w) for w in words) for label in runs])
        if out.all():
            raise ValueError("ScheduleLaw(held_out=...) names every run, so none is left to fit; name fewer.")
        used = np.isfinite(recorded) & (first > 0) & ~out[:, None]
        law, error = fit_law(first[used], second[used], recorded[used])
        plain, _ = fit_law(first[used], np.zeros(int(used.sum())), recorded[used])
        predicted = law_at(law, first, second)
        values: dict[str, Any] = {"step": step, "recorded": recorded, "forward": first, "annealed": second}
        values |= {"law": predicted, "predicted_only": out, "error": _off(predicted, recorded)}
        values |= {"error_without": _off(law_at(plain, first, 0 * second), recorded)}
        values |= dict(zip(_NAMES, law, strict=True))
        values |= {f"{name}_error": e for name, e in zip(_NAMES, error, strict=True)}
        coords, flat = {"run": np.array(list(runs)), "point": np.arange(1, POINTS + 1)}, not second[used].any()
        notes = ["recorded scalars only: no example was looked at"]
        notes += ["no fitted run has a learning rate that changes: annealing is unknown"] if flat else []
        yield self.reading(1.0, values, coords=coords, converged=True, notes=tuple(notes))

    def _curve(self, label: str, run: Trajectory) -> Floats:
        """Step, loss, S₁ and S₂ at the chosen records, (4, POINTS), nan beyond them."""
        if self.loss not in run.scalars:
            raise ValueError(missing(run, label, self.loss))
        every, losses = _known(run, self.loss)
        every, losses = every[every >= self.start], losses[every >= self.start]
        found = np.full((4, POINTS), np.nan)
        if not len(every):
            return found
        kept = np.unique(np.linspace(0, len(every) - 1, min(POINTS, len(every))).round().astype(int))
        steps = every[kept]
        areas_ = areas(_rates(label, run, int(steps[-1])), self.decay)
        found[:, : len(kept)] = np.stack([steps, losses[kept], *(area[steps - 1] for area in areas_)])
        return found

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """The law's numbers, and its errors on runs that were held out (or all)."""
        found: dict[str, Value] = {n + end: float(data[n]) if not end else float(data[n + end])
                                   for n in _NAMES for end in ("", "_error")}  # fmt: skip
        out = data.predicted_only.values if data.predicted_only.values.any() else np.ones(data.sizes["run"], dtype=bool)
        return found | {n: float(data[n].values[out].mean()) for n in ("error", "error_without")}

    def figure(self, data: xr.Dataset) -> Figure:
        """Each run's loss with the law."""
        axes, marks = (Axis("step"), Axis("loss")), list[AnyMark]()
        for place, role in zip(range(data.sizes["run"]), ROLES, strict=False):
            one = data.isel(run=place)
            if np.isfinite(one.recorded.values).any():
                label = str(one["run"].values) + (" (predicted)" if bool(one.predicted_only) else "")
                marks += [Line(one.step.values, one.recorded.values, label, role)]
                marks += [Line(one.step.values, one.law.values, "", "reference")]
        return Figure((Panel(tuple(marks) or (Text(0.0, 0.0, "no finite loss"),), *axes),))

    def estimate(self, subject: Runs) -> Cost:
        """The scalars of each run."""
        return Cost(2**20 * len(subject), 1, "reading the scalars")


def areas(rates: Floats, decay: float) -> tuple[Floats, Floats]:
    """(S₁, S₂) after each step, (steps,) each."""
    falls = -np.diff(rates, prepend=rates[:1])
    momentum = signal.lfilter([1.0], [1.0, -decay], falls)
    return np.cumsum(rates), np.cumsum(np.asarray(momentum, dtype=np.float64))


def law_at(law: Floats, first: Floats, second: Floats) -> Floats:
    """L₀ + A S₁^(-α) - C S₂; an unknown C counts as none where nothing is annealed."""
    floor, scale, exponent, annealing = law
    gain = 0.0 if math.isnan(annealing) else annealing
    with np.errstate(divide="ignore"):
        return floor + scale * first**-exponent - gain * second


def fit_law(first: Floats, second: Floats, loss: Floats) -> tuple[Floats, Floats]:
    """(L₀, A, α, C) by least squares and half-widths of 95 % intervals; nan where the points do not tell."""
    unknown = np.full(4, np.nan), np.full(4, np.nan)
    anneals = bool(np.any(second))
    if len(loss) < 5 + anneals or not np.ptp(first) > 0:
        return unknown
    unit = float(np.exp(np.log(first).mean()))  # areas in units of their middle, so that columns are alike in size
    weight = float(np.abs(second).max()) if anneals else 1.0

    def design(alpha: float) -> Floats:
        power = (first / unit) ** -alpha
        return np.stack([np.ones_like(power), power, *([-second / weight] if anneals else [])], axis=1)

    def left(alpha: float) -> float:
        matrix = design(alpha)
        return float(((loss - matrix @ np.linalg.lstsq(matrix, loss, rcond=None)[0]) ** 2).sum())

    grid = np.geomspace(0.01, STEEPEST, 60)
    near = float(grid[int(np.argmin([left(a) for a in grid]))])
    found: Any = optimize.minimize_scalar(
        left, bounds=(near / 1.15, near * 1.15), method="bounded", options={"xatol": 1e-9}
    )
    alpha = float(found.x)
    solved = np.linalg.lstsq(design(alpha), loss, rcond=None)[0]
    gain = solved[2] / weight if anneals else math.nan
    law = np.array([solved[0], solved[1] * unit**alpha, alpha, gain])
    power = first**-alpha
    columns = [np.ones_like(power), power, -law[1] * power * np.log(first), *([-second] if anneals else [])]
    slopes = np.stack(columns, axis=1)
    freedom = len(loss) - slopes.shape[1]
    sizes = np.linalg.norm(slopes, axis=0)
    inverse = np.linalg.pinv((slopes / sizes).T @ (slopes / sizes)) * left(alpha) / freedom
    error = float(stats.t.ppf(0.975, freedom)) * np.sqrt(np.maximum(inverse.diagonal(), 0.0)) / sizes
    return law, error if anneals else np.append(error, np.nan)


def _off(predicted: Floats, recorded: Floats) -> Floats:
    """Mean relative error of each run, nan where nothing is known."""
    off = np.abs(predicted / recorded - 1)
    known = np.isfinite(off)
    return np.array([o[k].mean() if k.any() else np.nan for o, k in zip(off, known, strict=True)])


def _known(run: Trajectory, name: str) -> tuple[NDArray[np.int64], Floats]:
    """The steps at which a scalar was recorded, and its values."""
    at, values = known(run.scalars.index, run.scalars[name])
    return at.astype(np.int64), values


def _rates(label: str, run: Trajectory, last: int) -> Floats:
    """The learning rate of steps 1 to ``last``."""
    at = np.arange(1, last + 1)
    for name in _RATES:
        steps, rates = _known(run, name) if name in run.scalars else (at[:0], np.empty(0))
        if len(steps):
            return np.interp(at, steps, rates)
    held = {step: run.optimizer(step) for step in run.steps}
    known = {step: float(o["groups"][0]["lr"]) for step, o in held.items() if o and o["groups"]}
    if not known:
        raise ValueError(f"{label!r} recorded no learning rate: recorder.step(lr=...), or give it the optimizer.")
    return np.interp(at, list(known), list(known.values()))
