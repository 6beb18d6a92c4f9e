"""The loss on the straight line between two models, and the barrier that it meets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from workbench.figure import AnyMark, Axis, Band, Figure, Panel, Points
from workbench.figure import Line as Curve
from workbench.landscape.grid import levels
from workbench.landscape.points import EVALUATED
from workbench.landscape.segment import Segment
from workbench.landscape.settings import Metric, NormBetween
from workbench.numerics.basis import norm
from workbench.numerics.sampling import Draw
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Doc, Range
from workbench.several import Pair

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Path(Probe[Pair]):
    """The loss between two models: ``loss[i] = L((1 - α_i) θ_a + α_i θ_b)``, and the barrier on the way.

    What it measures: mean loss and error rate on the straight line from the first model (α = 0) to the second (α = 1)
    and ``overshoot`` beyond both. ``barrier`` = max_α L(α) - ((1-α) L(0) + α L(1)) over [0, 1] (Entezari et al. 2022);
    ``barrier_mean`` and ``error_barrier_mean`` = max_α - mean of the ends, of loss and error rate (Frankle et al.
    2020); ``barrier_maximum`` = max_α - larger end; ``greatest_rise``, how far the loss ever climbs above an earlier
    value on the way from first to second (Goodfellow et al. 2015).

    How to read it: no barrier beyond its error means that the two are linearly mode connected on these examples.
    Two networks trained apart may differ by a mere permutation of their units, which makes a barrier that is not one
    of the loss's shape. From the initialisation to a trained model, no rise is the monotone interpolation that is
    often seen.

    What it costs: a forward pass over the examples for each point; with ``norm="recompute"`` and BatchNorm two.

    When it misleads: BatchNorm's statistics of the end points are wrong in between, which alone makes a barrier:
    ``norm="recompute"``, the default, estimates them anew at each point. Unequal ends make ``barrier_mean`` large. A
    narrow barrier can lie between two points.

    Errors: ``barrier_error`` is the standard error over examples of the difference at the highest point, examples
    paired (nan where losses do not come apart); it ignores that the highest of several points was picked.
    """

    looks_at: ClassVar[Literal["pair"]] = "pair"

    points: Annotated[int, Range(5, 401, soft=(11, 101)), Doc("Points from the first model to the second.")] = 31
    overshoot: Annotated[float, Range(0.0, 1.0, soft=(0.0, 0.5)), Doc("How far beyond both, in their distance.")] = 0.25
    norm: NormBetween = "recompute"
    metric: Metric = "loss"

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("loss", ("alpha",), "mean loss", "loss per example", "loss_error"),
        Variable("loss_error", ("alpha",), "standard error of the mean loss over examples", "loss per example"),
        Variable("error_rate", ("alpha",), "share of examples classified wrongly", "", "error_rate_error"),
        Variable("error_rate_error", ("alpha",), "standard error of the error rate over examples"),
        Variable("evaluated", ("alpha",), "whether the point was evaluated", kind="bool"),
        Variable("barrier", (), "height above the chord between the ends", "loss per example", "barrier_error"),
        Variable("barrier_error", (), "standard error of the barrier over examples", "loss per example"),
        Variable("barrier_place", (), "where on the way it is met, from 0 to 1"),
        Variable("barrier_mean", (), "height above the mean of the ends", "loss per example", "barrier_error"),
        Variable("barrier_maximum", (), "height above the higher end", "loss per example", "barrier_error"),
        Variable("error_barrier_mean", (), "error rate's height above the mean of the ends", "", "error_barrier_error"),
        Variable("error_barrier_error", (), "standard error of the error rate's barrier over examples, unpaired"),
        Variable("greatest_rise", (), "largest rise on the way from first to second", "loss per example"),
        Variable("distance", (), "distance between the two models", "parameter distance"),
    )

    def stream(self, subject: Pair, draw: Draw) -> Iterator[Reading]:
        """Both ends and the middle first, then from coarse to fine, then what lies beyond; a reading a point."""
        subject.check_alike()
        way = _Way(self, subject)
        for i in way.order():
            way.evaluate(i)
            yield way.reading()

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """The barriers with their errors, the ends and the distance."""
        ends = {f"loss_{name}": float(data.loss.sel(alpha=a)) for name, a in (("first", 0.0), ("second", 1.0))}
        return {
            "barrier": float(data.barrier),
            "barrier_error": float(data.barrier_error),
            "barrier_mean": float(data.barrier_mean),
            "error_barrier_mean": float(data.error_barrier_mean),
            "error_barrier_mean_error": float(data.error_barrier_error),
            "greatest_rise": float(data.greatest_rise),
            **ends,
            "distance": float(data.distance),
        }

    def figure(self, data: xr.Dataset) -> Figure:
        """The curve with its error band, the two models, the chord between them."""
        seen = data.evaluated.values
        x, y, e = (
            a[seen] for a in (data["alpha"].values, data[self.metric].values, data[f"{self.metric}_error"].values)
        )
        words = self.metric.replace("_", " ")
        ends = data[self.metric].sel(alpha=[0.0, 1.0]).values
        marks: list[AnyMark] = [
            Band(x, y - e, y + e, "± standard error"),
            Curve(x, y, words),
            Curve([0.0, 1.0], ends, "chord", "reference"),
            Points([0.0, 1.0], ends, label="the two models", role="reference"),
        ]
        if self.metric == "loss" and float(data.barrier) > 0:
            place, height = float(data.barrier_place), float(data.barrier)
            foot = (1 - place) * ends[0] + place * ends[1]
            marks.append(Curve([place, place], [foot, foot + height], f"barrier {height:.3g}", "second"))
        return Figure((Panel(tuple(marks), Axis("from the first model (0) to the second (1)"), Axis(words)),))

    def estimate(self, subject: Pair) -> Cost:
        """Two models, one between them, and the forward pass of a chunk."""
        first = subject.first
        places = _positions(self.points, self.overshoot).size
        size = 4 * first.size * first.dtype.itemsize + first.memory()
        return Cost(size, places, f"{places} forward passes over {first.examples} examples")


def _positions(points: int, overshoot: float) -> Array:
    """Evenly spaced α with 0 and 1 among them exactly, reaching ``overshoot`` beyond both as far as steps fit."""
    beyond = math.floor(overshoot * (points - 1) + 1e-9)
    return np.arange(-beyond, points + beyond) / (points - 1)


@dataclass(eq=False)
class _Way:
    """The arrays of a path while it is being walked."""

    probe: Path
    pair: Pair

    def __post_init__(self) -> None:
        first, second = self.pair.first, self.pair.second
        self.alpha = _positions(self.probe.points, self.probe.overshoot)
        self.segment = Segment(first.under(self.probe.norm), first.tensors(), second.tensors())
        flats = [s.flatten(s.params).double() for s in (first, second)]
        self.distance = float(norm(flats[0] - flats[1]))

    def order(self) -> Iterator[int]:
        """Indices: the ends and the middle, finer and finer, then beyond."""
        start, n = int(np.flatnonzero(self.alpha == 0)[0]), self.probe.points
        inside = list(dict.fromkeys(start + int(i) for level in levels(n) for i in (level[0], level[-1], *level)))
        yield from inside
        yield from (i for i in range(self.alpha.size) if i not in set(inside))

    def evaluate(self, i: int) -> None:
        """The values at position i."""
        self.segment.evaluate(float(self.alpha[i]))

    def reading(self) -> Reading:
        """What is known now."""
        evaluated = np.array([float(a) in self.segment.found for a in self.alpha])
        heights = self.segment.heights()
        if heights:
            heights["error_barrier_error"] = heights["error_barrier_mean_error"]
        declared = {v.name for v in self.probe.variables}
        values: dict[str, Any] = {name: self.segment.values(name, self.alpha) for name in EVALUATED}
        values |= {name: height for name, height in heights.items() if name in declared}
        return self.probe.reading(
            float(evaluated.mean()),
            values | {"evaluated": evaluated, "distance": self.distance},
            coords={"alpha": self.alpha},
            converged=bool(evaluated.all()),
            notes=self.segment.ground.notes,
        )
