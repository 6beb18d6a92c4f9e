"""matplotlib's settings for a venue, and the only place where they are changed: a context that puts them back.

matplotlib keeps its settings in one table for the whole process, so our drawing takes turns under one lock.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

from workbench.draw.fonts import choose
from workbench.draw.style import colours
from workbench.draw.venues import Venue

GREY = "#6E757C"
VEIL = "#ECEEF0"
_LOCK = threading.RLock()
_LEFT_ALONE = (
    "backend",
    "interactive",
    "toolbar",
    "webagg",
    "savefig.directory",
    "date.epoch",
    "figure.max_open",
    "tk.",
    "macosx.",
)


def settings(where: Venue, usetex: bool = False) -> dict[str, Any]:
    """matplotlib's settings for a venue, complete: the user's own settings do not reach the figure."""
    import matplotlib as mpl

    base = {k: v for k, v in mpl.rcParamsDefault.items() if not k.startswith(_LEFT_ALONE)}
    return base | _LINES | _words(where, usetex) | _WRITTEN


def _words(where: Venue, usetex: bool) -> dict[str, Any]:
    found = choose(where)
    return {
        "font.family": [where.family] if usetex else [where.family, found.fallback],
        f"font.{where.family}": [found.name],
        "font.size": where.size,
        "axes.labelsize": where.size,
        "axes.titlesize": where.size,
        "figure.titlesize": where.size,
        "xtick.labelsize": where.small,
        "ytick.labelsize": where.small,
        "legend.fontsize": where.small,
        "mathtext.fontset": where.mathematics,
        "text.usetex": usetex,
        "text.latex.preamble": where.preamble if usetex else "",
    }


_WRITTEN: dict[str, Any] = {"pdf.fonttype": 42, "ps.fonttype": 42, "svg.fonttype": "path", "svg.hashsalt": "workbench"}

_LINES: dict[str, Any] = {
    "axes.linewidth": 0.6,
    "axes.labelpad": 2.5,
    "axes.titlepad": 3.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.linewidth": 0.35,
    "grid.color": "#E3E6E8",
    "lines.linewidth": 1.2,
    "lines.markersize": 3.0,
    "patch.linewidth": 0.6,
    "hatch.linewidth": 0.4,
    "hatch.color": GREY,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 1.5,
    "ytick.minor.size": 1.5,
    "xtick.major.pad": 2.0,
    "ytick.major.pad": 2.0,
    "legend.frameon": True,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "legend.handlelength": 1.9,
    "legend.borderpad": 0.25,
    "legend.labelspacing": 0.25,
    "legend.handletextpad": 0.5,
}


@contextmanager
def styled(where: Venue, usetex: bool = False) -> Generator[None]:
    """Hold matplotlib's settings at a venue's for a block; they are as before afterwards, errors included."""
    import matplotlib as mpl

    with _LOCK, mpl.rc_context(cast(Any, settings(where, usetex))), _quiet():
        yield


@contextmanager
def _quiet() -> Generator[None]:
    """Keep fontTools from remarking on the dates inside fonts while they are embedded."""
    log = logging.getLogger("fontTools")

    def drop(record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING

    handlers = [log, *(logging.getLogger(name) for name in _CHATTY)]
    for one in handlers:
        one.addFilter(drop)
    try:
        yield
    finally:
        for one in handlers:
            one.removeFilter(drop)


_CHATTY = ("fontTools.ttLib.tables._h_e_a_d", "fontTools.subset", "fontTools.subset.timer")


def colour_map(diverging: bool = False) -> Any:
    """The colour map as matplotlib's object, from the anchors that the screen uses too."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("workbench", list(colours(diverging)), N=256)
