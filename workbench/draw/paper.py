"""Figures on paper: a :class:`~workbench.figure.Figure` becomes a matplotlib figure of exact size, mark by mark.

Nothing goes through pyplot and no backend is switched. matplotlib keeps its settings in one global table, so it is
changed only inside a context that puts it back, under a lock that all our drawing shares.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import numpy as np

from workbench.draw.cells import boxes, edges, open_quads, runs
from workbench.draw.fonts import choose
from workbench.draw.rulers import Ruler
from workbench.draw.sheet import Sheet, bar_width, grid, known, sheet
from workbench.draw.style import BAND_ALPHA, Look, colours, look
from workbench.draw.venues import Venue, venue
from workbench.draw.words import tick_texts
from workbench.figure import Array, Band, Bars, Contour, Figure, Heat, Line, Panel, Points, Rule, Stems, Surface, Text

_LOCK = threading.RLock()
_DASHES: dict[str, Any] = {"solid": "-", "dash": (0, (5, 2)), "dot": (0, (1.2, 1.6)), "dashdot": (0, (5, 1.6, 1.2, 1.6))}
_MARKERS = {"circle": "o", "square": "s", "triangle": "^", "diamond": "D", "cross": "P"}
_GREY = "#6E757C"
_VEIL = "#ECEEF0"
_VECTOR_CELLS = 20_000


@dataclass(frozen=True)
class Stage:
    """A panel on its axes: the sheet, matplotlib's axes, the venue that sets sizes, and whether rasters are allowed."""

    sheet: Sheet
    axes: Any
    venue: Venue
    raster: bool = True


def settings(where: Venue, usetex: bool = False) -> dict[str, Any]:
    """matplotlib's settings for a venue, complete: the user's own settings do not reach the figure."""
    import matplotlib as mpl

    found = choose(where)
    skip = ("backend", "interactive", "toolbar", "webagg", "savefig.directory", "date.epoch", "figure.max_open", "tk.")
    base = {k: v for k, v in mpl.rcParamsDefault.items() if not k.startswith(skip)}
    return base | _lines(where) | {
        **{"font.family": [where.family, found.fallback], f"font.{where.family}": [found.name], "font.size": where.size},
        **{"axes.labelsize": where.size, "axes.titlesize": where.size, "figure.titlesize": where.size},
        **{"xtick.labelsize": where.small, "ytick.labelsize": where.small, "legend.fontsize": where.small},
        **{"mathtext.fontset": where.mathematics, "text.usetex": usetex, "text.latex.preamble": where.preamble},
        **{"pdf.fonttype": 42, "ps.fonttype": 42, "svg.fonttype": "path", "svg.hashsalt": "workbench"},
    }


def _lines(where: Venue) -> dict[str, Any]:
    thin = 0.6 if where.size < 12 else 0.8
    return {
        **{"axes.linewidth": thin, "lines.linewidth": 1.2, "lines.markersize": 3.5, "patch.linewidth": thin},
        **{"xtick.major.width": thin, "ytick.major.width": thin, "xtick.minor.width": 0.4, "ytick.minor.width": 0.4},
        **{"xtick.major.size": 2.5, "ytick.major.size": 2.5, "xtick.minor.size": 1.5, "ytick.minor.size": 1.5},
        **{"axes.labelpad": 2.5, "xtick.major.pad": 2.0, "ytick.major.pad": 2.0, "axes.titlepad": 3.5},
        **{"axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 0.4, "hatch.color": _GREY},
        **{"legend.frameon": True, "legend.framealpha": 0.85, "legend.edgecolor": "none", "legend.handlelength": 1.8},
        **{"legend.borderpad": 0.2, "legend.labelspacing": 0.25, "axes.grid": True, "grid.linewidth": 0.35},
        **{"grid.color": "#E3E6E8", "axes.axisbelow": True},
    }


@contextmanager
def styled(where: Venue, usetex: bool = False) -> Iterator[None]:
    """Hold matplotlib's settings at a venue's for the length of a block; they are as before afterwards, errors included."""
    import matplotlib as mpl

    with _LOCK, mpl.rc_context(settings(where, usetex)):
        yield


def paper(figure: Figure, where: Venue | None = None, height: float | None = None, raster: bool = True) -> Any:
    """The figure as ``matplotlib.figure.Figure``, to be used inside :func:`styled`.

    Args:
        figure: what to draw.
        where: the venue's column; its width is the figure's, exactly.
        height: in inches; by default the panels get the venue's ratio.
        raster: whether very fine grids may become images; without, everything is lines and areas.
    """
    from matplotlib.figure import Figure as Canvas

    where = where or venue()
    rows, columns = grid(figure)
    size = (where.width, height or _height(figure, where, rows, columns))
    page = Canvas(figsize=size, layout="constrained")
    page.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.04, hspace=0.05)
    ratios = list(figure.widths) if len(figure.widths) == columns else None
    slots = page.add_gridspec(rows, columns, width_ratios=ratios)
    for i, panel in enumerate(figure.panels):
        _panel(panel, page, slots[divmod(i, columns)], where, raster)
    _around(figure, page, where)
    return page


def _height(figure: Figure, where: Venue, rows: int, columns: int) -> float:
    tall = max(_ratio(p, where) for p in figure.panels)
    line = where.size / 72
    extra = 1.6 * line * bool(figure.title) + 1.3 * line * bool(figure.note)
    legends = 1.4 * line * any(p.title for p in figure.panels) * rows
    return rows * tall * where.width / columns + extra + legends


def _ratio(panel: Panel, where: Venue) -> float:
    if panel.solid:
        return 0.8
    return 0.8 if panel.square else max(where.ratio, 0.55)


def _around(figure: Figure, page: Any, where: Venue) -> None:
    if figure.title:
        page.suptitle(plain(figure.title), fontsize=where.size)
    if figure.note:
        page.supxlabel(plain(figure.note), fontsize=where.small, color=_GREY, x=0.995, ha="right")


def plain(words: str) -> str:
    """Words as they stand: a dollar sign is a dollar sign, not mathematics."""
    return words.replace("$", r"\$")


def _panel(panel: Panel, page: Any, slot: Any, where: Venue, raster: bool) -> None:
    axes = page.add_subplot(slot, projection="3d" if panel.solid else None)
    stage = Stage(sheet(panel), axes, where, raster)
    _prepare(stage)
    for mark in panel.marks:
        _draw(mark, stage)
    if stage.sheet.field is not None:
        _bar(stage, page)
    _finish(stage)


def _prepare(stage: Stage) -> None:
    """Scales, limits and labels before the marks, so that marks can ask where they are."""
    page, axes = stage.sheet, stage.axes
    if page.panel.solid:
        return _prepare_solid(stage)
    for name, r in (("x", page.x), ("y", page.y)):
        scale = {"linthresh": r.threshold} if r.scale == "symlog" else {}
        getattr(axes, f"set_{name}scale")(r.scale, **scale)
        getattr(axes, f"set_{name}lim")(r.low, r.high)
        getattr(axes, f"set_{name}label")(plain(r.words))
        _ticks(getattr(axes, f"{name}axis"), r)
    if page.field is not None:
        axes.grid(False)
    if page.panel.square:
        axes.set_aspect("equal", adjustable="box")


def _ticks(axis: Any, r: Ruler) -> None:
    from matplotlib.ticker import MaxNLocator, NullLocator

    if r.scale == "linear":
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    if r.scale == "symlog":
        values = [float(v) for v in r.ticks()]
        axis.set_ticks(values, labels=tick_texts(r, values, "math"))
        axis.set_minor_locator(NullLocator())


def _prepare_solid(stage: Stage) -> None:
    page, axes = stage.sheet, stage.axes
    axes.view_init(elev=28, azim=-52)
    axes.set_box_aspect((1.0, 1.0, 0.72), zoom=0.9)
    for name, r in (("x", page.x), ("y", page.y), ("z", page.height)):
        side = getattr(axes, f"{name}axis")
        getattr(axes, f"set_{name}lim")(*r.span)
        getattr(axes, f"set_{name}label")(plain(r.words), labelpad=-4)
        values = [float(v) for v in r.ticks(5)]
        side.set_ticks(r.forward(values), labels=tick_texts(r, values, "math"))
        side.set_tick_params(pad=-2)
        side.pane.set_facecolor("white")
        side.pane.set_edgecolor("#C9CED2")
        side.line.set_color("#A9AFB4")


def _finish(stage: Stage) -> None:
    panel, axes = stage.sheet.panel, stage.axes
    if panel.title:
        axes.set_title(plain(panel.title), loc="left")
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        axes.legend(handles, labels, loc="best")
    names = next((m for m in panel.marks if isinstance(m, Bars) and m.names), None)
    if names is not None:
        axes.set_xticks(np.asarray(names.x), labels=[plain(n) for n in names.names])
        axes.grid(False, axis="x")


def _label(words: str) -> str | None:
    return plain(words) if words else None


def _pen(found: Look) -> dict[str, Any]:
    return {"color": found.paper, "linestyle": _DASHES[found.dash], "linewidth": 1.2 * found.width}


def _dot(found: Look) -> dict[str, Any]:
    face = "none" if found.hollow else found.paper
    return {"marker": _MARKERS[found.marker], "color": found.paper, "markerfacecolor": face, "markeredgewidth": 0.7}


def _at(stage: Stage, x: Any, y: Any) -> tuple[Any, ...]:
    """Coordinates that matplotlib is given: masked where unknown; on the floor of a three-dimensional panel."""
    page = stage.sheet
    u, v = page.x.forward(x), page.y.forward(y)
    if page.panel.solid:
        return u, v, np.full(np.shape(u), page.height.span[0])
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    return np.where(np.isfinite(u), x, np.nan), np.where(np.isfinite(v), y, np.nan)


@singledispatch
def _draw(mark: Any, stage: Stage) -> None:
    """Draw one mark on a panel."""
    raise TypeError(f"paper cannot draw a {type(mark).__name__}; register a function for it in workbench/draw/paper.py.")


@_draw.register
def _(mark: Line, stage: Stage) -> None:
    found = look(mark.role)
    pen = _pen(found) | {"label": _label(mark.label), "alpha": max(found.alpha, 0.5)}
    stage.axes.plot(*_at(stage, mark.x, mark.y), **pen)


@_draw.register
def _(mark: Band, stage: Stage) -> None:
    found, y = look(mark.role), stage.sheet.y
    low = y.clip(mark.low) if y.scale == "log" else np.asarray(mark.low)
    x, high = _at(stage, mark.x, mark.high)[:2]
    whole = np.isfinite(x) & np.isfinite(y.forward(low)) & np.isfinite(high)
    label = _label(mark.label)
    for a, b in runs(whole):
        area = {"color": found.paper, "alpha": BAND_ALPHA, "linewidth": 0, "label": label}
        stage.axes.fill_between(x[a:b], np.asarray(low)[a:b], high[a:b], **area)
        label = None


@_draw.register
def _(mark: Points, stage: Stage) -> None:
    found = look(mark.role)
    style = _dot(found) | {"linestyle": "none", "label": _label(mark.label), "alpha": max(found.alpha, 0.6)}
    if mark.error is None or stage.sheet.panel.solid:
        stage.axes.plot(*_at(stage, mark.x, mark.y), **style)
        return
    whisker = {"yerr": _whisker(mark, stage.sheet.y), "elinewidth": 0.7, "capsize": 1.5, "capthick": 0.7}
    stage.axes.errorbar(*_at(stage, mark.x, mark.y), **style, **whisker)


def _whisker(mark: Points | Bars, r: Ruler) -> Array:
    """Lengths below and above; unknown ones are zero, and on a logarithm the lower end stops at the axis."""
    y, error = np.asarray(mark.y), np.nan_to_num(np.asarray(mark.error), nan=0.0, posinf=0.0)
    down = y - r.clip(y - error) if r.scale == "log" else error
    return np.stack([np.fmax(np.nan_to_num(down), 0.0), error])


@_draw.register
def _(mark: Bars, stage: Stage) -> None:
    found, r = look(mark.role), stage.sheet.y
    x, y = _at(stage, mark.x, mark.y)[:2]
    foot = r.low if r.scale == "log" else 0.0
    face = "none" if found.hollow else found.paper
    body = {"facecolor": face, "edgecolor": found.paper, "linewidth": 0.6, "alpha": 0.85, "label": _label(mark.label)}
    stage.axes.bar(x, y - foot, width=bar_width(np.asarray(mark.x)), bottom=foot, **body)
    if mark.error is not None:
        whisker = {"ecolor": "#24292E", "elinewidth": 0.7, "capsize": 1.8, "capthick": 0.7, "linestyle": "none"}
        stage.axes.errorbar(x, y, yerr=_whisker(mark, r), **whisker)


@_draw.register
def _(mark: Stems, stage: Stage) -> None:
    found, r = look(mark.role), stage.sheet.y
    x, y = _at(stage, mark.x, mark.y)[:2]
    foot = max(mark.base, r.low) if r.scale == "log" else mark.base
    stage.axes.vlines(x, foot, y, color=found.paper, linewidth=0.9)
    stage.axes.plot(x, y, **_dot(found), linestyle="none", label=_label(mark.label))


@_draw.register
def _(mark: Text, stage: Stage) -> None:
    spot = tuple(float(v[0]) for v in _at(stage, [mark.x], [mark.y]))
    style = {"color": look(mark.role).paper, "fontsize": stage.venue.small, "ha": "center", "va": "center"}
    stage.axes.text(*spot, plain(mark.words), **style)


@_draw.register
def _(mark: Rule, stage: Stage) -> None:
    found, axes = look(mark.role), stage.axes
    if stage.sheet.panel.solid:
        ends = [stage.sheet.y.low, stage.sheet.y.high] if mark.axis == "x" else [stage.sheet.x.low, stage.sheet.x.high]
        at = [mark.at, mark.at]
        axes.plot(*(_at(stage, at, ends) if mark.axis == "x" else _at(stage, ends, at)), **_pen(found))
        return
    (axes.axvline if mark.axis == "x" else axes.axhline)(mark.at, **_pen(found), zorder=1.5)
    if mark.label:
        _beside(mark, stage, found)


def _beside(mark: Rule, stage: Stage, found: Look) -> None:
    """The words of a rule, along it at its far end."""
    axes, style = stage.axes, {"fontsize": stage.venue.small, "color": found.paper, "textcoords": "offset points"}
    if mark.axis == "x":
        spot: dict[str, Any] = {"xy": (mark.at, 1), "xycoords": axes.get_xaxis_transform(), "xytext": (-1.5, -1.5)}
        axes.annotate(plain(mark.label), **spot, **style, rotation=90, ha="right", va="top")
    else:
        spot = {"xy": (1, mark.at), "xycoords": axes.get_yaxis_transform(), "xytext": (-1.5, 1.5)}
        axes.annotate(plain(mark.label), **spot, **style, ha="right", va="bottom")


@_draw.register
def _(mark: Heat, stage: Stage) -> None:
    page = stage.sheet
    x, y = (edges(np.asarray(v), r) for v, r in ((mark.x, page.x), (mark.y, page.y)))
    z = page.height.forward(mark.z)
    low, high = page.height.span
    fine = stage.raster and z.size > _VECTOR_CELLS
    paint = {"cmap": colour_map(page.diverging), "vmin": low, "vmax": high, "rasterized": fine}
    seams = {} if fine else {"edgecolors": "face", "linewidth": 0.15}
    image = stage.axes.pcolormesh(x, y, np.ma.masked_invalid(z), **paint, **seams)
    _remember(stage, mark, image)
    _hatch(boxes(~np.isfinite(z), x, y), stage)


@_draw.register
def _(mark: Contour, stage: Stage) -> None:
    if min(np.shape(mark.z)) < 2:
        return _draw(Heat(mark.x, mark.y, mark.z, mark.label), stage)
    page, axes = stage.sheet, stage.axes
    assert page.bands is not None
    w = np.ma.masked_invalid(page.colour_place(mark.z))
    cuts = np.arange(page.bands.levels.size)
    grid_, last = {"levels": cuts, "corner_mask": False}, float(cuts[-1])
    paint = {"cmap": colour_map(page.diverging), "vmin": 0.5, "vmax": max(last - 0.5, 1.0)}
    image = axes.contourf(mark.x, mark.y, w, **grid_, **paint)
    axes.contour(mark.x, mark.y, w, **grid_, colors="white", linewidths=0.35, alpha=0.6)
    _remember(stage, mark, image)
    open_ = open_quads(known(mark, page.height))
    _hatch(boxes(open_, np.asarray(mark.x), np.asarray(mark.y)), stage)


@_draw.register
def _(mark: Surface, stage: Stage) -> None:
    """Only meshes with four known corners are drawn; the others are crossed on the floor."""
    from matplotlib.colors import LightSource, Normalize

    page, axes = stage.sheet, stage.axes
    x, y = np.meshgrid(page.x.forward(mark.x), page.y.forward(mark.y))
    z = page.height.forward(mark.z)
    norm, paint = Normalize(*page.height.span), colour_map(page.diverging)
    rough = {"rcount": min(z.shape[0], 120), "ccount": min(z.shape[1], 120)}
    light = LightSource(azdeg=315, altdeg=60)
    mesh = axes.plot_surface(x, y, np.ma.masked_invalid(z), norm=norm, cmap=paint, lightsource=light, **rough)
    mesh.set_edgecolor("face")
    mesh.set_linewidth(0.1)
    _remember(stage, mark, mesh)
    missing = ~np.isfinite(z)
    floor = np.full(int(missing.sum()), page.height.span[0])
    axes.plot(x[missing], y[missing], floor, linestyle="none", marker="x", markersize=2, markeredgewidth=0.4, color=_GREY)


def _hatch(pieces: list[Any], stage: Stage) -> None:
    """Hatched rectangles where a value is not known."""
    from matplotlib.collections import PolyCollection

    corners = [[(a, c), (b, c), (b, d), (a, d)] for a, b, c, d in pieces]
    face = {"facecolors": _VEIL, "edgecolors": _GREY, "linewidths": 0.0, "hatch": "//////"}
    stage.axes.add_collection(PolyCollection(corners, **face, gid="unknown"), autolim=False)


def _remember(stage: Stage, mark: Any, image: Any) -> None:
    """Keep the coloured artist of the field that owns the colour bar."""
    if mark is stage.sheet.field or isinstance(stage.sheet.field, Contour):
        stage.axes.workbench_image = image


def _bar(stage: Stage, page: Any) -> None:
    values = [float(v) for v in stage.sheet.colour_ticks()]
    place = {"fraction": 0.05, "pad": 0.12, "shrink": 0.7, "aspect": 22} if stage.sheet.panel.solid else {"pad": 0.02}
    bar = page.colorbar(stage.axes.workbench_image, ax=stage.axes, drawedges=False, **place)
    bar.set_ticks(stage.sheet.colour_place(values), labels=tick_texts(stage.sheet.height, values, "math"))
    bar.minorticks_off()
    bar.outline.set_linewidth(0.4)
    bar.set_label(plain(stage.sheet.height.words))
    if not stage.raster:
        bar.solids.set_rasterized(False)


def colour_map(diverging: bool = False) -> Any:
    """The colour map as matplotlib's object, from the anchors that the screen uses too."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("workbench", list(colours(diverging)), N=1024)
