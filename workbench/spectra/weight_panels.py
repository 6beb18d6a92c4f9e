"""The panels of a reading about weights: exponents, spikes and ranks by layer, and densities of eigenvalues."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from workbench.figure import AnyMark, Axis, Bars, Line, Panel, Points, Role, Rule
from workbench.numerics.marchenko_pastur import random_bulk_density
from workbench.numerics.power_law import FEWEST
from workbench.spectra.layer_panels import short
from workbench.spectra.weight_numbers import VALID

Floats = NDArray[np.float64]
CROWD = 8
"""Layers beyond which each panel by layer needs a row."""
FEW, MANY = 3, 6
"""Layers whose densities are drawn where none are named: in a crowd, and else."""
FAR = 12.0
"""Where the axis of exponents ends at the latest."""


def exponents(data: xr.Dataset) -> Panel:
    """α of each layer with its interval, grey where something speaks against a power law."""
    alpha, kept, at = data.alpha.values, data.power_law.values, _places(data)
    marks: list[AnyMark] = [Bars(at, np.full(at.size, np.nan), names=_names(data))]
    parts: tuple[tuple[Any, str, Role], ...] = ((kept, "α", "main"), (~kept, "doubtful", "unconverged"))
    for some, words, role in parts:
        low, high, here = (np.where(some, v, np.nan) for v in (data.alpha_low.values, data.alpha_high.values, alpha))
        marks += [_upright(at, low, high, role), Points(at, here, None, words, role)]
    marks += [Rule(bound, "y") for bound in VALID]
    finite = data.alpha_high.values[np.isfinite(data.alpha_high.values)]
    top = min(max([1.2 * VALID[1], *(1.1 * finite)]), FAR)
    return Panel(tuple(marks), Axis("layer"), Axis("exponent α", limits=(0.0, top)), title="power-law exponent")


def _upright(at: Floats, low: Floats, high: Floats, role: Role) -> Line:
    """Intervals as upright lines."""
    gap = np.full(at.size, np.nan)
    return Line(np.stack([at, at, gap], 1).ravel(), np.stack([low, high, gap], 1).ravel(), "", role)


def spikes(data: xr.Dataset) -> Panel:
    """Eigenvalues above what random entries explain."""
    marks = (Bars(_places(data), data.spikes.values, None, "", "main", _names(data)),)
    return Panel(marks, Axis("layer"), Axis("above the edge"), title="spikes")


def ranks(data: xr.Dataset) -> Panel:
    """Stable and effective rank of each layer."""
    at, names = _places(data), _names(data)
    marks = (
        Bars(at, data.stable_rank.values, None, "stable rank", "main", names),
        Points(at, data.effective_rank.values, None, "effective rank", "second"),
    )
    return Panel(marks, Axis("layer"), Axis("rank"), title="stable and effective rank")


def shown(data: xr.Dataset, words: str) -> list[int]:
    """The layers whose densities are drawn: those that ``words`` name, or a few spread over those with many values."""
    known = [i for i in range(data.sizes["layer"]) if np.isfinite(data.eigenvalue.values[i]).any()]
    asked = [word.strip() for word in words.split(",") if word.strip()]
    names = [str(name) for name in data["layer"].values]
    if asked:
        return [i for i in known if any(fnmatch.fnmatchcase(names[i], word) for word in asked)]
    most = FEW if len(names) > CROWD else MANY
    enough = np.isfinite(data.eigenvalue.values).sum(1) >= FEWEST
    known = [i for i in known if enough[i]] or known
    places = np.unique(np.linspace(0, len(known) - 1, min(most, len(known))).round().astype(int))
    return [known[i] for i in places]


def densities(data: xr.Dataset, words: str) -> tuple[Panel, ...]:
    """The densities of the layers that are shown; the first one's marks stand for all in the legend."""
    made = [density(data, layer) for layer in shown(data, words)]
    return tuple(
        replace(panel, marks=tuple(m if i == 0 or isinstance(m, Rule) else replace(m, label="") for m in panel.marks))
        for i, panel in enumerate(made)
    )


def density(data: xr.Dataset, layer: int) -> Panel:
    """One layer's density of eigenvalues on logarithms, with the power law's line and the law of random entries."""
    one = data.isel(layer=layer)
    found = one.eigenvalue.values
    found = found[np.isfinite(found) & (found > 0)]
    zeros = float(one.zeros)
    total = found.size + (zeros if math.isfinite(zeros) else 0)
    title = str(one["layer"].values)
    if not found.size:
        return Panel((Rule(0.0),), Axis("x = σ²"), Axis("density"), title=title)
    marks: list[AnyMark] = [_histogram(found, total), *_law(one, total), *_random(one, found)]
    if math.isfinite(float(one.alpha)):
        title += f", α = {float(one.alpha):.2f}" + ("" if bool(one.power_law) else " (doubtful)")
    return Panel(tuple(marks), Axis("x = σ²", "log"), Axis("density", "log"), title=title)


def _histogram(found: Floats, total: float) -> Points:
    """Counts in bins of equal width on the logarithm, over width and number of values; empty ones left out."""
    low, high = float(found.min()) * (1 - 1e-6), float(found.max()) * (1 + 1e-6)
    edges = np.geomspace(low, high, 1 + min(max(round(2 * math.sqrt(found.size)), 6), 40))
    count, _ = np.histogram(found, edges)
    with np.errstate(invalid="ignore"):
        height = np.where(count > 0, count / np.diff(edges) / total, np.nan)
    return Points(np.sqrt(edges[1:] * edges[:-1]), height, None, "eigenvalues")


def _law(one: xr.Dataset, total: float) -> Sequence[AnyMark]:
    """The power law from x_min on, with the tail's share of all values."""
    alpha, start, tail = float(one.alpha), float(one.x_min), float(one.tail_size)
    if not math.isfinite(alpha):
        return ()
    at = np.geomspace(start, float(np.nanmax(one.eigenvalue.values)), 50)
    return (Line(at, tail / total * (alpha - 1) / start * (at / start) ** -alpha, "power law", "second"),)


def _random(one: xr.Dataset, found: Floats) -> Sequence[AnyMark]:
    """The law of Marchenko and Pastur between its edges, and a rule at the upper one."""
    std, low, high = float(one.noise_std), float(one.edge_low), float(one.edge)
    if not math.isfinite(std):
        return ()
    inner = max(low * (1 + 1e-3), float(found.min()))
    rule = Rule(high, "x", "edge")
    if not inner < high:
        return (rule,)
    at = np.geomspace(inner, high * (1 - 1e-3), 120)
    curve = random_bulk_density(at, int(one.rows), int(one.columns), std)
    return (Line(at, curve, "random", "reference"), rule)


def _places(data: xr.Dataset) -> Floats:
    return np.arange(data.sizes["layer"], dtype=float)


def _names(data: xr.Dataset) -> tuple[str, ...]:
    return short([str(name) for name in data["layer"].values])
