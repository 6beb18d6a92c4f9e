"""How far several Markov chains agree, and how many independent draws they are worth."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

FEWEST_DRAWS = 4
"""Draws of a chain below which halves have no variance of their own."""


def split_rhat(draws: ArrayLike) -> float:
    """R̂ of a scalar over chains (m, n), in two halves each: √(pooled variance / variance within); 1 when stationary.

    Halves that drift look like chains that disagree. nan for fewer than four draws, or where any draw is not finite;
    1 for constants. Source: Gelman et al. 2013, Bayesian Data Analysis, section 11.4.
    """
    halves = _halves(draws)
    if halves is None:
        return math.nan
    within, pooled = _variances(halves)
    if within == 0:
        return 1.0 if pooled == 0 else math.inf
    return float(math.sqrt(pooled / within))


def effective_sample_size(draws: ArrayLike) -> float:
    """Independent draws that m · n correlated ones of chains (m, n) are worth for their mean: m n / (1 + 2 Σ ρ_t).

    The correlations ρ_t are pooled over halves of chains, so that disagreement counts as correlation, and summed by
    Geyer's initial monotone sequence. At most m n log10(m n), as chains that overshoot would else seem worth more than
    they are. nan as for :func:`split_rhat`. Cost: one fast Fourier transform a chain. Sources: Geyer 1992; Gelman et
    al. 2013, section 11.5; Vehtari et al. 2021.
    """
    halves = _halves(draws)
    if halves is None:
        return math.nan
    within, pooled = _variances(halves)
    total = halves.size
    if pooled == 0:
        return float(total)
    correlation = 1 - (within - _autocovariance(halves)) / pooled
    return total / max(_correlation_time(correlation), 1 / math.log10(max(total, 11)))


def _halves(draws: ArrayLike) -> Floats | None:
    values = np.asarray(draws, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f"Draws must have shape (chains, draws); got {values.shape}.")
    if values.shape[1] < FEWEST_DRAWS or not np.isfinite(values).all():
        return None
    half = values.shape[1] // 2
    return np.concatenate([values[:, :half], values[:, -half:]])


def _variances(halves: Floats) -> tuple[float, float]:
    """Mean variance within chains, and the pooled variance that also counts how far their means lie apart."""
    count = halves.shape[1]
    within = float(halves.var(axis=1, ddof=1).mean())
    between = float(halves.mean(axis=1).var(ddof=1))
    return within, within * (count - 1) / count + between


def _autocovariance(halves: Floats) -> Floats:
    """Mean over chains of the autocovariance at each lag, with the divisor count - 1 at all lags."""
    count = halves.shape[1]
    off = halves - halves.mean(axis=1, keepdims=True)
    power = np.abs(np.fft.rfft(off, 2 * count, axis=1)) ** 2
    return np.fft.irfft(power, 2 * count, axis=1)[:, :count].mean(axis=0) / (count - 1)


def _correlation_time(correlation: Floats) -> float:
    """-1 + 2 Σ of the sums of neighbouring pairs, as long as these are positive, each at most the one before."""
    correlation = correlation.copy()
    correlation[0] = 1.0
    pairs = correlation[: len(correlation) // 2 * 2].reshape(-1, 2).sum(axis=1)
    negative = np.flatnonzero(pairs <= 0)
    kept = pairs[: negative[0]] if negative.size else pairs
    return float(-1 + 2 * np.minimum.accumulate(kept).sum()) if kept.size else 1.0
