"""Axes, scenes, legends, titles and the template of figures on screen."""

from __future__ import annotations

from typing import Any

from workbench.draw.layout import EDGE, FOOT, HEAD, NOTE, height_of
from workbench.draw.rulers import Ruler
from workbench.draw.screen_marks import pen
from workbench.draw.stage import GRID, INK, Stage, plain, plain_words, screen_values
from workbench.draw.style import look
from workbench.draw.words import tick_texts
from workbench.figure import Bars, Figure, Rule

_FONT = "Inter, 'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', sans-serif"
_TITLE = 30
MESH = "rgb(150,157,164)"


def layout_of(figure: Figure, stages: list[Stage]) -> dict[str, Any]:
    """The layout of a figure whose panels stand on ``stages``."""
    top = HEAD + (_TITLE if figure.title else 0)
    layout: dict[str, Any] = {
        "template": template(),
        "height": height_of(figure) + (_TITLE if figure.title else 0),
        "margin": {"l": EDGE, "r": 16, "t": top, "b": FOOT + (NOTE if figure.note else 0)},
        "autosize": True,
        "uirevision": "workbench",
        "barmode": "overlay",
        "annotations": _annotations(figure, stages),
        "shapes": [_rule(m, s) for s in stages for m in s.sheet.panel.marks if isinstance(m, Rule) and not s.solid],
        "title": {"text": plain(figure.title), "x": 0, "xref": "paper", "xanchor": "left", "y": 1, "yref": "container"},
    }
    layout["title"] |= {"yanchor": "top", "pad": {"t": 10}, "font": {"size": 15}}
    for stage in stages:
        layout |= _scene(stage) if stage.solid else _axes(stage)
        layout[f"legend{stage.suffix}"] = _legend_place(stage)
    return layout


def template() -> dict[str, Any]:
    """Colours and fonts that read well on white and on black; nothing of it is registered with Plotly."""
    axis = {
        "gridcolor": GRID,
        "linecolor": INK,
        "tickcolor": INK,
        "ticks": "outside",
        "ticklen": 4,
        "showline": True,
        "automargin": True,
        "zeroline": False,
        "exponentformat": "power",
    }
    wall = {"showbackground": False, "gridcolor": MESH, "linecolor": INK, "showline": True, "zeroline": False}
    wall |= {"exponentformat": "power", "tickfont": {"size": 10}, "showspikes": False}
    layout = {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": _FONT, "size": 12, "color": INK},
        "xaxis": axis,
        "yaxis": axis,
        "hoverlabel": {"font": {"family": _FONT}},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": GRID, "activecolor": INK},
        "scene": {"xaxis": wall, "yaxis": wall, "zaxis": wall},
    }
    return {"layout": layout}


def _axes(stage: Stage) -> dict[str, Any]:
    page, place, s = stage.sheet, stage.place, stage.suffix
    x = _axis(page.x, ", ") | {"domain": [place.left, place.right], "anchor": f"y{s}"}
    y = _axis(page.y, "<br>") | {"domain": [place.bottom, place.top], "anchor": f"x{s}"}
    named = next((m for m in page.panel.marks if isinstance(m, Bars) and m.names), None)
    if named is not None:
        places = screen_values(page.x, named.x).tolist()
        x |= {"tickmode": "array", "tickvals": places, "ticktext": [plain(n) for n in named.names], "showgrid": False}
    if page.panel.square:
        y |= {"scaleanchor": f"x{s}", "constrain": "domain"}
        x |= {"constrain": "domain", "constraintoward": "right"}
    if page.field is not None:
        x, y = x | {"showgrid": False}, y | {"showgrid": False}
    return {f"xaxis{s}": x, f"yaxis{s}": y}


def _axis(r: Ruler, between: str) -> dict[str, Any]:
    found: dict[str, Any] = {"title": {"text": plain_words(r, between), "standoff": 8}, "range": list(r.span)}
    if r.scale != "log":
        return found | _ticks(r)
    return found | {"type": "log", "dtick": 1 if r.span[1] - r.span[0] > 1.5 else None}


def _ticks(r: Ruler) -> dict[str, Any]:
    if r.scale == "linear" and not r.whole:
        return {"type": "linear", "tickmode": "auto", "tickvals": None, "ticktext": None}
    values = [float(v) for v in r.ticks()]
    found = {"type": "linear", "tickmode": "array", "tickvals": r.forward(values).tolist()}
    return found | {"ticktext": tick_texts(r, values, "html")}


def _scene(stage: Stage) -> dict[str, Any]:
    """A scene keeps the camera that a person chose, because its revision never changes."""
    page, place = stage.sheet, stage.place
    far = 1.0 if place.right - place.left > 0.6 else 1.6
    sides = {"xaxis": page.x, "yaxis": page.y, "zaxis": page.height}
    scene = {name: _side(r) for name, r in sides.items()} | {
        "domain": {"x": [place.left, place.right], "y": [place.bottom, place.top]},
        "uirevision": "camera",
        "camera": {"eye": {"x": 1.45 * far, "y": -1.55 * far, "z": 0.95 * far}, "center": {"x": 0, "y": 0, "z": -0.14}},
        "aspectmode": "manual",
        "aspectratio": {"x": 1.05, "y": 1.05, "z": 0.8},
    }
    return {f"scene{stage.suffix}": scene}


def _side(r: Ruler) -> dict[str, Any]:
    words = plain_words(r).replace(" (", "<br>(")
    found: dict[str, Any] = {"title": {"text": words, "font": {"size": 11}}, "range": list(r.span)}
    values = [float(v) for v in r.ticks(5)]
    return found | {"tickvals": r.forward(values).tolist(), "ticktext": tick_texts(r, values, "html")}


def _legend_place(stage: Stage) -> dict[str, Any]:
    return {
        "x": stage.place.left,
        "xanchor": "left",
        "y": stage.place.top,
        "yanchor": "bottom",
        "orientation": "h",
        "bgcolor": "rgba(0,0,0,0)",
        "font": {"size": 11},
    }


def _rule(mark: Rule, stage: Stage) -> dict[str, Any]:
    """A line across the panel with its words at the far end."""
    found, s = look(mark.role), stage.suffix
    r = stage.sheet.x if mark.axis == "x" else stage.sheet.y
    at = float(screen_values(r, [mark.at])[0])
    side = {"textposition": "end", "yanchor": "bottom", "xanchor": "right"}
    words = {"text": plain(mark.label), "font": {"size": 11, "color": found.screen}, **side}
    line = {"type": "line", "line": pen(found) | {"width": 1.2}, "label": words}
    if mark.axis == "x":
        return line | {"x0": at, "x1": at, "y0": 0, "y1": 1, "xref": f"x{s}", "yref": f"y{s} domain"}
    return line | {"x0": 0, "x1": 1, "y0": at, "y1": at, "xref": f"x{s} domain", "yref": f"y{s}"}


def _annotations(figure: Figure, stages: list[Stage]) -> list[dict[str, Any]]:
    found = [_caption(s) for s in stages if s.sheet.panel.title]
    if figure.note:
        place = {
            "x": 1,
            "xanchor": "right",
            "y": 0,
            "yanchor": "top",
            "yshift": -FOOT,
            "xref": "paper",
            "yref": "paper",
        }
        found.append(place | {"text": plain(figure.note), "font": {"size": 11}, "showarrow": False})
    return found


def _caption(stage: Stage) -> dict[str, Any]:
    """The title of a panel, above its legend where it has one."""
    labelled = any(getattr(m, "label", "") and not isinstance(m, Rule) for m in stage.sheet.panel.marks)
    place = {"x": stage.place.left, "y": stage.place.top, "xanchor": "left", "yanchor": "bottom", "showarrow": False}
    shift = {"yshift": 24 if labelled else 5, "xref": "paper", "yref": "paper"}
    return place | shift | {"text": plain(stage.sheet.panel.title), "font": {"size": 13}}
