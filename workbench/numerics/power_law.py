"""Power laws in the tail of a sample: the exponent, where the tail begins, how sure, how good, and what else fits.

All of it works on y = ln x: a power law p(x) ~ x^-α above x_min is an exponential law of rate α - 1 of y - ln x_min.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import erfc, erfcx, log_ndtr

Floats = NDArray[np.float64]
Distance = Literal["two-sided", "lower"]
FEWEST = 50
"""Values below which no power law is fitted: so few fit anything."""
LEAST_TAIL = 25
"""Values that a tail must hold."""
CANDIDATES = 60
"""Beginnings of the tail that are tried, evenly spread in rank."""
FLAT = 1e-3
"""A tail whose largest value exceeds its smallest by no more than this share has no slope: rounding makes so much."""


@dataclass(frozen=True)
class PowerLaw:
    """p(x) ~ x^-``alpha`` for x >= ``x_min``, fitted to the ``tail`` values from there on.

    ``distance`` is Kolmogorov and Smirnov's between the law and these values. ``standard_error`` is that of α for a
    tail that was known beforehand: (α - 1)/√tail.
    """

    alpha: float
    x_min: float
    tail: int
    distance: float

    @property
    def standard_error(self) -> float:
        """(α - 1)/√tail."""
        return (self.alpha - 1) / math.sqrt(self.tail)


@dataclass(frozen=True)
class Rival:
    """Another law against the power law on its tail.

    ``ratio`` is the log likelihood of the power law less that of the rival: negative where the rival fits better.
    ``p_value``: how often chance alone gives one so far from zero (Vuong), or, for a rival that contains the power
    law, one so negative (chi-squared with the parameter at its bound).
    """

    ratio: float
    p_value: float

    def better(self, level: float = 0.05) -> bool:
        """Whether the rival fits better beyond chance."""
        return self.ratio < 0 and self.p_value < level


def fit_tail(values: ArrayLike, x_min: float, distance: Distance = "two-sided") -> PowerLaw | None:
    """The law of the values at or above ``x_min`` > 0: α = 1 + n / Σ ln(x/x_min); None where these are (nearly) equal.

    ``distance`` compares the law with the upper and the lower step of the empirical distribution function, or with the
    lower ones only, as some tools do. Source: Clauset, Shalizi and Newman 2009.
    """
    found = np.sort(np.asarray(values, dtype=np.float64))
    tail = np.log(found[found >= x_min]) - math.log(x_min)
    return _law(tail, x_min, distance) if tail.size and tail[-1] > FLAT else None


def fit_power_law(
    values: ArrayLike, distance: Distance = "two-sided", least: int = LEAST_TAIL, most: int | None = CANDIDATES
) -> PowerLaw | None:
    """The law whose beginning x_min, one of the values, gives the smallest distance.

    At most ``most`` beginnings are tried (None: all), the smallest value always; each leaves ``least`` values or more.
    None for fewer values than that, for values that are not positive, and where the largest are (nearly) equal.
    O(most · n) time, O(n) memory. Source: Clauset, Shalizi and Newman 2009.
    """
    found = np.sort(np.asarray(values, dtype=np.float64))
    if found.size < max(least, 2) or not found[0] > 0 or not np.isfinite(found[-1]):
        return None
    return _scan(np.log(found), distance, least, most)


def _scan(logs: Floats, distance: Distance, least: int, most: int | None) -> PowerLaw | None:
    best: PowerLaw | None = None
    for start in _beginnings(logs.size, least, most):
        if logs[-1] - logs[start] <= FLAT:
            break
        law = _law(logs[start:] - logs[start], math.exp(logs[start]), distance)
        best = law if best is None or law.distance < best.distance else best
    return best


def _beginnings(count: int, least: int, most: int | None) -> Iterable[int]:
    """Places where a tail may begin, the first of all included, each once."""
    last = count - least
    return range(last + 1) if most is None or last < most else np.linspace(0, last, most).astype(int).tolist()


def _law(tail: Floats, x_min: float, distance: Distance) -> PowerLaw:
    """The law of the ascending ln(x/x_min) of a tail that is not flat."""
    count = tail.size
    rate = count / float(tail.sum())
    # The distribution function, then its height above the lower steps i/n and below the upper ones (i + 1)/n.
    above = -np.expm1(-rate * tail) - np.arange(count) / count
    apart = float(np.abs(above).max() if distance == "lower" else max(above.max(), 1 / count - above.min()))
    return PowerLaw(1 + rate, x_min, count, apart)


def profile(values: ArrayLike, shares: Iterable[float], distance: Distance = "two-sided") -> tuple[Floats, Floats]:
    """(α, distance) with the tail made of each share of the values, the largest; nan below LEAST_TAIL values."""
    logs = np.log(np.sort(np.asarray(values, dtype=np.float64)))
    rows = list[tuple[float, float]]()
    for share in shares:
        tail = logs[logs.size - min(max(round(share * logs.size), 0), logs.size) :]
        fits = tail.size >= LEAST_TAIL and tail[-1] - tail[0] > FLAT
        law = _law(tail - tail[0], 1.0, distance) if fits else None
        rows.append((law.alpha, law.distance) if law else (math.nan, math.nan))
    alpha, apart = np.array(rows).reshape(-1, 2).T
    return alpha, apart


def interval(
    values: ArrayLike,
    law: PowerLaw,
    rng: np.random.Generator,
    resamples: int = 100,
    distance: Distance = "two-sided",
) -> tuple[float, float]:
    """A 95 % interval of α, which also holds the doubt about where the tail begins.

    The wider, on each side, of α ± 1.96 standard errors and of the percentiles of the bootstrap, in which each
    resample finds its own x_min. (Alone, either covers the truth in some 90 % of samples of 100; together in 94 %.)
    Zero ``resamples``: the first only. nan where a resample has no law. Source: Efron 1979; Clauset et al. 2009.
    """
    half = 1.96 * law.standard_error
    if resamples == 0:
        return law.alpha - half, law.alpha + half
    logs = np.log(np.sort(np.asarray(values, dtype=np.float64)))
    fits = [_scan(np.sort(rng.choice(logs, logs.size)), distance, LEAST_TAIL, CANDIDATES) for _ in range(resamples)]
    alphas = np.array([math.nan if fit is None else fit.alpha for fit in fits])
    if np.isnan(alphas).any():
        return math.nan, math.nan
    low, high = np.quantile(alphas, [0.025, 0.975])
    return min(float(low), law.alpha - half), max(float(high), law.alpha + half)


def goodness(
    values: ArrayLike,
    law: PowerLaw,
    rng: np.random.Generator,
    resamples: int = 100,
    distance: Distance = "two-sided",
) -> float:
    """How often samples of the law lie as far from a power law as these values: small (< 0.1) speaks against it.

    A sample draws each value above x_min from the law, with the probability that the data lie there, and below it from
    the data; its own law is fitted anew. (1 + those as far) / (1 + ``resamples``); nan without resamples.
    Source: Clauset, Shalizi and Newman 2009.
    """
    if resamples == 0:
        return math.nan
    logs = np.log(np.sort(np.asarray(values, dtype=np.float64)))
    body, start = logs[: logs.size - law.tail], math.log(law.x_min)
    far = 0
    for _ in range(resamples):
        count = int(rng.binomial(logs.size, law.tail / logs.size)) if body.size else logs.size
        low = rng.choice(body, logs.size - count) if body.size else body
        sample = np.sort(np.r_[low, start + rng.exponential(1 / (law.alpha - 1), count)])
        fit = _scan(sample, distance, LEAST_TAIL, CANDIDATES)
        far += fit is None or fit.distance >= law.distance
    return (1 + far) / (1 + resamples)


# ---------------------------------------------------------------------------------------------- what else fits the tail


def against_exponential(values: ArrayLike, law: PowerLaw) -> Rival:
    """The exponential law above x_min, rate 1/(mean - x_min), by Vuong's test. Source: Vuong 1989."""
    tail = _tail(values, law)
    over = np.expm1(tail)  # x/x_min - 1
    rate = 1 / float(over.mean())
    apart = _power(tail, law) - (math.log(rate) + tail - rate * over)
    ratio, spread = float(apart.sum()), float(apart.std()) * math.sqrt(tail.size)
    return Rival(ratio, float(erfc(abs(ratio) / (math.sqrt(2) * spread))) if spread > 0 else math.nan)


def against_lognormal(values: ArrayLike, law: PowerLaw) -> Rival:
    """The lognormal law cut off at x_min, of which the power law is the limit of infinite width.

    In y = ln(x/x_min) its density is exp(-b y - c y²/2) / Z with c >= 0, and c = 0 is the power law; the fit is that of
    greatest likelihood in (b, c). The ratio is never positive; twice its size follows, for a true power law, the mean
    of chi-squared laws with 0 and 1 degrees of freedom.
    """
    tail = _tail(values, law)
    scale = float(tail.mean())
    first, second = 1.0, float((tail**2).mean()) / scale**2 / 2

    def cost(at: Floats) -> float:
        return float(at[0] * first + at[1] * second + _log_mass(float(at[0]), float(at[1])))

    tries = [minimize(cost, (b, c), method="L-BFGS-B", bounds=[(-40, 40), (0, 400)]) for b, c in ((1, 0), (0, 1))]
    gain = max(0.0, 1.0 - min(float(found.fun) for found in tries)) * tail.size  # at (1, 0) the cost is 1
    return Rival(-gain, 0.5 * float(erfc(math.sqrt(gain))) if gain > 0 else 1.0)


def _log_mass(b: float, c: float) -> float:
    """ln of the integral of exp(-b y - c y²/2) over y > 0; infinite where it diverges."""
    if c < 1e-10:
        return -math.log(b) if b > 0 else math.inf
    if b > 0:  # without the cancellation that the other form has for small c
        return 0.5 * math.log(math.pi / (2 * c)) + math.log(float(erfcx(b / math.sqrt(2 * c))))
    return 0.5 * math.log(2 * math.pi / c) + b * b / (2 * c) + float(log_ndtr(-b / math.sqrt(c)))


def _tail(values: ArrayLike, law: PowerLaw) -> Floats:
    found = np.sort(np.asarray(values, dtype=np.float64))[-law.tail :]
    return np.maximum(np.log(found) - math.log(law.x_min), 0.0)


def _power(tail: Floats, law: PowerLaw) -> Floats:
    """Log density of the power law in y."""
    return math.log(law.alpha - 1) - (law.alpha - 1) * tail
