"""Estimated errors of Ritz values: against exact eigenvalues, and as a function of values and residuals alone."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import diagonal, normal

from workbench.numerics.krylov import Krylov, lanczos
from workbench.numerics.ritz import estimated_errors

APART = np.r_[10.0, 6.0, 4.0, np.linspace(-0.5, 0.5, 300)]
TOLERANCE = 1e-3


def ended(seed: int, judged: str, tolerance: float = TOLERANCE) -> Krylov:
    """The end of a run for the first eigenvalue of a spectrum with three that stand apart."""
    start = normal(APART.size, seed)
    *_, last = lanczos(diagonal(APART), start, top=1, bottom=0, tolerance=tolerance, judged=judged)  # type: ignore[arg-type]
    return last


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), width=st.floats(1e-6, 0.3), scale=st.sampled_from([1e-3, 1.0, 1e4]))
def test_a_lone_eigenvalue_is_within_residual_squared_over_the_gap(seed: int, width: float, scale: float) -> None:
    """Rayleigh quotients of a tilted first eigenvector, beside the second eigenvalue, over ten orders of size."""
    exact = scale * APART
    rest = np.random.default_rng(seed).standard_normal(exact.size - 1)
    vector = np.r_[1.0, width * rest / np.linalg.norm(rest)]
    vector /= np.linalg.norm(vector)
    value = float(vector @ (exact * vector))
    residual = float(np.linalg.norm(exact * vector - value * vector))
    estimate = estimated_errors(np.array([value, exact[1]]), np.array([residual, 0.0]))[0]
    error = exact[0] - value
    assert error <= estimate * (1 + 1e-9) + 1e-12 * exact[0]
    assert estimate <= residual
    if width < 1e-3:
        assert estimate < 0.01 * residual


def test_without_a_gap_the_residual_stands() -> None:
    residuals = np.array([0.3, 0.1, 0.2])
    np.testing.assert_array_equal(estimated_errors(np.array([1.0, 0.9, 0.85]), residuals), residuals)
    np.testing.assert_array_equal(estimated_errors(np.array([2.0]), np.array([0.5])), [0.5])
    inner = estimated_errors(np.array([9.0, 5.0, 4.0]), np.array([0.1, 0.1, 0.1]))
    np.testing.assert_allclose(inner, [0.01 / 3.9, 0.01 / 0.9, 0.01 / 0.9])


def test_runs_judged_by_estimates_end_sooner_and_as_near_as_asked() -> None:
    pairs = [(ended(seed, "estimate"), ended(seed, "residual")) for seed in range(12)]
    saved = [slow.products - quick.products for quick, slow in pairs]
    assert min(saved) >= 0
    assert np.mean(saved) >= 1
    assert any(quick.top_residuals[0] > TOLERANCE * APART[0] for quick, _ in pairs)  # the bound says less, and is said
    for quick, _ in pairs:
        assert quick.done
        assert APART[0] - quick.top_values[0] <= TOLERANCE * APART[0]
        assert quick.top_estimates[0] <= TOLERANCE * APART[0]
