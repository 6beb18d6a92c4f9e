"""Noise scales from sums: sets of gradients whose values are known, plain leaving-out, and intervals that cover."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.numerics.noise_scale import NoiseSums

FOUR = np.array([[2.0, 0.0], [2.0, 2.0], [0.0, 0.0], [4.0, 2.0]])


def sums(rows: np.ndarray, batch: int = 1) -> NoiseSums:
    """One part only."""
    mean = rows.mean(0)
    return NoiseSums((rows**2).sum(1)[:, None], (rows @ mean)[:, None], np.array([mean @ mean]), len(rows), batch)


@pytest.mark.parametrize(
    ("rows", "trace", "square"), [(np.array([[1.0, 0.0], [1.0, 2.0]]), 2.0, 1.0), (FOUR, 4.0, 4.0)]
)
def test_small_sets_of_gradients(rows: np.ndarray, trace: float, square: float) -> None:
    found = sums(rows).estimate()
    assert found.trace == pytest.approx([trace])
    assert found.square == pytest.approx([square])
    assert found.snr == pytest.approx([square / trace])


def test_the_mean_over_all_ways_of_batching_is_that_of_the_examples() -> None:
    """Four gradients make three pairs of pairs; both parts are unbiased, so their means agree with the examples'."""
    ways = [((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2))]
    found = [sums(np.array([FOUR[list(pair)].mean(0) for pair in way]), batch=2).estimate() for way in ways]
    assert np.mean([f.trace[0] for f in found]) == pytest.approx(4.0)
    assert np.mean([f.square[0] for f in found]) == pytest.approx(4.0)


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 9), st.integers(1, 4), st.integers(1, 5), st.integers(0, 10**6))
def test_the_interval_is_that_of_leaving_one_out(count: int, size: int, batch: int, seed: int) -> None:
    from scipy import stats

    rows = np.random.default_rng(seed).normal(1.0, 1.0, (count, size))

    def plain(g: np.ndarray) -> np.ndarray:
        trace = g.var(axis=0, ddof=1).sum()
        square = (g.mean(0) ** 2).sum() - trace / len(g)
        return np.array([trace * batch, square, square / (trace * batch)])

    found = sums(rows, batch).estimate()
    without = np.array([plain(np.delete(rows, i, axis=0)) for i in range(count)]) if count > 2 else None
    spread = np.sqrt((count - 1) / count * ((without - without.mean(0)) ** 2).sum(0))
    assert found.value[:, 0] == pytest.approx(plain(rows))
    assert found.error[:, 0] == pytest.approx(spread * stats.t.ppf(0.975, count - 1), rel=1e-6)


def test_intervals_cover_the_truth_and_say_when_it_is_out_of_reach() -> None:
    """x ~ N(0, I_d) and ½(w·x)²: the noise scale is d + 1; w tiny against label noise: nothing can be resolved."""
    d, inside, undefined = 5, 0, 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(400, d))
        value, low, high = sums(x * x[:, :1]).estimate().scale()
        inside += bool(low[0] <= d + 1 <= high[0])
        assert np.isfinite(value[0])
        lost = sums(rng.normal(size=(40, d))).estimate()
        undefined += not lost.resolved[0]
        assert np.isnan(lost.scale()[0][0]) == (not lost.resolved[0])
    assert 0.88 <= inside / 200 <= 0.99
    assert undefined / 200 > 0.9


def test_equal_gradients_have_no_noise_and_no_scale() -> None:
    found = sums(np.ones((5, 3))).estimate()
    assert found.trace == pytest.approx([0.0], abs=1e-12)
    assert found.square == pytest.approx([3.0])
    for part, other in itertools.pairwise(found.scale()):
        assert part.shape == other.shape
