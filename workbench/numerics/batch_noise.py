"""The largest eigenvalue of a mini-batch's curvature above that of all examples: two laws of noise, and their fits.

A batch of B out of n examples, drawn without replacement, is as noisy as b = B / (1 - B/n) out of infinitely many.
Both laws have one parameter. Each batch gives an estimate of it, whose variance is about proportional to b, so the
estimates are averaged with weights 1/b: least squares of the laws' own variable against 1/b, through the full data.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def inverse_size(batch: ArrayLike, examples: int) -> Floats:
    """1/b = 1/B - 1/n of batches of B out of n examples: 0 for a batch of all."""
    return 1 / np.asarray(batch, dtype=np.float64) - 1 / examples


@dataclass(frozen=True)
class Law(ABC):
    """How far noise of a ``scale`` lifts the largest eigenvalue ``largest`` > 0 of a matrix of ``size`` rows."""

    largest: float
    size: int

    @abstractmethod
    def predict(self, scale: float, inverse: ArrayLike) -> Floats:
        """The batch's largest eigenvalue at 1/b = ``inverse``."""

    @abstractmethod
    def invert(self, values: ArrayLike, inverse: ArrayLike) -> Floats:
        """The scale at which each batch's largest eigenvalue would be as predicted."""


@dataclass(frozen=True)
class Additive(Law):
    """H_B = H + E with E symmetric, its entries independent of variance σ²/b: the scale is σ².

    E alone has a semicircle of radius r = 2σ√(P/b). An eigenvalue λ > r/2 moves to λ + r²/(4λ); one below is swallowed,
    and the largest is then r. Source: Granziol, Zohren and Roberts 2022 (arXiv 2006.09092).
    """

    def predict(self, scale: float, inverse: ArrayLike) -> Floats:
        square = np.maximum(scale * self.size * np.asarray(inverse, dtype=np.float64), 0.0)
        return np.where(square < self.largest**2, self.largest + square / self.largest, 2 * np.sqrt(square))

    def invert(self, values: ArrayLike, inverse: ArrayLike) -> Floats:
        found = np.asarray(values, dtype=np.float64)
        outside = self.largest * (found - self.largest)
        square = np.where(found > 2 * self.largest, found**2 / 4, outside)
        return square / (self.size * np.asarray(inverse, dtype=np.float64))


@dataclass(frozen=True)
class Multiplicative(Law):
    """H_B is the covariance of b samples whose covariance has eigenvalues λ and, in all else, s: the scale is s.

    With γ = P/b, λ > s(1 + √γ) moves to λ + γλs/(λ - s); one below is swallowed, and the largest is s(1 + √γ)².
    Source: Marchenko and Pastur 1967; Baik and Silverstein 2006.
    """

    def predict(self, scale: float, inverse: ArrayLike) -> Floats:
        ratio = self.size * np.asarray(inverse, dtype=np.float64)
        edge = scale * (1 + np.sqrt(ratio))
        with np.errstate(divide="ignore", invalid="ignore"):
            outside = self.largest + ratio * self.largest * scale / (self.largest - scale)
        return np.where(edge < self.largest, outside, scale * (1 + np.sqrt(ratio)) ** 2)

    def invert(self, values: ArrayLike, inverse: ArrayLike) -> Floats:
        found, ratio = np.asarray(values, dtype=np.float64), self.size * np.asarray(inverse, dtype=np.float64)
        lifted = found - self.largest
        outside = lifted * self.largest / (ratio * self.largest + lifted)
        swallowed = found > self.largest * (1 + np.sqrt(ratio))
        return np.where(swallowed, found / (1 + np.sqrt(ratio)) ** 2, outside)


@dataclass(frozen=True)
class Fit:
    """A law's ``scale`` with its standard ``error`` over batches.

    ``misfit`` is the distance of the predictions from the means of each size, in their standard errors, root mean
    square: near 1 where the law holds.
    """

    scale: float
    error: float
    misfit: float


def fit(law: Law, values: ArrayLike, inverse: ArrayLike) -> Fit:
    """Fit a law to largest eigenvalues (sizes, batches), nan where not measured, at 1/b (sizes,) > 0.

    The standard error follows from the spread of the batches' own estimates, whatever their variances are; nan for a
    single batch.
    """
    found, at = np.asarray(values, dtype=np.float64), np.asarray(inverse, dtype=np.float64)
    estimates = law.invert(found, at[:, None])
    weights = np.where(np.isfinite(estimates), at[:, None], 0.0)
    estimates, count, total = np.nan_to_num(estimates), int((weights > 0).sum()), float(weights.sum())
    if not count:
        return Fit(math.nan, math.nan, math.nan)
    scale = float((weights * estimates).sum()) / total
    spread = float(((weights * (estimates - scale)) ** 2).sum())
    error = math.sqrt(count / (count - 1) * spread) / total if count > 1 else math.nan
    mean, deviation = mean_and_error(found)
    with np.errstate(divide="ignore", invalid="ignore"):
        off = (mean - law.predict(scale, at)) / deviation
    off = off[np.isfinite(off)]
    return Fit(scale, error, math.sqrt(float((off**2).mean())) if off.size else math.nan)


def mean_and_error(values: Floats) -> tuple[Floats, Floats]:
    """Means (sizes,) over the batches that were measured (sizes, batches), and their standard errors; nan for none."""
    known = np.isfinite(values)
    count = known.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(known, values, 0.0).sum(axis=1) / count
        scatter = np.where(known, (values - mean[:, None]) ** 2, 0.0).sum(axis=1)
        error = np.sqrt(scatter / (count - 1) / count)
    return np.where(count > 0, mean, np.nan), np.where(count > 1, error, np.nan)
