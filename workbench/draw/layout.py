"""Where the panels of a figure stand on screen: rectangles in fractions of the plotting area, and heights in pixels."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.draw.sheet import grid
from workbench.figure import Contour, Figure, Heat, Panel

HEAD, FOOT, NOTE, EDGE = 48, 56, 18, 64
"""Pixels above the panels (caption and legend), below them (axis label), for the small print, and at the left."""

_ROW = 330
_BETWEEN = HEAD + FOOT + 6
_GAP, _BAR = 0.22, 0.085
"""Between columns (numbers and label of an axis), in widths of a column; for a colour bar, in widths of the figure."""


@dataclass(frozen=True)
class Place:
    """The rectangle of a panel's axes."""

    left: float
    right: float
    bottom: float
    top: float


def height_of(figure: Figure) -> int:
    """The height in pixels of everything but the figure's title."""
    return _plot_height(figure) + HEAD + FOOT + (NOTE if figure.note else 0)


def _plot_height(figure: Figure) -> int:
    rows, _ = grid(figure)
    solid = any(p.solid for p in figure.panels)
    return rows * (_ROW + (60 if solid else 0)) + (rows - 1) * _BETWEEN


def places(figure: Figure) -> list[Place]:
    """A rectangle for each panel, with room for colour bars, legends and labels between them."""
    rows, columns = grid(figure)
    spans, gap = _columns(figure, columns), _BETWEEN / _plot_height(figure)
    tall = (1.0 - gap * (rows - 1)) / rows
    tops = [1.0 - (i // columns) * (tall + gap) for i in range(len(figure.panels))]
    return [Place(*spans[i % columns], max(top - tall, 0.0), top) for i, top in enumerate(tops)]


def _coloured(panel: Panel) -> bool:
    return not panel.solid and any(isinstance(m, Heat | Contour) for m in panel.marks)


def _columns(figure: Figure, columns: int) -> list[tuple[float, float]]:
    """The horizontal span of each column of panels, colour bars cut off."""
    bars = [any(_coloured(p) for p in figure.panels[c::columns]) for c in range(columns)]
    parts = list(figure.widths) if len(figure.widths) == columns else [1.0] * columns
    gap = _GAP / columns
    free = 1.0 - gap * (columns - 1) - _BAR * sum(bars)
    spans, left = [], 0.0
    for part, bar in zip(parts, bars, strict=True):
        right = left + free * part / sum(parts)
        spans.append((left, right))
        left = right + gap + (_BAR if bar else 0.0)
    return spans
