"""Legends on screen: one above each panel where they fit, else one for the whole figure.

Plotly makes room for a legend that is wider than what is left of the page by moving the margins, and then draws colour
bars and axes by different margins. So no legend may be wider than its panel once there is another beside it.
"""

from __future__ import annotations

from typing import Any

from workbench.draw.stage import Stage, Trace

LINE = 19
"""Pixels of a line of entries."""

_PAGE, _LEAST = 620, 540
"""Pixels that the panels share on a usual page, and on one so narrow that lines break early."""
_SYMBOL, _LETTER = 42.0, 5.6
"""Pixels of an entry's symbol with the space around it, and of a letter."""


def common_legend(traces: list[Trace], stages: list[Stage]) -> list[str]:
    """The names of a legend for all panels, in order, when those of the panels would not fit beside each other.

    The traces are changed so that each of these names stands once, in the first legend. Empty: they fit.
    """
    names = {f"legend{stage.suffix}": _entries(traces, f"legend{stage.suffix}") for stage in stages}
    widths = {f"legend{s.suffix}": _PAGE * (s.place.right - s.place.left) for s in stages}
    if sum(map(bool, names.values())) < 2 or all(_width(names[key]) <= widths[key] for key in names):
        return []
    return _unite([t for t in traces if "legend" in t])


def lines(names: list[str]) -> int:
    """How many lines a legend for all panels takes on a narrow page."""
    count, used = 1, 0.0
    for name in names:
        wide = _width([name])
        count, used = (count + 1, wide) if used and used + wide > _LEAST else (count, used + wide)
    return count


def _entries(traces: list[Trace], legend: str) -> list[str]:
    return [t["name"] for t in traces if t.get("legend") == legend and t["showlegend"]]


def _width(names: list[str]) -> float:
    return sum(_SYMBOL + _LETTER * len(name) for name in names)


def _unite(traces: list[Trace]) -> list[str]:
    seen: dict[Any, str] = {}
    for trace in traces:
        look = trace["name"], repr(trace.get("line")), repr(trace.get("marker"))
        trace |= {"legend": "legend", "legendgroup": repr(look), "showlegend": trace["showlegend"] and look not in seen}
        if trace["showlegend"]:
            seen[look] = trace["name"]
    return list(seen.values())
