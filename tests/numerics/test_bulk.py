"""Random matrices whose edges and outliers are known by formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import Floats, fresh, normal

from workbench.numerics.bulk import (
    bulk_of_run,
    fit_bulk,
    gap_count,
    marchenko_pastur_quantile,
    semicircle_quantile,
    tail_count,
)
from workbench.numerics.krylov import Krylov, lanczos
from workbench.numerics.operator import Matrix
from workbench.numerics.quadrature import Quadrature, gauss

MIDDLES = (np.arange(20_000) + 0.5) / 20_000


def run(matrix: Floats, seed: int) -> Krylov:
    operator = Matrix(torch.from_numpy(matrix))
    words = {"top": 6, "bottom": 1, "least": 30, "fresh": fresh(operator.size, seed)}
    return list(lanczos(operator, normal(operator.size, seed), **words))[-1]


def covariance(samples: int, size: int, spike: float, seed: int) -> Floats:
    """XᵀX/N with variance ``spike`` along one direction and 1 along the others."""
    rows = np.random.default_rng(seed).normal(size=(samples, size))
    rows[:, 0] *= math.sqrt(spike)
    return rows.T @ rows / samples


def wigner(size: int, spike: float, seed: int) -> Floats:
    """A symmetric matrix of noise with spectrum [-2, 2], and a spike along one direction."""
    noise = np.random.default_rng(seed).normal(size=(size, size))
    noise = (noise + noise.T) / math.sqrt(2 * size)
    noise[0, 0] += spike
    return noise


@pytest.mark.parametrize("ratio", [0.05, 0.5, 1.0, 3.0])
def test_marchenko_pastur_quantiles_have_its_moments(ratio: float) -> None:
    x = marchenko_pastur_quantile(MIDDLES, ratio)
    wanted = [1, 1 + ratio, 1 + 3 * ratio + ratio**2]
    assert [float((x**k).mean()) for k in (1, 2, 3)] == pytest.approx(wanted, rel=2e-3)
    assert x.max() <= (1 + math.sqrt(ratio)) ** 2
    assert (x == 0).mean() == pytest.approx(max(0, 1 - 1 / ratio), abs=2e-3)
    assert np.all(np.diff(x) >= 0)


def test_semicircle_quantiles_have_its_moments() -> None:
    x = semicircle_quantile(MIDDLES)
    assert [float((x**k).mean()) for k in (1, 2, 4, 6)] == pytest.approx([0, 1 / 4, 1 / 8, 5 / 64], abs=2e-4)


def test_a_spike_above_the_threshold_is_the_one_outlier_of_a_sample_covariance() -> None:
    edge, spike = (1 + math.sqrt(0.5)) ** 2, 4 * (1 + 0.5 / 3)
    for seed in range(3):
        state = run(covariance(1200, 600, 4.0, seed), seed)
        bulk, error = bulk_of_run(state.alpha, state.beta, 600)
        assert bulk is not None
        assert bulk.law == "Marchenko-Pastur"
        assert bulk.edge == pytest.approx(edge, abs=1.5 * error)
        assert error < 0.2 * edge
        assert bulk.misfit < 0.1
        assert (state.top_values > bulk.edge + error).sum() == 1
        assert state.top_values[0] == pytest.approx(spike, rel=0.1)
        assert gap_count(state.top_values)[0] == 1
        tail, off = tail_count(gauss(state.alpha, state.beta), bulk.edge, 600)
        assert abs(tail - (np.linalg.eigvalsh(covariance(1200, 600, 4.0, seed)) > bulk.edge).sum()) <= off


def test_a_spike_below_the_threshold_leaves_no_outlier() -> None:
    for seed in range(3):  # 1.4 < 1 + √0.5
        state = run(covariance(1200, 600, 1.4, seed), seed)
        bulk, error = bulk_of_run(state.alpha, state.beta, 600)
        assert bulk is not None
        assert (state.top_values > bulk.edge + error).sum() == 0


@pytest.mark.parametrize(("spike", "count"), [(2.0, 1), (0.5, 0)])
def test_spiked_wigner(spike: float, count: int) -> None:
    state = run(wigner(600, spike, 1), 1)
    bulk, error = bulk_of_run(state.alpha, state.beta, 600)
    assert bulk is not None
    assert bulk.law == "semicircle"
    assert bulk.edge == pytest.approx(2, abs=1.5 * error)
    assert (state.top_values > bulk.edge + error).sum() == count
    if count:
        assert state.top_values[0] == pytest.approx(2.5, rel=0.05)
        assert gap_count(state.top_values) == (1, pytest.approx(2.5 / 2, rel=0.1))


def test_the_edge_s_error_covers_it() -> None:
    covered = 0
    for seed in range(30):
        state = run(covariance(400, 200, 1.0, seed), seed)
        bulk, error = bulk_of_run(state.alpha, state.beta, 200)
        covered += bulk is not None and abs(bulk.edge - (1 + math.sqrt(0.5)) ** 2) <= error
    assert covered >= 27


@settings(max_examples=30)
@given(st.floats(1e-6, 1e6), st.integers(0, 5))
def test_a_bulk_scales_with_its_spectrum(scale: float, seed: int) -> None:
    values = np.sort(np.random.default_rng(seed).gamma(2.0, size=40))
    plain = fit_bulk(Quadrature(values, np.full(40, 1 / 40)))
    scaled = fit_bulk(Quadrature(scale * values, np.full(40, 1 / 40)))
    assert plain is not None
    assert scaled is not None
    assert scaled.law == plain.law
    assert scaled.edge == pytest.approx(scale * plain.edge, rel=1e-6)
    assert scaled.misfit == pytest.approx(plain.misfit, rel=1e-5)


def test_no_law_is_fitted_to_too_little() -> None:
    assert fit_bulk(Quadrature(np.arange(3.0), np.full(3, 1 / 3))) is None
    assert fit_bulk(Quadrature(np.ones(9), np.full(9, 1 / 9))) is None
    assert bulk_of_run([1.0], [0.5], 10) == (None, pytest.approx(math.nan, nan_ok=True))


@pytest.mark.parametrize(
    ("values", "most", "wanted"),
    [
        ([8, 7, 6, 1, 0.9], None, (3, 6)),
        ([8, 7, 6, 1, 0.01], 3, (3, 6)),  # the gap behind the fourth is not looked at
        ([8, 7, 6, 1, 0.01], None, (4, 100)),
        ([0.75, 0.75, 0.25, 0.25, 1e-17, -1e-17], None, (4, 0.25 / 0.75e-12)),  # zeros but for rounding
        ([3, 2, -1, -1e9], None, (1, 1.5)),  # a change of sign is no gap
    ],
)
def test_gaps(values: list[float], most: int | None, wanted: tuple[int, float]) -> None:
    assert gap_count(values, most, floor=1e-12) == (wanted[0], pytest.approx(wanted[1]))


@pytest.mark.parametrize("values", [[], [5.0], [-1.0, -2.0], [0.0, 0.0], [5.0, -1.0]])
def test_no_gap_without_two_positive_values(values: list[float]) -> None:
    count, ratio = gap_count(values, floor=1e-12)
    assert (count, math.isnan(ratio)) == (0, True)
