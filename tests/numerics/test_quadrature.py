"""Spectral densities against measures known beforehand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance
from spectra import D4, Floats, clustered, diagonal, marchenko_pastur, normal

from workbench.numerics import quadrature as q
from workbench.numerics.krylov import lanczos
from workbench.numerics.operator import Operator


def run(operator: Operator, steps: int, seed: int) -> tuple[Floats, Floats]:
    """The tridiagonal matrix of one random start."""
    *_, state = lanczos(operator, normal(operator.size, seed), tolerance=1e-14, limit=steps, basis=max(steps, 15))
    return state.alpha, state.beta


def exact(eigenvalues: Floats) -> q.Quadrature:
    return q.Quadrature(np.sort(eigenvalues), np.full(len(eigenvalues), 1 / len(eigenvalues)))


def test_the_known_weights_of_four_equally_spaced_eigenvalues() -> None:
    alpha = np.full(4, 1.5)
    beta = np.array([np.sqrt(5) / 2, 2 / np.sqrt(5), 3 / (2 * np.sqrt(5)), 0.0])
    two, three, four = (q.gauss(alpha[:m], beta[:m]) for m in (2, 3, 4))
    np.testing.assert_allclose(two.nodes, [0.38196601, 2.61803399], atol=1e-8)
    np.testing.assert_allclose(two.weights, 0.5)
    np.testing.assert_allclose(three.weights, [0.30487805, 0.39024390, 0.30487805], atol=1e-8)
    np.testing.assert_allclose(four.nodes, D4, atol=1e-12)
    np.testing.assert_allclose(four.weights, 0.25)
    assert q.smooth(four, [1.0], 0.1)[0] == pytest.approx(0.99735570, abs=1e-8)
    assert q.distance(two, four) == pytest.approx((2 * 0.38196601 + 2 * 0.61803399) / 4, abs=1e-8)


@given(seed=st.integers(0, 10**6), steps=st.integers(1, 12))
def test_a_run_of_m_steps_is_exact_for_polynomials_of_degree_2m_minus_1(seed: int, steps: int) -> None:
    eigenvalues = np.random.default_rng(seed).uniform(-1, 1, size=40)
    start = normal(40, seed).numpy()
    shares = start**2 / (start @ start)
    measure = q.gauss(*run(diagonal(eigenvalues), steps, seed))
    for order in range(2 * steps):
        assert measure.moment(order) == pytest.approx(shares @ eigenvalues**order, abs=1e-12)


def test_marchenko_pastur_is_recovered() -> None:
    eigenvalues = marchenko_pastur(4000)
    measure = q.mix([q.gauss(*run(diagonal(eigenvalues), 60, seed)) for seed in range(4)])
    assert measure.nodes[0] == pytest.approx(0.08578644, abs=5e-3)
    assert measure.nodes[-1] == pytest.approx(2.91421356, abs=2e-2)
    for order, moment in enumerate([1, 1, 1.5, 2.75]):
        assert measure.moment(order) == pytest.approx(moment, rel=0.05)
    grid = np.linspace(-1, 4, 2001)
    density = q.smooth(measure, grid, 0.1)
    assert np.interp(1.0, grid, density) == pytest.approx(0.42108440, abs=0.03)
    assert np.trapezoid(density, grid) == pytest.approx(1, abs=1e-6)
    assert measure.mass(0.0858, 1.0) == pytest.approx((eigenvalues < 1).mean(), abs=0.03)


@pytest.mark.parametrize("steps", [16, 48])
@pytest.mark.parametrize(
    "eigenvalues", [clustered(bulk=1000), marchenko_pastur(600), np.random.default_rng(0).normal(size=1000) ** 3]
)
def test_the_error_bar_bounds_the_true_distance(eigenvalues: Floats, steps: int) -> None:
    held = []
    for seed in range(10):
        runs = [run(diagonal(eigenvalues), steps, 3 * seed + i) for i in range(3)]
        true = q.distance(q.mix([q.gauss(*r) for r in runs]), exact(eigenvalues))
        held.append(true <= 1.1 * q.density_error(runs))
    assert np.mean(held) >= 0.9


@given(seed=st.integers(0, 10**6), size=st.integers(20, 1000), top=st.integers(0, 6), bottom=st.integers(0, 3))
def test_atoms_weigh_one_over_size_and_mass_is_kept(seed: int, size: int, top: int, bottom: int) -> None:
    rng = np.random.default_rng(seed)
    measure = q.Quadrature(np.sort(rng.normal(size=12)), rng.dirichlet(np.ones(12)))
    highest, lowest = measure.nodes[::-1][:top], measure.nodes[:bottom]
    atoms = q.with_atoms(measure, size, highest, lowest)
    assert atoms.weights.sum() == pytest.approx(1)
    assert (np.diff(atoms.nodes) >= 0).all()
    for value in [*highest, *lowest]:
        assert atoms.weights[atoms.nodes == value] == pytest.approx(1 / size)
    inner = measure.nodes[bottom : 12 - top]
    kept = atoms.weights[np.isin(atoms.nodes, inner)]
    np.testing.assert_allclose(
        kept / kept.sum(), measure.weights[bottom : 12 - top] / measure.weights[bottom : 12 - top].sum()
    )


def test_atoms_keep_the_node_that_stands_for_more_than_themselves() -> None:
    single = q.Quadrature(np.array([2.0]), np.array([1.0]))
    atoms = q.with_atoms(single, 100, top=[2.0] * 10)
    assert atoms.mass(1.9, 2.1) == pytest.approx(1)
    whole = q.with_atoms(q.Quadrature(np.array([0.1, 2.9]), np.array([0.5, 0.5])), 4, top=D4)
    np.testing.assert_allclose(whole.nodes, D4)
    np.testing.assert_allclose(whole.weights, 0.25)
    with pytest.raises(ValueError, match="size 4 has no 5"):
        q.with_atoms(single, 4, top=[1.0] * 5)


@given(seed=st.integers(0, 10**6), width=st.floats(1e-3, 1.0))
def test_smoothing_loses_no_mass_and_nothing_depends_on_the_scale(seed: int, width: float) -> None:
    rng = np.random.default_rng(seed)
    measure = q.Quadrature(np.sort(rng.normal(size=9)), rng.dirichlet(np.ones(9)))
    grid = q.padded_grid(measure, width, points=4000)
    np.testing.assert_allclose(np.trapezoid(q.smooth(measure, grid, width), grid), 1, atol=2e-3)
    scaled = q.Quadrature(1000 * measure.nodes, measure.weights)
    np.testing.assert_allclose(
        1000 * q.smooth(scaled, 1000 * grid, 1000 * width), q.smooth(measure, grid, width), rtol=1e-9, atol=1e-12
    )
    assert q.default_width(scaled, 30) == pytest.approx(1000 * q.default_width(measure, 30))
    steps = q.cumulative(measure, [measure.nodes[0] - 1, *measure.nodes])
    np.testing.assert_allclose(steps, [0, *np.cumsum(measure.weights)], atol=1e-12)


def test_distance_agrees_with_sorted_samples() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=50), rng.normal(size=50) + 1
    assert q.distance(exact(a), exact(b)) == pytest.approx(np.abs(np.sort(a) - np.sort(b)).mean())
    assert q.distance(exact(a), exact(b)) == pytest.approx(wasserstein_distance(a, b))


def test_what_cannot_be_known_is_nan() -> None:
    assert np.isnan(q.depth_error([([1.0], [0.5])]))
    assert np.isnan(q.split_error([([1.0, 2.0], [0.5])]))
    assert q.density_error([([1.0, 2.0], [0.5])]) > 0
    with pytest.raises(ValueError, match="alpha"):
        q.gauss([], [])
    with pytest.raises(ValueError, match="at least one"):
        q.mix([])
    with pytest.raises(ValueError, match="width"):
        q.smooth(exact(D4), D4, 0.0)
