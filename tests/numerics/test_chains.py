"""Diagnostics of chains against autoregressive processes, whose correlation times are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import lfilter

from workbench.numerics.chains import Diagnosis, blocked, effective_sample_size, split_rhat


def autoregressive(rho: float, chains: int, draws: int, seed: int = 0) -> np.ndarray:
    """x_t = ρ x_(t-1) + √(1 - ρ²) ξ, stationary from its first draw."""
    rng = np.random.default_rng(seed)
    noise = math.sqrt(1 - rho**2) * rng.standard_normal((chains, draws))
    noise[:, 0] /= math.sqrt(1 - rho**2)
    return np.asarray(lfilter([1.0], [1.0, -rho], noise, axis=1))


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9, 0.97, -0.4])
def test_effective_draws_of_autoregressive_chains(rho: float) -> None:
    found = np.mean([effective_sample_size(autoregressive(rho, 4, 4000, seed)) for seed in range(10)])
    assert found == pytest.approx(16_000 * (1 - rho) / (1 + rho), rel=0.1)


@given(st.floats(-0.9, 0.95), st.integers(0, 1000), st.floats(0.01, 100), st.floats(-1e3, 1e3))
@settings(max_examples=25, deadline=None)
def test_neither_unit_nor_origin_nor_order_of_chains_matters(rho: float, seed: int, scale: float, shift: float) -> None:
    draws = autoregressive(rho, 3, 200, seed)
    for diagnose in (split_rhat, effective_sample_size):
        assert diagnose(scale * draws[::-1] + shift) == pytest.approx(diagnose(draws), rel=1e-6)


def test_split_rhat_by_hand() -> None:
    halves = np.array([[1.0, 2.0], [2.0, 4.0], [3.0, 7.0], [0.0, 1.0]])  # chains (1, 2, 3, 7) and (2, 4, 0, 1)
    within = np.mean([0.5, 2.0, 8.0, 0.5])
    between = np.var([1.5, 3.0, 5.0, 0.5], ddof=1)
    assert split_rhat([[*halves[0], *halves[2]], [*halves[1], *halves[3]]]) == pytest.approx(
        math.sqrt((within / 2 + between) / within)
    )


def test_drift_and_disagreement_are_seen() -> None:
    draws = autoregressive(0.5, 4, 1000)
    assert split_rhat(draws) < 1.02
    drifting = draws + np.linspace(0, 4, 1000)
    apart = draws + np.arange(4)[:, None]
    for bad in (drifting, apart):
        assert split_rhat(bad) > 1.3
        assert effective_sample_size(bad) < 40 < effective_sample_size(draws)


def test_what_cannot_be_said_is_nan() -> None:
    broken = np.ones((2, 10))
    broken[1, 3] = np.nan
    for draws in (np.ones((4, 3)), broken):
        assert math.isnan(split_rhat(draws))
        assert math.isnan(effective_sample_size(draws))
    assert split_rhat(np.ones((2, 10))) == 1.0
    with pytest.raises(ValueError, match=r"\(chains, draws\)"):
        split_rhat(np.ones(10))


def test_noise_on_single_draws_does_not_hide_a_drift() -> None:
    rng = np.random.default_rng(0)
    drifting = np.linspace(0, 1, 400) + rng.normal(0, 1.0, (4, 400))
    assert split_rhat(drifting) < 1.1, "single draws do not show it"
    found = Diagnosis.of(drifting)
    assert found.rhat > 1.1
    assert found.effective < 0.9 * effective_sample_size(drifting)


@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_standard_errors_cover(rho: float) -> None:
    found = [Diagnosis.of(autoregressive(rho, 4, 600, seed)) for seed in range(200)]
    inside = [abs(one.mean) < 2 * one.error for one in found]
    assert np.mean(inside) > 0.93
    assert np.mean([one.error for one in found]) < 1.5 * math.sqrt((1 + rho) / (1 - rho) / 2400)


def test_diagnosis_of_little() -> None:
    nothing = Diagnosis.of(np.empty((3, 0)))
    assert np.isnan([nothing.mean, nothing.error, nothing.rhat, nothing.effective, *nothing.each]).all()
    few = Diagnosis.of(np.array([[1.0, 2.0, 4.0]]))
    assert few.mean == pytest.approx(7 / 3)
    assert math.isnan(few.error)
    same = Diagnosis.of(np.ones((2, 100)))
    assert (same.mean, same.error, same.rhat) == (1.0, 0.0, 1.0)
    assert blocked(np.arange(7.0)[None], 3).tolist() == [[1.5, 3.5, 5.5]]
