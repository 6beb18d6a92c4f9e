"""Lines, bands, points, bars, stems, rules and words by matplotlib, one function for each mark."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import numpy as np

from workbench.draw.cells import runs
from workbench.draw.pgf import tex_words
from workbench.draw.rulers import Ruler
from workbench.draw.sheet import Sheet, bar_width
from workbench.draw.style import BAND_ALPHA, Look, look
from workbench.draw.venues import Venue
from workbench.draw.words import tick_texts
from workbench.figure import Array, Band, Bars, Line, Points, Rule, Stems, Text

_DASHES: dict[str, Any] = {
    "solid": "-",
    "dash": (0, (5, 2)),
    "dot": (0, (1.2, 1.6)),
    "dashdot": (0, (5, 1.6, 1.2, 1.6)),
}
_MARKERS = {"circle": "o", "square": "s", "triangle": "^", "diamond": "D", "cross": "P"}
_THIN = {"elinewidth": 0.7, "capsize": 1.6, "capthick": 0.7}


@dataclass(frozen=True)
class Stage:
    """A panel on its axes: sheet, matplotlib's axes, venue, room in inches, and whether rasters are allowed."""

    sheet: Sheet
    axes: Any
    venue: Venue
    width: float
    height: float
    raster: bool = True

    def at(self, x: Any, y: Any) -> tuple[Any, ...]:
        """Coordinates for matplotlib: masked where unknown; on the floor of a three-dimensional panel."""
        page = self.sheet
        u, v = page.x.forward(x), page.y.forward(y)
        if page.panel.solid:
            return u, v, np.full(np.shape(u), page.height.span[0])
        x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
        return np.where(np.isfinite(u), x, np.nan), np.where(np.isfinite(v), y, np.nan)


def plain(words: str) -> str:
    """Words as they stand, for matplotlib or for LaTeX when that is to set them: no character is a command."""
    return tex_words(words, mathematics=False) if _by_latex() else words.replace("$", r"\$")


def numbers(r: Ruler, values: list[float]) -> list[str]:
    """The texts of ticks."""
    texts = tick_texts(r, values, "math")
    return [tex_words(t) for t in texts] if _by_latex() else texts


def _by_latex() -> bool:
    import matplotlib as mpl

    return bool(mpl.rcParams["text.usetex"])


def folded(words: str, inches: float, size: float) -> str:
    """Words over as many lines as they need to stay within a length, at about half an em a letter."""
    return "\n".join(plain(line) for line in wrapped(words, inches, size).split("\n"))


def wrapped(words: str, inches: float, size: float) -> str:
    """The same for words that are :func:`plain` already."""
    letters = max(int(inches * 72 / (0.5 * size)), 8)
    return "\n".join(part for line in words.split("\n") for part in textwrap.wrap(line, letters))


def _label(mark: Any, stage: Stage) -> str | None:
    """What a mark is called in the legend; nothing when it has nothing to show."""
    x, y = (np.asarray(v, dtype=float) for v in stage.at(mark.x, getattr(mark, "high", getattr(mark, "y", None)))[:2])
    return plain(mark.label) if mark.label and bool((np.isfinite(x) & np.isfinite(y)).any()) else None


def _pen(found: Look) -> dict[str, Any]:
    return {"color": found.paper, "linestyle": _DASHES[found.dash], "linewidth": 1.2 * found.width}


def _dot(found: Look) -> dict[str, Any]:
    face = "none" if found.hollow else found.paper
    return {"marker": _MARKERS[found.marker], "color": found.paper, "markerfacecolor": face, "markeredgewidth": 0.7}


@singledispatch
def draw(mark: Any, stage: Stage) -> None:
    """Draw one mark on a panel.

    Raises:
        TypeError: nobody has said how to draw it.
    """
    name = type(mark).__name__
    raise TypeError(f"paper cannot draw a {name}; register a function for it in workbench/draw/paper_marks.py.")


@draw.register
def _(mark: Line, stage: Stage) -> None:
    found = look(mark.role)
    pen = _pen(found) | {"label": _label(mark, stage), "alpha": max(found.alpha, 0.5)}
    stage.axes.plot(*stage.at(mark.x, mark.y), **pen)


@draw.register
def _(mark: Band, stage: Stage) -> None:
    found, y = look(mark.role), stage.sheet.y
    low = stage.sheet.open_end(mark.low)
    x, high = stage.at(mark.x, mark.high)[:2]
    whole = np.isfinite(x) & np.isfinite(y.forward(low)) & np.isfinite(high)
    label = _label(mark, stage)
    for a, b in runs(whole):
        area = {"color": found.paper, "alpha": BAND_ALPHA, "linewidth": 0, "label": label}
        stage.axes.fill_between(x[a:b], low[a:b], high[a:b], **area)
        label = None


@draw.register
def _(mark: Points, stage: Stage) -> None:
    found = look(mark.role)
    style = _dot(found) | {"linestyle": "none", "label": _label(mark, stage), "alpha": max(found.alpha, 0.6)}
    if mark.error is None or stage.sheet.panel.solid:
        stage.axes.plot(*stage.at(mark.x, mark.y), **style)
        return
    stage.axes.errorbar(*stage.at(mark.x, mark.y), **style, yerr=_whisker(mark, stage.sheet), **_THIN)


def _whisker(mark: Points | Bars, page: Sheet) -> Array:
    """Lengths below and above; unknown ones are zero, and on a logarithm the lower end stops at the axis."""
    y, error = np.asarray(mark.y), np.nan_to_num(np.asarray(mark.error), nan=0.0, posinf=0.0)
    down = np.nan_to_num(y - page.open_end(y - error))
    return np.stack([np.maximum(down, 0.0), error])


@draw.register
def _(mark: Bars, stage: Stage) -> None:
    found, page = look(mark.role), stage.sheet
    x, y = stage.at(mark.x, mark.y)[:2]
    foot = float(page.open_end(0.0))
    face = "none" if found.hollow else found.paper
    body = {"facecolor": face, "edgecolor": found.paper, "linewidth": 0.6, "alpha": 0.85, "label": _label(mark, stage)}
    stage.axes.bar(x, y - foot, width=bar_width(np.asarray(mark.x)), bottom=foot, **body)
    if mark.error is not None:
        stage.axes.errorbar(x, y, yerr=_whisker(mark, page), linestyle="none", ecolor="#24292E", **_THIN)


@draw.register
def _(mark: Stems, stage: Stage) -> None:
    found = look(mark.role)
    x, y = stage.at(mark.x, mark.y)[:2]
    stage.axes.vlines(x, float(stage.sheet.open_end(mark.base)), y, color=found.paper, linewidth=0.9)
    stage.axes.plot(x, y, **_dot(found), linestyle="none", label=_label(mark, stage))


@draw.register
def _(mark: Text, stage: Stage) -> None:
    spot = tuple(float(v[0]) for v in stage.at([mark.x], [mark.y]))
    style = {"color": look(mark.role).paper, "fontsize": stage.venue.small, "ha": "center", "va": "center"}
    stage.axes.text(*spot, plain(mark.words), **style)


@draw.register
def _(mark: Rule, stage: Stage) -> None:
    found, axes, page = look(mark.role), stage.axes, stage.sheet
    if page.panel.solid:
        ends = [page.y.low, page.y.high] if mark.axis == "x" else [page.x.low, page.x.high]
        at = [mark.at, mark.at]
        axes.plot(*(stage.at(at, ends) if mark.axis == "x" else stage.at(ends, at)), **_pen(found))
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
