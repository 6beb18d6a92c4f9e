"""How values become places and colours: limits, thresholds, ticks and contour levels, computed once for both renderers.

A :class:`Ruler` is an :class:`~workbench.figure.Axis` that has met its data. ``forward`` maps values to the coordinate
in which the axis is even: the value itself, its decimal logarithm, or the symmetric logarithm

    u(v) = a v / t                          for |v| <= t
    u(v) = sign(v) (a + log10(|v| / t))     for |v| >  t,      a = 10 / 9,

which is matplotlib's ``symlog`` with ``linscale=1`` divided by the threshold t. What an axis cannot show (NaN, Inf, and
on a logarithm anything that is not positive) is NaN in u: not known, never shifted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from workbench.figure import Array, Axis, Scale, symlog_threshold

_LINEAR_PART = 10.0 / 9.0
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Ruler:
    """One resolved axis: what it shows from ``low`` to ``high``; ``threshold`` is where a symlog turns linear.

    ``whole``: a short linear axis of whole numbers (layers, tasks, classes), between which there is nothing to name.
    """

    scale: Scale
    low: float
    high: float
    threshold: float = 1.0
    label: str = ""
    whole: bool = False

    @property
    def remark(self) -> str:
        """What must be printed beside the label: where a symmetric logarithm turns linear."""
        return f"linear below {self.threshold:.2g}" if self.scale == "symlog" else ""

    def words(self, between: str = ", ") -> str:
        """Label, unit and remark, as printed along the axis or the colour bar."""
        return between.join(w for w in (self.label, self.remark) if w)

    def forward(self, values: Any) -> Array:
        """Values to the even coordinate u; NaN where the axis cannot show the value."""
        v = np.asarray(values, dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            u = _FORWARD[self.scale](v, self.threshold)
        return np.where(np.isfinite(v) & np.isfinite(u), u, np.nan)

    def inverse(self, u: Any) -> Array:
        """The even coordinate back to values."""
        with np.errstate(over="ignore"):
            return np.asarray(_INVERSE[self.scale](np.asarray(u, dtype=np.float64), self.threshold))

    @property
    def span(self) -> tuple[float, float]:
        """The limits in the even coordinate."""
        low, high = self.forward([self.low, self.high])
        return float(low), float(high)

    def clip(self, values: Any) -> Array:
        """Values with those below ``low`` moved onto it: for the open end of an interval or the foot of a bar."""
        return np.maximum(np.asarray(values, dtype=np.float64), self.low)

    def ticks(self, count: int = 6) -> Array:
        """Round values between the limits at which to print numbers, about ``count`` of them."""
        found = self._inside(_TICKS[self.scale](self, count))
        return found if found.size > 1 else self._inside(_linear_ticks(self, count))

    def _inside(self, values: Array) -> Array:
        u, (low, high) = self.forward(values), self.span
        slack = 1e-9 * (high - low)
        return values[(u >= low - slack) & (u <= high + slack)]


def _symlog(v: Array, t: float) -> Array:
    outside = np.sign(v) * (_LINEAR_PART + np.log10(np.abs(v) / t))
    return np.where(np.abs(v) <= t, _LINEAR_PART * v / t, outside)


def _unsymlog(u: Array, t: float) -> Array:
    outside = np.sign(u) * t * 10.0 ** (np.abs(u) - _LINEAR_PART)
    return np.where(np.abs(u) <= _LINEAR_PART, u * t / _LINEAR_PART, outside)


_FORWARD: dict[str, Any] = {
    "linear": lambda v, _: v,
    "log": lambda v, _: np.log10(np.where(v > 0, v, np.nan)),
    "symlog": _symlog,
}
_INVERSE: dict[str, Any] = {"linear": lambda u, _: u, "log": lambda u, _: 10.0**u, "symlog": _unsymlog}


def ruler(axis: Axis, arrays: Iterable[Any], *, margin: float = 0.0, include: Iterable[float] = ()) -> Ruler:
    """Resolve an axis on the values that are drawn along it.

    Args:
        axis: its scale, fixed limits and threshold, where given.
        arrays: everything drawn along the axis; only what it can show counts.
        margin: room left at both ends, as a part of the span in the even coordinate; none where limits are fixed.
        include: values that must be inside, such as the foot of bars.

    Raises:
        ValueError: the fixed limits or the threshold do not suit the scale.
    """
    values = np.concatenate([np.ravel(np.asarray(a, dtype=np.float64)) for a in (*arrays, tuple(include))])
    threshold = _threshold(axis, values)
    free = Ruler(axis.scale, 0.0, 0.0, threshold)
    if axis.limits is not None:
        low, high = _fixed(axis, free)
    else:
        low, high = _free(free, values, margin)
    return Ruler(axis.scale, low, high, threshold, axis.words)


def _threshold(axis: Axis, values: Array) -> float:
    if axis.threshold is not None:
        if not (math.isfinite(axis.threshold) and axis.threshold > 0):
            raise ValueError(f"Axis {axis.label!r} needs a positive threshold; got {axis.threshold!r}.")
        return float(axis.threshold)
    return symlog_threshold(values) if axis.scale == "symlog" else 1.0


def _fixed(axis: Axis, free: Ruler) -> tuple[float, float]:
    assert axis.limits is not None
    low, high = float(axis.limits[0]), float(axis.limits[1])
    if not np.isfinite(free.forward([low, high])).all() or not low < high:
        raise ValueError(
            f"Axis {axis.label!r} has limits {axis.limits}; a {axis.scale} axis needs finite"
            f"{' positive' if axis.scale == 'log' else ''} limits with low < high."
        )
    return low, high


def _free(free: Ruler, values: Array, margin: float) -> tuple[float, float]:
    u = free.forward(values)
    u = u[np.isfinite(u)]
    if u.size == 0:
        return (0.1, 1.0) if free.scale == "log" else (0.0, 1.0)
    low, high = float(u.min()), float(u.max())
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        room = 0.5 * abs(low) or 0.5 if free.scale == "linear" else 0.5
        low, high, margin = low - room, high + room, 0.0
    room = margin * (high - low)
    ends = free.inverse([low - room, high + room])
    return float(ends[0]), float(ends[1])


def nice_step(span: float, count: int) -> float:
    """The round step (1, 2, 2.5 or 5 times a power of ten) that cuts ``span`` into at most about ``count`` pieces."""
    raw = span / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
    return next((s * power for s in _STEPS if s * power >= raw * (1 - 1e-9)), 10.0 * power)


def _even(low: float, high: float, step: float) -> Array:
    return np.float64(step) * np.arange(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)


def _linear_ticks(r: Ruler, count: int) -> Array:
    step = nice_step(r.high - r.low, count)
    return _even(r.low, r.high, float(math.ceil(step)) if r.whole else step)


def _log_ticks(r: Ruler, count: int) -> Array:
    low, high = r.span
    if high - low < 1.0:
        return _linear_ticks(r, count)
    if high - low <= 2.5:
        decades = np.arange(math.floor(low), math.ceil(high) + 1)
        return np.ravel(np.outer(10.0**decades, [1.0, 3.0]))
    return 10.0 ** _even(low, high, float(max(1, math.ceil((high - low) / count))))


def _symlog_ticks(r: Ruler, count: int) -> Array:
    """Zero and powers of ten outside the linear part, every so many decades."""
    low, high = r.span
    first, last = (
        math.ceil(math.log10(r.threshold) - 1e-9),
        math.floor(math.log10(max(abs(r.low), abs(r.high), 1e-300))),
    )
    step = max(1, math.ceil((high - low) / max(count, 3)))
    sizes = 10.0 ** np.arange(first, last + 1, step)
    return np.concatenate([-sizes[::-1], [0.0], sizes])


_TICKS: dict[str, Any] = {"linear": _linear_ticks, "log": _log_ticks, "symlog": _symlog_ticks}


def contour_levels(r: Ruler, count: int = 12) -> Array:
    """Levels in the even coordinate u that cover the ruler: round steps of the value, of its logarithm or of u."""
    low, high = r.span
    return _even(low, high, nice_step(high - low, count))
