"""Power laws of samples whose law is known: closed forms, plain scans, scipy's likelihoods, coverage, a peer."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pytest import approx
from scipy import stats
from scipy.optimize import minimize

from workbench.numerics import power_law as tails
from workbench.numerics.power_law import Floats

LADDER = (np.arange(1000) + 0.5) / 1000
QUANTILES = (1 - LADDER) ** -0.5
"""Quantiles of the power law with exponent 3 from 1 on."""


def pareto(alpha: float, count: int, seed: int) -> Floats:
    return np.random.default_rng([count, seed]).uniform(size=count) ** (-1 / (alpha - 1))


def lognormal(count: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).lognormal(0, 0.5, count)


def found_in(values: Floats, **words: object) -> tails.PowerLaw:
    law = tails.fit_power_law(values, **words)
    assert law is not None
    return law


def test_three_values_by_hand() -> None:
    lower, both = (tails.fit_tail([4, 1, 2], 1, which) for which in ("lower", "two-sided"))
    assert lower is not None
    assert both is not None
    assert both.alpha == lower.alpha == approx(1 + 1 / math.log(2), rel=1e-12)
    assert both.standard_error == approx(0.83294037, rel=1e-7)
    assert (lower.distance, both.distance) == approx((0.29878723, 1 / 3), rel=1e-7)


def test_quantiles_of_a_power_law() -> None:
    known, scanned = tails.fit_tail(QUANTILES, 1.0), found_in(QUANTILES, most=None)
    assert known is not None
    assert known.alpha == approx(3.00069330, rel=1e-8)
    assert scanned.alpha == approx(3.00169475, rel=1e-8)
    assert (scanned.x_min, scanned.tail) == (approx(QUANTILES[0]), 1000)
    assert scanned.distance == approx(0.001, rel=1e-6)
    assert found_in(QUANTILES, most=None, distance="lower").distance == approx(0.00067261, rel=1e-4)


@pytest.mark.parametrize("values", [np.r_[pareto(2.5, 150, 0), 0.9 * LADDER[::8]], lognormal(200)], ids=["body", "log"])
def test_the_tail_begins_where_a_plain_scan_says(values: Floats) -> None:
    """scipy's distance of each tail from its own law, largest to smallest."""
    ordered, best = np.sort(values), (math.inf, 0.0, 0.0)
    for start in ordered[:-24]:
        tail = ordered[ordered >= start]
        alpha = 1 + len(tail) / np.log(tail / start).sum()
        apart = stats.kstest(tail, stats.pareto(alpha - 1, scale=start).cdf).statistic
        best = min(best, (apart, start, alpha))
    law = found_in(np.random.default_rng(0).permutation(values), most=None)
    assert (law.distance, law.x_min, law.alpha) == approx(best, rel=1e-9)
    few = found_in(values)
    assert law.distance <= few.distance < law.distance + 0.02, "sixty beginnings are no substitute for all"


def test_the_package_powerlaw_agrees() -> None:
    peer = pytest.importorskip("powerlaw")
    values = np.r_[pareto(2.2, 250, 3), 0.95 * LADDER[::10]]  # it takes exponents above 3 down to 3
    law = found_in(values, most=None, distance="lower")
    theirs = peer.Fit(values, xmin=law.x_min, verbose=0)
    assert (law.alpha, law.distance) == approx((theirs.power_law.alpha, theirs.power_law.D))
    ratio, chance = theirs.distribution_compare("power_law", "exponential")
    rival = tails.against_exponential(values, law)
    assert rival.ratio == approx(float(ratio), rel=1e-5)
    assert rival.p_value == approx(float(chance), rel=0.01), "theirs divides by another spread"


@given(st.floats(-3, 3), st.floats(0.3, 3))
def test_units_and_powers_do_what_they_must(log_scale: float, power: float) -> None:
    """c x has the same exponent; x^k has (α - 1)/k for α - 1, the same distance and the same goodness."""
    values = pareto(2.5, 120, 1)
    law, moved = found_in(values), found_in(10**log_scale * values**power)
    assert moved.alpha - 1 == approx((law.alpha - 1) / power, rel=1e-9)
    assert (moved.distance, moved.tail) == (approx(law.distance, rel=1e-9), law.tail)
    assert moved.x_min == approx(10**log_scale * law.x_min**power, rel=1e-9)
    shares = (1.0, 0.5, 0.1)
    slopes, apart = zip(*(tails.profile(v, shares) for v in (values, 10**log_scale * values**power)), strict=True)
    assert slopes[1][:2] - 1 == approx((slopes[0][:2] - 1) / power, rel=1e-9)
    assert apart[1][:2] == approx(apart[0][:2], rel=1e-9)
    assert np.isnan(slopes[0][2]), "12 values are no tail"


def test_the_interval_covers_the_exponent() -> None:
    """Of 60 samples, 57 by right; fewer than 50 happens once in a thousand times at 95 %, more than 59 is too wide."""
    inside, widths = 0, list[float]()
    for seed in range(60):
        values = pareto(3.0, 120, seed)
        low, high = tails.interval(values, found_in(values), np.random.default_rng(seed), 25)
        inside += low <= 3.0 <= high
        widths.append(high - low)
    assert inside >= 50
    assert np.median(widths) < 12 * 2 / math.sqrt(120), "covers by being useless"
    law = found_in(values)
    known = tails.interval(values, law, np.random.default_rng(0), 0)
    assert known == approx((law.alpha - 1.96 * law.standard_error, law.alpha + 1.96 * law.standard_error))


def test_goodness_is_uniform_for_power_laws_and_small_for_others() -> None:
    def share(samples: list[Floats]) -> float:
        rng = np.random.default_rng(0)
        found = [tails.goodness(v, found_in(v), rng, 19) for v in samples]
        return float(np.mean(np.array(found) <= 0.1))

    body = [np.r_[pareto(2.5, 100, seed), 0.9 * LADDER[::10]] for seed in range(40)]
    assert share(body) < 0.3, "a law with a body below its tail is refused too often"
    evenly = [np.random.default_rng(seed).uniform(0, 1, 400) for seed in range(10)]
    assert share(evenly) > 0.6
    assert math.isnan(tails.goodness(body[0], found_in(body[0]), np.random.default_rng(0), 0))


# ------------------------------------------------------------------------------------------------------------- rivals


def likelihood(tail: Floats, law: tails.PowerLaw) -> Floats:
    return stats.pareto(law.alpha - 1, scale=law.x_min).logpdf(tail)


@pytest.mark.parametrize("values", [pareto(2.5, 300, 0), np.random.default_rng(0).exponential(1, 300)])
def test_against_the_exponential_by_scipy(values: Floats) -> None:
    law = tails.fit_tail(values, 0.2)
    assert law is not None
    tail = values[values >= law.x_min]
    apart = likelihood(tail, law) - stats.expon(law.x_min, tail.mean() - law.x_min).logpdf(tail)
    rival = tails.against_exponential(values, law)
    assert rival.ratio == approx(apart.sum(), rel=1e-9)
    assert rival.p_value == approx(2 * stats.norm.sf(abs(apart.sum()) / (apart.std() * math.sqrt(len(tail)))))


@pytest.mark.parametrize("values", [lognormal(400), np.random.default_rng(1).gamma(2, 1, 300)], ids=["log", "gamma"])
def test_against_the_lognormal_by_scipy(values: Floats) -> None:
    law = tails.fit_tail(values, 1.1)
    assert law is not None
    tail = values[values >= law.x_min]

    def cost(at: Floats) -> float:
        rival = stats.norm(at[0], math.exp(at[1]))
        return -float((rival.logpdf(np.log(tail)) - np.log(tail) - rival.logsf(math.log(law.x_min))).sum())

    best = min(minimize(cost, (m, s), method="Nelder-Mead", options={"maxiter": 400}).fun for m, s in ((0, 0), (-2, 1)))
    rival = tails.against_lognormal(values, law)
    assert rival.ratio == approx(likelihood(tail, law).sum() + best, rel=1e-4, abs=1e-3)
    assert rival.p_value == approx(0.5 * stats.chi2(1).sf(-2 * rival.ratio))


def test_a_true_power_law_is_not_beaten_and_others_are() -> None:
    def beaten(values: Floats, start: float) -> tuple[bool, bool]:
        law = tails.fit_tail(values, start)
        assert law is not None
        return tails.against_exponential(values, law).better(), tails.against_lognormal(values, law).better()

    true = np.array([beaten(pareto(2.5, 200, seed), 1e-9 + 1.0) for seed in range(100)])
    assert true[:, 0].sum() == 0
    assert true[:, 1].sum() <= 13, "5 of 100 by right, 13 once in a thousand times"
    assert all(beaten(np.random.default_rng(seed).exponential(1, 400), 0.2) == (True, True) for seed in range(10))
    assert all(beaten(lognormal(400, seed), 0.8)[1] for seed in range(10))


@pytest.mark.parametrize(
    "values",
    [np.linspace(1, 2, 24), np.r_[0.0, QUANTILES[:100]], np.full(80, 2.0), np.r_[QUANTILES[:100], np.inf]],
    ids=["few", "zero", "flat", "infinite"],
)
def test_there_is_no_law_without_a_slope(values: Floats) -> None:
    assert tails.fit_power_law(values) is None


def test_rounding_of_equal_values_is_no_slope() -> None:
    assert tails.fit_power_law(1 + 1e-5 * LADDER) is None
    assert np.isnan(tails.profile(1 + 1e-5 * LADDER, [1.0])[0]).all()
