"""What the squared singular values of a matrix of independent entries would be: edges, how far chance reaches, spikes.

The ratio of the law is known from the matrix's shape; only its scale is fitted, which tells this from the fit of a
spectrum of unknown origin in ``bulk.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import gamma

from workbench.numerics.bulk import marchenko_pastur_quantile

Floats = NDArray[np.float64]
NARROWEST = 10
"""Rows or columns below which a matrix is too small for the law, which is one of large matrices."""
CHANCE = 0.01
"""How often a matrix without any signal shows a spike."""
_ROUNDS = 20


@dataclass(frozen=True)
class RandomBulk:
    """The law of Marchenko and Pastur fitted to eigenvalues x = σ²(W) of an m x n matrix (no division by n).

    ``std`` s: of an entry of the noise, by the median of what is no spike. ``low``, ``high``: the edges s²(√n ∓ √m)².
    ``threshold``: the largest of noise alone stays below it in 99 of 100 matrices (Tracy and Widom). ``spikes`` lie
    above it. ``mass`` and ``norm``: the shares of the number and of the sum of the eigenvalues that lie between the
    edges, widened by what chance does there. ``misfit``: root mean square distance between the law's quantiles and the
    eigenvalues that are no spikes, over the standard deviation of these or of the law, whichever is larger; near 0 the
    law describes them, near 1 not.
    """

    std: float
    low: float
    high: float
    threshold: float
    spikes: int
    mass: float
    norm: float
    misfit: float


def fit_random_bulk(values: ArrayLike, rows: int, columns: int, blocks: int = 1) -> RandomBulk | None:
    """The law of eigenvalues σ²(W), pooled from ``blocks`` matrices of ``rows`` x ``columns``, min(rows, columns) each.

    The scale matches the median; spikes are taken out and the median is taken anew until their number stays, at most
    half of all values. None where the matrices are narrower than 10, or the median is 0. Source: Marchenko and Pastur
    1967; Johnstone 2001 for the widths, with the approximation of Tracy and Widom's law by Chiani 2014.
    """
    found = np.sort(np.asarray(values, dtype=np.float64))
    narrow, wide = sorted((rows, columns))
    if narrow < NARROWEST or not np.isfinite(found).all():
        return None
    low, high = (math.sqrt(wide) - math.sqrt(narrow)) ** 2, (math.sqrt(wide) + math.sqrt(narrow)) ** 2
    above, below = _widths(narrow, wide, blocks)
    middle = float(marchenko_pastur_quantile(0.5, narrow / wide)) * wide
    spikes, variance = 0, 0.0
    for _ in range(_ROUNDS):
        variance = float(np.median(found[: found.size - spikes])) / middle
        now = min(int((found > variance * (high + above)).sum()), found.size // 2)
        if now <= spikes:
            break
        spikes = now
    if not variance > 0:
        return None
    inside = (found >= variance * (low - below)) & (found <= variance * (high + above))
    return RandomBulk(
        math.sqrt(variance),
        variance * low,
        variance * high,
        variance * (high + above),
        int((found > variance * (high + above)).sum()),
        float(inside.mean()),
        float(found[inside].sum() / found.sum()),
        _misfit(found[: found.size - spikes], narrow / wide, variance * wide),
    )


def _widths(narrow: int, wide: int, blocks: int) -> tuple[float, float]:
    """How far beyond the upper and lower edge the extreme of ``blocks`` matrices of unit noise reaches by chance."""
    far = float(gamma.ppf(1 - CHANCE / blocks, 46.446, scale=0.186054)) - 9.84801
    p, n = math.sqrt(narrow), math.sqrt(wide)
    return far * (n + p) * (1 / n + 1 / p) ** (1 / 3), far * (n - p) * max(1 / p - 1 / n, 0.0) ** (1 / 3)


def _misfit(values: Floats, ratio: float, scale: float) -> float:
    law = scale * marchenko_pastur_quantile((np.arange(values.size) + 0.5) / values.size, ratio)
    return float(np.sqrt(((values - law) ** 2).mean())) / max(float(values.std()), float(law.std()))


def random_bulk_density(at: ArrayLike, rows: int, columns: int, std: float) -> Floats:
    """Density of an eigenvalue x = σ²(W) at these places: √((b - x)(x - a)) / (2π min(rows, columns) s² x)."""
    x = np.asarray(at, dtype=np.float64)
    narrow, wide = sorted((rows, columns))
    low, high = (std * (math.sqrt(wide) - math.sqrt(narrow))) ** 2, (std * (math.sqrt(wide) + math.sqrt(narrow))) ** 2
    inside = np.maximum((high - x) * (x - low), 0.0)
    return np.sqrt(inside) / (2 * math.pi * narrow * std**2 * x)
