"""Figures on paper: a :class:`~workbench.figure.Figure` becomes a matplotlib figure of exact size.

Nothing goes through pyplot and no backend is switched. Marks are drawn in :mod:`workbench.draw.paper_marks` and
:mod:`workbench.draw.paper_fields`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from workbench.draw.paper_fields import draw_field
from workbench.draw.paper_marks import Stage, draw, folded, numbers, plain, wrapped
from workbench.draw.paper_style import GREY
from workbench.draw.rulers import Ruler
from workbench.draw.sheet import grid, known, sheet
from workbench.draw.venues import Venue, venue
from workbench.figure import Bars, Contour, Figure, Heat, Panel, Rule, Surface

_NARROW = 2.4
"""Inches below which a three-dimensional panel gets smaller words."""
_LEAST, _WITH_BAR = 1.5, 2.0
"""Inches of a column of panels, and of one with a colour bar beside a panel."""
_HANDLE = 0.4
"""Inches of a legend's line beside its words, with the air around both."""
_TALL = 2.0
"""Inches that a row of a figure with several rows gets at most, so that a wide figure still leaves room for words."""


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
    rows, columns = grid(figure, where.width, _WITH_BAR if any(map(_barred, figure.panels)) else _LEAST)
    size = (where.width, height or _height(figure, where, rows, columns))
    page = Canvas(figsize=size, layout="compressed" if any(map(_barred, figure.panels)) else "constrained")
    engine: Any = page.get_layout_engine()
    engine.set(w_pad=0.03, h_pad=0.035, wspace=0.04, hspace=0.05)
    ratios = list(figure.widths) if len(figure.widths) == columns else None
    slots = page.add_gridspec(rows, columns, width_ratios=ratios)
    for i, panel in enumerate(figure.panels):
        room = where.width / columns, size[1] / rows
        _panel(panel, page.add_subplot(slots[divmod(i, columns)], **_kind(panel)), where, room, raster)
    _around(figure, page, where)
    return page


def _height(figure: Figure, where: Venue, rows: int, columns: int) -> float:
    """Panels at the venue's ratio, plus the lines of text above and below them."""
    row = max(_ratio(p, where, where.width / columns) for p in figure.panels) * where.width / columns
    if rows > 1 and not any(p.square or p.solid for p in figure.panels):
        row = min(row, _TALL)
    line, small, width = where.size / 72, where.small / 72, where.width / columns
    extra = 1.6 * line * bool(figure.title) + 1.4 * small * _lines(_note(figure, where))
    titles = 1.4 * line * any(p.title for p in figure.panels) * rows
    legends = rows * max(_legend_lines(p, width, where.small) for p in figure.panels) * 1.45 * small
    below = rows * max(_lines(_below(p, where, width)) - 1 for p in figure.panels) * 1.2 * line
    return rows * row + extra + titles + legends + below


def _barred(panel: Panel) -> bool:
    return not panel.solid and any(isinstance(m, Heat | Contour) for m in panel.marks)


def _lines(text: str) -> int:
    return text.count("\n") + 1 if text else 0


def _note(figure: Figure, where: Venue) -> str:
    """The small print in as many lines as it needs."""
    return folded(figure.note, 0.97 * where.width, where.small)


def _below(panel: Panel, where: Venue, width: float) -> str:
    """The words below a panel, in as many lines as they get."""
    return "" if panel.solid else folded(sheet(panel).x.words(", "), 0.75 * width, where.size)


def _legend_lines(panel: Panel, width: float, small: float) -> int:
    """Lines of a legend that stands above its panel; none where it has room inside."""
    unnamed = Heat | Contour | Surface | Rule
    names = [getattr(m, "label", "") for m in panel.marks if not isinstance(m, unnamed)]
    labels = _fitting(list(filter(None, names)), width, small)
    columns = _legend_columns(labels, width, small)
    return _stacked_lines(labels, columns) if _above(panel, labels, width) else 0


def _stacked_lines(labels: list[str], columns: int) -> int:
    """Lines of labels that run down one column after another: each row is as high as its tallest label."""
    rows = math.ceil(len(labels) / columns)
    return sum(max(map(_lines, labels[row::rows])) for row in range(rows))


def _fitting(labels: list[str], width: float, small: float) -> list[str]:
    """The words of a legend, folded where they are wider than the panel."""
    return [wrapped(label, 0.8 * width - _HANDLE, small) for label in labels]


def _above(panel: Panel, labels: list[str], width: float) -> bool:
    """Whether a legend stands above its panel: where it would hide a field, or most of a narrow panel."""
    return bool(labels) and (_barred(panel) or sum(map(_lines, labels)) > 1.6 * width)


def _legend_columns(labels: list[str], width: float, small: float) -> int:
    """As many as the panel is wide enough for, and no wider than 1.1 inches each at the least."""
    longest = max((len(line) for label in labels for line in label.split("\n")), default=0)
    return max(1, int(0.9 * width / max(1.0, 0.5 * small / 72 * longest + _HANDLE)))


def _ratio(panel: Panel, where: Venue, width: float) -> float:
    if panel.solid:
        return 0.72
    if panel.square:
        return 0.8
    return max(where.ratio, 0.85 if width < _NARROW else 0.55)


def _around(figure: Figure, page: Any, where: Venue) -> None:
    if figure.title:
        page.suptitle(plain(figure.title), fontsize=where.size)
    if figure.note:
        page.supxlabel(_note(figure, where), fontsize=where.small, color=GREY, x=0.995, ha="right")


def _kind(panel: Panel) -> dict[str, str]:
    return {"projection": "3d"} if panel.solid else {}


def _panel(panel: Panel, axes: Any, where: Venue, room: tuple[float, float], raster: bool) -> None:
    stage = Stage(sheet(panel), axes, where, *room, raster)
    (_prepare_solid if panel.solid else _prepare)(stage)
    for mark in panel.marks:
        if isinstance(mark, Heat | Contour | Surface):
            image = draw_field(mark, stage)
            if mark is stage.sheet.field and not panel.solid and known(mark, stage.sheet.height).any():
                _bar(stage, image)
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
        room, between = (stage.width, ", ") if name == "x" else (stage.height, "\n")
        getattr(axes, f"set_{name}label")(folded(r.words(between), 0.75 * room, stage.venue.size))
        _ticks(getattr(axes, f"{name}axis"), r, 6 if room > _NARROW else 4)
    if page.field is not None:
        axes.grid(False)
        axes.spines[:].set_visible(True)
    if page.panel.square:
        axes.set_aspect("equal", adjustable="box")


def _ticks(axis: Any, r: Ruler, count: int) -> None:
    from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator

    if r.scale == "linear":
        axis.set_major_locator(MaxNLocator(count, steps=[1, 2, 5, 10], integer=r.whole))
    elif r.scale == "symlog" or r.span[1] - r.span[0] < 1.0:
        values = [float(v) for v in r.ticks(count)]
        axis.set_ticks(values, labels=numbers(r, values))
        axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _prepare_solid(stage: Stage) -> None:
    page, axes = stage.sheet, stage.axes
    axes.view_init(elev=28, azim=-52)
    axes.set_box_aspect((1.0, 1.0, 0.72), zoom=_zoom(stage.width))
    narrow = stage.width < _NARROW
    for name, r in (("x", page.x), ("y", page.y), ("z", page.height)):
        getattr(axes, f"set_{name}lim")(*r.span)
        words = folded(r.words("\n").replace(" (", "\n("), 0.5 * stage.width, stage.venue.small)
        pad = (-9 if narrow else -4.5) + 3.5 * words.count("\n")
        getattr(axes, f"set_{name}label")(words, labelpad=pad, fontsize=stage.venue.small, linespacing=1.0)
        _side(getattr(axes, f"{name}axis"), r, stage.venue.small - (1.0 if narrow else 0.0), narrow)
    _above_height(axes)


def _above_height(axes: Any) -> None:
    """Put the words of the height axis on top of it: matplotlib lays them outside the panel, where they are cut off."""
    label = axes.zaxis.label
    axes.text2D(1.0, 0.86, label.get_text(), transform=axes.transAxes, fontsize=label.get_fontsize(), ha="right")
    label.set_visible(False)


def _zoom(width: float) -> float:
    """How large the box is drawn: smaller where the words around it need a larger part of the panel."""
    return 0.76 if width < _NARROW else 0.85 if width < 3.0 else 0.94


def _side(side: Any, r: Ruler, size: float, narrow: bool) -> None:
    values = [float(v) for v in r.ticks(3 if narrow else 4)]
    side.set_ticks(r.forward(values), labels=numbers(r, values))
    side.set_tick_params(pad=-4 if narrow else -2.5, labelsize=size)
    side.pane.set_facecolor("white")
    side.pane.set_edgecolor("#C9CED2")
    side.line.set_color("#A9AFB4")


def _finish(stage: Stage) -> None:
    panel, axes = stage.sheet.panel, stage.axes
    handles, names = axes.get_legend_handles_labels()
    labels = _fitting(names, stage.width, stage.venue.small)
    if _above(panel, labels, stage.width):
        _legend_above(stage, handles, labels)
    else:
        axes.set_title(folded(panel.title, 0.85 * stage.width, stage.venue.size), loc="left")
        if labels:
            axes.legend(handles, labels, loc="best")
    names = next((m for m in panel.marks if isinstance(m, Bars) and m.names), None)
    if names is not None:
        axes.set_xticks(np.asarray(names.x), labels=[plain(n) for n in names.names], **_slope(names.names, stage))
        axes.grid(False, axis="x")


def _slope(names: tuple[str, ...], stage: Stage) -> dict[str, Any]:
    """Names that would run into one another stand aslant."""
    wide = max(map(len, names)) * len(names) * 0.5 * stage.venue.small / 72 > 0.8 * stage.width
    return {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if wide else {}


def _legend_above(stage: Stage, handles: list[Any], labels: list[str]) -> None:
    """A legend that would cover a narrow panel stands above it, with the panel's title on top."""
    columns = _legend_columns(labels, stage.width, stage.venue.small)
    place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "ncols": columns}
    heading = {"title": plain(stage.sheet.panel.title) or None, "title_fontsize": stage.venue.size, "alignment": "left"}
    stage.axes.legend(handles, labels, **place, **heading, columnspacing=1.0, borderaxespad=0.1)


def _bar(stage: Stage, image: Any) -> None:
    """The colour bar, with the ticks and the words that the screen has too."""
    r = stage.sheet.height
    values = [float(v) for v in r.ticks()]
    bar = stage.axes.figure.colorbar(image, ax=stage.axes, pad=0.02)
    bar.set_ticks(stage.sheet.colour_place(values), labels=numbers(r, values))
    bar.minorticks_off()
    bar.outline.set_linewidth(0.4)
    bar.set_label(folded(r.words("\n"), 0.75 * stage.height, stage.venue.size))
    if not stage.raster:
        bar.solids.set_rasterized(False)
