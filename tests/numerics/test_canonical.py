"""Canonical correlations and Procrustes against covariance matrices, scipy and scikit-learn, and by their laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx
from scipy.linalg import eigh, orthogonal_procrustes
from scipy.spatial import procrustes
from sklearn.cross_decomposition import CCA

from workbench.numerics.canonical import Measure, Reduced, compare
from workbench.numerics.similarity import Estimate

Array = np.ndarray


def draws(seed: int, n: int, *widths: int) -> list[Array]:
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(n, 2))
    return [rng.normal(size=(n, d)) + common @ rng.normal(size=(2, d)) + 3 for d in widths]


def published() -> tuple[Array, Array]:
    rng = np.random.RandomState(1337)
    x = rng.randn(100, 10)
    return x, rng.randn(100, 10) + x


def estimate(one: list[Array], two: list[Array], measure: Measure, variance: float = 1.0) -> Estimate:
    share = 1.0 if measure == "procrustes" else variance
    sides = [[Reduced.of(torch.as_tensor(rows), share) for rows in side] for side in (one, two)]
    found = list(compare(*sides, measure))
    assert [done for done, _ in found] == sorted(done for done, _ in found)
    assert found[-1][0] == approx(1)
    return found[-1][1]


def value(one: Array, two: Array, measure: Measure, variance: float = 1.0) -> float:
    return float(estimate([one], [two], measure, variance).value.item())


# ------------------------------------------------------------------------ oracles


def by_covariances(x: Array, y: Array) -> tuple[Array, Array]:
    """Canonical correlations, and Σ_j |⟨h_i, x_j⟩| of each: roots of covariances, nothing decomposed but these."""
    x, y = x - x.mean(0), y - y.mean(0)
    roots = []
    for rows in (x, y):
        values, axes = eigh(rows.T @ rows)
        roots.append(axes @ np.diag(values**-0.5) @ axes.T)
    left, rho, _ = np.linalg.svd(roots[0] @ x.T @ y @ roots[1], full_matrices=False)
    return rho, np.abs((x @ roots[0] @ left).T @ x).sum(1)


@pytest.mark.parametrize("widths", [(4, 6), (6, 4), (5, 5)])
def test_canonical_correlations_equal_those_of_covariances(widths: tuple[int, int]) -> None:
    x, y = draws(0, 80, *widths)
    rho, weights = by_covariances(x, y)
    assert len(rho) == min(widths)
    assert value(x, y, "svcca") == approx(rho.mean(), rel=1e-10)
    assert value(x, y, "pwcca") == approx((weights * rho).sum() / weights.sum(), rel=1e-10)


def test_canonical_correlations_equal_those_of_another_library() -> None:
    x, y = draws(1, 60, 3, 4)
    ours = CCA(n_components=3, max_iter=5000, tol=1e-12)
    variates = ours.fit_transform(x, y)
    rho = [np.corrcoef(a, b)[0, 1] for a, b in zip(variates[0].T, variates[1].T, strict=True)]
    assert value(x, y, "svcca") == approx(np.mean(rho), abs=1e-6)


def test_published_values() -> None:
    assert value(*published(), "svcca", 0.99) == approx(0.73101396, abs=1e-8)
    square = np.array([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    assert 2 - 2 * value(square, square[:, :1], "procrustes") == approx(2 - 2**0.5, abs=1e-12)


@pytest.mark.parametrize("widths", [(5, 5), (3, 6)])
def test_procrustes_equals_the_distance_after_the_best_rotation(widths: tuple[int, int]) -> None:
    x, y = draws(2, 30, *widths)
    unit = [(rows - rows.mean(0)) / np.linalg.norm(rows - rows.mean(0)) for rows in (x, y)]
    padded = [np.pad(rows, ((0, 0), (0, max(widths) - rows.shape[1]))) for rows in unit]
    turn, _ = orthogonal_procrustes(padded[1], padded[0])
    found = value(x, y, "procrustes")
    assert 2 - 2 * found == approx(((padded[0] - padded[1] @ turn) ** 2).sum(), rel=1e-10)
    assert 1 - found**2 == approx(procrustes(*padded)[2], rel=1e-10), "scipy's also scales the second"


def test_only_the_directions_that_carry_the_share_of_squared_values_count() -> None:
    """Singular values 3, 2 and 1: 13/14 of the squares lie in two of them, 5/6 of the plain sum."""
    rng = np.random.default_rng(3)
    flat = rng.normal(size=(40, 3))
    left = np.linalg.qr(flat - flat.mean(0))[0]
    x = left * [3, 2, 1] @ np.linalg.qr(rng.normal(size=(3, 3)))[0]
    for share, kept in ((0.6, 1), (0.65, 2), (0.92, 2), (13 / 14, 2), (0.93, 3), (1.0, 3)):
        assert Reduced.of(torch.from_numpy(x), share).rows.shape[1] == kept
    y = left[:, 2:]  # all of it in the direction that a share of 0.9 leaves out
    assert value(x, y, "svcca", 0.9) == approx(0, abs=1e-12)
    assert value(x, y, "svcca", 1.0) == approx(1)


# ------------------------------------------------------------------------- errors


@pytest.mark.parametrize("measure", ["svcca", "pwcca", "procrustes"])
def test_errors_come_from_a_tenth_left_out_at_a_time(measure: Measure) -> None:
    x, y = draws(4, 45, 3, 5)
    again = np.array([value(*(np.delete(r, np.s_[g::10], 0) for r in (x, y)), measure) for g in range(10)])
    found = estimate([x], [y], measure)
    np.testing.assert_allclose(found.replicates[:, 0, 0], again, rtol=1e-9)
    assert found.error.item() == approx(np.sqrt(9 * again.var()), rel=1e-8)


@pytest.mark.parametrize("measure", ["svcca", "procrustes"])
def test_the_error_is_as_large_as_the_spread_of_other_examples(measure: Measure) -> None:
    """Where no correlation is near 0; there |ρ| has a kink, and the jackknife says up to a third too much."""
    rng = np.random.default_rng(5)

    def sample() -> Estimate:
        hidden, more = rng.normal(size=(2, 100, 3))
        return estimate([hidden], [hidden * [2, 1, 1] + 0.7 * more], measure)

    found = [sample() for _ in range(200)]
    spread = np.std([f.value.item() for f in found])
    assert np.sqrt(np.mean([f.error.item() ** 2 for f in found])) / spread == approx(1, abs=0.15)


# --------------------------------------------------------------------------- laws


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3))
def test_what_each_forgives(seed: int, scale: float) -> None:
    x, y = draws(seed, 50, 4, 6)
    rng = np.random.default_rng(seed)
    turned = scale * x @ np.linalg.qr(rng.normal(size=(4, 4)))[0] + scale * rng.normal(size=4)
    skewed = x @ (np.eye(4) + 0.3 * np.triu(rng.normal(size=(4, 4)), 1)) * [1, 2, 3, 4]
    for measure in ("svcca", "pwcca", "procrustes"):
        assert value(turned, x, measure) == approx(1, abs=1e-9)
    for measure in ("svcca", "procrustes"):
        assert value(turned, y, measure) == approx(value(x, y, measure), abs=1e-9)
        assert value(y, x, measure) == approx(value(x, y, measure), abs=1e-9)
        assert 0 <= value(x, y, measure) < 1
    assert value(skewed, y, "svcca") == approx(value(x, y, "svcca"), abs=1e-8)
    assert value(skewed, x, "procrustes") < 0.999


def test_fewer_examples_than_features_make_all_correlations_one() -> None:
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(2, 20, 30))
    assert value(x, y, "svcca") == approx(1)
    assert value(x, y, "procrustes") < 0.95


def test_constant_features_and_nan_are_unknown() -> None:
    x, y = draws(7, 40, 3, 4)
    spoilt = x.copy()
    spoilt[0, 0] = np.nan
    far = (1e4 + np.zeros((40, 3))).astype(np.float32) * np.float32(1.1)
    for measure in ("svcca", "pwcca", "procrustes"):
        found = estimate([x, spoilt, np.full((40, 2), 0.1), far], [y], measure)
        assert np.isfinite(found.value[0])
        assert np.isfinite(found.error[0])
        assert np.isnan(found.value[1:]).all()


def test_too_few_examples_for_ten_groups_have_no_error() -> None:
    found = estimate(*([rows] for rows in draws(8, 19, 2, 3)), "svcca")
    assert np.isfinite(found.value).all()
    assert np.isnan(found.error).all()


def test_a_copied_feature_adds_no_direction() -> None:
    x, y = draws(9, 60, 3, 4)
    doubled = np.c_[x, x[:, :1]].astype(np.float32)
    assert Reduced.of(torch.from_numpy(doubled)).rows.shape[1] == 3
    assert value(doubled, y, "svcca") == approx(value(x, y, "svcca"), abs=1e-5)
