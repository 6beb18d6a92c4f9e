"""Where the panels of a figure stand on screen: rectangles in fractions of the plotting area, and its height in pixels."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.draw.sheet import grid
from workbench.figure import Contour, Figure, Heat, Panel, Surface

_ROW = 320
_GAP = 0.085
_BAR = 0.10


@dataclass(frozen=True)
class Place:
    """The rectangle of a panel's axes."""

    left: float
    right: float
    bottom: float
    top: float


def places(figure: Figure) -> tuple[list[Place], int]:
    """A rectangle for each panel, with room for colour bars, and the figure's height in pixels."""
    rows, columns = grid(figure)
    spans = _columns(figure, columns)
    found = [_place(i, columns, rows, spans) for i in range(len(figure.panels))]
    head = 100 + (30 if figure.title else 0)
    return found, rows * _ROW + head + (20 if figure.note else 0)


def _coloured(panel: Panel) -> bool:
    return any(isinstance(m, Heat | Contour | Surface) for m in panel.marks)


def _columns(figure: Figure, columns: int) -> list[tuple[float, float]]:
    """The horizontal span of each column of panels, colour bars cut off."""
    bars = [any(_coloured(p) for p in figure.panels[c::columns]) for c in range(columns)]
    parts = list(figure.widths) if len(figure.widths) == columns else [1.0] * columns
    free = 1.0 - _GAP * (columns - 1) - _BAR * sum(bars)
    spans, left = [], 0.0
    for part, bar in zip(parts, bars, strict=True):
        right = left + free * part / sum(parts)
        spans.append((left, right))
        left = right + _GAP + (_BAR if bar else 0.0)
    return spans


def _place(index: int, columns: int, rows: int, spans: list[tuple[float, float]]) -> Place:
    row, column = divmod(index, columns)
    gap = 0.22 / rows if rows > 1 else 0.0
    height = (1.0 - gap * (rows - 1)) / rows
    top = 1.0 - row * (height + gap)
    return Place(*spans[column], max(top - height, 0.0), top)
