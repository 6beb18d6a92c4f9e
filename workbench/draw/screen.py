"""Figures on screen: a :class:`~workbench.figure.Figure` becomes a Plotly figure, mark by mark.

Paper and plot are transparent and text is mid-grey, so that one picture reads well in light and dark themes. Arrays are
float32, which Plotly sends as binary. Every mark makes a fixed number of traces whatever its data, so that a picture
that is updated keeps its structure; what is not known is hatched and says so under the pointer.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import numpy as np

from workbench.draw.cells import boxes, edges, open_quads, outline, runs
from workbench.draw.layout import Place, places
from workbench.draw.rulers import Ruler
from workbench.draw.sheet import Sheet, bar_width, known, sheet
from workbench.draw.style import BAND_ALPHA, Look, colours, look
from workbench.draw.words import tick_texts
from workbench.figure import Array, Band, Bars, Contour, Figure, Heat, Line, Panel, Points, Role, Stems, Surface, Text

INK = "#808890"
GRID = "rgba(128,136,144,0.25)"
VEIL = "rgba(128,136,144,0.18)"
FONT = "Inter, 'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', sans-serif"
_SYMBOLS = {"circle": "circle", "square": "square", "triangle": "triangle-up", "diamond": "diamond", "cross": "cross"}
Trace = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """Where traces of a panel go: its sheet, its number from 1, its rectangle, and whether it is the only one."""

    sheet: Sheet
    number: int
    place: Place

    @property
    def suffix(self) -> str:
        """``""`` for the first panel, else its number: how Plotly names axes, scenes and legends."""
        return "" if self.number == 1 else str(self.number)

    def xy(self, x: Any, y: Any) -> Trace:
        """Points in the plane of the panel: on its two axes, or on the floor of its scene."""
        across, along = screen_values(self.sheet.x, x), screen_values(self.sheet.y, y)
        if not self.sheet.panel.solid:
            return {"x": across, "y": along, "xaxis": f"x{self.suffix}", "yaxis": f"y{self.suffix}"}
        across, along = f32(self.sheet.x.forward(x)), f32(self.sheet.y.forward(y))
        floor = np.full(across.shape, self.sheet.height.span[0], dtype=np.float32)
        return {"type": "scatter3d", "x": across, "y": along, "z": floor, "scene": f"scene{self.suffix}"}


def screen(figure: Figure) -> Any:
    """The figure as ``plotly.graph_objects.Figure``.

    Sizes: the height is set (so that a notebook reserves it), the width follows the page.
    """
    import plotly.graph_objects as go

    data, layout = describe(figure)
    return go.Figure(data=data, layout=layout)


def describe(figure: Figure) -> tuple[list[Trace], dict[str, Any]]:
    """Traces and layout as plain dicts, for :func:`screen` and for figures that are updated in place."""
    spots, height = places(figure)
    stages = [Stage(sheet(p), n, spot) for n, (p, spot) in enumerate(zip(figure.panels, spots, strict=True), 1)]
    traces = [trace for stage in stages for mark in stage.sheet.panel.marks for trace in _traces(mark, stage)]
    return [_named(t, stages) for t in traces], _layout(figure, stages, height)


def f32(values: Any) -> Any:
    """Values as float32, what cannot be shown as NaN."""
    out = np.asarray(values, dtype=np.float64)
    with np.errstate(over="ignore"):
        return np.where(np.isfinite(out), out, np.nan).astype(np.float32)


def screen_values(r: Ruler, values: Any) -> Any:
    """What Plotly is given along an axis: the values (masked where unknown), or u on a symlog, which it lacks."""
    u = r.forward(values)
    return f32(u) if r.scale == "symlog" else f32(np.where(np.isfinite(u), values, np.nan))


def _named(trace: Trace, stages: list[Stage]) -> Trace:
    return {"type": "scatter", "showlegend": bool(trace.get("name")), **trace}


def _hover(stage: Stage, third: str = "") -> str:
    panel = stage.sheet.panel
    x, y = html.escape(panel.x.label), html.escape(panel.y.label)
    across = "%{customdata[0]:.4~g}" if stage.sheet.x.scale == "symlog" else "%{x:.4~g}"
    along = "%{customdata[1]:.4~g}" if stage.sheet.y.scale == "symlog" else "%{y:.4~g}"
    return f"{x}: {across}<br>{y}: {along}{third}"


def _pairs(stage: Stage, x: Any, y: Any) -> Trace:
    """Hover text of points; true values ride along where an axis shows a transformed one."""
    if "symlog" not in (stage.sheet.x.scale, stage.sheet.y.scale) and not stage.sheet.panel.solid:
        return {}
    return {"customdata": f32(np.stack([np.ravel(x), np.ravel(y)], axis=1))}


def rgba(colour: str, alpha: float) -> str:
    """``#RRGGBB`` with an opacity, as CSS writes it."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha:g})"


def _line(found: Look) -> Trace:
    return {"color": found.screen, "dash": found.dash, "width": 2 * found.width}


def _marker(found: Look, size: float = 7) -> Trace:
    symbol = _SYMBOLS[found.marker] + ("-open" if found.hollow else "")
    return {"color": found.screen, "symbol": symbol, "size": size, "line": {"width": 1.5 if found.hollow else 0}}


def _legend(label: str, stage: Stage) -> Trace:
    return {"name": html.escape(label), "legend": f"legend{stage.suffix}"} if label else {}


@singledispatch
def _traces(mark: Any, stage: Stage) -> list[Trace]:
    """The traces of one mark; a :class:`~workbench.figure.Rule` has none, it is a shape of the layout."""
    return []


@_traces.register
def _(mark: Line, stage: Stage) -> list[Trace]:
    found = look(mark.role)
    words = {"hovertemplate": _hover(stage) + "<extra></extra>", **_pairs(stage, mark.x, mark.y)}
    base = stage.xy(mark.x, mark.y) | {"mode": "lines", "line": _line(found), "opacity": max(found.alpha, 0.5)}
    return [base | words | _legend(mark.label, stage)]


@_traces.register
def _(mark: Band, stage: Stage) -> list[Trace]:
    found = look(mark.role)
    x, y = _ribbon(mark, stage.sheet)
    fill = {"fill": "toself", "fillcolor": rgba(found.screen, BAND_ALPHA), "hoverinfo": "skip", "mode": "lines"}
    return [stage.xy(x, y) | fill | {"line": {"width": 0, "color": found.screen}} | _legend(mark.label, stage)]


def _ribbon(mark: Band, page: Sheet) -> tuple[Array, Array]:
    """The band as closed polygons, one for each stretch in which both ends are known."""
    x, low, high = np.asarray(mark.x), page.y.clip(mark.low) if page.y.scale == "log" else mark.low, mark.high
    whole = np.isfinite(page.x.forward(x)) & np.isfinite(page.y.forward(low)) & np.isfinite(page.y.forward(high))
    low, high = np.asarray(low), np.asarray(high)
    across, along = [], []
    for a, b in runs(whole):
        across += [*x[a:b], *x[a:b][::-1], np.nan]
        along += [*low[a:b], *high[a:b][::-1], np.nan]
    return np.array(across[:-1], dtype=float), np.array(along[:-1], dtype=float)


@_traces.register
def _(mark: Points, stage: Stage) -> list[Trace]:
    found = look(mark.role)
    words = {"hovertemplate": _hover(stage) + _error_words(mark.error) + "<extra></extra>"}
    base = stage.xy(mark.x, mark.y) | {"mode": "markers", "marker": _marker(found), "opacity": max(found.alpha, 0.6)}
    return [base | words | _pairs(stage, mark.x, mark.y) | _whisker(mark, stage, found) | _legend(mark.label, stage)]


def _error_words(error: Any) -> str:
    return "" if error is None else " \N{PLUS-MINUS SIGN} %{error_y.array:.2~g}"


def _whisker(mark: Points | Bars, stage: Stage, found: Look) -> Trace:
    """Error bars; on a logarithm the lower end stops at the axis, on a symlog both ends are transformed."""
    if mark.error is None:
        return {}
    r, y, error = stage.sheet.y, np.asarray(mark.y), np.asarray(mark.error)
    if r.scale == "symlog":
        up, down = r.forward(y + error) - r.forward(y), r.forward(y) - r.forward(y - error)
    else:
        up, down = error, (y - r.clip(y - error) if r.scale == "log" else error)
    bars = {"array": f32(up), "arrayminus": f32(down), "color": found.screen, "thickness": 1.2, "width": 3}
    return {"error_y": {"type": "data", "symmetric": False, "visible": True, **bars}}


@_traces.register
def _(mark: Bars, stage: Stage) -> list[Trace]:
    found, page = look(mark.role), stage.sheet
    foot = page.y.clip(np.zeros(np.size(mark.y))) if page.y.scale == "log" else np.zeros(np.size(mark.y))
    top, base = screen_values(page.y, mark.y), screen_values(page.y, foot)
    fill = {"color": rgba(found.screen, 0.0 if found.hollow else 0.85), "line": {"color": found.screen, "width": 1.2}}
    body = stage.xy(mark.x, mark.y) | {"type": "bar", "y": top - base, "base": base, "marker": fill}
    body |= {"width": bar_width(np.asarray(mark.x)), "customdata": f32(np.stack([mark.x, mark.y], axis=1))}
    words = {"hovertemplate": _hover(stage).replace("%{y:", "%{customdata[1]:") + _error_words(mark.error) + "<extra></extra>"}
    return [body | words | _whisker(mark, stage, found) | _legend(mark.label, stage)]


@_traces.register
def _(mark: Stems, stage: Stage) -> list[Trace]:
    found, page = look(mark.role), stage.sheet
    x, y, gap = np.asarray(mark.x), np.asarray(mark.y), np.full(np.size(mark.x), np.nan)
    foot = np.full(x.size, max(mark.base, page.y.low) if page.y.scale == "log" else mark.base)
    stalks = stage.xy(np.stack([x, x, gap], 1).ravel(), np.stack([foot, y, gap], 1).ravel())
    stalks |= {"mode": "lines", "line": _line(found) | {"dash": "solid", "width": 1.5}, "hoverinfo": "skip"}
    heads = stage.xy(x, y) | {"mode": "markers", "marker": _marker(found), **_pairs(stage, x, y)}
    return [stalks, heads | {"hovertemplate": _hover(stage) + "<extra></extra>"} | _legend(mark.label, stage)]


@_traces.register
def _(mark: Text, stage: Stage) -> list[Trace]:
    font = {"color": look(mark.role).screen, "size": 12}
    place = stage.xy([mark.x], [mark.y]) | {"mode": "text", "text": [html.escape(mark.words)], "textfont": font}
    return [place | {"hoverinfo": "skip"}]


@_traces.register
def _(mark: Heat, stage: Stage) -> list[Trace]:
    page = stage.sheet
    x, y = (edges(np.asarray(v), r) for v, r in ((mark.x, page.x), (mark.y, page.y)))
    low, high = page.height.span
    colour = _coloured(mark, stage) | {"zmin": low, "zmax": high, "hoverongaps": False}
    body = stage.xy(x, y) | {"type": "heatmap", "z": f32(page.height.forward(mark.z)), **colour}
    missing = ~known(mark, page.height)
    return [body, _hatch(boxes(missing, x, y), stage), _unknown(mark, missing, stage)]


@_traces.register
def _(mark: Contour, stage: Stage) -> list[Trace]:
    if min(np.shape(mark.z)) < 2:
        return _traces(Heat(mark.x, mark.y, mark.z, mark.label), stage)
    page, bands = stage.sheet, stage.sheet.bands
    assert bands is not None
    last = bands.levels.size - 1
    cuts = {"start": 1, "end": max(last - 1, 1), "size": 1, "coloring": "fill", "showlines": True}
    look_ = {"autocontour": False, "contours": cuts, "line": {"width": 0.6, "color": "rgba(255,255,255,0.45)"}}
    body = stage.xy(mark.x, mark.y) | {"type": "contour", "z": f32(page.colour_place(mark.z)), "connectgaps": False}
    missing = ~known(mark, page.height)
    hatch = _hatch(boxes(open_quads(~missing), np.asarray(mark.x), np.asarray(mark.y)), stage)
    return [body | look_ | _coloured(mark, stage), hatch, _unknown(mark, missing, stage)]


@_traces.register
def _(mark: Surface, stage: Stage) -> list[Trace]:
    page = stage.sheet
    z = page.height.forward(mark.z)
    low, high = page.height.span
    body = {"type": "surface", "x": f32(page.x.forward(mark.x)), "y": f32(page.y.forward(mark.y)), "z": f32(z)}
    light = {"ambient": 0.75, "diffuse": 0.55, "specular": 0.08, "roughness": 0.9}
    body |= {"cmin": low, "cmax": high, "scene": f"scene{stage.suffix}", "lighting": light, "connectgaps": False}
    return [body | _coloured(mark, stage), _unknown(mark, ~known(mark, page.height), stage)]


def _coloured(mark: Heat | Contour | Surface, stage: Stage) -> Trace:
    """Colour map, colour bar and hover text of a field."""
    page, r = stage.sheet, stage.sheet.height
    anchors = colours(page.diverging)
    scale = [[i / (len(anchors) - 1), c] for i, c in enumerate(anchors)]
    plain = r.scale == "linear" and not isinstance(mark, Contour) and not page.panel.solid
    third = f"<br>{html.escape(page.panel.z.label if page.panel.z else '')}: "
    words = _hover(stage).replace("%{customdata[0]", "%{x").replace("%{customdata[1]", "%{y")
    found: Trace = {"colorscale": scale, "showscale": mark is page.field, "colorbar": _bar(stage)}
    if plain:
        return found | {"hovertemplate": words + third + "%{z:.4~g}<extra></extra>"}
    found |= {"customdata": f32(mark.z), "hovertemplate": words + third + "%{customdata:.4~g}<extra></extra>"}
    return found


def _bar(stage: Stage) -> Trace:
    page, place = stage.sheet, stage.place
    values = [float(v) for v in page.colour_ticks()]
    bar = {"x": place.right + 0.008, "y": 0.5 * (place.bottom + place.top), "len": place.top - place.bottom}
    bar |= {"tickvals": page.colour_place(values).tolist(), "ticktext": tick_texts(page.height, values, "html")}
    title = {"text": html.escape(page.height.words), "side": "right", "font": {"size": 12}}
    return bar | {"xanchor": "left", "thickness": 14, "outlinewidth": 0, "title": title, "lenmode": "fraction"}


def _hatch(pieces: list[Any], stage: Stage) -> Trace:
    """Hatched rectangles over what is not known; present, though empty, when everything is."""
    x, y = outline(pieces)
    pattern = {"shape": "/", "fgcolor": INK, "bgcolor": VEIL, "size": 6, "solidity": 0.18, "fillmode": "overlay"}
    return stage.xy(x, y) | {
        **{"mode": "lines", "fill": "toself", "fillpattern": pattern, "fillcolor": VEIL, "hoverinfo": "skip"},
        **{"line": {"width": 0, "color": INK}},
    }


def _unknown(mark: Heat | Contour | Surface, missing: Any, stage: Stage) -> Trace:
    """One marker at each unknown value: invisible under a hatch, a small cross on the floor of a scene."""
    rows, columns = np.nonzero(missing)
    x, y, z = np.asarray(mark.x)[columns], np.asarray(mark.y)[rows], np.asarray(mark.z)[rows, columns]
    name = html.escape(stage.sheet.panel.z.label if stage.sheet.panel.z else "value")
    text = [f"{name}: not known ({_why(v, stage.sheet.height)})" for v in z]
    solid = stage.sheet.panel.solid
    dot = {"symbol": "x" if solid else "square", "size": 2.5 if solid else 9, "color": INK, "opacity": 1.0 if solid else 0.0}
    words = {"text": text, "hovertemplate": f"{_hover(stage)}<br>%{{text}}<extra></extra>"}
    return stage.xy(x, y) | {"mode": "markers", "marker": dot, **words, **_pairs(stage, x, y)}


def _why(value: float, r: Ruler) -> str:
    return f"{value:g}" if not np.isfinite(value) else f"{value:g} has no place on a {r.scale} scale"


def _layout(figure: Figure, stages: list[Stage], height: int) -> dict[str, Any]:
    layout: dict[str, Any] = {
        **{"template": _template(), "height": height, "uirevision": "workbench", "barmode": "overlay"},
        **{"annotations": _annotations(figure, stages), "shapes": [s for stage in stages for s in _rules(stage)]},
    }
    if figure.title:
        layout["title"] = {"text": html.escape(figure.title), "x": 0.01, "xanchor": "left", "y": 0.985, "yanchor": "top"}
    for stage in stages:
        layout |= _scene(stage) if stage.sheet.panel.solid else _axes(stage)
        layout[f"legend{stage.suffix}"] = _legend_place(stage)
    return layout


def _template() -> dict[str, Any]:
    axis = {"gridcolor": GRID, "zerolinecolor": GRID, "linecolor": INK, "ticks": "outside", "ticklen": 4}
    axis |= {"tickcolor": INK, "showline": True, "automargin": True, "zeroline": False, "exponentformat": "power"}
    wall = {"showbackground": False, "gridcolor": GRID, "linecolor": INK, "zerolinecolor": GRID, "exponentformat": "power"}
    layout = {
        **{"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)"},
        **{"font": {"family": FONT, "size": 12, "color": INK}, "xaxis": axis, "yaxis": axis},
        **{"margin": {"l": 64, "r": 20, "t": 24, "b": 48}, "hoverlabel": {"font": {"family": FONT}}},
        **{"scene": {"xaxis": wall, "yaxis": wall, "zaxis": wall}},
    }
    return {"layout": layout}


def _axes(stage: Stage) -> dict[str, Any]:
    page, place, s = stage.sheet, stage.place, stage.suffix
    x = _axis(page.x) | {"domain": [place.left, place.right], "anchor": f"y{s}"}
    y = _axis(page.y) | {"domain": [place.bottom, place.top], "anchor": f"x{s}"}
    names = next((m for m in page.panel.marks if isinstance(m, Bars) and m.names), None)
    if names is not None:
        x |= {"tickmode": "array", "tickvals": screen_values(page.x, names.x).tolist(), "ticktext": list(names.names)}
    if page.panel.square:
        y |= {"scaleanchor": f"x{s}", "constrain": "domain"}
        x |= {"constrain": "domain"}
    return {f"xaxis{s}": x, f"yaxis{s}": y}


def _axis(r: Ruler) -> dict[str, Any]:
    found = {"title": {"text": html.escape(r.words), "standoff": 8}, "range": list(r.span)}
    return found | ({"type": "log", "dtick": 1 if _decades(r) > 1.5 else None} if r.scale == "log" else _ticks(r))


def _decades(r: Ruler) -> float:
    return r.span[1] - r.span[0]


def _ticks(r: Ruler) -> dict[str, Any]:
    if r.scale == "linear":
        return {"type": "linear"}
    values = [float(v) for v in r.ticks()]
    found = {"type": "linear", "tickmode": "array", "tickvals": r.forward(values).tolist()}
    return found | {"ticktext": tick_texts(r, values, "html")}


def _scene(stage: Stage) -> dict[str, Any]:
    """A scene keeps the camera that a person chose, because its revision never changes."""
    page, place = stage.sheet, stage.place
    sides = zip(("xaxis", "yaxis", "zaxis"), (page.x, page.y, page.height), strict=True)
    scene: dict[str, Any] = {name: _side(r) for name, r in sides}
    scene |= {"domain": {"x": [place.left, place.right], "y": [place.bottom, place.top]}, "uirevision": "camera"}
    scene |= {"camera": {"eye": {"x": 1.5, "y": -1.6, "z": 0.95}}, "aspectmode": "manual"}
    return {f"scene{stage.suffix}": scene | {"aspectratio": {"x": 1.05, "y": 1.05, "z": 0.8}}}


def _side(r: Ruler) -> dict[str, Any]:
    found = {"title": {"text": html.escape(r.words)}, "range": list(r.span)}
    if r.scale == "linear":
        return found
    values = [float(v) for v in r.ticks()]
    return found | {"tickvals": r.forward(values).tolist(), "ticktext": tick_texts(r, values, "html")}


def _legend_place(stage: Stage) -> dict[str, Any]:
    spot = {"x": stage.place.left, "xanchor": "left", "y": stage.place.top, "yanchor": "bottom"}
    return spot | {"orientation": "h", "bgcolor": "rgba(0,0,0,0)", "font": {"size": 11}}


def _rules(stage: Stage) -> list[dict[str, Any]]:
    from workbench.figure import Rule

    return [_rule(m, stage) for m in stage.sheet.panel.marks if isinstance(m, Rule) and not stage.sheet.panel.solid]


def _rule(mark: Any, stage: Stage) -> dict[str, Any]:
    found, s = look(mark.role), stage.suffix
    r = stage.sheet.x if mark.axis == "x" else stage.sheet.y
    at = float(screen_values(r, [mark.at])[0])
    words = {"text": html.escape(mark.label), "font": {"size": 11, "color": found.screen}, "textposition": "end"}
    line = {"type": "line", "line": _line(found) | {"width": 1.2}, "label": words}
    if mark.axis == "x":
        return line | {"x0": at, "x1": at, "y0": 0, "y1": 1, "xref": f"x{s}", "yref": f"y{s} domain"}
    return line | {"x0": 0, "x1": 1, "y0": at, "y1": at, "xref": f"x{s} domain", "yref": f"y{s}"}


def _annotations(figure: Figure, stages: list[Stage]) -> list[dict[str, Any]]:
    found = [_caption(s) for s in stages if s.sheet.panel.title]
    if figure.note:
        small = {"text": html.escape(figure.note), "font": {"size": 11}, "x": 1, "xanchor": "right"}
        found.append(small | {"y": 0, "yanchor": "top", "yshift": -44, "xref": "paper", "yref": "paper", "showarrow": False})
    return found


def _caption(stage: Stage) -> dict[str, Any]:
    labelled = any(getattr(m, "label", "") and not hasattr(m, "at") for m in stage.sheet.panel.marks)
    fields = stage.sheet.field is not None
    place = {"x": stage.place.left, "y": stage.place.top, "xanchor": "left", "yanchor": "bottom", "showarrow": False}
    shift = {"yshift": 24 if labelled and not fields else 6, "xref": "paper", "yref": "paper"}
    return place | shift | {"text": html.escape(stage.sheet.panel.title), "font": {"size": 13}}
