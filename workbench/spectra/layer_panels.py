"""The panels of a reading about layers: bars by layer, grey where a number is not converged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from workbench.figure import Axis, Bars, Panel, Points, Rule

Floats = NDArray[np.float64]
LONGEST = 18
"""Characters of a layer's name that stand under its bar."""


def _bars(data: xr.Dataset, value: Floats, error: Floats, sure: NDArray[np.bool_], words: str) -> tuple[Any, ...]:
    """Bars with errors by layer, those that are not sure in grey."""
    at, names = np.arange(value.size, dtype=float), short([str(name) for name in data["layer"].values])
    kept, rest = (np.where(known, value, np.nan) for known in (sure, ~sure))
    return (
        Rule(0.0),
        Bars(at, kept, np.where(sure, error, np.nan), words, "main", names),
        Bars(at, rest, np.where(sure, np.nan, error), "not converged", "unconverged", names),
    )


def short(names: Sequence[str]) -> tuple[str, ...]:
    """Names without the beginning that all share, and of long ones only the end: what stands under bars."""
    first = [name.split(".")[:-1] for name in names]
    shared = 0
    while len(names) > 1 and all(len(f) > shared and f[shared] == first[0][shared] for f in first):
        shared += 1
    cut = (".".join(name.split(".")[shared:]) for name in names)
    return tuple(name if len(name) <= LONGEST else f"…{name[-LONGEST:]}" for name in cut)


def eigenvalues(data: xr.Dataset) -> Panel:
    """The largest eigenvalues of each layer with residuals, the smallest, and the largest of all layers together."""
    at, low = np.arange(data.sizes["layer"], dtype=float), data.eigenvalue_min
    marks = [*_bars(data, data.eigenvalue.values[:, 0], data.residual.values[:, 0], data.converged.values[:, 0], "λ_1")]
    further = ((data.eigenvalue.values[:, k], data.residual.values[:, k], k) for k in range(1, data.sizes["rank"]))
    marks += [Points(at, value, error, "the next" if k == 1 else "", "third") for value, error, k in further]
    if np.isfinite(low).any():
        sure, residual = data.eigenvalue_min_converged.values, data.eigenvalue_min_residual.values
        marks.append(Points(at, np.where(sure, low, np.nan), residual, "minimum", "second"))
        marks.append(Points(at, np.where(sure, np.nan, low), residual, "", "unconverged"))
    if math.isfinite(float(data.whole_eigenvalue)):
        marks.append(Rule(float(data.whole_eigenvalue), "y", "λ_1 of all together"))
    return Panel(tuple(marks), Axis("layer"), Axis("eigenvalue"), title="largest eigenvalue")


def shares(data: xr.Dataset) -> Panel:
    """Each layer's share of the trace."""
    sure = np.isfinite(data.trace_share_error.values) & data.complete.values
    marks = _bars(data, data.trace_share.values, data.trace_share_error.values, sure, "share")
    return Panel(marks, Axis("layer"), Axis("share of the trace"), title="where the trace lies")


def scaled(data: xr.Dataset) -> Panel:
    """λ_1 ‖W‖² of each layer."""
    marks = _bars(data, data.scaled.values, data.scaled_error.values, data.converged.values[:, 0], "λ_1 ‖W‖²")
    return Panel(marks, Axis("layer"), Axis("λ_1 ‖W‖²"), title="free of the layer's scale")
