"""Legends on screen: one above each panel where they fit, else one for the whole figure.

Plotly makes room for a legend that is wider than what is left of the page by moving the margins, and then draws colour
bars and axes by different margins. So a legend may reach to the end of the page, and of its panel once there is
another. Where one look means different things in two panels, the common legend tells the panels apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from workbench.draw.stage import Stage, Trace, plain

LINE = 19
"""Pixels of a line of entries."""

_PAGE, _LEAST = 620, 540
"""Pixels that the panels share on a usual page, and on one so narrow that lines break early."""
_SYMBOL, _LETTER = 42.0, 5.6
"""Pixels of an entry's symbol with the space around it, and of a letter."""


@dataclass(frozen=True)
class Common:
    """A legend for all panels: how many lines it takes (0: there is none), and whether it tells panels apart."""

    lines: int = 0
    apart: bool = False


_Group = tuple[Stage, list[Trace]]


def common_legend(traces: list[Trace], stages: list[Stage]) -> Common:
    """The legend for all panels, when those of the panels would not fit beside each other.

    The traces are changed: all name the first legend, each look once, or under the words of their panel.
    """
    groups = [(s, held) for s in stages if (held := _shown(traces, f"legend{s.suffix}"))]
    ends = [stage.place.right for stage, _ in groups] if len(groups) > 1 else [1.0]
    fits = (_width(held) <= _PAGE * (end - s.place.left) for (s, held), end in zip(groups, ends, strict=False))
    if len(stages) == 1 or all(fits):
        return Common()
    named = [t for t in traces if "legend" in t]
    for trace in named:
        trace["legend"] = "legend"
    apart = _ambiguous(groups)
    return Common(_apart(groups) if apart else _unite(named), apart)


def _shown(traces: list[Trace], legend: str) -> list[Trace]:
    return [t for t in traces if t.get("legend") == legend and t["showlegend"]]


def _width(traces: list[Trace]) -> float:
    return sum(_SYMBOL + _LETTER * len(t["name"]) for t in traces)


def _look(trace: Trace) -> str:
    return repr([trace.get(key) for key in ("type", "mode", "line", "marker", "fillcolor")])


def _ambiguous(groups: list[_Group]) -> bool:
    """Whether what looks alike has different names in different panels."""
    known = dict[str, set[str]]()
    panels = [{_look(t): {o["name"] for o in held if _look(o) == _look(t)} for t in held} for _, held in groups]
    return any(known.setdefault(look, names) != names for panel in panels for look, names in panel.items())


def _unite(traces: list[Trace]) -> int:
    """Each look once; a click on it counts for all panels."""
    seen = dict[str, Trace]()
    for trace in traces:
        what = trace["name"] + _look(trace)
        trace |= {"legendgroup": what, "showlegend": trace["showlegend"] and what not in seen}
        if trace["showlegend"]:
            seen[what] = trace
    return _rows([(_width([t]), 1) for t in seen.values()])


def _apart(groups: list[_Group]) -> int:
    """Panel by panel, each under its title or what its vertical axis shows."""
    for stage, held in groups:
        panel = stage.sheet.panel
        title: dict[str, Any] = {"text": plain(panel.title or panel.y.label), "font": {"size": 11}}
        for trace in held:
            trace |= {"legendgroup": str(stage.number), "legendgrouptitle": title}
    return _rows([(max(_width([t]) for t in held), 1 + len(held)) for _, held in groups])


def _rows(boxes: list[tuple[float, int]]) -> int:
    """How many lines boxes of (width, lines) take that are set one after the other on a narrow page."""
    total, used, high = 0, 0.0, 0
    for wide, lines in boxes:
        if used and used + wide > _LEAST:
            total, used, high = total + high, 0.0, 0
        used, high = used + wide, max(high, lines)
    return total + high
