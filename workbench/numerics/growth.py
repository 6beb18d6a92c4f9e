"""Two laws of slow growth, a log t + c and A t^ν, fitted to one curve, with how sure their numbers are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

Floats = NDArray[np.float64]
STEEPEST = 5.0
"""Exponents are sought between -STEEPEST and STEEPEST."""


@dataclass(frozen=True)
class Growth:
    """Slope a with half its 95 % interval and R² of d = a log t + c; exponent ν likewise of d = A t^ν.

    ``evidence`` = n/2 log(residuals of the power law / residuals of the logarithm): nats in favour of the logarithm,
    for independent normal residuals. nan where fewer than three points tell.
    """

    slope: float = math.nan
    slope_error: float = math.nan
    offset: float = math.nan
    log_r2: float = math.nan
    scale: float = math.nan
    exponent: float = math.nan
    exponent_error: float = math.nan
    power_r2: float = math.nan
    evidence: float = math.nan


def fit_growth(t: Floats, d: Floats) -> Growth:
    """Both laws by least squares in d itself, on the same points t > 0 (n,)."""
    known = np.isfinite(d) & (t > 0)
    t, d = t[known], d[known]
    if len(t) < 3 or not np.ptp(d) > 0:
        return Growth()
    logs = np.log(t)
    (slope, offset), log_rss, (slope_error, _) = _solve(np.stack([logs, np.ones_like(t)], 1), d)
    nu = _exponent(logs, d)
    base = np.exp(nu * logs)
    scale = float(base @ d / (base @ base))
    rss = float(((d - scale * base) ** 2).sum())
    _, error = _errors(np.stack([base, scale * base * logs], 1), rss)
    total = float(((d - d.mean()) ** 2).sum())
    floor = len(d) * (np.finfo(float).eps * float(np.abs(d).max())) ** 2  # of rounding, where a law holds exactly
    evidence = len(d) / 2 * math.log(max(rss, floor) / max(log_rss, floor))
    return Growth(
        slope, slope_error, offset, 1 - log_rss / total, scale, nu, error, 1 - rss / total, evidence
    )  # fmt: skip


def _exponent(logs: Floats, d: Floats) -> float:
    """The ν with the least residuals, the scale being the best one for each: a grid, then a bracket of it."""

    def left(nu: float) -> float:
        base = np.exp(nu * (logs - logs.mean()))
        return float(d @ d - (base @ d) ** 2 / (base @ base))

    grid = np.linspace(-STEEPEST, STEEPEST, 201)
    best = grid[int(np.argmin([left(nu) for nu in grid]))]
    step = grid[1] - grid[0]
    found: Any = optimize.minimize_scalar(
        left, bounds=(best - step, best + step), method="bounded", options={"xatol": 1e-9}
    )
    return float(found.x)


def _solve(design: Floats, d: Floats) -> tuple[tuple[float, float], float, tuple[float, float]]:
    found = np.linalg.lstsq(design, d, rcond=None)[0]
    rss = float(((d - design @ found) ** 2).sum())
    return (float(found[0]), float(found[1])), rss, _errors(design, rss)


def _errors(design: Floats, rss: float) -> tuple[float, float]:
    """Half-widths of the 95 % intervals of two numbers; nan without a degree of freedom."""
    freedom = len(design) - 2
    if freedom < 1 or np.linalg.matrix_rank(design) < 2:
        return math.nan, math.nan
    covariance = np.linalg.inv(design.T @ design) * rss / freedom
    reach = float(stats.t.ppf(0.975, freedom))
    return reach * math.sqrt(covariance[0, 0]), reach * math.sqrt(covariance[1, 1])
