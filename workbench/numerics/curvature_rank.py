"""How many eigenvalues carry a spectrum, of either sign: from all of them, or from a quadrature with multiplicities."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from workbench.numerics.density import Starts, spectral_measure, spectral_sum
from workbench.numerics.krylov import Krylov
from workbench.numerics.quadrature import Quadrature, gauss
from workbench.numerics.stats import jackknife_error

Floats = NDArray[np.float64]
ROUNDING = 1e-12
"""Share of Σ|λ| that counts as none, so that sums in another order give the same rank."""


def covered(nodes: Floats, counts: Floats) -> tuple[Floats, Floats]:
    """(eigenvalues so far, share of Σ|λ| so far), largest |λ| first, from nodes with ``counts`` eigenvalues each.

    Empty where Σ|λ| is 0 or not finite.
    """
    order = np.argsort(-np.abs(nodes), kind="stable")
    parts = np.cumsum(counts[order] * np.abs(nodes[order]))
    if not parts.size or not 0 < parts[-1] < math.inf:
        return np.zeros(0), np.zeros(0)
    return np.cumsum(counts[order]), parts / parts[-1]


def threshold_rank(nodes: Floats, counts: Floats, share: float) -> tuple[float, float]:
    """(least number k of eigenvalues that hold ``share`` of Σ|λ|, the |λ| of the last of them); nan where unknown.

    Inside a node that stands for several eigenvalues k is cut where the share is reached, and need not be whole.
    """
    numbers, shares = covered(nodes, counts)
    if not numbers.size:
        return math.nan, math.nan
    place = int(np.searchsorted(shares, share - ROUNDING))
    order = np.argsort(-np.abs(nodes), kind="stable")
    size = float(np.abs(nodes[order[place]]))
    if counts[order[place]] <= 1:
        return float(numbers[place]), size
    before = float(shares[place - 1]) if place else 0.0
    missing = (share - before) / max(float(shares[place]) - before, np.finfo(float).tiny)
    return float(numbers[place]) - (1 - missing) * float(counts[order[place]]), size


def rank_of(state: Krylov, size: int, slack: float, share: float, others: Starts = ()) -> tuple[float, float]:
    """The threshold rank of an operator of ``size`` eigenvalues from a Lanczos run, and its error.

    0 for a run that knows every eigenvalue. Else the larger of two: what half as many steps change, and the error of
    the number of eigenvalues above the last one that counts (its depth, and two standard deviations of sampling).
    """
    found, _ = spectral_measure(state, size, slack, others)
    value, last = threshold_rank(found.nodes, size * found.weights, share)
    if state.complete:
        return value, 0.0
    half, _ = spectral_measure(state, size, slack, others, half=True)
    other, _ = threshold_rank(half.nodes, size * half.weights, share)
    _, spread = spectral_sum(state, size, slack, lambda x: (np.abs(x) >= last).astype(np.float64), others)
    return value, max(abs(value - other), spread)


def share_of(state: Krylov, size: int, slack: float, below: float, others: Starts = ()) -> tuple[float, float]:
    """The share of eigenvalues with |λ| < ``below``, and its error: 0 for a run that knows every eigenvalue.

    Else a bound: by the inequalities of Chebyshev, Markov and Stieltjes the mass of a Gauss quadrature below a point is
    wrong by at most the larger weight of the two nodes around it. Half as many steps would tell too little, since
    neither sees eigenvalues that close. Two standard deviations of sampling are added.
    """
    value, sampling = spectral_sum(state, size, slack, lambda x: (np.abs(x) < below).astype(np.float64), others)
    share = min(max(value / size, 0.0), 1.0)
    if state.complete:
        return share, 0.0
    runs = [gauss(*run) for run in ((state.alpha, state.beta), *others)]
    bounds = [_around(run, -below) + _around(run, below) for run in runs]
    return share, float(np.mean(bounds)) + sampling / size


def _around(measure: Quadrature, point: float) -> float:
    """The larger weight of the nodes next to a point."""
    order = np.argsort(measure.nodes)
    place = int(np.searchsorted(measure.nodes[order], point))
    return float(measure.weights[order][max(place - 1, 0) : place + 1].max(initial=0.0))


def negative_part(state: Krylov, size: int, slack: float, others: Starts = ()) -> tuple[float, float]:
    """Σ|λ| over negative eigenvalues, over Σ|λ| of all; nan where all are 0."""
    low, low_error = spectral_sum(state, size, slack, lambda x: np.maximum(-x, 0.0), others)
    all_, all_error = spectral_sum(state, size, slack, np.abs, others)
    if not all_ > 0:
        return math.nan, math.nan
    return low / all_, math.hypot(low_error / all_, low * all_error / all_**2)


def mean_cosine(along: Floats, squared: float) -> tuple[float, float]:
    """Mean cosine over pairs of n unit vectors u_i, and its standard error by the jackknife over them.

    Args:
        along: u_i · s with s = Σ u_i, (n,).
        squared: ‖s‖².
    """
    n = len(along)
    value = (squared - n) / (n * (n - 1)) if n > 1 else math.nan
    if n < 3:
        return value, math.nan
    without = (squared - 2 * along + 1 - (n - 1)) / ((n - 1) * (n - 2))
    return value, float(jackknife_error(without))
