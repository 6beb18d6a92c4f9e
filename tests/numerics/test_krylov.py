"""Lanczos against spectra known beforehand."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import D4, S2, T5, Floats, clustered, diagonal, fresh, normal, path_laplacian, rotated
from torch import Tensor

from workbench.numerics.krylov import Krylov, lanczos
from workbench.numerics.operator import Matrix, Operator


def last(states: Iterator[Krylov]) -> Krylov:
    """The state a run ends with."""
    *_, state = states
    return state


def relative(found: Floats, exact: Floats) -> float:
    """Largest error over the largest exact magnitude."""
    return float(np.abs(found - exact).max() / np.abs(exact).max())


@given(signs=st.lists(st.sampled_from([-1.0, 1.0]), min_size=4, max_size=4))
def test_every_sign_vector_gives_the_known_tridiagonal_matrix(signs: list[float]) -> None:
    states = list(lanczos(diagonal(D4), torch.tensor(signs, dtype=torch.float64), top=4, bottom=0))
    second, third, end = states[1], states[2], states[3]
    np.testing.assert_allclose(second.values, [2.61803399, 0.38196601], atol=1e-8)
    np.testing.assert_allclose(second.residuals, np.sqrt(2 / 5), rtol=1e-12)
    np.testing.assert_allclose(third.values, [2.93178211, 1.5, 0.06821789], atol=1e-8)
    np.testing.assert_allclose(third.residuals, [0.29631888, 0.52382272, 0.29631888], atol=1e-8)
    np.testing.assert_allclose(end.alpha, 1.5, rtol=1e-12)
    np.testing.assert_allclose(end.beta, [np.sqrt(5) / 2, 2 / np.sqrt(5), 3 / (2 * np.sqrt(5)), 0], atol=1e-12)
    np.testing.assert_allclose(end.top_values, D4[::-1], atol=1e-12)
    assert end.complete
    assert end.done
    assert len(states) == 4


@pytest.mark.parametrize(
    ("operator", "exact"),
    [
        (path_laplacian(5), T5),
        (Matrix(torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)), S2),
        (Matrix(torch.tensor([[1.5, 0.75], [0.75, 1.5]], dtype=torch.float64)), np.array([0.75, 2.25])),
        (path_laplacian(31), 2 - 2 * np.cos(np.arange(1, 32) * np.pi / 32)),
        (diagonal(np.zeros(6)), np.zeros(6)),
    ],
)
def test_small_operators_come_out_exact(operator: Operator, exact: Floats) -> None:
    end = last(lanczos(operator, normal(operator.size, 0), top=operator.size, bottom=1))
    np.testing.assert_allclose(end.top_values, exact[::-1], atol=1e-12)
    np.testing.assert_allclose(end.bottom_values, exact[:1], atol=1e-12)
    assert end.complete
    assert end.top_converged.all()


def test_largest_is_algebraic_not_in_magnitude() -> None:
    end = last(lanczos(diagonal(np.array([-5.0, 1.0])), normal(2, 0), top=1, bottom=1))
    assert end.top_values[0] == pytest.approx(1, abs=1e-12)
    assert end.bottom_values[0] == pytest.approx(-5, abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_each_of_the_five_largest_of_a_cluster(seed: int) -> None:
    exact = clustered()
    for top in range(1, 6):
        end = last(lanczos(rotated(exact, seed=1), normal(300, seed), top=top, tolerance=1e-4, fresh=fresh(300, seed)))
        assert end.done
        assert relative(end.top_values, exact[:top]) < 1e-4
        assert end.bottom_values[0] == pytest.approx(exact[-1], rel=1e-3)


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), values=st.integers(1, 6), size=st.integers(12, 90))
def test_repeated_eigenvalues_are_counted(seed: int, values: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    exact = np.sort(rng.choice(rng.normal(size=values), size=size))[::-1]
    end = last(lanczos(diagonal(exact), normal(size, seed), bottom=2, tolerance=1e-4, fresh=fresh(size, seed)))
    assert end.confirmed
    assert relative(end.top_values, exact[:10]) < 1.2e-4
    assert relative(end.bottom_values, exact[:-3:-1]) < 1.2e-4


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6))
def test_repeated_outliers_over_a_bulk_are_counted(seed: int) -> None:
    rng = np.random.default_rng(seed)
    outliers = np.repeat(rng.uniform(0.3, 1, size=5), rng.integers(1, 4, 5))
    exact = np.sort(np.r_[outliers, rng.normal(0, 0.03, 250)])[::-1].copy()
    end = last(lanczos(diagonal(exact), normal(len(exact), seed), tolerance=1e-2, fresh=fresh(len(exact), seed)))
    assert end.done
    assert relative(end.top_values, exact[:10]) < 1e-2


def test_a_start_that_misses_a_pair_is_found_out() -> None:
    exact = np.r_[3.0, 2.0, 1.0, np.linspace(-0.1, 0.1, 197)]
    start = normal(200, 0)
    start[0] = 0.0  # the Krylov space of this start never holds the largest eigenvector
    blind = last(lanczos(diagonal(exact), start, top=2, tolerance=1e-6, confirm=False))
    seeing = last(lanczos(diagonal(exact), start, top=2, tolerance=1e-6, fresh=fresh(200, 0)))
    np.testing.assert_allclose(blind.top_values, [2, 1], atol=1e-6)
    assert blind.done
    assert not blind.confirmed
    assert blind.checked == 0
    np.testing.assert_allclose(seeing.top_values, [3, 2], atol=1e-6)
    assert seeing.confirmed
    assert 16 <= seeing.checked < seeing.products


@given(seed=st.integers(0, 10**6), size=st.integers(2, 40), steps=st.integers(1, 15))
def test_ritz_values_climb_inside_the_spectrum(seed: int, size: int, steps: int) -> None:
    exact = np.sort(np.random.default_rng(seed).normal(size=size))
    scale = np.abs(exact).max()
    tops, bottoms = [], []
    for state in lanczos(diagonal(exact), normal(size, seed), tolerance=1e-10, limit=steps, fresh=fresh(size, seed)):
        tops.append(state.values[0])
        bottoms.append(state.values[-1])
        nearest = np.abs(exact - state.values[:, None]).min(axis=1)
        assert (nearest <= state.residuals + 1e-13 * scale).all()
    assert max(tops) <= exact[-1] + 1e-13 * scale
    assert min(bottoms) >= exact[0] - 1e-13 * scale
    assert (np.diff(tops) >= -1e-13 * scale).all()
    assert (np.diff(bottoms) <= 1e-13 * scale).all()


@given(seed=st.integers(0, 10**6), limit=st.integers(1, 60), basis=st.integers(15, 70))
def test_vectors_are_orthonormal_and_residuals_true(seed: int, limit: int, basis: int) -> None:
    exact = clustered(bulk=150, seed=seed)
    operator = rotated(exact, seed=3)
    run = lanczos(operator, normal(160, seed), top=9, tolerance=1e-5, limit=limit, basis=basis, fresh=fresh(160, seed))
    for state in run:
        if state.products == limit or state.done:
            vectors = state.vectors(range(len(state.values)))
            off = vectors @ vectors.T - torch.eye(len(vectors))
            assert off.abs().max() < 1e-12
            images = operator @ vectors.T - vectors.T * torch.from_numpy(state.values.copy())
            true = torch.linalg.vector_norm(images, dim=0).numpy()
            assert (true <= state.residuals * (1 + 1e-6) + 1e-13).all()


@pytest.mark.parametrize("basis", [24, 33, 48])
def test_a_restart_changes_no_result(basis: int) -> None:
    exact = clustered(bulk=500)
    ends = [
        last(lanczos(diagonal(exact), normal(510, 1), tolerance=1e-6, basis=rows, fresh=fresh(510, 1)))
        for rows in (basis, 200)
    ]
    np.testing.assert_allclose(ends[0].top_values, ends[1].top_values, atol=1e-9)
    assert ends[0].bottom_values[0] == pytest.approx(ends[1].bottom_values[0], abs=1e-6)
    assert len(ends[0].values) <= basis + 1
    assert ends[0].products <= 1.5 * ends[1].products
    assert len(ends[0].alpha) <= basis + 1
    np.testing.assert_allclose(ends[0].alpha, ends[1].alpha[: len(ends[0].alpha)], atol=1e-12)


def test_a_starved_run_says_so() -> None:
    end = last(lanczos(diagonal(clustered()), normal(300, 0), top=10, limit=5))
    assert end.products == 5
    assert not end.done
    assert not end.converged
    assert not end.confirmed
    assert not end.top_converged.any()
    assert np.isnan(end.top_values[5:]).all()
    assert np.isfinite(end.top_values[:5]).all()


def test_a_state_never_changes_and_its_vectors_expire() -> None:
    run = lanczos(diagonal(clustered()), normal(300, 0))
    first = next(run)
    copy = {name: np.array(getattr(first, name)) for name in ("values", "residuals", "alpha", "top_values")}
    assert first.vectors([0]).shape == (1, 300)
    for _ in range(5):
        next(run)
    for name, value in copy.items():
        np.testing.assert_array_equal(getattr(first, name), value)
    with pytest.raises(ValueError, match="read-only"):
        first.values[0] = 0.0
    with pytest.raises(RuntimeError, match="product 1 are gone"):
        first.vectors([0])


class Crooked(Operator):
    """Not symmetric, or not finite from some product on."""

    def __init__(self, skew: float = 0.0, nan_from: int = 10**9) -> None:
        self.size, self.dtype, self.device = 50, torch.float64, torch.device("cpu")
        self.skew, self.nan_from, self.products = skew, nan_from, 0
        self.entries = torch.linspace(-1, 1, 50, dtype=torch.float64)

    def matvec(self, vector: Tensor) -> Tensor:
        self.products += 1
        product = self.entries * vector + self.skew * vector.roll(1)
        return product * float("nan") if self.products >= self.nan_from else product


def test_asymmetry_is_measured_on_the_way() -> None:
    crooked = last(lanczos(Crooked(skew=0.1), normal(50, 0), limit=15))
    straight = last(lanczos(Crooked(), normal(50, 0), limit=15))
    assert crooked.asymmetry > 0.01
    assert straight.asymmetry < 1e-14


def test_products_that_are_not_finite_stop_the_run() -> None:
    run = lanczos(Crooked(nan_from=3), normal(50, 0))
    next(run), next(run)
    with pytest.raises(ArithmeticError, match="Product 3 of Crooked"):
        next(run)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"start": torch.ones(4)}, r"shape \(3,\)"),
        ({"start": torch.zeros(3)}, "length is 0"),
        ({"start": torch.full((3,), float("nan"))}, "finite"),
        ({"top": 0, "bottom": 0}, "not both 0"),
        ({"top": -1}, "top and bottom"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"basis": 2}, "basis must hold"),
    ],
)
def test_unusable_settings_are_refused(change: dict, words: str) -> None:
    arguments = {"start": torch.ones(3)} | change
    with pytest.raises(ValueError, match=words):
        next(lanczos(diagonal(np.arange(3.0)), **arguments))


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    last(lanczos(diagonal(np.repeat([1.0, 0.0], 20)), normal(40, 0)))
    assert torch.equal(before, torch.get_rng_state())


def test_float32_vectors_keep_six_digits() -> None:
    exact = clustered(bulk=60_000)
    run = lanczos(diagonal(exact, torch.float32), normal(60_010, 0).float(), tolerance=1e-3, fresh=fresh(60_010, 0))
    check_single_precision(run, exact)


@pytest.mark.slow
def test_float32_vectors_keep_six_digits_at_a_million_entries() -> None:
    exact = clustered(bulk=10**6)
    size = len(exact)
    run = lanczos(diagonal(exact, torch.float32), normal(size, 0).float(), tolerance=1e-3, fresh=fresh(size, 0))
    check_single_precision(run, exact)


def check_single_precision(run: Iterator[Krylov], exact: Floats) -> None:
    """Orthogonal to 1e-6, eigenvalues to 1e-6, the spread of the last digits in the residuals."""
    for state in run:
        if state.done:
            vectors = state.vectors(range(12)).double()
            assert (vectors @ vectors.T - torch.eye(12)).abs().max() < 1e-6
            assert relative(state.top_values, exact[:10]) < 1e-6
            assert state.residuals.min() >= 1e-8
            assert state.asymmetry < 1e-6
            return
    raise AssertionError("The run did not converge.")


def test_a_bfloat16_basis_serves_a_coarse_tolerance_and_a_host_basis_any() -> None:
    exact = clustered(bulk=20_000)
    operator, start = diagonal(exact, torch.float32), normal(20_010, 0).float()
    half = last(lanczos(operator, start, tolerance=1e-2, store="bfloat16", fresh=fresh(20_010, 0)))
    assert half.done
    assert relative(half.top_values, exact[:10]) < 2e-3
    here, there = (last(lanczos(operator, start, fresh=fresh(20_010, 0), host=host)) for host in (False, True))
    np.testing.assert_array_equal(here.values, there.values)


def test_residuals_bound_the_error_on_a_flat_spectrum() -> None:
    exact = np.linspace(0.5, 1.5, 400)  # where orthogonality in one pass alone is lost
    for dtype, rounding in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        run = lanczos(diagonal(exact, dtype), normal(400, 1).to(dtype), top=5, limit=60, fresh=fresh(400, 1))
        for state in run:
            nearest = np.abs(state.values[:, None] - exact).min(axis=1)
            assert (nearest <= state.residuals + rounding).all()


def test_two_runs_are_equal_bit_for_bit() -> None:
    operator = rotated(clustered(), seed=2)
    ends = [last(lanczos(operator, normal(300, 0), fresh=fresh(300, 0))) for _ in range(2)]
    np.testing.assert_array_equal(ends[0].values, ends[1].values)
    assert ends[0].products == ends[1].products


def test_depth_can_be_asked_for_and_the_basis_lent() -> None:
    run = lanczos(
        diagonal(np.r_[5.0, 4.0, np.zeros(98)] + np.linspace(0, 0.1, 100)), normal(100, 0), top=1, bottom=0, least=25
    )
    *_, end = run
    assert end.products == len(end.alpha) == 25
    np.testing.assert_allclose(end.span() @ end.span().T, np.eye(len(end.values)), atol=1e-12)


def test_a_smallest_eigenvalue_near_zero_need_not_be_resolved_relative_to_itself() -> None:
    exact = np.r_[np.geomspace(1e-9, 1e-3, 400), 0.5, 1.0, 2.0]
    strict, vague = (
        last(lanczos(diagonal(exact), normal(403, 0), top=2, limit=60, near_zero=size, fresh=fresh(403, 0)))
        for size in (0.0, 0.05)
    )
    assert not strict.done
    assert vague.done
    assert vague.bottom_residuals[0] <= 0.02 * 0.05 * 2.0
    negative = last(lanczos(diagonal(np.append(exact, -0.01)), normal(404, 0), top=2, near_zero=0.05, limit=200))
    assert negative.bottom_values[0] == pytest.approx(-0.01, rel=0.02)
