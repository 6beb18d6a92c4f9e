"""Predicted risks against closed forms, published numbers and simulated regressions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.numerics.eigenframework import features_risk, kernel_risk

FLAT, SHARES = np.ones(10), np.full(10, 0.1)
FALLING = np.arange(1, 1001) ** -1.5


@pytest.mark.parametrize(("noise", "test"), [(0.0, 0.6), (1.0, 2.26666667)])
def test_a_flat_spectrum(noise: float, test: float) -> None:
    found = kernel_risk(FLAT, SHARES, 4, 0.0, noise)
    assert (found.kappa, found.overfitting, found.test) == pytest.approx((1.5, 5 / 3, test))
    assert found.train == 0


def test_numbers_with_ridge_and_of_random_features() -> None:
    found = kernel_risk(FLAT, SHARES, 4, 1.0, 0.25)
    assert (found.kappa, found.test, found.train) == pytest.approx((1.88278222, 0.96765196, 0.01706079), rel=1e-6)
    assert kernel_risk(FALLING, FALLING, 100, 0.01, 0.5).test == pytest.approx(1.09424557)
    few = features_risk(FALLING, FALLING, 100, 200, 0.01, 0.5)
    assert (few.kappa, few.test) == pytest.approx((0.00161890, 1.65826918), rel=1e-5)
    assert features_risk(FALLING, FALLING, 100, 1e7, 0.01, 0.5).test == pytest.approx(1.09425239)


def test_many_random_features_are_the_kernel() -> None:
    gaps = [
        features_risk(FALLING, FALLING, 50, k, 0.01).test - kernel_risk(FALLING, FALLING, 50, 0.01).test
        for k in (1e3, 1e4, 1e5)
    ]
    assert 0 < gaps[2] < gaps[1] < gaps[0]
    assert gaps[1] / gaps[2] == pytest.approx(10, rel=0.05)
    with pytest.raises(ValueError, match="ridge above 0"):
        features_risk(FLAT, SHARES, 4, 8, 0.0)
    with pytest.raises(ValueError, match="not all 0"):
        kernel_risk(np.zeros(3), np.ones(3), 2, 0.1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-6, 10), min_size=2, max_size=30), st.integers(1, 40), st.floats(1e-6, 10))
def test_modes_compete_for_examples(values: list[float], n: int, ridge: float) -> None:
    lam = np.array(values)
    found = kernel_risk(lam, lam, n, ridge)
    assert found.learnability.sum() + ridge / found.kappa == pytest.approx(n, rel=1e-9)
    assert found.learnability.sum() <= n
    assert 0 < found.train <= found.test
    assert kernel_risk(lam, lam, n, ridge, 1.0).test == pytest.approx(found.test + found.overfitting)


def test_more_examples_than_modes_learn_everything() -> None:
    found = kernel_risk(FLAT, SHARES, 25, 0.0, 1.0)
    assert found.kappa == 0
    assert found.test == pytest.approx(25 / 15)  # ordinary least squares in theory: n / (n - m)
    assert math.isinf(kernel_risk(FLAT, SHARES, 10, 0.0, 1.0).test)


def test_regression_on_gaussian_features_does_it() -> None:
    """Ridge on x ~ N(0, diag λ) with f* = w·x: its kernel's eigenvalues are λ and v_i² = λ_i w_i²."""
    rng = np.random.default_rng(0)
    lam, n, ridge, noise = np.arange(1, 61) ** -1.2, 30, 0.3, 0.2
    w = rng.standard_normal(60)
    wanted, tests, trains = kernel_risk(lam, lam * w**2, n, ridge, noise), list[float](), list[float]()
    for _ in range(300):
        x = rng.standard_normal((n, 60)) * np.sqrt(lam)
        y = x @ w + math.sqrt(noise) * rng.standard_normal(n)
        found = x.T @ np.linalg.solve(x @ x.T + ridge * np.eye(n), y)
        tests.append(float((lam * (found - w) ** 2).sum()) + noise)
        trains.append(float(((x @ found - y) ** 2).mean()))
    for many, value in ((tests, wanted.test), (trains, wanted.train)):
        assert value == pytest.approx(np.mean(many), rel=0.03, abs=4 * np.std(many) / math.sqrt(300))
