"""How far several Markov chains agree, and how many independent draws they are worth."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

BLOCKS = 20
"""Blocks of consecutive draws that each chain is also judged by: noise of single draws hides slow drift."""
FEWEST_DRAWS = 4
"""Draws of a chain below which halves have no variance of their own."""


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What chains (m, n) of a scalar say of its mean, and how far to believe them; nan where nothing can be said.

    Attributes:
        each: mean of each chain, (m,).
        mean: over all chains.
        error: standard error: the largest of the spread between chains' means, over the root of m, and of what single
            draws and means of blocks say by their effective number. Few chains may agree by chance.
        rhat: the larger split R-hat of draws and of means of blocks.
        effective: independent draws with the same standard error, at most what single draws say.
    """

    each: Floats
    mean: float
    error: float
    rhat: float
    effective: float

    @classmethod
    def of(cls, draws: ArrayLike) -> Diagnosis:
        """Of draws (m, n); those of the first few, where n is no multiple of the blocks, are in no block."""
        values = np.asarray(draws, dtype=np.float64)
        values = np.where(np.isfinite(values), values, np.nan)  # where chains left for infinity nothing is known
        each = values.mean(axis=1) if values.shape[1] else np.full(len(values), math.nan)
        sets = [values, blocked(values)] if values.shape[1] >= 2 * BLOCKS else [values]
        within = [standard_error(one) for one in sets]
        between = float(each.std(ddof=1)) / math.sqrt(len(each)) if len(each) > 1 else 0.0
        spread = float(values.var(axis=1, ddof=1).mean()) if values.shape[1] > 1 else math.nan
        worst = max(within) if np.isfinite(within).all() else math.nan
        return cls(
            each=each,
            mean=float(each.mean()),
            error=max(worst, between) if math.isfinite(worst) else math.nan,
            rhat=float(np.max([split_rhat(one) for one in sets])),
            effective=min(effective_sample_size(values), spread / worst**2) if worst else effective_sample_size(values),
        )


def blocked(draws: Floats, blocks: int = BLOCKS) -> Floats:
    """Means of ``blocks`` blocks of consecutive draws, (m, blocks), from (m, n >= blocks) but its first n % blocks."""
    length = draws.shape[1] // blocks
    return draws[:, -length * blocks :].reshape(len(draws), blocks, length).mean(axis=2)


def standard_error(draws: ArrayLike) -> float:
    """√(pooled variance / effective draws) of the mean over chains (m, n)."""
    halves = _halves(draws)
    return math.nan if halves is None else math.sqrt(_variances(halves)[1] / effective_sample_size(draws))


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
