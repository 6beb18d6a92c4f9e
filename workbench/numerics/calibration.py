"""Calibration of predicted probabilities: binned and unbinned errors under any weights, and the best temperature.

A prediction has a confidence q = max_c p_c and is right (a = 1) or not (a = 0); r = a - q is its residual. In a bin b
with n_b of N predictions the gap is acc_b - conf_b, the mean of r over the bin.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Integers = NDArray[np.int64]
MEASURES = (
    "ece",
    "ece_equal_mass",
    "ece_classwise",
    "ece_top_label",
    "ece_max",
    "rms",
    "rms_squared_debiased",
    "overconfidence",
    "ks",
    "kernel_squared",
    "brier",
    "nll",
    "accuracy",
)
"""Names of the numbers that :meth:`Predictions.measure` gives."""
BOUND = 5.0
"""The search for a temperature T goes over log T from minus this to plus this."""
_EDGE = 1e-9
_ENTRIES = 2**22


def equal_width(values: Array, bins: int) -> Integers:
    """The bin of each value in [0, 1] among ``bins`` intervals (l, u] of one width, the first closed at 0.

    Values within 1e-9 of a bin's width above its upper end belong to it, so that k / bins does whatever its rounding.
    """
    return np.clip(np.ceil(values * bins - _EDGE).astype(np.int64) - 1, 0, bins - 1)


def equal_mass(values: Array, bins: int) -> Integers:
    """The bin of each value among intervals (l, u] that hold equally many of them; equal values share a bin."""
    ranks = np.ceil(np.arange(1, bins) * (len(values) / bins)).astype(np.int64) - 1
    edges = np.unique(np.sort(values)[np.clip(ranks, 0, None)])
    return np.searchsorted(edges, values, side="left").astype(np.int64)


def total(index: Integers, bins: int, values: Array) -> Array:
    """The sum of the values in each bin, (bins,)."""
    return np.bincount(index, values, bins).astype(np.float64)


def gaps(index: Integers, bins: int, residuals: Array, weights: Array) -> tuple[Array, Array]:
    """Sums of weights and of weighted residuals in each bin, (bins,) both."""
    return total(index, bins, weights), total(index, bins, weights * residuals)


def clopper_pearson(right: Array, counts: Array, level: float = 0.95) -> tuple[Array, Array]:
    """The exact interval of a share, from the number of successes and of independent trials; nan without trials.

    Source: Clopper and Pearson 1934, Biometrika 26:404.
    """
    from scipy.special import betaincinv

    tail = (1 - level) / 2
    wrong = counts - right
    low = np.where(right > 0, betaincinv(np.maximum(right, 0.5), wrong + 1, tail), 0.0)
    high = np.where(wrong > 0, betaincinv(right + 1, np.maximum(wrong, 0.5), 1 - tail), 1.0)
    return np.where(counts > 0, low, np.nan), np.where(counts > 0, high, np.nan)


@dataclass(frozen=True, eq=False)
class Reliability:
    """What a reliability diagram shows of each bin, (bins,) each; nan where a bin is empty.

    ``low`` and ``high`` are the exact 95 % interval of the accuracy, for independent predictions.
    """

    counts: Array
    confidence: Array
    accuracy: Array
    low: Array
    high: Array


@dataclass(frozen=True, eq=False)
class Predictions:
    """Logits (n, C), labels (n,) and settings, with all that does not change when predictions are weighed anew.

    Memory: about 28 bytes for each entry of the logits.
    """

    logits: Array
    labels: Integers
    bins: int = 15
    sweep: tuple[int, ...] = ()
    width: float = 0.4

    @cached_property
    def _parts(self) -> _Parts:
        return _Parts(self)

    def measure(self, weights: Array | None = None) -> dict[str, float]:
        """Every number of :data:`MEASURES`, predictions counted ``weights`` (n,) times (None: once).

        Binned, with ``bins`` bins of equal width unless said otherwise: ``ece`` = Σ_b (n_b/N) |acc_b - conf_b|;
        ``ece_equal_mass`` the same over bins that hold equally many; ``ece_classwise`` the same of p_c against
        1[y = c], averaged over the classes; ``ece_top_label`` with bins within each predicted class; ``ece_max`` the
        largest |gap|; ``rms`` = √Σ (n_b/N) gap²; ``rms_squared_debiased`` = Σ (n_b/N) (gap² -
        acc(1 - acc)/(n_b - 1)) over bins of two or more. Unbinned: ``overconfidence`` = mean of q - a; ``ks`` = max
        over q of |Σ_{q_i <= q} r_i| / N; ``kernel_squared`` = Σ_{i≠j} r_i r_j exp(-|q_i - q_j| / width) / (N(N - 1)),
        O(n log n). ``brier`` = mean of Σ_c (p_c - 1[y = c])², from 0 to 2; ``nll`` = mean of -log p_y.
        """
        return self._parts.measure(np.ones(len(self.labels)) if weights is None else weights)

    def sweep_over(self, weights: Array | None = None) -> tuple[Array, Array]:
        """ECE for each number of bins in ``sweep``, of equal width and of equal mass, (len(sweep),) both."""
        w = np.ones(len(self.labels)) if weights is None else weights
        return self._parts.over(self._parts.widths, w), self._parts.over(self._parts.masses, w)

    def floor(self, bins: int) -> float:
        """The ECE (equal width) expected of perfectly calibrated predictions of these confidences: its bias there.

        A bin's gap is then nearly normal around zero with variance Σ q(1 - q) / n_b², so E|gap| = √(2 variance / π).
        """
        q = self._parts.confidence
        variance = np.bincount(equal_width(q, bins), q * (1 - q), bins)
        return float(np.sqrt(2 * variance / math.pi).sum() / len(q))

    def reliability(self) -> Reliability:
        """Counts, mean confidence and accuracy of each bin of equal width."""
        parts = self._parts
        index, counts = parts.index, np.bincount(parts.index, minlength=self.bins).astype(np.float64)
        right = total(index, self.bins, parts.right)
        some = np.where(counts > 0, counts, np.nan)
        low, high = clopper_pearson(right, counts)
        confidence = total(index, self.bins, parts.confidence) / some
        return Reliability(counts, confidence, right / some, low, high)

    def lonely(self) -> int:
        """Bins (of equal width) that hold one prediction, which the debiased measure leaves out."""
        return int((np.bincount(self._parts.index, minlength=self.bins) == 1).sum())


class _Parts:
    """Bins, orders and residuals of some predictions, found once."""

    def __init__(self, given: Predictions) -> None:
        z, y, bins = given.logits, given.labels, given.bins
        self.bins, self.width, self.classes = bins, given.width, z.shape[1]
        logs = log_probabilities(z)
        p = np.exp(logs)
        rows = np.arange(len(y))
        chosen = z.argmax(1)
        self.confidence: Array = p[rows, chosen]
        self.right: Array = (chosen == y).astype(np.float64)
        self.residuals: Array = self.right - self.confidence
        self.nll: Array = -logs[rows, y]
        p[rows, y] -= 1.0  # from here on the negative of each class's residual
        self.brier: Array = (p**2).sum(1)
        self.index = equal_width(self.confidence, bins)
        self.mass_index = equal_mass(self.confidence, bins)
        self.top_index = chosen * bins + self.index
        self.class_matrix = _class_matrix(p, y, bins)
        self.widths = [(equal_width(self.confidence, b), b) for b in given.sweep]
        self.masses = [(equal_mass(self.confidence, b), b) for b in given.sweep]
        self.order = np.argsort(self.confidence, kind="stable")
        q = self.confidence[self.order]
        self.ends = np.append(q[1:] > q[:-1], True)
        self.rise: Array = np.exp(q / self.width)

    def measure(self, w: Array) -> dict[str, float]:
        """See :meth:`Predictions.measure`."""
        mass, r = float(w.sum()), self.residuals
        n, d = gaps(self.index, self.bins, r, w)
        by_class = np.abs(self.class_matrix @ w).sum()
        found = {
            "ece": np.abs(d).sum() / mass,
            "ece_equal_mass": self._binned(self.mass_index, self.bins, w),
            "ece_classwise": by_class / mass / self.classes,
            "ece_top_label": self._binned(self.top_index, self.bins * self.classes, w),
            "overconfidence": -float(w @ r) / mass,
            "brier": float(w @ self.brier) / mass,
            "nll": float(w @ self.nll) / mass,
            "accuracy": float(w @ self.right) / mass,
        }
        found |= self._squares(n, d, total(self.index, self.bins, w * self.right)) | self._unbinned(w)
        return {name: float(value) for name, value in found.items()}

    def over(self, indices: Sequence[tuple[Integers, int]], w: Array) -> Array:
        """ECE for each of several ways of binning."""
        return np.array([self._binned(index, bins, w) for index, bins in indices])

    def _binned(self, index: Integers, bins: int, w: Array) -> float:
        return float(np.abs(gaps(index, bins, self.residuals, w)[1]).sum() / w.sum())

    def _squares(self, n: Array, d: Array, right: Array) -> dict[str, float]:
        held = n > 0
        share, gap, accuracy = n[held] / n.sum(), d[held] / n[held], right[held] / n[held]
        several = n[held] > 1
        noise = accuracy * (1 - accuracy) / np.where(several, n[held] - 1, 1)
        return {
            "ece_max": float(np.abs(gap).max()),
            "rms": float(np.sqrt((share * gap**2).sum())),
            "rms_squared_debiased": float((share * (gap**2 - noise))[several].sum()),
        }

    def _unbinned(self, w: Array) -> dict[str, float]:
        weights, mass = w[self.order], float(w.sum())
        weighted = weights * self.residuals[self.order]
        below = np.cumsum(weighted * self.rise)
        pairs = 2 * float((weighted[1:] / self.rise[1:]) @ below[:-1])  # Σ_{i<j} of the product of exponentials
        others = mass**2 - float(weights @ weights)
        return {
            "ks": float(np.abs(np.cumsum(weighted))[self.ends].max() / mass),
            "kernel_squared": pairs / others if others > 0 else math.nan,
        }


def _class_matrix(residuals: Array, labels: Integers, bins: int) -> NDArray[np.float64]:
    """The matrix (C · bins, n) that takes weights to the sums of residuals of each class in each bin of p_c."""
    from scipy.sparse import csc_array

    n, classes = residuals.shape
    index = np.empty((n, classes), dtype=np.int32 if classes * bins < 2**31 else np.int64)
    for rows in _blocks(n, classes):
        p = residuals[rows].copy()
        p[np.arange(len(p)), labels[rows]] += 1.0
        index[rows] = equal_width(p, bins) + np.arange(classes) * bins
    ends = np.arange(n + 1, dtype=np.int64) * classes
    return csc_array((residuals.ravel(), index.ravel(), ends), shape=(classes * bins, n))  # pyright: ignore[reportReturnType]


def log_probabilities(logits: Array) -> Array:
    """log softmax over the last axis, exact to rounding however large the logits are."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def resampled(examples: int, rng: np.random.Generator) -> Array:
    """How often each example is drawn in one bootstrap sample, (examples,)."""
    return np.bincount(rng.integers(0, examples, examples), minlength=examples).astype(np.float64)


# --- temperature ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Temperature:
    """T = argmin of the mean -log softmax(z / T)_y, with its standard error and 95 % interval over examples.

    ``at_bound``: the minimum lies beyond exp(±5), so ``value`` is that bound, and there is no error.
    """

    value: float
    error: float = math.nan
    low: float = math.nan
    high: float = math.nan
    at_bound: bool = False


def fit_temperature(logits: Array, labels: Integers, examples: Integers | None = None) -> Temperature:
    """The best temperature for logits (n, C) and labels (n,); ``examples`` (n,) says which predictions belong together.

    The mean loss is convex in β = 1/T: Newton's method inside a bracket, to rounding, in float64. The interval is
    normal in log T, with the variance Σ_e g_e² / (Σ f'')² where g_e is the slope of example e's loss: right also where
    softmax(z / T) is not the true law, and where the predictions of one example depend on each other. O(n C) an
    iteration. Source of the method: Guo et al. 2017 (arXiv 1706.04599); of the variance: White 1982.
    """
    low, high = math.exp(-BOUND), math.exp(BOUND)
    if slopes(logits, labels, low)[0].sum() >= 0:
        return Temperature(1 / low, at_bound=True)
    if slopes(logits, labels, high)[0].sum() <= 0:
        return Temperature(1 / high, at_bound=True)
    beta = 1.0
    for _ in range(200):
        first, second = (float(x.sum()) for x in slopes(logits, labels, beta))
        low, high = (beta, high) if first < 0 else (low, beta)
        aim = beta - first / second if second > 0 else math.inf
        aim = aim if low < aim < high else math.sqrt(low * high)
        step, beta = abs(aim - beta), aim
        if step <= 1e-14 * beta or first == 0:
            break
    return _with_interval(logits, labels, beta, np.arange(len(labels)) if examples is None else examples)


def slopes(logits: Array, labels: Integers, beta: float) -> tuple[Array, Array]:
    """First and second derivative of each prediction's -log softmax(β z)_y with respect to β, (n,) both."""
    first, second = np.empty(len(labels)), np.empty(len(labels))
    for rows in _blocks(*logits.shape):
        z, y = logits[rows], labels[rows]
        p = np.exp(log_probabilities(beta * z))
        mean = (p * z).sum(1)
        first[rows] = mean - z[np.arange(len(y)), y]
        second[rows] = (p * (z - mean[:, None]) ** 2).sum(1)
    return first, second


def _with_interval(logits: Array, labels: Integers, beta: float, examples: Integers) -> Temperature:
    first, second = slopes(logits, labels, beta)
    each = np.bincount(np.unique(examples, return_inverse=True)[1], first)
    if len(each) < 2:
        return Temperature(1 / beta)
    spread = math.sqrt(len(each) / (len(each) - 1) * float(each @ each)) / float(second.sum())
    relative = spread / beta  # of β, and so of T
    value = 1 / beta
    return Temperature(value, value * relative, value * math.exp(-1.96 * relative), value * math.exp(1.96 * relative))


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _ENTRIES // max(columns, 1))
    return (slice(at, min(at + step, rows)) for at in range(0, rows, step))


def spread_of(samples: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The standard deviation of each number over bootstrap samples: its standard error; nan for fewer than two."""
    if len(samples) < 2:
        return dict.fromkeys(MEASURES, math.nan)
    return {name: float(np.std([s[name] for s in samples], ddof=1)) for name in MEASURES}
