"""Heat maps, contours and surfaces by matplotlib, with what is not known hatched or left open and marked."""

from __future__ import annotations

from functools import singledispatch
from typing import Any

import numpy as np

from workbench.draw.cells import Box, boxes, edges, open_quads
from workbench.draw.paper_marks import Stage
from workbench.draw.paper_style import GREY, VEIL, colour_map
from workbench.draw.sheet import known
from workbench.figure import Contour, Heat, Surface

_VECTOR_CELLS = 20_000
_ROUGHEST = 120


@singledispatch
def draw_field(mark: Any, stage: Stage) -> Any:
    """Draw a field and return the coloured artist, which a colour bar can be made for."""
    raise TypeError(f"{type(mark).__name__} is not a field.")


@draw_field.register
def _(mark: Heat, stage: Stage) -> Any:
    page = stage.sheet
    x, y = (edges(np.asarray(v), r) for v, r in ((mark.x, page.x), (mark.y, page.y)))
    z = page.height.forward(mark.z)
    low, high = page.height.span
    fine = stage.raster and z.size > _VECTOR_CELLS
    paint = {"cmap": colour_map(page.diverging), "vmin": low, "vmax": high, "rasterized": fine}
    seams = {} if fine else {"edgecolors": "face", "linewidth": 0.15}
    image = stage.axes.pcolormesh(x, y, np.ma.masked_invalid(z), **paint, **seams)
    _hatch(boxes(~np.isfinite(z), x, y), stage)
    return image


@draw_field.register
def _(mark: Contour, stage: Stage) -> Any:
    if min(np.shape(mark.z)) < 2:
        return draw_field(Heat(mark.x, mark.y, mark.z, mark.label), stage)
    page, axes = stage.sheet, stage.axes
    cuts = np.arange(page.levels.size)
    w = np.ma.masked_invalid(page.colour_place(mark.z))
    last = float(cuts[-1])
    paint = {"cmap": colour_map(page.diverging), "vmin": 0.5, "vmax": max(last - 0.5, 1.0)}
    image = axes.contourf(mark.x, mark.y, w, levels=cuts, corner_mask=False, **paint)
    lines = {"colors": "white", "linewidths": 0.35, "alpha": 0.6}
    axes.contour(mark.x, mark.y, w, levels=cuts[1:-1] if last > 1 else cuts, corner_mask=False, **lines)
    _hatch(boxes(open_quads(known(mark, page.height)), np.asarray(mark.x), np.asarray(mark.y)), stage)
    return image


@draw_field.register
def _(mark: Surface, stage: Stage) -> Any:
    """Only meshes with four known corners are drawn; the others are crossed on the floor."""
    from matplotlib.colors import LightSource, Normalize

    page, axes = stage.sheet, stage.axes
    x, y = np.meshgrid(page.x.forward(mark.x), page.y.forward(mark.y))
    z = page.height.forward(mark.z)
    paint = {"norm": Normalize(*page.colour_ends), "cmap": colour_map(page.diverging)}
    rough = {"rcount": min(z.shape[0], _ROUGHEST), "ccount": min(z.shape[1], _ROUGHEST)}
    light = LightSource(azdeg=315, altdeg=60)
    mesh = axes.plot_surface(x, y, np.ma.masked_invalid(z), lightsource=light, **paint, **rough)
    mesh.set_edgecolor("face")
    mesh.set_linewidth(0.1)
    missing = ~np.isfinite(z)
    floor = np.full(int(missing.sum()), page.height.span[0])
    cross = {"linestyle": "none", "marker": "x", "markersize": 2, "markeredgewidth": 0.4, "color": GREY}
    axes.plot(x[missing], y[missing], floor, **cross)
    return mesh


def _hatch(pieces: list[Box], stage: Stage) -> None:
    """Hatched rectangles where a value is not known."""
    from matplotlib.collections import PolyCollection

    corners = [[(a, c), (b, c), (b, d), (a, d)] for a, b, c, d in pieces]
    face: dict[str, Any] = {"facecolors": VEIL, "edgecolors": GREY, "linewidths": 0.0, "hatch": "//////"}
    stage.axes.add_collection(PolyCollection(corners, **face, gid="unknown"), autolim=False)
