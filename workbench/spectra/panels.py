"""The panels of a spectrum: eigenvalues by rank, their density, and the share of them below each value."""

from __future__ import annotations

import math

import numpy as np
import xarray as xr

from workbench.figure import AnyMark, Axis, Band, Line, Panel, Points, Rule, Stems

FAR = 4.0
"""A threshold that many times above the largest eigenvalue is not drawn: it would flatten what is."""


def ranks(data: xr.Dataset) -> Panel:
    """The largest eigenvalues by rank with residuals, grey where not converged; and what they are to be held against.

    Across: the minimum, and the stability threshold where it is not far above. Upright: behind as many outliers as
    there are classes (C), and behind one fewer. At the first rank: the bracket for all data.
    """
    rank, value, met = data["rank"].values.astype(float), data.eigenvalue.values, data.converged.values
    kept, open_ = np.where(met, value, np.nan), np.where(met, np.nan, value)
    marks: list[AnyMark] = [
        Rule(0.0),
        *_bracket(data),
        Points(rank, kept, np.where(met, data.residual.values, np.nan), "eigenvalue ± residual"),
        Points(rank, open_, np.where(met, np.nan, data.residual.values), "not converged", "unconverged"),
        *_minimum(data),
        *_threshold(data),
        *_classes(float(data.classes), rank.size),
    ]
    return Panel(tuple(marks), Axis("rank"), Axis("eigenvalue"), title="largest eigenvalues")


def _minimum(data: xr.Dataset) -> tuple[AnyMark, ...]:
    low, residual = float(data.eigenvalue_min), float(data.eigenvalue_min_residual)
    if not math.isfinite(low):
        return ()
    sure = bool(data.eigenvalue_min_converged)
    words = f"minimum {low:.3g} ± {residual:.1g}" + ("" if sure else ", not converged")
    return (Rule(low, "y", words, "second" if sure else "unconverged"),)


def _bracket(data: xr.Dataset) -> tuple[AnyMark, ...]:
    low, high = float(data.sharpness_low), float(data.sharpness_high)
    if not (math.isfinite(low) and math.isfinite(high)):
        return ()
    return (Band([0.75, 1.25], [low, low], [high, high], "bracket for all data"),)


def _threshold(data: xr.Dataset) -> tuple[AnyMark, ...]:
    at = float(data.stability_threshold)
    if not (math.isfinite(at) and at <= FAR * float(data.eigenvalue.values[0])):
        return ()
    return (Rule(at, "y", f"stable below {at:.3g}", "fourth"),)


def _classes(classes: float, ranks: int) -> tuple[AnyMark, ...]:
    """Lines between ranks, where they fall inside the panel."""
    if not math.isfinite(classes):
        return ()
    return tuple(
        Rule(at, "x", words) for at, words in ((classes - 0.5, "C - 1"), (classes + 0.5, "C")) if at < ranks + 1
    )


def density(data: xr.Dataset) -> Panel:
    """The smoothed density, logarithmic in height and, beyond the smoothing's width, in eigenvalue."""
    width, size = float(data.smoothing_width), float(data.parameters)
    x, y = data["value"].values, data.density.values
    if not math.isfinite(width):
        return Panel((Line(x, y),), Axis("eigenvalue"), Axis("density"), title="spectral density")
    height = 1 / (size * width * math.sqrt(2 * math.pi))
    floor = 0.03 * height
    atoms = data.eigenvalue.values[data.converged.values]
    if bool(data.eigenvalue_min_converged):
        atoms = np.append(atoms, float(data.eigenvalue_min))
    edge = float(data.bulk_edge)
    marks: list[AnyMark] = [
        Line(x, np.where(y >= floor, y, np.nan), "all eigenvalues"),
        Stems(atoms, np.full(atoms.size, height), "single eigenvalues", "second", base=floor),
        *((Rule(edge, "x", "bulk's edge"),) if math.isfinite(edge) else ()),
    ]
    limits = (floor, 3 * max(float(np.max(y)), height))
    return Panel(
        tuple(marks),
        Axis("eigenvalue", "symlog", threshold=width),
        Axis("density", "log", limits=limits),
        title=f"spectral density, smoothed by {width:.2g}",
    )


def cumulative(data: xr.Dataset) -> Panel:
    """The share of the eigenvalues up to each value, as steps: nothing is smoothed and nothing was chosen."""
    known = np.isfinite(data.node.values)
    node, weight = data.node.values[known], data.weight.values[known]
    below = np.concatenate([[0.0], np.cumsum(weight)])
    x, y = np.repeat(node, 2), np.repeat(below, 2)[1:-1]
    width = float(data.smoothing_width)
    scale = Axis("eigenvalue", "symlog", threshold=width) if math.isfinite(width) else Axis("eigenvalue")
    error = float(data.density_error)
    title = "share below" + (f", ± {error:.2g} in eigenvalue" if error > 0 else "")
    return Panel((Line(x, y, "share of eigenvalues"),), scale, Axis("share of eigenvalues"), title=title)
