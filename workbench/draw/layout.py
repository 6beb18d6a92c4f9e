"""Where the panels of a figure stand on screen: rectangles in fractions of the plotting area, and heights in pixels."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from workbench.draw.sheet import grid
from workbench.figure import Contour, Figure, Heat, Panel

HEAD, FOOT, NOTE, EDGE = 48, 56, 18, 64
"""Pixels above the panels (caption and legend), below them (axis label), for the small print, and at the left."""
BAR = 48
"""Pixels of a colour bar below a panel, with its numbers and label."""

_PARTS, _LETTERS = " · ", 100
"""Between parts of the small print, and how many letters of it fit the narrowest bench."""
_ROW, _TALLER, _SQUARES = 330, 60, {2: 300, 3: 230}
_BETWEEN = HEAD + FOOT + 6
_GAP, _BESIDE = {2: 0.11, 3: 0.1}, 0.085
"""Between columns (numbers and label of an axis), and for a colour bar, in widths of the figure."""


@dataclass(frozen=True)
class Place:
    """The rectangle of a panel's axes.

    ``bar`` is the top of a colour bar below it (None: it stands at the right), ``free`` the width at its left that is
    kept for the numbers of an axis, which a scene has inside.
    """

    left: float
    right: float
    bottom: float
    top: float
    bar: float | None = None
    free: float = 0.0


def height_of(figure: Figure) -> int:
    """The height in pixels of the panels and what is below them."""
    return _plot_height(figure) + foot_of(figure)


def foot_of(figure: Figure) -> int:
    """The pixels below the panels."""
    return FOOT + _bar_height(figure) + NOTE * len(note_lines(figure))


def note_lines(figure: Figure) -> list[str]:
    """The small print in lines that fit a narrow page, what is said of each panel on lines of its own."""
    return [line for part in figure.note.split("; ") if part for line in _lines(part)]


def _lines(words: str) -> list[str]:
    lines: list[str] = []
    for part in words.split(_PARTS):
        if lines and len(lines[-1]) + len(_PARTS) + len(part) <= _LETTERS:
            lines[-1] += _PARTS + part
        else:
            lines += textwrap.wrap(part, _LETTERS)
    return lines


def places(figure: Figure) -> list[Place]:
    """A rectangle for each panel, with room for colour bars, legends and labels between them."""
    rows, columns = grid(figure)
    height, bar = _plot_height(figure), _bar_height(figure)
    spans, gap = _columns(figure, columns), (_BETWEEN + bar) / height
    tall = (1.0 - gap * (rows - 1)) / rows
    tops = [1.0 - (i // columns) * (tall + gap) for i in range(len(figure.panels))]
    floors = [max(top - tall, 0.0) for top in tops]
    bars = [floor - FOOT / height if bar else None for floor in floors]
    room = [0.0, *[_gap(columns)] * (columns - 1)]
    found = enumerate(zip(floors, tops, bars, strict=True))
    return [Place(*spans[i % columns], *upright, room[i % columns]) for i, upright in found]


def _plot_height(figure: Figure) -> int:
    rows, columns = grid(figure)
    return rows * _row(figure, columns) + (rows - 1) * (_BETWEEN + _bar_height(figure))


def _row(figure: Figure, columns: int) -> int:
    """A square side by side with others is as high as it is wide: more would be empty."""
    if columns > 1:
        return _SQUARES.get(columns, _SQUARES[3]) if any(p.square for p in figure.panels) else _ROW
    return _ROW + _TALLER * any(p.solid for p in figure.panels)


def _bar_height(figure: Figure) -> int:
    """Side by side, panels need their width: colour bars stand below them."""
    return BAR if grid(figure)[1] > 1 and any(_coloured(p) for p in figure.panels) else 0


def _coloured(panel: Panel) -> bool:
    return not panel.solid and any(isinstance(m, Heat | Contour) for m in panel.marks)


def _columns(figure: Figure, columns: int) -> list[tuple[float, float]]:
    """The horizontal span of each column of panels, a colour bar at the right of a single one cut off."""
    parts = list(figure.widths) if len(figure.widths) == columns else [1.0] * columns
    beside = columns == 1 and any(_coloured(p) for p in figure.panels)
    gap = _gap(columns)
    free = 1.0 - gap * (columns - 1) - _BESIDE * beside
    spans, left = [], 0.0
    for part in parts:
        right = left + free * part / sum(parts)
        spans.append((left, right))
        left = right + gap
    return spans


def _gap(columns: int) -> float:
    return _GAP.get(columns, _GAP[3])
