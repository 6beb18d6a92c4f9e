"""Axes, scenes, legends, titles and the template of figures on screen."""

from __future__ import annotations

from typing import Any

from workbench.draw.layout import EDGE, HEAD, NOTE, foot_of, height_of, note_lines
from workbench.draw.legends import LINE, Common
from workbench.draw.rulers import Ruler
from workbench.draw.screen_marks import pen
from workbench.draw.stage import GRID, INK, Stage, plain, plain_words, screen_values
from workbench.draw.style import look
from workbench.draw.words import tick_texts
from workbench.figure import Bars, Figure, Rule

_FONT = "Inter, 'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', sans-serif"
_TITLE, _CAPTION = 30, 38
MESH = "rgb(150,157,164)"


def layout_of(figure: Figure, stages: list[Stage], common: Common) -> dict[str, Any]:
    """The layout of a figure whose panels stand on ``stages``, with a ``common`` legend where there is one."""
    title = _TITLE if figure.title else 0
    top = title + (_CAPTION + LINE * common.lines if common.lines else HEAD)
    layout: dict[str, Any] = {
        "template": template(),
        "height": top + height_of(figure),
        "margin": {"l": EDGE, "r": 16, "t": top, "b": foot_of(figure)},
        "autosize": True,
        "uirevision": "workbench",
        "barmode": "overlay",
        "annotations": _annotations(figure, stages, bool(common.lines)),
        "shapes": [_rule(m, s) for s in stages for m in s.sheet.panel.marks if isinstance(m, Rule) and not s.solid],
        "title": {"text": plain(figure.title), "x": 0, "xref": "paper", "xanchor": "left", "y": 1, "yref": "container"},
    }
    layout["title"] |= {"yanchor": "top", "pad": {"t": 10}, "font": {"size": 15}}
    for left, stage in zip([None, *stages], stages, strict=False):
        layout |= _scene(stage, stages) if stage.solid else _axes(stage, left)
        layout[f"legend{stage.suffix}"] = _legend_place(stage)
    if common.lines:
        click = "toggleitem" if common.apart else "togglegroup"  # a name that stands once is that of all panels
        place = {"x": 0.0, "y": 1 - title / layout["height"], "yref": "container", "yanchor": "top"}
        layout["legend"] |= place | {"tracegroupgap": 0, "groupclick": click}
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


def _axes(stage: Stage, left: Stage | None) -> dict[str, Any]:
    page, place, s = stage.sheet, stage.place, stage.suffix
    x = _axis(page.x, ", ") | {"domain": [place.left, place.right], "anchor": f"y{s}"}
    y = _axis(page.y, "<br>") | {"domain": [place.bottom, place.top], "anchor": f"x{s}"}
    if left is not None and _says_the_same(left, stage):
        y["title"] = {"text": ""}
    named = next((m for m in page.panel.marks if isinstance(m, Bars) and m.names), None)
    if named is not None:
        places = screen_values(page.x, named.x).tolist()
        x |= {"tickmode": "array", "tickvals": places, "ticktext": [plain(n) for n in named.names], "showgrid": False}
    if page.panel.square:
        y |= {"scaleanchor": f"x{s}", "constrain": "domain"}
        x |= {"constrain": "domain", "constraintoward": "right" if place.bar is None else "center"}
        y |= {"constraintoward": "middle" if place.bar is None else "bottom"}
    if page.field is not None:
        x, y = x | {"showgrid": False}, y | {"showgrid": False}
    return {f"xaxis{s}": x, f"yaxis{s}": y}


def _says_the_same(left: Stage, stage: Stage) -> bool:
    """Whether the panel before stands at the left in the same row and names its vertical axis alike."""
    beside = left.place.top == stage.place.top and not left.solid
    return beside and plain_words(left.sheet.y) == plain_words(stage.sheet.y)


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


def _scene(stage: Stage, stages: list[Stage]) -> dict[str, Any]:
    """A scene keeps the camera that a person chose, because its revision never changes."""
    page, place = stage.sheet, stage.place
    far = 1.0 if place.right - place.left > 0.6 else 1.2
    sides = {"xaxis": page.x, "yaxis": page.y, "zaxis": page.height}
    named = {name: _side(r) for name, r in sides.items()}
    if any(_has_bar(s) and plain_words(s.sheet.height) == plain_words(page.height) for s in stages):
        named["zaxis"]["title"] = {"text": ""}  # the colour bar says it; in a narrow scene it would be cut off
    scene = named | {
        "domain": {"x": [place.left - 0.7 * place.free, place.right], "y": [place.bottom, place.top]},
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


def _annotations(figure: Figure, stages: list[Stage], common: bool) -> list[dict[str, Any]]:
    found = [_caption(s, common) for s in stages if s.sheet.panel.title]
    found += [_bar_words(s, s.place.bar) for s in stages if s.place.bar is not None and _has_bar(s)]
    if lines := note_lines(figure):
        place = {
            "x": 1,
            "xanchor": "right",
            "y": 0,
            "yanchor": "top",
            "yshift": NOTE * len(lines) - foot_of(figure),
            "xref": "paper",
            "yref": "paper",
        }
        words = {"text": "<br>".join(plain(line) for line in lines), "align": "right"}
        found.append(place | words | {"font": {"size": 11}, "showarrow": False})
    return found


def _has_bar(stage: Stage) -> bool:
    return stage.sheet.field is not None and not stage.solid


def _bar_words(stage: Stage, top: float) -> dict[str, Any]:
    """What a colour bar below a panel measures."""
    middle = 0.5 * (stage.place.left + stage.place.right)
    place = {"x": middle, "y": top, "xanchor": "center", "yanchor": "top", "xref": "paper", "yref": "paper"}
    words = {"text": plain_words(stage.sheet.height), "font": {"size": 12}, "showarrow": False}
    return place | words | {"yshift": -27}


def _caption(stage: Stage, common: bool) -> dict[str, Any]:
    """The title of a panel, above its legend where it has one."""
    labelled = not common and any(getattr(m, "label", "") and not isinstance(m, Rule) for m in stage.sheet.panel.marks)
    place = {"x": stage.place.left, "y": stage.place.top, "xanchor": "left", "yanchor": "bottom", "showarrow": False}
    shift = {"yshift": 24 if labelled else 5, "xref": "paper", "yref": "paper"}
    return place | shift | {"text": plain(stage.sheet.panel.title), "font": {"size": 13}}
