"""A recorded training on the plane of its own principal components, and what that plane does not show of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from workbench.figure import AnyMark, Axis, Band, Figure, Line, Panel, Points, Role, fitting, step_axis
from workbench.landscape.directions import mover
from workbench.landscape.grid import coarse_to_fine, levels
from workbench.landscape.kinds import recorded
from workbench.landscape.picture import field_of, note, panels
from workbench.landscape.points import EVALUATED, PlanePoints, expected_bytes
from workbench.landscape.settings import View
from workbench.numerics.basis import norm
from workbench.numerics.geometry import coordinates, principal_path
from workbench.numerics.sampling import Draw
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Choice, Display, Doc, Range
from workbench.subject import Subject
from workbench.trajectory import Trajectory

Array = NDArray[np.float64]
REACH = 1.2
"""The plane reaches so many times as far as the path."""


@dataclass(frozen=True)
class TrajectoryView(Probe[Trajectory]):
    """A recorded training drawn over the loss on the plane of its two principal components, and what that hides.

    What it measures: with θ_t the weights at the chosen checkpoints, the axes are the two leading principal components
    of the mean-centred path, unit length; (u, v) = (0, 0) is the checkpoint at ``origin``. On the plane ``loss[i, j]``
    = L(θ_origin + u_i d1 + v_j d2). For every checkpoint: its projection (``path_u``, ``path_v``), its distance from
    the plane, ``path_loss`` = L(θ_t), the loss that training saw, ``plane_loss``, the loss at the projection, which
    the picture shows in its place, and ``gap`` = plane_loss - path_loss. ``explained_variance`` are the components'
    shares of the path's variance, ``random_walk`` those of a random walk of as many points in many dimensions
    (Antognini and Sohl-Dickstein 2018, arXiv:1806.08805): 61 % and 15 % for a long one.

    How to read it: shares are a finding only beyond the random walk's. Where ``gap`` is not small the coloured loss
    under the path is not the loss of training, whatever share of the variance the plane shows.

    What it costs: points² forward passes for the plane, four for each checkpoint, whose weights are also read from
    disk about as often as there are checkpoints; with ``norm="recompute"`` and BatchNorm twice as many passes.

    When it misleads: checkpoints recorded at even steps weigh late training, ones on a log scale early training:
    ``spacing="arc_length"`` takes them at equal lengths of the path. Principal components of any smooth path look
    like parabolas. BatchNorm's running statistics belong to one checkpoint; ``norm="recompute"``, the default,
    estimates them anew at each point, also for ``path_loss``, so that the two losses compare.

    Errors: standard errors over the examples; ``gap_error`` pairs them (nan where losses do not come apart).
    """

    looks_at: ClassVar[Literal["trajectory"]] = "trajectory"

    points: Annotated[
        int, Range(3, 201, 2, soft=(5, 51)), Doc("Grid points on each axis; cost grows as its square.")
    ] = 21
    extent: Annotated[
        float, Range(0.1, 100.0, log=True, soft=(0.5, 4.0)), Doc("Width of the plane, times that of the path.")
    ] = 1.0
    checkpoints: Annotated[
        int,
        Range(3, 1000, soft=(5, 100)),
        Doc("At most so many checkpoints; the first, the last and the origin always."),
    ] = 30
    spacing: Annotated[
        Literal["recorded", "arc_length"],
        Doc("Which checkpoints are taken."),
        Choice({"recorded": "evenly among those on record", "arc_length": "at equal lengths of the path"}),
    ] = "recorded"
    origin: Annotated[
        int | None, Range(0, 10**12, soft=(0, 10**5)), Doc("Step at (0, 0), whose buffers are used; None for the last.")
    ] = None
    norm: Annotated[
        Literal["recompute", "eval", "batch"],
        Doc("BatchNorm's statistics at each point; without such layers it does not matter."),
        Choice(
            {
                "recompute": "estimated anew from the examples",
                "eval": "on the plane the origin's, at checkpoints their own",
                "batch": "of each micro-batch",
            }
        ),
    ] = "recompute"
    scale: Annotated[
        Literal["log", "linear", "symlog"],
        Doc("How loss is drawn; log becomes symlog where losses are not positive."),
        Display(),
    ] = "log"
    view: View = "contour"

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("loss", ("u", "v"), "mean loss on the plane", "loss per example", "loss_error"),
        Variable("loss_error", ("u", "v"), "standard error of the mean loss over examples", "loss per example"),
        Variable("error_rate", ("u", "v"), "share of examples classified wrongly", "", "error_rate_error"),
        Variable("error_rate_error", ("u", "v"), "standard error of the error rate over examples"),
        Variable("evaluated", ("u", "v"), "whether the point was evaluated", kind="bool"),
        Variable("path_u", ("step",), "first coordinate of the checkpoint's projection", "parameter distance"),
        Variable("path_v", ("step",), "second coordinate of the checkpoint's projection", "parameter distance"),
        Variable("path_distance", ("step",), "distance of the checkpoint from the plane", "parameter distance"),
        Variable("path_reach", ("step",), "distance of the checkpoint from the origin", "parameter distance"),
        Variable("path_length", ("step",), "length of the chosen path up to the checkpoint", "parameter distance"),
        Variable("path_loss", ("step",), "mean loss of the checkpoint itself", "loss per example", "path_loss_error"),
        Variable("path_loss_error", ("step",), "standard error of path_loss over examples", "loss per example"),
        Variable("plane_loss", ("step",), "mean loss at its projection", "loss per example", "plane_loss_error"),
        Variable("plane_loss_error", ("step",), "standard error of plane_loss over examples", "loss per example"),
        Variable("gap", ("step",), "plane_loss minus path_loss", "loss per example", "gap_error"),
        Variable("gap_error", ("step",), "standard error of the gap over paired examples", "loss per example"),
        Variable("explained_variance", ("direction",), "share of the path's variance along each component"),
        Variable("random_walk", ("direction",), "share that a random walk of as many points would show"),
    )

    def stream(self, subject: Trajectory, draw: Draw) -> Iterator[Reading]:
        """The axes; checkpoints and their projections, ends first; then the plane from coarse to fine."""
        shown = _Shown(self, subject)
        for level in levels(len(shown.steps)):
            for k in level.tolist():
                if not shown.known[k]:
                    shown.compare(k)
                    yield shown.reading()
        yield from shown.fill()

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """Shares of both components with the random walk's, and the largest distance and gap that the plane leaves."""
        gaps = np.abs(data.gap.values)
        known = np.isfinite(gaps)
        worst = int(np.where(known, gaps, -1.0).argmax())
        share, walk = data.explained_variance.values, data.random_walk.values
        return {
            "explained": float(share.sum()),
            "explained_first": float(share[0]),
            "random_walk": float(walk.sum()),
            "distance_max": float(data.path_distance.max()),
            "gap_max": float(gaps[worst]),
            "gap_max_error": float(data.gap_error[worst]),
            "gap_max_step": int(data["step"][worst]),
        }

    def figure(self, data: xr.Dataset) -> Figure:
        """The path over the loss on its plane; the loss at checkpoints and at their projections; distances."""
        share = data.explained_variance.values
        words = tuple(f"component {k + 1} ({s:.0%} of variance)" for k, s in enumerate(share))
        u, v, origin = data.path_u.values, data.path_v.values, data["step"].values[data.path_reach.values.argmin()]
        drawn = field_of(data, "loss", (words[0], words[1]), self.scale, square=False)
        marks = (
            Line(u, v, "path", "second"),
            Points(u, v, role="second"),
            Points([0.0], [0.0], label=f"step {origin}", role="reference"),
        )
        walk = f"a random walk: {' and '.join(f'{s:.0%}' for s in data.random_walk.values)}"
        return Figure((*panels(drawn, self.view, marks), self._losses(data), _distances(data)), note=note(data, walk))

    def _losses(self, data: xr.Dataset) -> Panel:
        """What training saw, and what the plane shows in its place."""
        known, marks = np.isfinite(data.path_loss.values), list[AnyMark]()
        x = data["step"].values[known]
        kinds: tuple[tuple[str, str, Role], ...] = (
            ("path", "at the checkpoint", "main"),
            ("plane", "at its projection", "second"),
        )
        for name, label, role in kinds:
            y, e = data[f"{name}_loss"].values[known], data[f"{name}_loss_error"].values[known]
            marks += [Band(x, y - e, y + e, role=role), Line(x, y, label, role)]
        return Panel(tuple(marks), step_axis(), self._upright(data))

    def _upright(self, data: xr.Dataset) -> Axis:
        return fitting("loss", self.scale, data.path_loss.values, data.plane_loss.values)

    def estimate(self, subject: Trajectory) -> Cost:
        """Two directions, the weights of two checkpoints, a moved copy and the forward pass of a chunk."""
        one = subject.subject(subject.steps[-1])
        count = min(self.checkpoints, len(subject.steps)) + 1
        size = 8 * one.size * one.dtype.itemsize + expected_bytes(one) + 8 * (8 * self.points**2 + count**2)
        passes = self.points**2 + 4 * count
        return Cost(size, passes, f"{passes} forward passes over {one.examples} examples, {count} checkpoints read")


def _distances(data: xr.Dataset) -> Panel:
    x = data["step"].values
    marks = (
        Line(x, data.path_reach.values, "from the origin"),
        Line(x, data.path_distance.values, "from the plane", "second"),
    )
    return Panel(marks, step_axis(), Axis("distance"))


class _Some(Sequence[Tensor]):
    """Some rows of a sequence, each read when it is asked for."""

    def __init__(self, rows: Sequence[Tensor], places: Sequence[int]) -> None:
        self._rows, self._places = rows, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[self._places[index]]


def lengths(path: Sequence[Tensor]) -> Array:
    """Length of the polygon through the points up to each, (n,): Σ‖θ_t - θ_s‖. Two points are held at a time."""
    steps, before = [0.0], path[0]
    for k in range(1, len(path)):
        now = path[k]
        steps.append(float(norm(now - before)))
        before = now
    return np.cumsum(steps)


def evenly(along: Array, most: int, always: Sequence[int]) -> list[int]:
    """At most ``most`` places whose positions ``along`` (n,), ascending, are nearest to even ones; ``always`` on top.

    Fewer where several even positions have one nearest place. Both ends are among them.
    """
    wanted = np.linspace(along[0], along[-1], most)
    nearest = {int(np.abs(along - w).argmin()) for w in wanted}
    return sorted(nearest | {0, len(along) - 1} | {k % len(along) for k in always})


@dataclass(eq=False)
class _Shown:
    """The path, its plane, and what has been evaluated of both."""

    probe: TrajectoryView
    trajectory: Trajectory
    arrays: dict[str, Array] = field(default_factory=dict[str, Array])

    def __post_init__(self) -> None:
        probe, steps = self.probe, self.trajectory.steps
        origin = steps[-1] if probe.origin is None else probe.origin
        self.ground = self._subject(origin)
        rows, place = recorded(self.trajectory.subject(origin)), steps.index(origin)
        along = lengths(rows) if probe.spacing == "arc_length" else np.arange(len(steps), dtype=np.float64)
        chosen = evenly(along, probe.checkpoints, [place])
        self.steps, self.path = [steps[k] for k in chosen], _Some(rows, chosen)
        here = self.ground.flatten(self.ground.params)
        axes = principal_path(self.path, here)
        found, away = coordinates(self.path, here, axes.directions)
        self.first, self.second = (self.ground.unflatten(d) for d in axes.directions)
        self.at = mover(self.ground, self.first, self.second)
        self.fixed = {
            "path_u": found[:, 0],
            "path_v": found[:, 1],
            "path_distance": away,
            "path_reach": np.array([float(norm(w - here)) for w in self.path]),
            "path_length": lengths(self.path),
            "explained_variance": axes.explained,
            "random_walk": axes.random_walk,
        }
        self._prepare(found)

    def _prepare(self, found: Array) -> None:
        """Room for the plane and for the losses along the path."""
        n, count = self.probe.points, len(self.steps)
        self.u, self.v = (_ticks(c, self.probe.extent, n) for c in found.T)
        self.arrays = {name: np.full((n, n), np.nan) for name in EVALUATED}
        losses = ("path_loss", "path_loss_error", "plane_loss", "plane_loss_error", "gap", "gap_error")
        self.arrays |= {name: np.full(count, np.nan) for name in losses}
        self.evaluated, self.known = np.zeros((n, n), dtype=bool), np.zeros(count, dtype=bool)
        self.points = PlanePoints(self.ground, self.first, self.second, expected=n * n)

    def _subject(self, step: int) -> Subject:
        return self.trajectory.subject(step).under(self.probe.norm)

    def compare(self, k: int) -> None:
        """The loss at a checkpoint and at its projection."""
        real, there = self._subject(self.steps[k]), self.at(*(float(self.fixed[n][k]) for n in ("path_u", "path_v")))
        for name, found in (("path", real.evaluate(real.params)), ("plane", self.ground.evaluate(there))):
            self.arrays[f"{name}_loss"][k] = found["loss"]
            self.arrays[f"{name}_loss_error"][k] = found["loss_error"]
        self.arrays["gap"][k] = self.arrays["plane_loss"][k] - self.arrays["path_loss"][k]
        one, two = real.losses(), self.ground.losses(there)
        if one is not None and two is not None and len(one) > 1:
            self.arrays["gap_error"][k] = float((two - one).std()) / math.sqrt(len(one))
        self.known[k] = True

    def fill(self) -> Iterator[Reading]:
        """The plane from coarse to fine, as many points at a time as are evaluated together."""
        order = list(coarse_to_fine(self.probe.points))
        left = iter(order)
        for group in self.points.in_turn([(self.u[i], self.v[j]) for i, j in order]):
            for found, (i, j) in zip(group, left, strict=False):
                for name in EVALUATED:
                    self.arrays[name][i, j] = found.get(name, np.nan)
                self.evaluated[i, j] = True
            yield self.reading()

    def reading(self) -> Reading:
        """What is known now."""
        seen, total = int(self.evaluated.sum() + self.known.sum()), self.evaluated.size + self.known.size
        return self.probe.reading(
            seen / total,
            {**self.arrays, **self.fixed, "evaluated": self.evaluated},
            coords={"u": self.u, "v": self.v, "step": np.array(self.steps)},
            converged=seen == total,
            notes=(*self.ground.notes, f"on {len(self.steps)} of {len(self.trajectory.steps)} recorded checkpoints"),
        )


def _ticks(along: Array, extent: float, points: int) -> Array:
    """Even ticks around the middle of the path's own range, the origin included."""
    low, high = min(along.min(), 0.0), max(along.max(), 0.0)
    middle, half = (low + high) / 2, extent * REACH * (high - low) / 2
    return np.linspace(middle - half, middle + half, points)
