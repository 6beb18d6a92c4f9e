"""A picture as plain data: panels, axes and nine marks. Who draws it (Plotly or matplotlib) decides colours and fonts.

Marks name *roles*, never colours. Arrays keep NaN wherever a value is not known; renderers leave such places open or
hatch them, and never fill them in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from workbench.resolve import resolve

SHOW = "workbench.draw.show:bundle_of"
"""What draws a figure for a notebook, by name, so that this module imports nothing that draws."""

Array = NDArray[np.float64]
Role = Literal["main", "second", "third", "fourth", "reference", "uncertainty", "unconverged"]
Scale = Literal["linear", "log", "symlog"]
ROLES: tuple[Role, ...] = ("main", "second", "third", "fourth")
"""The roles of several curves in one panel, in their order."""


@dataclass(frozen=True)
class Axis:
    """One axis: label, unit and scale. ``threshold`` is where a symlog axis turns linear; ``limits`` fix its ends."""

    label: str
    scale: Scale = "linear"
    unit: str = ""
    limits: tuple[float, float] | None = None
    threshold: float | None = None

    @property
    def words(self) -> str:
        """The label with its unit, as it is printed."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


def fitting(label: str, scale: Scale, *values: ArrayLike) -> Axis:
    """An axis of this scale, or the symmetric logarithm where a logarithm has no place for one of the finite values.

    Zero and negative losses are losses: they are drawn where they are, neither moved nor left out. Where such an axis
    turns linear is printed beside its label.
    """
    seen = _finite(values)
    return Axis(label, "symlog" if scale == "log" and (seen <= 0).any() else scale)


def step_axis(label: str = "step") -> Axis:
    """Training steps: logarithmic, so that the first ones can be told apart, and linear below one, as 0 is a step."""
    return Axis(label, "symlog", threshold=1.0)


def symlog_threshold(values: ArrayLike) -> float:
    """Where a symmetric logarithm turns linear on its own: the power of ten at or below the smallest value's size.

    Zeros and what is not finite do not count; sizes under 1e-4 of the largest lie in the linear part. 1 without values.
    """
    seen = np.abs(_finite([values]))
    sizes = seen[seen > 0]
    if sizes.size == 0:
        return 1.0
    smallest = max(float(sizes.min()), 1e-4 * float(sizes.max()))
    return float(10.0 ** math.floor(math.log10(smallest)))


def _finite(arrays: Iterable[ArrayLike]) -> Array:
    flat = [np.ravel(np.asarray(a, dtype=np.float64)) for a in arrays]
    values = np.concatenate(flat) if flat else np.empty(0)
    return values[np.isfinite(values)]


@dataclass(frozen=True, eq=False)
class Mark:
    """Anything that can be drawn in a panel. Subclasses list their arrays; all are stored as read-only float64."""

    def __post_init__(self) -> None:
        for name in self.arrays:
            object.__setattr__(self, name, _frozen(getattr(self, name)))
        self.check()

    arrays: ClassVar[tuple[str, ...]] = ()

    def check(self) -> None:
        """Raise ``ValueError`` when the arrays do not fit together."""


def _frozen(value: Any) -> Array | None:
    if value is None:
        return None
    out = np.array(value, dtype=np.float64)
    out.setflags(write=False)
    return out


@dataclass(frozen=True, eq=False)
class _Along(Mark):
    """A mark whose arrays all have one length."""

    def check(self) -> None:
        sizes = {n: np.shape(getattr(self, n)) for n in self.arrays if getattr(self, n) is not None}
        if len(set(sizes.values())) > 1 or any(len(s) != 1 for s in sizes.values()):
            raise ValueError(f"{type(self).__name__} needs arrays of one length; got {sizes}.")


@dataclass(frozen=True, eq=False)
class Line(_Along):
    """Points joined in order; NaN breaks the line."""

    x: ArrayLike
    y: ArrayLike
    label: str = ""
    role: Role = "main"

    arrays: ClassVar[tuple[str, ...]] = ("x", "y")


@dataclass(frozen=True, eq=False)
class Band(_Along):
    """The region between ``low`` and ``high``: an interval that moves with x."""

    x: ArrayLike
    low: ArrayLike
    high: ArrayLike
    label: str = ""
    role: Role = "uncertainty"

    arrays: ClassVar[tuple[str, ...]] = ("x", "low", "high")


@dataclass(frozen=True, eq=False)
class Points(_Along):
    """Separate points, with an optional error bar of plus and minus ``error`` in y."""

    x: ArrayLike
    y: ArrayLike
    error: ArrayLike | None = None
    label: str = ""
    role: Role = "main"

    arrays: ClassVar[tuple[str, ...]] = ("x", "y", "error")


@dataclass(frozen=True, eq=False)
class Bars(_Along):
    """Bars from zero to ``y`` with an optional error bar; ``names`` label them where x only counts them."""

    x: ArrayLike
    y: ArrayLike
    error: ArrayLike | None = None
    label: str = ""
    role: Role = "main"
    names: tuple[str, ...] = ()

    arrays: ClassVar[tuple[str, ...]] = ("x", "y", "error")


@dataclass(frozen=True, eq=False)
class Stems(_Along):
    """Thin lines from ``base`` to y with a head: atoms of a distribution."""

    x: ArrayLike
    y: ArrayLike
    label: str = ""
    role: Role = "main"
    base: float = 0.0

    arrays: ClassVar[tuple[str, ...]] = ("x", "y")


@dataclass(frozen=True, eq=False)
class _Field(Mark):
    """Values on a rectangle: ``z[j, i]`` belongs to ``(x[i], y[j])``, as images are stored; NaN is not known.

    On screen the pointer also tells ``error``, an uncertainty of each value, and names x and y by ``coordinates``
    instead of their axes' words.
    """

    x: ArrayLike
    y: ArrayLike
    z: ArrayLike
    label: str = ""
    error: ArrayLike | None = None
    coordinates: tuple[str, str] | None = None

    arrays: ClassVar[tuple[str, ...]] = ("x", "y", "z", "error")

    def check(self) -> None:
        wanted = (np.size(self.y), np.size(self.x))
        for name in ("z", "error"):
            found = getattr(self, name)
            if found is not None and np.shape(found) != wanted:
                raise ValueError(f"{type(self).__name__}.{name} must be (y, x) = {wanted}; got {np.shape(found)}.")


@dataclass(frozen=True, eq=False)
class Heat(_Field):
    """Coloured cells on the panel's colour axis ``z``. ``diverging`` is for signed values around zero."""

    diverging: bool = False


@dataclass(frozen=True, eq=False)
class Contour(_Field):
    """Filled contours with lines, at ``levels`` when given, else at levels that both renderers compute alike."""

    levels: ArrayLike | None = None

    arrays: ClassVar[tuple[str, ...]] = ("x", "y", "z", "error", "levels")


@dataclass(frozen=True, eq=False)
class Surface(_Field):
    """The same values as a surface in three dimensions; a panel with a Surface is a 3-D panel."""


@dataclass(frozen=True)
class Rule:
    """A straight line across the panel at one value of x or of y: a threshold, a prediction, a reference."""

    at: float
    axis: Literal["x", "y"] = "y"
    label: str = ""
    role: Role = "reference"


@dataclass(frozen=True)
class Text:
    """Words at a place given in data coordinates."""

    x: float
    y: float
    words: str
    role: Role = "reference"


AnyMark = Line | Band | Points | Bars | Stems | Heat | Contour | Surface | Rule | Text


@dataclass(frozen=True)
class Panel:
    """One set of axes with what is drawn in it. ``z`` is the colour axis, or the height of a surface.

    ``square`` makes a unit of x as long as a unit of y: for planes whose two directions have the same measure.
    """

    marks: tuple[AnyMark, ...]
    x: Axis
    y: Axis
    z: Axis | None = None
    title: str = ""
    square: bool = False

    def __post_init__(self) -> None:
        if any(isinstance(m, Heat | Contour | Surface) for m in self.marks) and self.z is None:
            raise ValueError("A panel with a Heat, Contour or Surface needs z=Axis(...), which names what is coloured.")

    @property
    def solid(self) -> bool:
        """True when the panel is three-dimensional."""
        return any(isinstance(m, Surface) for m in self.marks)


@dataclass(frozen=True)
class Figure:
    """Panels side by side under one title. ``note`` is the line of small print: how sure, on how many examples."""

    panels: tuple[Panel, ...]
    title: str = ""
    note: str = ""
    columns: int | None = None
    widths: tuple[float, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.panels:
            raise ValueError("A Figure needs at least one Panel.")

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return resolve(SHOW)(self, self.title or self.note or f"a figure of {len(self.panels)} panels")


def beside(figures: Mapping[str, Figure]) -> Figure:
    """Figures of one kind beside each other, their labels as titles, with one colour scale for panels of one place.

    Colours reach from the lowest to the highest finite value of all (the lowest positive one on a logarithm), so that
    equal colours, contour lines and heights are equal values. Figures with several panels take a row each.
    """
    rows = {label: figure.panels for label, figure in figures.items()}
    widest = max(len(row) for row in rows.values())
    scales = [_shared([row[k] for row in rows.values() if k < len(row)]) for k in range(widest)]
    panels = [
        replace(panel, z=scale if panel.z else None, title=" · ".join(filter(None, (label, panel.title))))
        for label, row in rows.items()
        for panel, scale in zip(row, scales, strict=False)
    ]
    notes = [f"{label}: {figure.note}" for label, figure in figures.items() if figure.note]
    return Figure(tuple(panels), note="; ".join(notes), columns=widest if widest > 1 else None)


def _shared(panels: Iterable[Panel]) -> Axis | None:
    """The colour axis of the first panel that has one, with limits for all of them; those it has itself stay.

    A symmetric logarithm that one of them needs is that of all, with one threshold.
    """
    held = [panel for panel in panels if panel.z is not None]
    axis = next((p.z for p in held if p.z and p.z.scale == "symlog"), held[0].z if held else None)
    if axis is None or axis.limits is not None:
        return axis
    values = _finite(m.z for panel in held for m in panel.marks if isinstance(m, Heat | Contour | Surface))
    seen = values[(values > 0) | (axis.scale != "log")]
    if axis.scale == "symlog" and axis.threshold is None:
        axis = replace(axis, threshold=symlog_threshold(values))
    if not seen.size or not seen.min() < seen.max():
        return axis
    return replace(axis, limits=(float(seen.min()), float(seen.max())))
