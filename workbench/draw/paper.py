"""Figures on paper: a :class:`~workbench.figure.Figure` becomes a matplotlib figure of exact size.

Nothing goes through pyplot and no backend is switched. Marks are drawn in :mod:`workbench.draw.paper_marks` and
:mod:`workbench.draw.paper_fields`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from workbench.draw.paper_fields import draw_field
from workbench.draw.paper_marks import Stage, draw, plain
from workbench.draw.paper_style import GREY
from workbench.draw.rulers import Ruler
from workbench.draw.sheet import grid, sheet
from workbench.draw.venues import Venue, venue
from workbench.draw.words import tick_texts
from workbench.figure import Bars, Contour, Figure, Heat, Panel, Rule, Surface

_NARROW = 2.4
"""Inches below which a three-dimensional panel gets smaller words."""


def paper(figure: Figure, where: Venue | None = None, height: float | None = None, raster: bool = True) -> Any:
    """The figure as ``matplotlib.figure.Figure``, to be used inside :func:`workbench.draw.paper_style.styled`.

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
    engine: Any = page.get_layout_engine()
    engine.set(w_pad=0.03, h_pad=0.035, wspace=0.04, hspace=0.05)
    ratios = list(figure.widths) if len(figure.widths) == columns else None
    slots = page.add_gridspec(rows, columns, width_ratios=ratios)
    for i, panel in enumerate(figure.panels):
        _panel(panel, page, slots[divmod(i, columns)], where, raster)
    _around(figure, page, where)
    return page


def _height(figure: Figure, where: Venue, rows: int, columns: int) -> float:
    """Panels at the venue's ratio, plus the lines of text above and below them."""
    tall = max(_ratio(p, where) for p in figure.panels)
    line = where.size / 72
    extra = 1.6 * line * bool(figure.title) + 1.3 * line * bool(figure.note)
    titles = 1.4 * line * any(p.title for p in figure.panels) * rows
    legends = rows * max(_legend_lines(p, where.width / columns) for p in figure.panels) * 1.25 * where.small / 72
    return rows * tall * where.width / columns + extra + titles + legends


def _legend_lines(panel: Panel, width: float) -> int:
    """Lines of a legend that stands above its panel; none where it has room inside."""
    count = sum(
        bool(getattr(m, "label", "")) and not isinstance(m, Heat | Contour | Surface | Rule) for m in panel.marks
    )
    return math.ceil(count / _legend_columns(width)) if _above(panel, count, width) else 0


def _above(panel: Panel, labels: int, width: float) -> bool:
    """Whether a legend stands above its panel: where it would hide a field, or most of a narrow panel."""
    field = any(isinstance(m, Heat | Contour) for m in panel.marks)
    return labels > 0 and (field or labels > 1.6 * width)


def _legend_columns(width: float) -> int:
    return max(1, round(width / 1.1))


def _ratio(panel: Panel, where: Venue) -> float:
    if panel.solid:
        return 0.72
    return 0.8 if panel.square else max(where.ratio, 0.55)


def _around(figure: Figure, page: Any, where: Venue) -> None:
    if figure.title:
        page.suptitle(plain(figure.title), fontsize=where.size)
    if figure.note:
        page.supxlabel(plain(figure.note), fontsize=where.small, color=GREY, x=0.995, ha="right")


def _panel(panel: Panel, page: Any, slot: Any, where: Venue, raster: bool) -> None:
    axes = page.add_subplot(slot, projection="3d" if panel.solid else None)
    stage = Stage(sheet(panel), axes, where, where.width / slot.get_gridspec().ncols, raster)
    (_prepare_solid if panel.solid else _prepare)(stage)
    for mark in panel.marks:
        if isinstance(mark, Heat | Contour | Surface):
            image = draw_field(mark, stage)
            if mark is stage.sheet.field and not panel.solid:
                _bar(stage, page, image)
        else:
            draw(mark, stage)
    _finish(stage)


def _prepare(stage: Stage) -> None:
    """Scales, limits and labels before the marks, so that nothing that is drawn can move them."""
    page, axes = stage.sheet, stage.axes
    for name, r in (("x", page.x), ("y", page.y)):
        scale = {"linthresh": r.threshold} if r.scale == "symlog" else {}
        getattr(axes, f"set_{name}scale")(r.scale, **scale)
        getattr(axes, f"set_{name}lim")(r.low, r.high)
        getattr(axes, f"set_{name}label")(plain(r.words(", " if name == "x" else "\n")))
        _ticks(getattr(axes, f"{name}axis"), r)
    if page.field is not None:
        axes.grid(False)
        axes.spines[:].set_visible(True)
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
    axes.set_box_aspect((1.0, 1.0, 0.72), zoom=_zoom(stage.width))
    for name, r in (("x", page.x), ("y", page.y), ("z", page.height)):
        getattr(axes, f"set_{name}lim")(*r.span)
        small = {"fontsize": stage.venue.small} if stage.width < _NARROW else {}
        getattr(axes, f"set_{name}label")(
            plain(r.words("\n")), labelpad=(-6 if name == "z" else -9) if small else -4.5, **small
        )
        _side(getattr(axes, f"{name}axis"), r, stage.venue.small - (1.0 if small else 0.0), bool(small))


def _zoom(width: float) -> float:
    """How large the box is drawn: smaller where the words around it need a larger part of the panel."""
    return 0.76 if width < _NARROW else 0.85 if width < 3.0 else 0.94


def _side(side: Any, r: Ruler, size: float, narrow: bool) -> None:
    values = [float(v) for v in r.ticks(3 if narrow else 4)]
    side.set_ticks(r.forward(values), labels=tick_texts(r, values, "math"))
    side.set_tick_params(pad=-4 if narrow else -2.5, labelsize=size)
    side.pane.set_facecolor("white")
    side.pane.set_edgecolor("#C9CED2")
    side.line.set_color("#A9AFB4")


def _finish(stage: Stage) -> None:
    panel, axes = stage.sheet.panel, stage.axes
    handles, labels = axes.get_legend_handles_labels()
    if _above(panel, len(labels), stage.width):
        _legend_above(stage, handles, labels)
    else:
        axes.set_title(plain(panel.title), loc="left")
        if labels:
            axes.legend(handles, labels, loc="best")
    names = next((m for m in panel.marks if isinstance(m, Bars) and m.names), None)
    if names is not None:
        axes.set_xticks(np.asarray(names.x), labels=[plain(n) for n in names.names])
        axes.grid(False, axis="x")


def _legend_above(stage: Stage, handles: list[Any], labels: list[str]) -> None:
    """A legend that would cover a narrow panel stands above it, with the panel's title on top."""
    place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "ncols": _legend_columns(stage.width)}
    heading = {"title": plain(stage.sheet.panel.title) or None, "title_fontsize": stage.venue.size, "alignment": "left"}
    stage.axes.legend(handles, labels, **place, **heading, columnspacing=1.0, borderaxespad=0.1)


def _bar(stage: Stage, page: Any, image: Any) -> None:
    """The colour bar, with the ticks and the words that the screen has too."""
    r = stage.sheet.height
    values = [float(v) for v in r.ticks()]
    bar = page.colorbar(image, ax=stage.axes, pad=0.02)
    bar.set_ticks(stage.sheet.colour_place(values), labels=tick_texts(r, values, "math"))
    bar.minorticks_off()
    bar.outline.set_linewidth(0.4)
    bar.set_label(plain(r.words("\n")))
    if not stage.raster:
        bar.solids.set_rasterized(False)
