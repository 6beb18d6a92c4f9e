"""Spikes of recorded curves: losses and gradient norms that leave what was usual."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from workbench.dynamics.described import TAKEN
from workbench.figure import AnyMark, Axis, Figure, Line, Panel, Points, Rule, Text
from workbench.numerics.sampling import Draw
from workbench.probe import Cost, Look, Probe, Reading, Value, Variable
from workbench.schema import Doc, Range
from workbench.trajectory import Trajectory

Floats = NDArray[np.float64]
SERIES = 4
"""Series that are drawn."""
EARLIEST = 10
"""Records before one, below which nothing is usual yet."""
NORMAL = 1.4826
"""Standard deviation of a normal over its median absolute deviation."""
_ROWS = 10_000


@dataclass(frozen=True)
class Spikes(Probe[Trajectory]):
    """Spikes of recorded losses and gradient norms.

    What it measures, for each recorded series: for gradient norms (names with "grad") the gradient spike score
    ``score`` = |g_t| / mean_s |g_s| over the whole record, a spike above ``gradient_threshold``; for all others
    the robust z-value (ℓ_t - median) / (1.4826 · median absolute deviation) over the ``window`` records before t, a
    spike above ``threshold``. ``count`` of spikes, ``largest`` score and ``at`` which step; neighbouring records above
    the threshold count once.

    How to read it: a spike that returns within a window is a passing instability; scores that grow from spike to spike
    announce divergence. ``AttentionLogits``, ``LogZ`` and the sharpness say what is behind one.

    What it costs: reading the scalars; no model is looked at.

    When it misleads: the mean over the whole record knows the future, and with T records no score can exceed T, so 51
    are needed for one above 50. Losses of mini-batches scatter: the median absolute deviation holds that, epochs of
    unlike batches it does not. The first ten records have no z-value. Values that are nan have no score; ``unknown``
    counts them.

    Errors: exact for the record. Source: Huang et al. 2025 (spike score); the robust z-value is a convention.
    """

    series: Annotated[str, Doc('Names and globs of recorded scalars between commas; "auto": with loss or grad.')] = (
        "auto"
    )
    window: Annotated[int, Range(EARLIEST, 1_000_000, log=True, soft=(50, 2000)), Doc("Records before one.")] = 200
    threshold: Annotated[float, Range(1.0, 1e6, log=True, soft=(3, 30)), Doc("Robust z-value of a spike.")] = 6.0
    gradient_threshold: Annotated[
        float, Range(1.0, 1e6, log=True, soft=(5, 500)), Doc("Gradient spike score of a spike.")
    ] = 50.0

    looks_at: ClassVar[Look] = "trajectory"
    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("value", ("step", "series"), "recorded value"),
        Variable("score", ("step", "series"), "how far above what is usual"),
        Variable("spike", ("step", "series"), "whether it is a spike", kind="bool"),
        Variable("limit", ("series",), "score above which it is one"),
        Variable("count", ("series",), "spikes, neighbouring ones once"),
        Variable("largest", ("series",), "largest score"),
        Variable("at", ("series",), "step of the largest score", "steps"),
        Variable("unknown", ("series",), "records that are nan or infinite"),
    )

    def stream(self, subject: Trajectory, draw: Draw) -> Iterator[Reading]:
        """All at once."""
        table = subject.scalars.drop(columns=list(TAKEN), errors="ignore")
        names = self._chosen([str(c) for c in table.columns], subject.label)
        values = table[names].to_numpy(dtype=np.float64)
        steps = table.index.to_numpy()
        gradient = np.array(["grad" in name.lower() for name in names])
        limits = np.where(gradient, self.gradient_threshold, self.threshold)
        scores = np.stack(
            [(spike_scores if g else robust_scores)(v, self.window) for g, v in zip(gradient, values.T, strict=True)], 1
        )
        spike = scores > limits
        found = {"value": values, "score": scores, "spike": spike, "limit": limits}
        found |= _counts(steps, spike, scores) | {"unknown": (~np.isfinite(values)).sum(0)}
        coords = {"step": steps, "series": np.array(names)}
        yield self.reading(1.0, found, coords=coords, converged=True, notes=self._notes(values, gradient))

    def _chosen(self, known: list[str], label: str) -> list[str]:
        words = "*loss*, *grad*" if self.series.strip() == "auto" else self.series
        patterns = [w.strip() for w in words.split(",") if w.strip()]
        found = [name for name in known if any(fnmatch.fnmatchcase(name.lower(), p.lower()) for p in patterns)]
        if not found:
            raise ValueError(
                f"{label} recorded no series called {self.series!r}; it has: {', '.join(known) or 'none'}. Say which "
                "with series=, or record some: recorder.step(train_loss=loss)."
            )
        return found

    def _notes(self, values: Floats, gradient: NDArray[np.bool_]) -> tuple[str, ...]:
        few = bool(gradient.any()) and len(values) <= self.gradient_threshold
        words = f"{len(values)} records cannot show a gradient spike score above {self.gradient_threshold:g}"
        return ("recorded scalars only: no example was looked at", *((words,) if few else ()))

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """Spikes in all, and the largest score over its threshold with where it is."""
        over = (data.largest / data.limit).values
        found: dict[str, Value] = {"spikes": int(data["count"].sum())}
        if not np.isfinite(over).any():
            return found
        place = int(np.nanargmax(over))
        found |= {"largest": float(data.largest[place]), "at_step": int(data["at"][place])}
        return found | {"series": str(data["series"].values[place])}

    def figure(self, data: xr.Dataset) -> Figure:
        """Each series with its spikes marked, over its scores with the threshold."""
        names = [str(n) for n in data["series"].values[:SERIES]]
        return Figure(tuple(panel for name in names for panel in _panels(data.sel(series=name), name)), columns=2)

    def estimate(self, subject: Trajectory) -> Cost:
        """The table and some windows of it."""
        return Cost(8 * (_ROWS * self.window * 3 + 20 * max(len(subject.scalars), 1)), 1, "reading the scalars")


def robust_scores(values: Floats, window: int) -> Floats:
    """(x_t - median)/(1.4826 MAD) of the ``window`` values before each, nan where fewer than ten are known."""
    padded = np.concatenate([np.full(window, np.nan), np.where(np.isfinite(values), values, np.nan)])[:-1]
    windows = np.lib.stride_tricks.sliding_window_view(padded, window)
    found = np.full(len(values), np.nan)
    for first in range(0, len(values), _ROWS):
        part = windows[first : first + _ROWS]
        enough = np.isfinite(part).sum(1) >= EARLIEST
        rows = part[enough]
        middle = np.nanmedian(rows, axis=1)
        spread = NORMAL * np.nanmedian(np.abs(rows - middle[:, None]), axis=1)
        above = values[first : first + _ROWS][enough] - middle
        with np.errstate(divide="ignore", invalid="ignore"):
            found[first : first + _ROWS][enough] = np.where(above == 0, 0.0, above / spread)
    return np.where(np.isnan(values), np.nan, found)


def spike_scores(values: Floats, window: int) -> Floats:
    """|g_t| over the mean of all |g_s| that are finite; ``window`` plays no part."""
    sizes = np.abs(values)
    known = np.isfinite(sizes)
    return sizes / sizes[known].mean() if known.any() else np.full(len(values), np.nan)


def _counts(steps: NDArray[np.int64], spike: NDArray[np.bool_], scores: Floats) -> dict[str, Floats]:
    starts = spike & ~np.vstack([np.zeros((1, spike.shape[1]), dtype=bool), spike[:-1]])
    some = ~np.isnan(scores)
    largest = np.array([s[k].max() if k.any() else np.nan for s, k in zip(scores.T, some.T, strict=True)])
    at = np.array([steps[np.nanargmax(s)] if k.any() else np.nan for s, k in zip(scores.T, some.T, strict=True)])
    return {"count": starts.sum(0).astype(float), "largest": largest, "at": at.astype(float)}


def _panels(data: xr.Dataset, name: str) -> Iterator[Panel]:
    steps, values, spikes = data["step"].values, data.value.values, data.spike.values
    x = Axis("step")
    if not np.isfinite(values).any():
        yield Panel((Text(0.0, 0.0, f"{name}: no finite value"),), x, Axis(name.replace("_", " ")))
        return
    marks: list[AnyMark] = [Line(steps, values)]
    if spikes.any():
        marks.append(Points(steps[spikes], values[spikes], label="spike", role="second"))
    yield Panel(tuple(marks), x, Axis(name.replace("_", " ")))
    limit = Rule(float(data.limit), label="spike above")
    scores = np.where(np.isfinite(data.score.values), data.score.values, np.nan)
    yield Panel((Line(steps, scores), limit), x, Axis("score", "symlog", threshold=1.0))
