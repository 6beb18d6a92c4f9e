"""The pictures of an eigenvector's parts: by example, layer, class and entry of the input."""

from __future__ import annotations

import math

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from workbench.figure import Axis, Band, Bars, Line, Panel, Points, Rule

Floats = NDArray[np.float64]
DRAWN = 40
"""Layers and classes that are drawn with their names; of more, those with the largest parts."""


def panels(data: xr.Dataset) -> tuple[Panel, ...]:
    """Contributions sorted and against the loss, and the parts of layers, and of classes and inputs where known."""
    found = [_sorted(data), _losses(data), _layers(data)]
    if np.isfinite(data.class_contribution).any():
        found.append(_classes(data))
    if data.sizes["feature"] > 1:
        found.append(_inputs(data))
    return tuple(found)


def _inputs(data: xr.Dataset) -> Panel:
    at, size, error = np.arange(data.sizes["feature"]), data.saliency.values, data.saliency_error.values
    marks = (Band(at, size - error, size + error), Line(at, size))
    return Panel(marks, Axis("entry of the input"), Axis("saliency"), title="inputs")


def _sorted(data: xr.Dataset) -> Panel:
    order = data.example_at.values
    known = order[np.isfinite(order)].astype(int)
    found, error = data.contribution.values[known], data.contribution_error.values[known]
    marks = (Rule(0.0), Points(np.arange(1.0, len(known) + 1), found, error, "example"))
    return Panel(marks, Axis("examples, sorted"), _scale(found), title="contributions")


def _scale(found: Floats, label: str = "contribution") -> Axis:
    typical = float(np.median(np.abs(found))) if found.size else math.nan
    return Axis(label, "symlog", threshold=typical) if typical > 0 else Axis(label)


def _losses(data: xr.Dataset) -> Panel:
    found, loss = data.contribution.values, data.loss.values
    mark = Points(loss, found, label="example", role="second")
    return Panel((mark,), _scale(loss, "loss"), _scale(found[np.isfinite(found)]), title="contribution by loss")


def _layers(data: xr.Dataset) -> Panel:
    share, names = data.layer_share.values, [str(name) for name in data["layer"].values]
    chosen = _largest(share)
    at, error = np.arange(chosen.size, dtype=float), float(data.misalignment)
    label = tuple(names[i] for i in chosen)
    bars = Bars(at, share[chosen], np.full(chosen.size, error), "share of the vector", names=label)
    known, scale = data.layer_own.values[chosen], abs(float(data.eigenvalue))
    own = Points(at, known / scale, data.layer_own_error.values[chosen] / scale, "own block, share of λ", "third")
    parameters = Points(at, data.layer_parameters.values[chosen], label="share of the parameters", role="second")
    marks = (bars, parameters, own) if np.isfinite(known).any() else (bars, parameters)
    return Panel(marks, Axis("layer"), Axis("share"), title="layers")


def _classes(data: xr.Dataset) -> Panel:
    found = data.class_contribution.values
    chosen = _largest(found)
    at, label = np.arange(chosen.size, dtype=float), tuple(str(int(c)) for c in data["class_"].values[chosen])
    bars = Bars(at, found[chosen], data.class_contribution_error.values[chosen], names=label)
    return Panel((bars,), Axis("class"), Axis("part of the eigenvalue"), title="classes")


def _largest(values: Floats) -> NDArray[np.intp]:
    """All places, or those of the largest values in their own order where there are too many to draw."""
    if values.size <= DRAWN:
        return np.arange(values.size)
    return np.sort(np.argsort(-np.abs(values), kind="stable")[:DRAWN])
