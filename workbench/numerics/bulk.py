"""Spikes and bulk: where the bulk of a spectrum ends, by the laws of random matrices, and how many values stand out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar

from workbench.numerics.quadrature import Quadrature, gauss

Floats = NDArray[np.float64]
Name = Literal["semicircle", "Marchenko-Pastur"]
QUANTILE = 0.99
"""Only what lies below this quantile is fitted, so that outliers do not stretch the bulk."""
FEWEST_NODES = 4
"""Nodes of a quadrature below which no law is fitted."""
DRAWS = 12
"""Other random starts that are imitated for the error of an edge."""
_POINTS, _RATIOS = 1024, np.logspace(-2, 2, 17)


@dataclass(frozen=True)
class Bulk:
    """A law fitted to the bulk of a spectrum, which ends at ``edge``.

    ``misfit`` is the root mean square distance between the law's quantiles and the spectrum's, over the spectrum's
    standard deviation (both below the 99 % quantile): near 0 the law describes the bulk, near 1 it does not.
    """

    law: Name
    edge: float
    misfit: float


def gap_count(values: ArrayLike, most: int | None = None, floor: float = 0.0) -> tuple[int, float]:
    """(k, λ_k / λ_{k+1}): where neighbouring positive eigenvalues lie furthest apart by ratio, for 1 <= k <= ``most``.

    ``values`` are eigenvalues that are known well, largest first, without gaps. Below ``floor`` times the largest, a
    value counts as zero up to rounding, so as that floor in the ratio; the search ends there, and where values turn
    negative. (0, nan) where there is no ratio. A definition, not an estimate: equal eigenvalues have a largest ratio
    too, so look at the ratio.
    """
    found = np.asarray(values, dtype=np.float64)
    if not found.size or not found[0] > 0:
        return 0, math.nan
    least = floor * float(found[0])
    ends = (found <= least) & ((found < -least) | (np.roll(found, 1) <= least))
    found = np.maximum(found[: int(np.argmax(np.append(ends, True)))], least)[: None if most is None else most + 1]
    if found.size < 2:
        return 0, math.nan
    with np.errstate(divide="ignore"):
        ratios = found[:-1] / found[1:]
    return int(np.argmax(ratios)) + 1, float(ratios.max())


def fit_bulk(measure: Quadrature, quantile: float = QUANTILE) -> Bulk | None:
    """The semicircle or Marchenko-Pastur law that is nearest to a quadrature, between its outer quantiles.

    A node stands for the quantile in the middle of its own weight (the true distribution function lies between the sums
    before and after it, by Chebyshev, Markov and Stieltjes). Quantiles are matched by weighted least squares: centre
    and radius of the semicircle, scale and ratio of Marchenko-Pastur. None for fewer than 4 nodes between the
    quantiles, and where all nodes are equal. Source: Marchenko and Pastur 1967; Wigner 1955.
    """
    shares = np.cumsum(measure.weights) - 0.5 * measure.weights
    inside = (shares < quantile) & (shares > 1 - quantile)
    nodes, weights, shares = measure.nodes[inside], measure.weights[inside], shares[inside]
    if nodes.size < FEWEST_NODES:
        return None
    weights = weights / weights.sum()
    deviation = math.sqrt(max(float(weights @ (nodes - weights @ nodes) ** 2), 0.0))
    if deviation <= 1e-12 * float(np.abs(nodes).max()):
        return None
    fits = (_semicircle_fit(nodes, weights, shares), _pastur_fit(nodes, weights, shares))
    law, edge, apart = min((fit for fit in fits if fit is not None), key=lambda fit: fit[2])
    return Bulk(law, edge, math.sqrt(apart) / deviation)


def bulk_of_run(alpha: ArrayLike, beta: ArrayLike, size: int, quantile: float = QUANTILE) -> tuple[Bulk | None, float]:
    """The law fitted to a Lanczos run's quadrature, and the error of its edge.

    The error adds, in squares, the change from half as many steps (or as few as show a bulk), and two standard
    deviations over other random starts: their weights on n w_i eigenvalues follow a Dirichlet law with parameters
    n w_i / 2, of which a dozen draws (always the same) are fitted too. The law's own misfit comes on top, and is not
    in it. About 25 ms.
    """
    diagonal, off = np.asarray(alpha, dtype=np.float64), np.asarray(beta, dtype=np.float64)
    whole = gauss(diagonal, off)
    found = fit_bulk(whole, quantile)
    fits = (fit_bulk(gauss(diagonal[:m], off[:m]), quantile) for m in _shorter(diagonal.size))
    earlier = next((fit for fit in fits if fit is not None), None)
    if found is None or earlier is None:
        return found, math.nan
    draws = np.random.default_rng(0).dirichlet(np.maximum(size * whole.weights / 2, 1e-9), DRAWS)
    others = [fit_bulk(Quadrature(whole.nodes, weights), quantile) for weights in draws]
    edges = [bulk.edge for bulk in others if bulk is not None]
    return found, math.hypot(found.edge - earlier.edge, 2 * float(np.std(edges, ddof=1)) if len(edges) > 1 else 0.0)


def _shorter(steps: int) -> tuple[int, ...]:
    """Half of the steps, and more where so few show no bulk."""
    return tuple(m for m in (steps // 2, 2 * steps // 3, 5 * steps // 6) if m > 0)


def _semicircle_fit(nodes: Floats, weights: Floats, shares: Floats) -> tuple[Name, float, float]:
    """Least squares of centre + radius · q(share), q the quantiles of the unit semicircle."""
    unit = semicircle_quantile(shares)
    middle, centre = weights @ unit, weights @ nodes
    radius = float(weights @ ((unit - middle) * (nodes - centre)) / (weights @ (unit - middle) ** 2))
    shift = float(centre - radius * middle)
    return "semicircle", shift + radius, float(weights @ (nodes - shift - radius * unit) ** 2)


def _pastur_fit(nodes: Floats, weights: Floats, shares: Floats) -> tuple[Name, float, float] | None:
    """Least squares of scale · q(share; ratio); None for a spectrum that is not positive."""

    def scale(ratio: float) -> tuple[float, float]:
        unit = marchenko_pastur_quantile(shares, ratio)
        size = float(weights @ (unit * nodes) / (weights @ unit**2 or 1.0))
        return size, float(weights @ (nodes - size * unit) ** 2)

    best = int(np.argmin([scale(ratio)[1] for ratio in _RATIOS]))
    around = _RATIOS[max(best - 1, 0)], _RATIOS[min(best + 1, _RATIOS.size - 1)]
    found: Any = minimize_scalar(
        lambda log: scale(math.exp(log))[1], bounds=tuple(np.log(around)), method="bounded", options={"xatol": 1e-8}
    )
    ratio = math.exp(float(found.x))
    size, apart = scale(ratio)
    return ("Marchenko-Pastur", size * (1 + math.sqrt(ratio)) ** 2, apart) if size > 0 else None


def semicircle_quantile(shares: ArrayLike) -> Floats:
    """Quantiles of the semicircle law of radius 1: the x with 1/2 + (x √(1 - x²) + arcsin x) / π = share."""
    return np.interp(np.asarray(shares, dtype=np.float64), *_semicircle_table())


@lru_cache(maxsize=1)
def _semicircle_table() -> tuple[Floats, Floats]:
    angle = np.linspace(-math.pi / 2, math.pi / 2, _POINTS)
    x = np.sin(angle)
    return 0.5 + (x * np.cos(angle) + angle) / math.pi, x


def marchenko_pastur_quantile(shares: ArrayLike, ratio: float) -> Floats:
    """Quantiles of the eigenvalues of XᵀX/N, X (N x P) with independent entries of variance 1 and ``ratio`` = P/N.

    Density √((b - x)(x - a)) / (2π ratio x) between a, b = (1 ∓ √ratio)², with an atom of 1 - 1/ratio at 0 where
    ratio > 1.
    """
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    # x = low + (high - low)(1 - cos u)/2 makes the integrand smooth at both ends, also where low = 0
    angle = np.linspace(0, math.pi, _POINTS)
    x = low + (high - low) * np.sin(angle / 2) ** 2
    with np.errstate(invalid="ignore", divide="ignore"):
        slope = ((high - low) / 2 * np.sin(angle)) ** 2 / (2 * math.pi * ratio * x)
    slope[0] = (high - low) / (math.pi * ratio) if low == 0 else 0.0
    mass = np.concatenate([[0.0], np.cumsum(0.5 * (slope[1:] + slope[:-1]) * np.diff(angle))])
    atom = max(0.0, 1 - 1 / ratio)
    found = np.interp(np.asarray(shares, dtype=np.float64), atom + (1 - atom) * mass / mass[-1], x)
    return np.where(np.asarray(shares) <= atom, 0.0, found)


def tail_count(measure: Quadrature, edge: float, size: int) -> tuple[float, float]:
    """(number of eigenvalues above ``edge`` by a run's own quadrature, without atoms; its error).

    k isolated eigenvalues have the weight χ²_k / size in the quadrature of a random start: k ± √(2k), of which the
    error is two.
    """
    found = size * measure.mass(low=edge)
    return found, 2 * math.sqrt(2 * max(found, 1.0))
