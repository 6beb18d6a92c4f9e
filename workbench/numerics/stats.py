"""Statistics that can be added up: moments merged from parts (Chan, in float64), per class too; and standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and scatter Σ(x - mean)² of observations (n, ...), entry by entry; parts merge to the whole.

    Merging adds the spread between the parts' means, so that nothing cancels however large the means are, unlike
    Σx² - (Σx)²/n. Any split into parts gives the same result to rounding. Source: Chan, Golub and LeVeque 1979.
    """

    count: int
    mean: NDArray[np.float64]
    scatter: NDArray[np.float64]

    @classmethod
    def of(cls, values: ArrayLike) -> Moments:
        """Moments over the first axis of ``values`` (n, ...), n >= 1."""
        array = np.asarray(values, dtype=np.float64)
        if array.ndim == 0 or array.shape[0] == 0:
            raise ValueError(f"Moments need at least one observation along the first axis; got shape {array.shape}.")
        mean = array.mean(axis=0)
        return cls(array.shape[0], mean, ((array - mean) ** 2).sum(axis=0))

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of observations together."""
        count = self.count + other.count
        gap = other.mean - self.mean
        scatter = self.scatter + other.scatter + gap**2 * (self.count * other.count / count)
        return Moments(count, self.mean + gap * (other.count / count), scatter)

    def add(self, values: ArrayLike) -> Moments:
        """The moments with further observations (n, ...)."""
        return self.merge(Moments.of(values))

    def variance(self, ddof: int = 1) -> NDArray[np.float64]:
        """Scatter over (count - ddof); nan where that is not positive."""
        freedom = self.count - ddof
        return np.asarray(self.scatter / freedom if freedom > 0 else np.full_like(self.scatter, np.nan))

    @property
    def standard_error(self) -> NDArray[np.float64]:
        """Standard error of the mean, for independent observations; nan for a single one."""
        return np.sqrt(self.variance() / self.count)


@dataclass(frozen=True, eq=False)
class ClassMoments:
    """Per class: ``counts`` (C,), ``means`` (C, d) and ``scatter`` (C,), Σ‖x - mean‖² over the class; all mergeable.

    The traces of the within-class covariances are ``scatter / counts``. Absent classes have count 0, mean 0, scatter
    0. Memory O(C d), float64, on the device of the features.
    """

    counts: Tensor
    means: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, classes: int, dimension: int, device: torch.device | str = "cpu") -> ClassMoments:
        """No observations yet of ``classes`` classes in ``dimension`` dimensions."""
        zeros = torch.zeros(classes, dimension + 1, dtype=torch.float64, device=device)
        return cls(torch.zeros(classes, dtype=torch.int64, device=device), zeros[:, 1:], zeros[:, 0])

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, classes: int) -> ClassMoments:
        """Moments of features (n, d) with integer labels (n,) in [0, classes)."""
        if features.ndim != 2 or tuple(labels.shape) != (features.shape[0],):
            raise ValueError(
                f"Features (n, d) and labels (n,) are wanted; got {tuple(features.shape)}, {tuple(labels.shape)}."
            )
        labels = labels.to(device=features.device, dtype=torch.int64)
        if labels.numel() and not (0 <= int(labels.min()) and int(labels.max()) < classes):
            raise ValueError(f"Labels must lie in [0, {classes}); got {int(labels.min())} to {int(labels.max())}.")
        features = features.detach().double()
        counts = torch.bincount(labels, minlength=classes)
        shift = features.mean(0) if features.shape[0] else features.new_zeros(features.shape[1])
        sums = features.new_zeros(classes, features.shape[1]).index_add_(0, labels, features - shift)
        means = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None] + shift, 0.0)
        squares = ((features - means[labels]) ** 2).sum(1)
        return cls(counts, means, features.new_zeros(classes).index_add_(0, labels, squares))

    def merge(self, other: ClassMoments) -> ClassMoments:
        """The moments of both sets of observations together."""
        counts = self.counts + other.counts
        share = other.counts.double() / counts.clamp_min(1)  # integers alone would divide in float32
        gap = other.means - self.means
        scatter = self.scatter + other.scatter + self.counts * share * (gap**2).sum(1)
        return ClassMoments(counts, self.means + share[:, None] * gap, scatter)

    def add(self, features: Tensor, labels: Tensor) -> ClassMoments:
        """The moments with further features (n, d) and labels (n,)."""
        part = ClassMoments.of(features, labels, self.counts.shape[0])
        return ClassMoments(*(t.to(part.means.device) for t in (self.counts, self.means, self.scatter))).merge(part)

    def within(self) -> Tensor:
        """Tr Σ_W: the mean over observations of ‖x - mean of its class‖², a 0-d tensor; nan without observations."""
        return self.scatter.sum() / self.counts.sum()


def known_mean(values: ArrayLike) -> float:
    """The mean of those values that are finite; nan without any."""
    array = np.asarray(values, dtype=np.float64)
    finite = array[np.isfinite(array)]
    return float(finite.mean()) if finite.size else math.nan


def error_of_mean(values: ArrayLike) -> NDArray[np.float64]:
    """Standard error of the mean of independent observations (n, ...), entry by entry; nan for fewer than two."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2:
        return np.full(array.shape[1:], np.nan)
    return array.std(axis=0, ddof=1) / math.sqrt(len(array))


def jackknife_error(replicates: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard error of a statistic from its values (m, ...) with each of m examples or equal groups left out.

    √((m-1)/m Σ (r - mean r)²); nan for fewer than two, or where one is not finite. Source: Efron and Stein 1981.
    """
    m = len(replicates)
    if m < 2:
        return np.full(replicates.shape[1:], np.nan)
    with np.errstate(invalid="ignore"):
        return np.sqrt((m - 1) / m * ((replicates - replicates.mean(0)) ** 2).sum(0))


@dataclass(frozen=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float


def bootstrap(
    values: ArrayLike,
    statistic: Callable[[NDArray[np.float64]], float],
    rng: np.random.Generator,
    *,
    resamples: int = 1000,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval of ``statistic(values)`` under resampling of the first axis with replacement.

    Approximate: it covers less than ``level`` for few (< 30) observations. A resample on which the statistic is nan
    makes the interval nan, rather than being dropped. Source: Efron 1979.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 0 or array.shape[0] < 2:
        raise ValueError(
            f"The bootstrap needs at least two observations along the first axis; got shape {array.shape}."
        )
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, such as 0.95; got {level}.")
    draws = rng.integers(0, array.shape[0], size=(resamples, array.shape[0]))
    estimates = np.array([statistic(array[rows]) for rows in draws])
    tail = (1 - level) / 2
    low, high = np.quantile(estimates, [tail, 1 - tail]) if np.isfinite(estimates).all() else (math.nan, math.nan)
    return Interval(float(low), float(high))
