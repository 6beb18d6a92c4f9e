"""Figures on screen: a :class:`~workbench.figure.Figure` becomes a Plotly figure, mark by mark.

Paper and plot are transparent and text is mid-grey, so that one picture reads well in light and dark themes. Arrays are
float32, which Plotly sends as binary. Every mark makes a fixed number of traces whatever its data, so that a picture
that is updated keeps its structure; what is not known is hatched and says so under the pointer.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from workbench.draw.layout import places
from workbench.draw.legends import common_legend
from workbench.draw.screen_fields import field_traces
from workbench.draw.screen_layout import layout_of
from workbench.draw.screen_marks import traces
from workbench.draw.sheet import sheet
from workbench.draw.stage import Stage, Trace
from workbench.figure import AnyMark, Contour, Figure, Heat, Surface

CONFIG: dict[str, Any] = {"responsive": True, "displaylogo": False, "doubleClick": "reset"}
"""What Plotly is told of every live picture: a double click returns to the ranges that the picture came with."""
CONFIG["modeBarButtonsToRemove"] = ["autoScale2d", "select2d", "lasso2d"]


def screen(figure: Figure) -> Any:
    """The figure as ``plotly.graph_objects.Figure``; its height is set, its width follows the page."""
    import plotly.graph_objects as go

    data, layout = describe(figure)
    return go.Figure(data=data, layout=layout)


def describe(figure: Figure) -> tuple[list[Trace], dict[str, Any]]:
    """Traces and layout as plain dicts, for :func:`screen` and for figures that are updated in place."""
    spots = places(figure)
    stages = [Stage(sheet(p), n, spot) for n, (p, spot) in enumerate(zip(figure.panels, spots, strict=True), 1)]
    made = [_whole(t) for stage in stages for mark in stage.sheet.panel.marks for t in _traces(mark, stage)]
    return made, layout_of(figure, stages, common_legend(made, stages))


def _traces(mark: AnyMark, stage: Stage) -> list[Trace]:
    if isinstance(mark, Heat | Contour | Surface):
        return field_traces(mark, stage)
    made = traces(mark, stage)
    if stage.sheet.field is None or stage.solid:
        return made
    # What lies on a field knows only its place, and would hide the field's value from the pointer all around it.
    told = ("hovertemplate", "customdata")
    return [{k: v for k, v in trace.items() if k not in told} | {"hoverinfo": "skip"} for trace in made]


def _whole(trace: Trace) -> Trace:
    """A trace with its type, and in the legend when it has a name and something to show."""
    shown = bool(trace.get("name")) and bool((np.isfinite(trace["x"]) & np.isfinite(trace["y"])).any())
    return {"type": "scatter", "showlegend": shown, **trace}
