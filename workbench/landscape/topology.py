"""How many basins a plane through the model shows, and how deep they are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from workbench.figure import AnyMark, Axis, Contour, Figure, Line, Panel, Points, fitting
from workbench.landscape.grid import drawable, levels
from workbench.landscape.plane import Plane
from workbench.landscape.settings import PlaneDirections, PlaneExtent, PlaneNormalization
from workbench.numerics.persistence import Persistence, persistence
from workbench.numerics.sampling import Draw
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Doc, Range
from workbench.subject import Subject

Array = NDArray[np.float64]
MOST = 32
"""Basins that are kept, deepest first."""
_BASIN = ("birth", "death", "basin_u", "basin_v")


@dataclass(frozen=True)
class Topology(Probe[Subject]):
    """Basins of the loss on a plane through the model: sublevel-set persistence of the sampled loss.

    What it measures: on a points × points grid of the plane that ``Plane`` draws with the same settings and seed,
    every local minimum (``birth``) with the saddle at which its basin runs into a deeper one (``death``); ``basins``,
    how many are deeper than ``threshold`` times the loss's range; ``total_persistence`` = Σ (death - birth) of all but
    the deepest; ``saddle_minimum_distance``, the mean height of the first saddle above each minimum. Cells that touch
    at a corner are neighbours. ``basins_at`` repeats the count on coarser grids.

    How to read it: one basin is a valley. In the persistence diagram points far above the diagonal are basins that
    matter; those near it are ripples, of the loss or of the sampling. A count that changes with the resolution is
    the grid's, not the loss's.

    What it costs: one forward pass over the examples for each point, from coarse to fine.

    When it misleads: a minimum of a plane is no minimum of the loss, and basins that the plane parts may be joined
    outside it. The resolution is part of the measure. NaN and Inf are no part of the domain and are counted.

    Errors: exact for this grid and these examples; each loss carries its standard error as in ``Plane``, and basins
    shallower than it (``noise``) are within noise.
    """

    points: Annotated[int, Range(3, 201, 2, soft=(5, 101)), Doc("Grid points on each axis.")] = 25
    extent: PlaneExtent = 1.0
    directions: PlaneDirections = "random"
    normalization: PlaneNormalization = "filter"
    threshold: Annotated[
        float, Range(0.0, 1.0, soft=(0.0, 0.2)), Doc("Depth that counts, as a share of the loss's range.")
    ] = 0.01

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("loss", ("u", "v"), "mean loss", "loss per example", "loss_error"),
        Variable("loss_error", ("u", "v"), "standard error of the mean loss over examples", "loss per example"),
        Variable("evaluated", ("u", "v"), "whether the point was evaluated", kind="bool"),
        Variable("birth", ("basin",), "loss at the basin's minimum", "loss per example", "noise"),
        Variable("death", ("basin",), "loss at the saddle to a deeper basin", "loss per example", "noise"),
        Variable("basin_u", ("basin",), "first coordinate of the minimum"),
        Variable("basin_v", ("basin",), "second coordinate of the minimum"),
        Variable("basins", (), "basins deeper than the threshold"),
        Variable("basins_at", ("level",), "basins deeper than the threshold on a coarser grid"),
        Variable("total_persistence", (), "summed depth of all basins but the deepest", "loss per example"),
        Variable("saddle_minimum_distance", (), "mean height of the first saddle above a minimum", "loss per example"),
        Variable("noise", (), "median standard error of the loss over examples", "loss per example"),
        Variable("not_finite", (), "points whose loss is not finite"),
    )

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """The plane from coarse to fine, with the basins of its finest complete grid; a reading a point."""
        plane = self._plane
        drawn, found = 0, dict[str, Any]()
        for reading in plane.stream(subject, replace(draw, key=plane.name)):
            data = reading.data
            at = drawable(data.evaluated.values)
            if data.evaluated.values[np.ix_(at, at)].all() and at.size != drawn:
                drawn, found = at.size, self._basins(data)
            yield self.reading(
                reading.done,
                found | {name: data[name].values for name in ("loss", "loss_error", "evaluated")},
                coords={"u": data["u"].values, "v": data["v"].values, "level": [a.size for a in levels(self.points)]},
                converged=reading.converged,
                notes=reading.notes,
                sizes={"basin": MOST},
            )

    @property
    def _plane(self) -> Plane:
        """The whole grid: interpolated losses have basins of their own."""
        return Plane(self.points, self.extent, self.directions, self.normalization, sampling="grid")

    def _basins(self, data: xr.Dataset) -> dict[str, Any]:
        """What the complete grids show, the finest one in full."""
        seen, counts = data.evaluated.values, np.full(len(levels(self.points)), np.nan)
        finest, at = None, np.arange(0)
        for k, level in enumerate(levels(self.points)):
            if seen[np.ix_(level, level)].all():
                finest, at = persistence(data.loss.values[np.ix_(level, level)]), level
                counts[k] = self._count(finest)
        assert finest is not None
        errors = data.loss_error.values[np.ix_(at, at)]
        axes = (data["u"].values[at], data["v"].values[at])
        return self._listed(finest, axes) | {
            "basins": self._count(finest),
            "basins_at": counts,
            "total_persistence": float(finest.lifetime[1:].sum()) if finest.birth.size else math.nan,
            "saddle_minimum_distance": finest.saddle_minimum_distance,
            "noise": float(np.nanmedian(errors)) if np.isfinite(errors).any() else math.nan,
            "not_finite": finest.holes,
        }

    def _count(self, found: Persistence) -> float:
        if not found.birth.size:
            return math.nan
        return float(found.count(self.threshold * float(found.death.max() - found.birth.min())))

    def _listed(self, found: Persistence, axes: tuple[Array, Array]) -> dict[str, Array]:
        """The deepest basins, nan-padded."""
        order = np.argsort(-found.lifetime, kind="stable")[:MOST]
        columns = (found.birth, found.death, axes[0][found.place[:, 0]], axes[1][found.place[:, 1]])
        return {
            name: np.append(values[order], np.full(MOST - order.size, np.nan))
            for name, values in zip(_BASIN, columns, strict=True)
        }

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """How many basins there are, their summed depth, and what the grid lacks."""
        return {
            "basins": float(data.basins),
            "total_persistence": float(data.total_persistence),
            "saddle_minimum_distance": float(data.saddle_minimum_distance),
            "noise": float(data.noise),
            "not_finite": float(data.not_finite),
        }

    def figure(self, data: xr.Dataset) -> Figure:
        """The contour map with its minima, and the persistence diagram."""
        at = drawable(data.evaluated.values)
        u, v = data["u"].values[at], data["v"].values[at]
        z = data.loss.values[np.ix_(at, at)].T
        depth = data.death.values - data.birth.values
        deep = depth >= self.threshold * np.nanmax(depth, initial=0.0)
        minima = Points(data.basin_u.values[deep], data.basin_v.values[deep], label="minima", role="second")
        marks: tuple[AnyMark, ...] = (Contour(u, v, z), minima)
        square = self.directions != "pca"
        map_panel = Panel(marks, Axis("direction 1"), Axis("direction 2"), fitting("loss", "log", z), square=square)
        return Figure((map_panel, _diagram(data, deep)))

    def estimate(self, subject: Subject) -> Cost:
        """As the plane's, and the union-find over its points."""
        plane = self._plane.estimate(subject)
        return replace(plane, bytes=plane.bytes + 200 * self.points**2)


def _diagram(data: xr.Dataset, deep: NDArray[np.bool_]) -> Panel:
    birth, death = data.birth.values, data.death.values
    known = np.isfinite(birth)
    ends = np.array([np.nanmin(birth), np.nanmax(death)]) if known.any() else np.array([0.0, 1.0])
    marks = (
        Line(ends, ends, "no depth", "reference"),
        Points(birth[known & ~deep], death[known & ~deep], label="shallow", role="unconverged"),
        Points(birth[deep], death[deep], label="basins", role="second"),
    )
    return Panel(marks, Axis("loss at the minimum"), Axis("loss at the saddle"), title="persistence")
