"""Gradient noise from squared lengths: its size, the mean gradient's, their ratio, and how sure all three are."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]

LEVEL = 0.95
"""Coverage of the intervals."""


@dataclass(frozen=True, eq=False)
class NoiseSums:
    """What m of n gradients g_i say, part by part (layer by layer); ``batch`` examples are averaged in each g_i.

    ``squares`` (m, k) holds ‖g_i‖², ``along`` (m, k) g_i · ḡ, and ``mean_square`` (k,) ‖ḡ‖² of the mean of all n.
    These few numbers give every estimate and every jackknife value: leaving one gradient out changes the mean to
    (n ḡ - g_i)/(n - 1), whose squared length they tell. Nothing of the gradients' size is kept.

    Squares and products may be those of any symmetric form, gᵀHg for ‖g‖²: all formulas stay as they are, and tr Σ
    becomes tr(HΣ). ``indefinite`` says that it may be negative; else what is below zero is rounding.
    """

    squares: Floats
    along: Floats
    mean_square: Floats
    count: int
    batch: int = 1
    indefinite: bool = False

    @property
    def whole(self) -> bool:
        """Whether all gradients are in."""
        return len(self.squares) == self.count

    def total(self) -> NoiseSums:
        """All parts together, as one."""
        squares, along = self.squares.sum(1, keepdims=True), self.along.sum(1, keepdims=True)
        return replace(self, squares=squares, along=along, mean_square=self.mean_square.sum(keepdims=True))

    def estimate(self) -> Noise:
        """Unbiased tr Σ and ‖G‖² with their ratio, each (k,), and 95 % intervals by the jackknife once all are in."""
        n = self.count
        spread = (self.squares - 2 * self.along + self.mean_square).mean(0) * n / (n - 1)
        value = self._numbers(spread, self.mean_square, n)
        if not self.whole or n < 3:
            return Noise(value, np.full_like(value, np.nan))
        mean = (n**2 * self.mean_square - 2 * n * self.along + self.squares) / (n - 1) ** 2
        scatter = self.squares.sum(0) - self.squares - (n - 1) * mean
        without = self._numbers(scatter / (n - 2), mean, n - 1)
        deviation = math.sqrt((n - 1) ** 2 / n) * without.std(axis=1, ddof=1)
        return Noise(value, deviation * float(stats.t.ppf(0.5 + LEVEL / 2, n - 1)))

    def _numbers(self, spread: Floats, mean_square: Floats, count: int) -> Floats:
        """tr Σ of one example, ‖G‖², and ‖G‖²/tr Σ (nan without noise) from the spread of gradients and ‖ḡ‖²."""
        found = spread if self.indefinite else np.maximum(spread, 0.0)  # negative by rounding, of equal gradients
        trace, square = found * self.batch, mean_square - found / count
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.stack([trace, square, np.where(trace > 0, square / trace, np.nan)])


@dataclass(frozen=True, eq=False)
class Noise:
    """Estimates (3, k): tr Σ, ‖G‖², their ratio; and half the widths of their 95 % intervals, nan where unknown."""

    value: Floats
    error: Floats

    @property
    def trace(self) -> Floats:
        """Tr Σ, the summed variance of one example's gradient, (k,)."""
        return self.value[0]

    @property
    def square(self) -> Floats:
        """‖G‖² of the expected gradient, (k,); may be negative, since it is unbiased."""
        return self.value[1]

    @property
    def snr(self) -> Floats:
        """‖G‖²/tr Σ, one over the noise scale, (k,)."""
        return self.value[2]

    @property
    def resolved(self) -> NDArray[np.bool_]:
        """Where the interval of ‖G‖²/tr Σ lies above zero, so that the noise scale has an upper end, (k,)."""
        with np.errstate(invalid="ignore"):
            return self.value[2] - self.error[2] > 0

    def scale(self) -> tuple[Floats, Floats, Floats]:
        """The noise scale tr Σ/‖G‖² with the ends of its interval, (k,) each.

        The interval is that of the inverse, turned over. Where it reaches zero the scale and its upper end are nan, and
        the lower end says that the scale is larger than this.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            low = np.where(self.value[2] + self.error[2] > 0, 1 / (self.value[2] + self.error[2]), np.nan)
            value, high = 1 / self.value[2], 1 / (self.value[2] - self.error[2])
        known = self.resolved
        return np.where(known, value, np.nan), low, np.where(known, high, np.nan)
