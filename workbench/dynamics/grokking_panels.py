"""Parts of Grokking's picture."""

from __future__ import annotations

import numpy as np
import xarray as xr

from workbench.figure import AnyMark, Axis, Band, Line, Panel, Points, step_axis
from workbench.numerics.crossings import known


def title(data: xr.Dataset) -> str:
    """The delay ratio with its error."""
    value, error = float(data.delay_ratio), float(data.delay_ratio_error)
    return f"delay ratio {value:.3g} ± {error:.2g}" if np.isfinite(value) else "delay ratio unknown"


def interval(data: xr.Dataset) -> list[AnyMark]:
    """Where one run may have generalised, as resampled test sets say."""
    ends = [float(data[f"run_step_generalise_{end}"][0]) for end in ("low", "high")]
    if data.sizes["run"] > 1 or not np.isfinite(ends).all():
        return []
    return [Band(ends, [0.0, 0.0], [1.0, 1.0])]


def norm_panel(data: xr.Dataset) -> Panel:
    """The norm of the weights of each run."""
    marks: list[AnyMark] = []
    for i in range(data.sizes["run"]):
        at, values = known(data["checkpoint"].values, data.weight_norm.values[i])
        marks.append(Points(at, values) if len(at) == 1 else Line(at, values))
    return Panel(tuple(marks), step_axis(), Axis("weight norm"))
