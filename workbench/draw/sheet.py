"""A panel made ready to draw: its rulers, contour bands and what is not known; the numbers both renderers share."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from workbench.draw.cells import edges
from workbench.draw.rulers import Ruler, contour_levels, ruler
from workbench.figure import (
    AnyMark,
    Array,
    Axis,
    Band,
    Bars,
    Contour,
    Figure,
    Heat,
    Line,
    Panel,
    Points,
    Rule,
    Stems,
    Surface,
    Text,
)

_MARGIN = 0.05
_FEW = 12.0
"""Whole numbers that an axis can name one by one; on longer axes round steps are whole anyway."""
_FLAT = (Surface, Line, Points, Rule, Text)


@dataclass(frozen=True)
class Bands:
    """Contour bands: ``levels`` in the even coordinate, and the coordinate w in which they are 0, 1, 2, ..."""

    levels: Array

    def forward(self, u: Array) -> Array:
        """From u to w, straight between levels and clipped to the outermost ones."""
        return np.where(np.isfinite(u), np.interp(u, self.levels, np.arange(self.levels.size)), np.nan)


@dataclass(frozen=True)
class Sheet:
    """A panel with its resolved axes; ``bands`` belongs to its contours, ``diverging`` to its heat maps."""

    panel: Panel
    x: Ruler
    y: Ruler
    z: Ruler | None
    bands: Bands | None
    diverging: bool

    @property
    def height(self) -> Ruler:
        """The ruler of colours or heights; only panels with a field have one."""
        if self.z is None:
            raise ValueError("This panel has no field, hence no colour axis.")
        return self.z

    @property
    def field(self) -> Heat | Contour | Surface | None:
        """The first field, which owns the colour bar."""
        return next((m for m in self.panel.marks if isinstance(m, Heat | Contour | Surface)), None)

    @property
    def levels(self) -> Array:
        """Contour levels in the even coordinate of the colour axis."""
        if self.bands is None:
            raise ValueError("This panel has no contours, hence no levels.")
        return self.bands.levels

    @property
    def colour_ends(self) -> tuple[float, float]:
        """Heights with the first and the last colour: the middles of the outermost bands, or the axis's ends."""
        cuts = self.bands.levels if self.bands else np.empty(0)
        return (float(cuts[:2].mean()), float(cuts[-2:].mean())) if cuts.size > 2 else self.height.span

    @property
    def inner_cuts(self) -> tuple[float, float]:
        """First and last of the contour lines between bands, in w; the outermost levels bound the colours only."""
        last = self.bands.levels.size - 1 if self.bands else 1
        return (1.0, last - 1.0) if last > 1 else (0.5, 0.5)

    def open_end(self, values: Any) -> Array:
        """Lower ends along y; on a logarithm, what lies below the axis ends there, where it leaves the picture."""
        return self.y.clip(values) if self.y.scale == "log" else np.asarray(values, dtype=np.float64)

    def colour_place(self, values: Any) -> Array:
        """Where values lie along the colour bar: in w when the panel has contour bands, else in u."""
        u = self.height.forward(values)
        return self.bands.forward(u) if self.bands else u


def sheet(panel: Panel) -> Sheet:
    """Resolve a panel's axes on its marks.

    Raises:
        ValueError: a three-dimensional panel holds a mark that has no place in it, or limits do not suit a scale.
    """
    if panel.solid:
        _check_solid(panel)
    x, y = _plane(panel, "x"), _plane(panel, "y")
    diverging = any(isinstance(m, Heat) and m.diverging for m in panel.marks)
    z = _colour(panel, diverging)
    bands = _bands(panel, z) if z else None
    if z and bands:
        ends = z.inverse(bands.levels[[0, -1]])
        z = Ruler(z.scale, float(ends[0]), float(ends[1]), z.threshold, z.label)
    return Sheet(panel, x, y, z, bands, diverging)


def _check_solid(panel: Panel) -> None:
    for mark in panel.marks:
        if not isinstance(mark, _FLAT):
            raise ValueError(
                f"A panel with a Surface can also hold Line, Points, Rule and Text, which lie on its floor; "
                f"got {type(mark).__name__}. Put it into a panel of its own."
            )


def _plane(panel: Panel, name: Literal["x", "y"]) -> Ruler:
    axis = panel.x if name == "x" else panel.y
    fields = [m for m in panel.marks if isinstance(m, Heat | Contour | Surface)]
    free = ruler(axis, [e for m in panel.marks for e in _extent(m, name, None)])
    arrays = [e for m in panel.marks for e in _extent(m, name, free)]
    include = [0.0] if name == "y" and axis.scale != "log" and _grounded(panel) else []
    found = ruler(axis, arrays, margin=0.0 if fields else _MARGIN, include=include)
    if found.scale == "linear" and found.high - found.low < _FEW and _whole(panel, name):
        return dataclasses.replace(found, whole=True)
    if include and axis.limits is None and found.low < 0 and _lowest(arrays) >= 0:
        return Ruler(found.scale, 0.0, found.high, found.threshold, found.label)
    return found


def _whole(panel: Panel, name: Literal["x", "y"]) -> bool:
    """Whether marks stand at whole numbers along x, or the cells of a field along either axis."""
    cells = [m for m in panel.marks if isinstance(m, Heat)]
    marks = cells if cells or name == "y" else [m for m in panel.marks if not isinstance(m, Rule | Text)]
    places = [np.ravel(np.asarray(getattr(m, name), dtype=float)) for m in marks]
    values = np.concatenate(places) if places else np.empty(0)
    values = values[np.isfinite(values)]
    return np.unique(values).size > 1 and bool((values == np.round(values)).all())


def _grounded(panel: Panel) -> bool:
    return any(isinstance(m, Bars) or (isinstance(m, Stems) and m.base == 0) for m in panel.marks)


def _lowest(arrays: list[Any]) -> float:
    values = np.concatenate([np.ravel(np.asarray(a, dtype=float)) for a in arrays])
    values = values[np.isfinite(values)]
    return float(values.min()) if values.size else 0.0


def _extent(mark: AnyMark, name: str, free: Ruler | None) -> list[Any]:
    """Every array of a mark that lies along axis ``name``; cells reach to their edges once a ruler is known."""
    if isinstance(mark, Rule):
        return [[mark.at]] if mark.axis == name else []
    if isinstance(mark, Text):
        return [[getattr(mark, name)]]
    if isinstance(mark, Heat) and free is not None:
        return [edges(np.asarray(getattr(mark, name)), free)]
    if isinstance(mark, Heat | Contour | Surface) or name == "x":
        return _along_x(mark) if name == "x" else [mark.y]  # type: ignore[union-attr]
    return _along_y(mark)


def _along_x(mark: Any) -> list[Any]:
    if isinstance(mark, Bars):
        half = 0.5 * bar_width(np.asarray(mark.x))
        return [np.asarray(mark.x) - half, np.asarray(mark.x) + half]
    return [mark.x]


def _along_y(mark: Any) -> list[Any]:
    if isinstance(mark, Band):
        return [mark.low, mark.high]
    if isinstance(mark, Points | Bars) and mark.error is not None:
        error = np.nan_to_num(np.asarray(mark.error), nan=0.0, posinf=0.0)
        return [mark.y, np.asarray(mark.y) - error, np.asarray(mark.y) + error]
    return [mark.y]


def bar_width(x: Array) -> float:
    """Four fifths of the smallest distance between neighbouring bars; 0.8 for a single one."""
    gaps = np.diff(np.unique(x[np.isfinite(x)]))
    return 0.8 * float(gaps.min()) if gaps.size else 0.8


def _colour(panel: Panel, diverging: bool) -> Ruler | None:
    fields = [m for m in panel.marks if isinstance(m, Heat | Contour | Surface)]
    if panel.z is None or not fields:
        return None
    axis = panel.z
    arrays = [m.z for m in fields]
    if diverging and axis.limits is None:
        axis = _symmetric(axis, arrays)
    return ruler(axis, arrays)


def _symmetric(axis: Axis, arrays: list[Any]) -> Axis:
    values = np.concatenate([np.ravel(np.asarray(a)) for a in arrays])
    sizes = np.abs(values[np.isfinite(values)])
    far = float(sizes.max()) if sizes.size and sizes.max() > 0 else 1.0
    return Axis(axis.label, "linear" if axis.scale == "log" else axis.scale, axis.unit, (-far, far), axis.threshold)


def _bands(panel: Panel, z: Ruler) -> Bands | None:
    """Of contours; of surfaces too, so that a contour map and a surface of the same values share ends and colours."""
    fields = [m for m in panel.marks if isinstance(m, Contour | Surface)]
    if not fields:
        return None
    given = next((m.levels for m in fields if isinstance(m, Contour) and m.levels is not None), None)
    levels = contour_levels(z) if given is None else np.unique(z.forward(given))
    levels = levels[np.isfinite(levels)]
    if levels.size < 2:
        raise ValueError(f"A Contour needs at least two levels that a {z.scale} axis can show; got {given}.")
    return Bands(levels)


def known(mark: Heat | Contour | Surface, z: Ruler) -> NDArray[np.bool_]:
    """Where a field has a value that the axis can show."""
    return np.isfinite(z.forward(mark.z))


def grid(figure: Figure, width: float | None = None, least: float = 1.5) -> tuple[int, int]:
    """Rows and columns of the panels: up to three in a row unless the figure says otherwise.

    With a ``width``, no more than fit side by side when each takes at least ``least`` of it.
    """
    count = len(figure.panels)
    columns = figure.columns or (count if count <= 3 else 2 if count == 4 else 3)
    if width is not None:
        columns = min(columns, max(1, int(width / least)))
    return math.ceil(count / columns), columns
