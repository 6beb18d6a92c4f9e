"""Two laws of batch noise: their closed forms, their fits to random matrices that obey them, their error bars."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.numerics.batch_noise import Additive, Law, Multiplicative, fit, inverse_size, mean_and_error


def test_a_batch_of_all_examples_has_no_noise_and_few_of_many_are_as_good_as_drawn_with_replacement() -> None:
    assert inverse_size([1, 5, 10], 10) == pytest.approx([0.9, 0.1, 0.0])
    assert inverse_size(7, 10**9) == pytest.approx(1 / 7, rel=1e-7)


def test_a_spike_of_a_symmetric_noise_matrix_moves_or_drowns() -> None:
    """Bulk radius 2: spike 2 is seen at 2.5, spike 0.5 drowns at 2, and a spike at the brink is seen at the edge."""
    assert [float(Additive(spike, 100).predict(0.01, 1.0)) for spike in (2.0, 0.5, 1.0)] == pytest.approx([2.5, 2, 2])


def test_a_spike_of_a_sample_covariance_moves_or_drowns() -> None:
    """γ = 1/2: spike 4 is seen at 4(1 + γ/3); one below 1 + √γ drowns at (1 + √γ)²."""
    seen = [float(Multiplicative(spike, 100).predict(1.0, 0.005)) for spike in (4.0, 1.5)]
    assert seen == pytest.approx([4.66666667, 2.91421356])


@given(st.sampled_from([Additive, Multiplicative]), *[st.floats(-2, 2)] * 3)
def test_inverting_what_is_predicted_gives_the_scale_back(kind: type[Law], largest: float, s: float, u: float) -> None:
    law, scale, inverse = kind(10**largest, 50), 10.0**s, 10.0**u
    if kind is Multiplicative and scale >= law.largest:
        return  # the other eigenvalues are the smaller ones
    assert float(law.invert(law.predict(scale, inverse), inverse)) == pytest.approx(scale, rel=1e-5)


def noisy(rng: np.random.Generator, size: int, spike: float, variance: float) -> float:
    """The largest eigenvalue of diag(spike, 0, ...) with independent noise of that variance."""
    noise = rng.standard_normal((size, size)) * np.sqrt(variance)
    matrix = np.triu(noise) + np.triu(noise, 1).T
    matrix[0, 0] += spike
    return float(np.linalg.eigvalsh(matrix)[-1])


def test_the_additive_law_finds_the_variance_of_gaussian_noise_above_and_below_the_brink() -> None:
    rng, size, variance = np.random.default_rng(0), 200, 0.015
    inverse = 1 / np.array([0.5, 2.0, 4.0, 16.0, 64.0])  # spike 1: the first two sizes drown it
    values = np.array([[noisy(rng, size, 1.0, variance * u) for _ in range(10)] for u in inverse])
    assert (variance * size * inverse > 1).sum() == 2
    found = fit(Additive(1.0, size), values, inverse)
    assert found.scale == pytest.approx(variance, rel=0.05)
    assert found.error < 0.05 * variance
    assert fit(Additive(1.0, size), values[2:], inverse[2:]).scale == pytest.approx(variance, rel=0.1)


def test_each_law_fits_its_own_matrices_better_than_the_other() -> None:
    rng, size, bulk, spike = np.random.default_rng(1), 300, 0.05, 0.5
    batches = np.array([10, 30, 100, 300])
    deviations = np.sqrt(np.r_[spike, np.full(size - 1, bulk)])
    samples = [[rng.standard_normal((b, size)) * deviations for _ in range(15)] for b in batches]
    values = np.array([[np.linalg.eigvalsh(x.T @ x / len(x))[-1] for x in row] for row in samples])
    own, other = (fit(law(spike, size), values, 1 / batches) for law in (Multiplicative, Additive))
    assert own.misfit < 2
    assert other.misfit > own.misfit
    assert own.scale == pytest.approx(bulk, abs=4 * own.error)


def test_the_standard_error_covers_the_scale_though_not_all_batches_are_equally_noisy() -> None:
    """Batches whose noise grows with 1/b, some not measured: 95 % intervals hold the truth in 90 % of runs at least."""
    rng, inverse, law = np.random.default_rng(2), 1 / np.array([8.0, 16.0, 40.0, 90.0]), Additive(5.0, 30)
    truth, inside = 0.4, 0
    for _ in range(300):
        values = law.predict(truth, inverse)[:, None] + rng.standard_normal((4, 10)) * np.sqrt(inverse)[:, None]
        values[rng.random((4, 10)) < 0.1] = np.nan
        found = fit(law, values, inverse)
        inside += abs(found.scale - truth) < 1.96 * found.error
    assert inside >= 270


def test_means_know_what_was_measured() -> None:
    mean, error = mean_and_error(np.array([[1.0, 3.0, np.nan], [np.nan] * 3, [2.0, np.nan, np.nan]]))
    assert mean == pytest.approx([2.0, np.nan, 2.0], nan_ok=True)
    assert error == pytest.approx([1.0, np.nan, np.nan], nan_ok=True)
    assert np.isnan(fit(Additive(1.0, 3), [[np.nan]], [0.5]).scale)
