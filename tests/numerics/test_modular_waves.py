"""Waves and parallelograms over tokens: against an explicit basis, plain loops, and the definitions' own numbers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.numerics.modular import frequency_power, gini, holding, parallelograms, standardised

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
