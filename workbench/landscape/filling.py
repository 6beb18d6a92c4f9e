"""The arrays of a plane while its grid is being filled: the one place where its points are evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from workbench.landscape.axes import PlaneAxes
from workbench.landscape.directions import mover, norm, unmoved_share
from workbench.landscape.evaluation.runner import in_bfloat16
from workbench.landscape.grid import coarse_to_fine, drawable
from workbench.landscape.points import EVALUATED, PlanePoints
from workbench.landscape.preview import PREVIEWED, Checks, check_precision, preview_error
from workbench.landscape.quadratic import (
    Quadratic,
    agreement_radius,
    differentiable_twice,
    inner_difference,
    quadratic,
)
from workbench.probe import Variable
from workbench.subject import Subject

Array = NDArray[np.float64]
SAMPLED = ("sample_u", "sample_v", "sample_loss", "sample_loss_error")
VARIABLES: tuple[Variable, ...] = (
    Variable("loss", ("u", "v"), "mean loss", "loss per example", "loss_error"),
    Variable("loss_error", ("u", "v"), "standard error of the mean loss over examples", "loss per example"),
    Variable("error_rate", ("u", "v"), "share of examples classified wrongly", "", "error_rate_error"),
    Variable("error_rate_error", ("u", "v"), "standard error of the error rate over examples", ""),
    Variable("own_metric", ("own", "u", "v"), "the subject's own metrics, by name", error="own_metric_error"),
    Variable("own_metric_error", ("own", "u", "v"), "standard error of the subject's own metrics over examples"),
    Variable("own_metric_preview_error", ("own",), "largest difference of a bfloat16 preview's own metrics"),
    *PREVIEWED,
    Variable("evaluated", ("u", "v"), "whether the point was evaluated", kind="bool"),
    Variable("loss_here", (), "mean loss at the model itself", "loss per example", "loss_here_error"),
    Variable("loss_here_error", (), "standard error of loss_here over examples", "loss per example"),
    Variable("sample_u", ("sample",), "first coordinate of each evaluation, in order"),
    Variable("sample_v", ("sample",), "second coordinate of each evaluation, in order"),
    Variable("sample_loss", ("sample",), "mean loss, in order", "loss per example", "sample_loss_error"),
    Variable("sample_loss_error", ("sample",), "standard error of sample_loss", "loss per example"),
    Variable("direction_norm", ("direction",), "length of each direction", "parameter distance"),
    Variable("cosine", (), "cosine of the angle between the directions"),
    Variable("unmoved_share", (), "share of coordinates that the smallest step left unmoved by rounding"),
)
"""What every plane has."""
PREDICTED: tuple[Variable, ...] = (
    Variable("slope", ("direction",), "derivative of the loss along each direction at the model"),
    Variable(
        "curvature",
        ("direction", "along"),
        "second derivatives of the loss in the plane at the model",
        error="curvature_error",
    ),
    Variable("curvature_error", (), "difference of the two mixed derivatives, which rounding makes"),
    Variable("inner_difference", (), "RMS difference of quadratic and loss over the loss's change, inner half"),
    Variable("agreement_radius", (), "coordinate distance within which that difference is at most a tenth"),
)
"""What a plane knows of the quadratic predicted at the model."""


@dataclass(eq=False)
class Filling:
    """A grid of ``axes`` around ``subject``. ``predict``: compare with the quadratic at the model.

    ``there`` makes the subject that stands at coordinates (u, v); None: the subject's own loss, moved. ``preview``:
    forward passes in bfloat16, but for ``here`` and the checks: at the model and on a grid of 3 × 3 points.
    """

    subject: Subject
    axes: PlaneAxes
    predict: bool = True
    there: Callable[[float, float], Subject] | None = None
    preview: bool = False
    said: tuple[str, ...] = ()
    predicted: Quadratic | None = None
    arrays: dict[str, Array] = field(init=False)

    def __post_init__(self) -> None:
        n, m = len(self.axes.u), len(self.axes.v)
        self.at = mover(self.subject, self.axes.first, self.axes.second)
        self.arrays = {name: np.full((n, m), np.nan) for name in EVALUATED}
        self.arrays |= {name: np.full(n * m, np.nan) for name in SAMPLED}
        self.own = tuple(self.subject.metrics)
        self.arrays |= {name: np.full((len(self.own), n, m), np.nan) for name in ("own_metric", "own_metric_error")}
        self.evaluated = np.zeros((n, m), dtype=bool)
        self.points = PlanePoints(self.subject, self.axes.first, self.axes.second, self.total, preview=self.preview)
        self.seen = 0
        self.here = self.subject.evaluate(None, self.metrics)
        self.checks, self.rough = Checks(), self.subject
        self.centre = self._roughly() if self.preview else self.here
        self.predicted = self.axes.quadratic
        self.fixed = self._fixed()
        self._compared: tuple[int, dict[str, Any]] = (0, {})

    def _roughly(self) -> dict[str, float]:
        """The model's own values as a preview has them, checked at once."""
        check_precision(self.subject)
        self.rough = in_bfloat16(self.subject)
        found = self.rough.evaluate(self.rough.params, self.metrics)  # a loss that is not finite is kept
        self.checks.add(found, self.here)
        return found

    @property
    def total(self) -> int:
        """Points of the grid."""
        return self.evaluated.size

    @property
    def share(self) -> float:
        """Share of the work that is done."""
        return (self.seen + 1) / (self.total + 1)

    @property
    def settled(self) -> bool:
        """Whether nothing is left to evaluate."""
        return self.seen == self.total

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is evaluated at each point."""
        return ("loss", "error_rate", *self.own)

    @property
    def coords(self) -> dict[str, Any]:
        """The coordinates of a reading."""
        return {"u": self.axes.u, "v": self.axes.v, "own": list(self.own)}

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

    def explore(self) -> Iterator[None]:
        """Evaluate what is left of a square grid, from coarse to fine; pauses after as many as go together."""
        yield from self.visit([at for at in coarse_to_fine(len(self.axes.u)) if not self.evaluated[at]])

    def visit(self, order: Sequence[tuple[int, int]]) -> Iterator[None]:
        """Evaluate these points of the grid in this order, as many at once as pays; pauses after each such group."""
        if not order:
            return
        left = iter(order)
        for group in self._groups([(float(self.axes.u[i]), float(self.axes.v[j])) for i, j in order]):
            for found, (i, j) in zip(group, left, strict=False):
                self._note(i, j, found)
            yield

    def _groups(self, points: Sequence[tuple[float, float]]) -> Iterator[list[dict[str, float]]]:
        if self.there or self.own:  # only the subject knows the user's own metrics
            yield from ([self.centre if u == 0.0 == v else self._alone(u, v, self.preview)] for u, v in points)
            return
        yield from self.points.in_turn(points, self.metrics)

    def _alone(self, u: float, v: float, preview: bool) -> dict[str, float]:
        """The values at (u, v), evaluated by the subject itself; a loss that is not finite is kept."""
        if self.there:
            there = self.there(u, v)
            there = in_bfloat16(there) if preview else there
            return there.evaluate(there.params, self.metrics)
        return (self.rough if preview else self.subject).evaluate(self.at(u, v), self.metrics)

    def _note(self, i: int, j: int, found: Mapping[str, float]) -> None:
        """The values at grid point (i, j); those at the model are what the subject itself says.

        A preview is checked at the corners, the middles of the sides, and the centre.
        """
        u, v = float(self.axes.u[i]), float(self.axes.v[j])
        found = self.centre if u == 0.0 == v else found
        for name in EVALUATED:
            self.arrays[name][i, j] = found.get(name, np.nan)
        for k, name in enumerate(self.own):
            self.arrays["own_metric"][k, i, j] = found[name]
            self.arrays["own_metric_error"][k, i, j] = found[f"{name}_error"]
        for name, value in zip(SAMPLED, (u, v, found["loss"], found["loss_error"]), strict=True):
            self.arrays[name][self.seen] = value
        self.evaluated[i, j] = True
        self.seen += 1
        self._check(i, j)

    def _check(self, i: int, j: int) -> None:
        """Evaluate a point of a preview's first rough map again in full precision; the model is checked already."""
        u, v = float(self.axes.u[i]), float(self.axes.v[j])
        rough = all(k in (0, n // 2, n - 1) for k, n in zip((i, j), self.evaluated.shape, strict=True))
        if not self.preview or not rough or u == 0.0 == v:
            return
        held = {name: float(self.arrays[name][i, j]) for name in ("loss", "error_rate")}
        held |= {name: float(self.arrays["own_metric"][k, i, j]) for k, name in enumerate(self.own)}
        exact = self._alone(u, v, preview=False)
        self.checks.add(held, {name: exact[name] for name in self.metrics})

    def restore(self, data: xr.Dataset) -> None:
        """Take over what an unfinished run of the same plane had evaluated; nothing where the axes are others.

        Nor where one of both is a preview and the other is not.
        """
        ticks = (np.array_equal(data[name].values, self.coords[name]) for name in ("u", "v", "own"))
        if not all(ticks) or np.isnan(preview_error(data)) == self.preview:
            return
        for name in self.arrays:
            self.arrays[name][...] = data[name].values
        self.evaluated[...] = data.evaluated.values
        self.seen = int(self.evaluated.sum())
        for i, j in np.argwhere(self.evaluated):
            self._check(int(i), int(j))
        if self.seen:
            self.said = (*self.said, f"{self.seen} points were taken over from a run that was cut short")

    def foresee(self) -> None:
        """Compute the quadratic at the model, once; a note says so where the loss has none."""
        if not self.predict or self.predicted is not None:
            return
        self.predict = False
        try:
            found = quadratic(self.subject, self.axes.first, self.axes.second)
        except RuntimeError as problem:
            if differentiable_twice(problem):
                raise
            self.said = (*self.said, "no quadratic is predicted: the loss cannot be differentiated twice")
            return
        if found.slope.any() or found.curvature.any():
            self.predicted = found
        else:
            self.said = (*self.said, "no quadratic is predicted: all derivatives of the loss are zero at the model")

    def values(self) -> Mapping[str, Any]:
        """Everything that is known now, by name."""
        known = self.arrays | self.fixed | self.checks.values | {"evaluated": self.evaluated}
        if self.preview:
            known["own_metric_preview_error"] = [self.checks.largest[name] for name in self.own]
        return known | self._quadratic() if self.predicted else known

    def _quadratic(self) -> dict[str, Any]:
        """The quadratic, and how well it agrees with the finest complete grid (compared once for each)."""
        q, at = self.predicted, drawable(self.evaluated)
        assert q is not None
        if not self.preview and self._compared[0] != len(at) and self.evaluated[np.ix_(at, at)].all():
            u, v = np.meshgrid(self.axes.u[at], self.axes.v[at], indexing="ij")
            loss = self.arrays["loss"][np.ix_(at, at)].ravel()
            points = (u.ravel(), v.ravel(), loss, self.here["loss"], q)
            widths = half_widths(self.axes.u, self.axes.v)
            found = {
                "inner_difference": inner_difference(*points, widths),
                "agreement_radius": agreement_radius(*points),
            }
            self._compared = (len(at), found)
        fixed = {"slope": q.slope, "curvature": q.curvature, "curvature_error": q.asymmetry}
        return fixed | self._compared[1]

    @property
    def notes(self) -> tuple[str, ...]:
        """What subject, axes and quadratic have to say."""
        held = self.predicted is not None and self.subject.norm == "recompute"
        frozen = ("the quadratic holds the recomputed statistics at those of the model",) if held else ()
        how = () if self.there or self.own else (self.points.how,)
        return (*self.checks.words, *self.subject.notes, *self.axes.notes, *self.said, *frozen, *how)


def half_widths(u: Array, v: Array) -> tuple[float, float]:
    """Half of what each axis spans."""
    return float(u[-1] - u[0]) / 2, float(v[-1] - v[0]) / 2
