"""Lines, bands, points, bars, stems and words as Plotly traces, one function for each mark."""

from __future__ import annotations

from functools import singledispatch
from typing import Any

import numpy as np

from workbench.draw.cells import runs
from workbench.draw.sheet import Sheet, bar_width
from workbench.draw.stage import Stage, Trace, f32, hover_values, plain, rgba, screen_values
from workbench.draw.style import BAND_ALPHA, Look, look
from workbench.figure import Array, Band, Bars, Line, Points, Rule, Stems, Text

_SYMBOLS = {
    "circle": "circle",
    "square": "square",
    "triangle": "triangle-up",
    "diamond": "diamond",
    "cross": "cross",
}
_SOLID_SYMBOLS = {"triangle": "diamond", "cross": "cross"}


def pen(found: Look) -> Trace:
    """Colour, dash and width of a line."""
    return {"color": found.screen, "dash": found.dash, "width": 2 * found.width}


def _marker(found: Look, stage: Stage) -> Trace:
    shape = _SOLID_SYMBOLS.get(found.marker, found.marker) if stage.solid else _SYMBOLS[found.marker]
    rim = {"width": 1.5 if found.hollow else 0, "color": found.screen}
    symbol = shape + ("-open" if found.hollow else "")
    return {"color": found.screen, "symbol": symbol, "size": 5 if stage.solid else 7, "line": rim}


def _legend(label: str, stage: Stage) -> Trace:
    return {"name": plain(label), "legend": f"legend{stage.suffix}"} if label else {}


@singledispatch
def traces(mark: Any, stage: Stage) -> list[Trace]:
    """The traces of one mark.

    Raises:
        TypeError: nobody has said how to draw it.
    """
    name = type(mark).__name__
    raise TypeError(f"screen cannot draw a {name}; register a function for it in workbench/draw/screen_marks.py.")


@traces.register
def _(mark: Rule, stage: Stage) -> list[Trace]:
    """In a plane a rule is a shape of the layout; on the floor of a scene it is a line."""
    if not stage.solid:
        return []
    page = stage.sheet
    ends = [page.y.low, page.y.high] if mark.axis == "x" else [page.x.low, page.x.high]
    at = [mark.at, mark.at]
    across, along = (at, ends) if mark.axis == "x" else (ends, at)
    return [stage.xy(across, along) | {"mode": "lines", "line": pen(look(mark.role)), "hoverinfo": "skip"}]


@traces.register
def _(mark: Line, stage: Stage) -> list[Trace]:
    found = look(mark.role)
    base = stage.xy(mark.x, mark.y) | {"mode": "lines", "line": pen(found), "opacity": max(found.alpha, 0.5)}
    return [base | hover_values(stage, mark.x, mark.y) | _legend(mark.label, stage)]


@traces.register
def _(mark: Band, stage: Stage) -> list[Trace]:
    found = look(mark.role)
    fill = {"fill": "toself", "fillcolor": rgba(found.screen, BAND_ALPHA), "hoverinfo": "skip", "mode": "lines"}
    base = stage.xy(*_ribbon(mark, stage.sheet)) | fill | {"line": {"width": 0, "color": found.screen}}
    return [base | _legend(mark.label, stage)]


def _ribbon(mark: Band, page: Sheet) -> tuple[Array, Array]:
    """The band as closed polygons, one for each stretch in which both ends are known, NaN between them."""
    x, low, high = np.asarray(mark.x), page.open_end(mark.low), np.asarray(mark.high)
    whole = np.isfinite(page.x.forward(x)) & np.isfinite(page.y.forward(low)) & np.isfinite(page.y.forward(high))
    across: list[float] = []
    along: list[float] = []
    for a, b in runs(whole):
        across += [*x[a:b], *x[a:b][::-1], np.nan]
        along += [*low[a:b], *high[a:b][::-1], np.nan]
    return np.array(across[:-1], dtype=float), np.array(along[:-1], dtype=float)


@traces.register
def _(mark: Points, stage: Stage) -> list[Trace]:
    found = look(mark.role)
    dots = {"mode": "markers", "marker": _marker(found, stage), "opacity": max(found.alpha, 0.6)}
    base = stage.xy(mark.x, mark.y) | dots | hover_values(stage, mark.x, mark.y, mark.error)
    return [base | _whisker(mark, stage, found.screen) | _legend(mark.label, stage)]


def _whisker(mark: Points | Bars, stage: Stage, colour: str) -> Trace:
    """Error bars; on a logarithm the lower end stops at the axis, on a symlog both ends are transformed."""
    if mark.error is None or stage.solid:
        return {}
    r, y, error = stage.sheet.y, np.asarray(mark.y), np.asarray(mark.error)
    if r.scale == "symlog":
        up, down = r.forward(y + error) - r.forward(y), r.forward(y) - r.forward(y - error)
    else:
        up, down = error, y - stage.sheet.open_end(y - error)
    bars = {"array": f32(up), "arrayminus": f32(down), "color": colour, "thickness": 1.2, "width": 3}
    return {"error_y": {"type": "data", "symmetric": False, "visible": True, **bars}}


@traces.register
def _(mark: Bars, stage: Stage) -> list[Trace]:
    found, page = look(mark.role), stage.sheet
    foot = screen_values(page.y, page.open_end(np.zeros(np.size(mark.y))))
    top = screen_values(page.y, mark.y)
    fill = {"color": rgba(found.screen, 0.0 if found.hollow else 0.85), "line": {"color": found.screen, "width": 1.2}}
    body = {"type": "bar", "y": top - foot, "base": foot, "marker": fill, "width": bar_width(np.asarray(mark.x))}
    unknown = np.full(np.size(mark.y), np.nan) if mark.error is None else mark.error
    words = hover_values(stage, mark.x, mark.y, unknown)
    if mark.error is None:
        words["hovertemplate"] = words["hovertemplate"].replace(" \N{PLUS-MINUS SIGN} %{customdata[2]:.2~g}", "")
    return [stage.xy(mark.x, mark.y) | body | words | _whisker(mark, stage, "#808890") | _legend(mark.label, stage)]


@traces.register
def _(mark: Stems, stage: Stage) -> list[Trace]:
    found = look(mark.role)
    x, y, gap = np.asarray(mark.x), np.asarray(mark.y), np.full(np.size(mark.x), np.nan)
    foot = stage.sheet.open_end(np.full(x.size, mark.base))
    stalks = stage.xy(np.stack([x, x, gap], 1).ravel(), np.stack([foot, y, gap], 1).ravel())
    stalks |= {"mode": "lines", "line": {"color": found.screen, "width": 1.5}, "hoverinfo": "skip"}
    heads = stage.xy(x, y) | {"mode": "markers", "marker": _marker(found, stage)}
    return [stalks, heads | hover_values(stage, x, y) | _legend(mark.label, stage)]


@traces.register
def _(mark: Text, stage: Stage) -> list[Trace]:
    words = {"mode": "text", "text": [plain(mark.words)], "textfont": {"color": look(mark.role).screen, "size": 12}}
    return [stage.xy([mark.x], [mark.y]) | words | {"hoverinfo": "skip"}]
