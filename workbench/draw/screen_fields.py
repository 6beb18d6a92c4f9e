"""Heat maps, contours and surfaces as Plotly traces, with what is not known hatched and named under the pointer."""

from __future__ import annotations

from functools import singledispatch
from typing import Any

import numpy as np

from workbench.draw.cells import boxes, edges, open_quads, outline
from workbench.draw.rulers import Ruler
from workbench.draw.sheet import known
from workbench.draw.stage import END, HATCH, INK, VEIL, Stage, Trace, f32, hover_values, plain, plain_words
from workbench.draw.style import colours
from workbench.draw.words import tick_texts
from workbench.figure import Contour, Heat, Surface

_Field = Heat | Contour | Surface


@singledispatch
def field_traces(mark: Any, stage: Stage) -> list[Trace]:
    """The traces of a field: its colours, then what is not known."""
    raise TypeError(f"{type(mark).__name__} is not a field.")


@field_traces.register
def _(mark: Heat, stage: Stage) -> list[Trace]:
    page = stage.sheet
    x, y = (edges(np.asarray(v), r) for v, r in ((mark.x, page.x), (mark.y, page.y)))
    low, high = page.height.span
    body = {"type": "heatmap", "z": f32(page.height.forward(mark.z)), "zmin": low, "zmax": high, "hoverongaps": False}
    missing = ~known(mark, page.height)
    coloured = stage.xy(x, y) | body | _coloured(mark, stage)
    return [coloured, _hatch(boxes(missing, x, y), stage), _unknown(mark, missing, stage)]


@field_traces.register
def _(mark: Contour, stage: Stage) -> list[Trace]:
    if min(np.shape(mark.z)) < 2:
        return field_traces(Heat(mark.x, mark.y, mark.z, mark.label, mark.error, mark.coordinates), stage)
    page = stage.sheet
    low, high = page.inner_cuts
    cuts = {"start": low, "end": high, "size": 1, "coloring": "fill", "showlines": True}
    lines = {"autocontour": False, "contours": cuts, "line": {"width": 0.6, "color": "rgba(255,255,255,0.45)"}}
    body = {"type": "contour", "z": f32(page.colour_place(mark.z)), "connectgaps": False, "hoverongaps": False}
    missing = ~known(mark, page.height)
    hatch = _hatch(boxes(open_quads(~missing), np.asarray(mark.x), np.asarray(mark.y)), stage)
    coloured = stage.xy(mark.x, mark.y) | body | lines | _coloured(mark, stage)
    return [coloured, hatch, _unknown(mark, missing, stage)]


@field_traces.register
def _(mark: Surface, stage: Stage) -> list[Trace]:
    page = stage.sheet
    low, high = page.colour_ends
    light = {"ambient": 0.85, "diffuse": 0.4, "specular": 0.08, "roughness": 0.9}
    body = {
        "type": "surface",
        "x": f32(page.x.forward(mark.x)),
        "y": f32(page.y.forward(mark.y)),
        "z": f32(page.height.forward(mark.z)),
        "cmin": low,
        "cmax": high,
        "scene": f"scene{stage.suffix}",
        "lighting": light,
        "connectgaps": False,
    }
    return [body | _coloured(mark, stage), _unknown(mark, ~known(mark, page.height), stage)]


def _coloured(mark: _Field, stage: Stage) -> Trace:
    """Colour map, colour bar and hover text. A surface needs no colour bar, since its height axis says the same."""
    page, anchors = stage.sheet, colours(stage.sheet.diverging)
    found: Trace = {"colorscale": [[i / (len(anchors) - 1), c] for i, c in enumerate(anchors)]}
    shown = mark is page.field and not stage.solid
    found |= {"showscale": True, "colorbar": _bar(stage)} if shown else {"showscale": False}
    return found | _told(mark, stage)


def _told(mark: _Field, stage: Stage) -> Trace:
    """The words under the pointer: coordinates, value and its error. Hover text is numbers: it travels as binary."""
    panel = stage.sheet.panel
    across, along = mark.coordinates or (panel.x.label, panel.y.label)
    found, value = {"customdata": f32(mark.z)}, "customdata"
    if stage.sheet.height.scale == "linear" and not isinstance(mark, Contour):
        found, value = dict[str, Any](), "z"
    words = f"{plain(across)}: %{{x:.4~g}}<br>{plain(along)}: %{{y:.4~g}}<br>{_name(stage)}: %{{{value}:.4~g}}"
    if mark.error is not None:
        found, words = found | {"hovertext": f32(mark.error)}, words + " \N{PLUS-MINUS SIGN} %{hovertext:.2~g}"
    return found | {"hovertemplate": words + END}


def _name(stage: Stage) -> str:
    return plain(stage.sheet.panel.z.label if stage.sheet.panel.z else "value")


def _bar(stage: Stage) -> Trace:
    page = stage.sheet
    values = [float(v) for v in page.height.ticks()]
    numbers = {
        "lenmode": "fraction",
        "thickness": 14,
        "outlinewidth": 0,
        "tickvals": page.colour_place(values).tolist(),
        "ticktext": tick_texts(page.height, values, "html"),
    }
    return numbers | (_bar_beside(stage) if stage.place.bar is None else _bar_below(stage, stage.place.bar))


def _bar_beside(stage: Stage) -> Trace:
    place = stage.place
    across = {"x": place.right + 0.008, "xanchor": "left"}
    along = {"y": 0.5 * (place.bottom + place.top), "len": place.top - place.bottom, "ypad": 0}
    title = {"text": plain_words(stage.sheet.height), "side": "right", "font": {"size": 12}}
    return across | along | {"title": title}


def _bar_below(stage: Stage, top: float) -> Trace:
    """Its words are an annotation: Plotly sets them between the numbers."""
    place = stage.place
    across = {"x": 0.5 * (place.left + place.right), "len": place.right - place.left, "xpad": 0}
    along = {"y": top, "yanchor": "top", "ypad": 0, "thickness": 10}
    return across | along | {"orientation": "h"}


def _hatch(pieces: list[Any], stage: Stage) -> Trace:
    """Hatched rectangles over what is not known; present, though empty, when everything is.

    They cover: Plotly lets contours reach a little into meshes of which a corner is not known.
    """
    pattern = {"shape": "/", "fgcolor": HATCH, "bgcolor": VEIL, "size": 6, "solidity": 0.2, "fillmode": "overlay"}
    fill = {"mode": "lines", "fill": "toself", "fillpattern": pattern, "fillcolor": VEIL, "hoverinfo": "skip"}
    return stage.xy(*outline(pieces)) | fill | {"line": {"width": 0, "color": INK}}


def _unknown(mark: _Field, missing: Any, stage: Stage) -> Trace:
    """One marker at each unknown value: invisible under a hatch, a small ring on the floor of a scene."""
    rows, columns = np.nonzero(missing)
    x, y, z = np.asarray(mark.x)[columns], np.asarray(mark.y)[rows], np.asarray(mark.z)[rows, columns]
    shape = {"symbol": "circle-open", "size": 3} if stage.solid else {"symbol": "square", "size": 9, "opacity": 0.0}
    words = hover_values(stage, x, y)
    words["hovertemplate"] = words["hovertemplate"].replace(END, f"<br>{_name(stage)}: not known (%{{text}}){END}")
    text = [_why(v, stage.sheet.height) for v in z]
    return stage.xy(x, y) | {"mode": "markers", "marker": {"color": INK, **shape}, "text": text} | words


def _why(value: float, r: Ruler) -> str:
    return f"{value:g}" if not np.isfinite(value) else f"{value:g} has no place on a {r.scale} scale"
