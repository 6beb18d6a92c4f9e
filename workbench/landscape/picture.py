"""How a plane is drawn: contour map and surface, the models on it, and the quadratic beside the measured loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from workbench.figure import AnyMark, Axis, Contour, Line, Panel, Points, Scale, Surface, fitting
from workbench.landscape.filling import half_widths
from workbench.landscape.grid import drawable, drawn
from workbench.landscape.preview import doubt
from workbench.landscape.quadratic import Quadratic, measured_line
from workbench.landscape.refining import refined

Array = NDArray[np.float64]
View = Literal["both", "contour", "surface"]
ENOUGH = 5
"""Points on each axis from which on a measured level line is drawn."""


@dataclass(frozen=True, eq=False)
class Field:
    """What is drawn of a plane: values (u, v) of the finest complete grid, with its ticks, and the words beside it.

    ``error`` is what the pointer tells of each value: its standard error, or how well it is known by interpolation.
    """

    u: Array
    v: Array
    z: Array
    axes: tuple[str, str]
    colour: Axis
    square: bool = False
    error: Array | None = None


def field_of(data: xr.Dataset, metric: str, axes: tuple[str, str], scale: Scale, square: bool) -> Field:
    """The finest complete grid of one variable; error rates are always drawn on a linear scale: they can be zero.

    A logarithm that has no place for one of the losses becomes a symmetric one, see :func:`~workbench.figure.fitting`.
    """
    rows, columns = drawn(data.evaluated.values)
    u, v, z = data["u"].values[rows], data["v"].values[columns], data[metric].values[np.ix_(rows, columns)]
    colour = fitting(metric.replace("_", " "), "linear" if metric == "error_rate" else scale, z)
    return Field(u, v, z, _along(data, axes), colour, square, _doubt(data, metric, rows, columns))


def _doubt(data: xr.Dataset, metric: str, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Array | None:
    """The error of what is drawn; None where nothing is known of it."""
    name = f"{metric}_error"
    if refined(data):
        name = "surface_error" if metric == "loss" else ""
    found = data[name].values[np.ix_(rows, columns)] + doubt(data, metric) if name in data else np.empty(0)
    return found if np.isfinite(found).any() else None


def _along(data: xr.Dataset, axes: tuple[str, str]) -> tuple[str, str]:
    """What a file from elsewhere calls its axes; else the words given."""
    said = [str(data[name].attrs.get("long_name", words)) for name, words in zip(("u", "v"), axes, strict=True)]
    return said[0], said[1]


def own_field(data: xr.Dataset, k: int, name: str, axes: tuple[str, str], square: bool) -> Field:
    """The finest complete grid of the subject's own metric number ``k``."""
    rows, columns = drawn(data.evaluated.values)
    z = data.own_metric.values[k][np.ix_(rows, columns)]
    return Field(data["u"].values[rows], data["v"].values[columns], z, _along(data, axes), Axis(name), square)


def panels(field: Field, view: View, marks: tuple[AnyMark, ...]) -> tuple[Panel, ...]:
    """Contour map with ``marks``, surface, or both."""
    made: list[Panel] = []
    error, names = None if field.error is None else field.error.T, ("u", "v")
    z, ends = field.z.T, ((field.u[0], field.u[-1]), (field.v[0], field.v[-1]))
    if view != "surface":
        x, y = (Axis(w, limits=(float(a), float(b))) for w, (a, b) in zip(field.axes, ends, strict=True))
        flat: tuple[AnyMark, ...] = (Contour(field.u, field.v, z, error=error, coordinates=names), *marks)
        made.append(Panel(flat, x, y, field.colour, square=field.square))
    if view != "contour":
        # A turned axis has little room for words.
        x, y = (Axis(w.split(" (")[0].removeprefix("along ").removeprefix("Hessian ")) for w in field.axes)
        made.append(Panel((Surface(field.u, field.v, z, error=error, coordinates=names),), x, y, field.colour))
    return tuple(made)


def note(data: xr.Dataset, *said: str) -> str:
    """How much of the grid is drawn, how much is not finite, and what else there is to say."""
    evaluated = data.evaluated.values
    shown, whole = (a.size for a in drawn(evaluated)), evaluated.shape
    counted = " × ".join(map(str, shown)), " × ".join(map(str, whole))
    rough = "" if counted[0] == counted[1] else f"{counted[0]} of {counted[1]} points"
    holes = evaluated.size - int(evaluated.sum())
    rough = f"{holes} of {counted[1]} points were not computed" if holes and not rough else rough
    lost = int((data.evaluated & ~np.isfinite(data.loss)).sum())
    hatched = f"{lost} points are not finite (hatched)" if lost else ""
    return " · ".join(part for part in (rough, hatched, *said) if part)


def path_marks(data: xr.Dataset) -> tuple[AnyMark, ...]:
    """The recorded path in the plane, where there is one."""
    known = np.isfinite(data.path_u.values)
    if not known.any():
        return ()
    return (Line(data.path_u.values[known], data.path_v.values[known], "recorded path", "second"),)


def here() -> Points:
    """The model itself."""
    return Points([0.0], [0.0], label="model", role="reference")


def predicted(data: xr.Dataset) -> Quadratic | None:
    """The quadratic in a reading's data; None before it is known."""
    slope, curvature = data.slope.values, data.curvature.values
    return Quadratic(slope, curvature) if np.isfinite(curvature).all() and np.isfinite(slope).all() else None


def quadratic_marks(data: xr.Dataset) -> tuple[AnyMark, ...]:
    """One level of the quadratic predicted at the model, and the loss's own line of that level."""
    q, widths = predicted(data), half_widths(data["u"].values, data["v"].values)
    if q is None or not np.isfinite(level := q.inner_level(widths)):
        return ()
    x, y = q.level_line(level, widths)
    marks: list[AnyMark] = [Line(x, y, f"predicted {_signed(level)}", "reference")]
    at = drawable(data.evaluated.values)
    if len(at) >= ENOUGH and level > doubt(data, "loss"):
        rise = data.loss.values[np.ix_(at, at)] - float(data.loss_here)
        x, y = measured_line(data["u"].values[at], data["v"].values[at], rise, level)
        marks.append(Line(x, y, f"measured {_signed(level)}", "third"))
    return tuple(marks)


def agreement_words(data: xr.Dataset) -> str:
    """How far the quadratic holds, in words; empty before that is known."""
    radius = float(data.agreement_radius)
    if np.isnan(radius):
        return ""
    if radius > 0:
        return f"quadratic good to 10 % within {radius:.2g}"
    at = drawable(data.evaluated.values)
    nearest = min(float(np.diff(data[name].values[at]).min()) for name in ("u", "v"))
    return f"quadratic off by more than 10 % at {nearest:.2g}"


def _signed(level: float) -> str:
    return f"{level:+.2g}"
