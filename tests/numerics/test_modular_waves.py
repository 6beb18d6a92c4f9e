"""Waves and parallelograms over tokens: against an explicit basis, plain loops, and the definitions' own numbers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.numerics.modular import (
    effective_hessian,
    frequency_power,
    gini,
    grokking_rate,
    holding,
    parallelograms,
    standardised,
)

vectors = st.tuples(st.integers(2, 13), st.integers(1, 4), st.integers(0, 999)).map(
    lambda t: np.random.default_rng(t[2]).normal(size=t[:2])
)


@given(vectors)
def test_powers_are_those_of_an_explicit_orthonormal_basis_and_add_up(rows: np.ndarray) -> None:
    p, at = len(rows), np.arange(len(rows))
    power = frequency_power(rows)
    for k in range(1, p // 2 + 1):
        waves = [f(2 * np.pi * k * at / p) for f in (np.cos, np.sin)]
        units = [w / np.linalg.norm(w) for w in waves if np.linalg.norm(w) > 1e-9]
        assert power[k - 1] == pytest.approx(sum(np.sum((u @ rows) ** 2) for u in units))
    assert power.sum() == pytest.approx(np.sum((rows - rows.mean(0)) ** 2))


@pytest.mark.parametrize("k", [1, 17, 56])
def test_one_circle_is_one_frequency(k: int) -> None:
    turn = 2 * np.pi * k * np.arange(113) / 113
    power = frequency_power(np.stack([np.cos(turn), np.sin(turn)], 1))
    assert gini(power) == pytest.approx(0.98214286, abs=1e-8)
    assert holding(power, 0.95) == (k,)


def test_gini_by_hand() -> None:
    assert gini([1, 2, 3, 4]) == pytest.approx(0.25)
    assert gini([5, 5, 5]) == pytest.approx(0)
    assert math.isnan(gini([0, 0]))
    assert math.isnan(gini([1, math.nan]))


@given(st.lists(st.floats(0, 100), min_size=2, max_size=9).filter(lambda x: sum(x) > 1e-3), st.floats(0.01, 100))
def test_gini_is_half_the_mean_difference_over_the_mean_in_any_unit_and_order(values: list[float], unit: float) -> None:
    n = len(values)
    wanted = sum(abs(a - b) for a in values for b in values) / (2 * n * sum(values))
    assert gini(values) == pytest.approx(wanted, abs=1e-9)
    assert gini([unit * v for v in reversed(values)]) == pytest.approx(wanted, abs=1e-9)


def test_the_fewest_frequencies_that_hold_a_share() -> None:
    assert holding([1.0, 5.0, 3.0, 1.0], 0.8) == (2, 3)
    assert holding([1.0, 5.0, 3.0, 1.0], 1.0) == (2, 3, 1, 4)
    assert holding([math.nan, 1.0], 0.5) == ()


def test_a_line_closes_all_parallelograms_and_a_parabola_few() -> None:
    line, parabola = np.arange(10.0)[:, None], np.arange(10.0)[:, None] ** 2
    assert parallelograms(standardised(line), 0.01) == (70, 70)
    assert parallelograms(standardised(parabola), 0.01) == (8, 70)


@given(vectors, st.floats(0.01, 3.0), st.booleans())
def test_parallelograms_are_counted_as_by_plain_loops(rows: np.ndarray, tolerance: float, modulus: bool) -> None:
    p, held, total = len(rows), 0, 0
    pairs = list(itertools.combinations_with_replacement(range(p), 2))
    for (i, n), (j, m) in itertools.combinations(pairs, 2):
        if (i + n - j - m) % p == 0 if modulus else i + n == j + m:
            total += 1
            held += bool(np.mean((rows[i] + rows[n] - rows[j] - rows[m]) ** 2) < tolerance)
    assert parallelograms(rows, tolerance, modulus) == (held, total)


def test_dims_that_do_not_vary_are_left_out() -> None:
    rows = np.array([[1.0, 5.0, 2.0], [3.0, 5.0, 2.5], [5.0, 5.0, 3.0]])
    assert standardised(rows) == pytest.approx(np.array([[-1.0, -1.0], [0, 0], [1, 1]]))
    with pytest.raises(ValueError, match="two tokens"):
        frequency_power(rows[:1])


# ------------------------------------------------------------------------------------------------ the effective loss


@given(st.integers(3, 9), st.integers(0, 999), st.floats(0.2, 1.0))
def test_the_effective_hessian_is_that_of_a_plain_sum_over_parallelograms(p: int, seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    chosen = [(i, j) for i in range(p) for j in range(p) if rng.random() < share]
    unordered = sorted({(min(pair), max(pair)) for pair in chosen})
    each = [(a, b) for a, b in itertools.combinations(unordered, 2) if sum(a) == sum(b)]
    found = effective_hessian(chosen, p)
    if not each:
        assert np.isnan(found).all()
        return
    x, e = rng.normal(size=p), np.eye(p)

    def loss(y: np.ndarray) -> float:
        return sum((y[i] + y[j] - y[m] - y[n]) ** 2 for (i, j), (m, n) in each) / len(each)

    assert x @ found @ x / 2 == pytest.approx(loss(x), abs=1e-12)
    mixed = [[(loss(a + b) - loss(a - b)) / 2 for b in e] for a in e]  # exact for a quadratic form
    assert found == pytest.approx(np.array(mixed), abs=1e-9)
    assert found @ np.ones(p) == pytest.approx(0, abs=1e-9)
    assert found @ np.arange(p) == pytest.approx(0, abs=1e-9)


def test_the_rate_of_three_tokens_is_known_and_one_pair_too_few_leaves_none() -> None:
    """The one parallelogram 0 + 2 = 1 + 1 gives H = 2 a aᵀ with a = (1, -2, 1), of eigenvalue 12."""
    line = np.array([[0.0, 1], [1, 1], [2, 1]])
    assert grokking_rate([(0, 2), (1, 1)], line) == pytest.approx(12 / 8)
    assert grokking_rate([(0, 2), (1, 1), (2, 0), (0, 1)], 2 * line) == pytest.approx(12 / 32)
    assert math.isnan(grokking_rate([(0, 2), (0, 1)], line))
    assert grokking_rate([(0, 2), (1, 1)], np.vstack([line, [[3.0, 1]]])) == 0, "token 3 lies wherever it lies"
    assert math.isnan(grokking_rate([(0, 2), (1, 1)], line * np.nan))


def test_gradient_descent_on_the_effective_loss_takes_vectors_to_a_line_at_this_rate() -> None:
    p, rng = 6, np.random.default_rng(4)
    chosen = [pair for pair in itertools.combinations_with_replacement(range(p), 2) if rng.random() < 0.8]
    x = np.column_stack([np.arange(p) + 0.05 * rng.normal(size=p), 0.05 * rng.normal(size=p)])
    each = [(a, b) for a, b in itertools.combinations(chosen, 2) if sum(a) == sum(b)]
    size, far = float((x**2).sum()), []
    rate = grokking_rate(chosen, x)
    line = np.column_stack([np.ones(p), np.arange(p)])
    for _ in range(4000):
        slope = np.zeros_like(x)
        for (i, j), (m, n) in each:
            gap = x[i] + x[j] - x[m] - x[n]
            for k, sign in ((i, 1), (j, 1), (m, -1), (n, -1)):
                slope[k] += sign * 2 * gap / (len(each) * size)
        x = x - 0.5 * slope
        far.append(np.linalg.norm(x - line @ np.linalg.lstsq(line, x, rcond=None)[0]))
    late = np.log(far[1999] / far[3999]) / (2000 * 0.5)
    assert rate > 0
    assert late == pytest.approx(rate, rel=0.02)
