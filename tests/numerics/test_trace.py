"""Trace estimators against exact traces, and their intervals against the truth counted over many seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import Floats, clustered, diagonal, fresh, normal, rotated

from workbench.numerics import trace as t
from workbench.numerics.krylov import lanczos
from workbench.numerics.operator import Matrix, Operator
from workbench.numerics.sampling import Draw

Estimator = Callable[[Operator, Draw], Iterator[t.TraceEstimate]]

ESTIMATORS: dict[str, Estimator] = {
    "hutchinson": lambda operator, draw: t.hutchinson(operator, draw, limit=27),
    "normal": lambda operator, draw: t.hutchinson(operator, draw, limit=27, kind="normal"),
    "hutch++": lambda operator, draw: t.hutch_plus_plus(operator, draw, 30),
    "xtrace": lambda operator, draw: t.xtrace(operator, draw, 24),
}
INDEFINITE = np.r_[10.0, 8.0, 7.0, -9.0, np.random.default_rng(0).normal(size=56) / 2]


def last(estimates: Iterator[t.TraceEstimate]) -> t.TraceEstimate:
    """The estimate a run ends with; checks that products only grow."""
    estimate, before = None, 0
    for estimate in estimates:
        assert estimate.products >= before
        before = estimate.products
    assert estimate is not None
    return estimate


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("spectrum", [INDEFINITE, 0.8 ** np.arange(60.0)])
def test_unbiased_and_inside_its_interval(name: str, spectrum: Floats) -> None:
    operator, truth = rotated(spectrum, seed=5), spectrum.sum()
    repeats = 200 if name in ("hutchinson", "normal") else 60
    ends = [last(ESTIMATORS[name](operator, Draw(seed, "trace", 60))) for seed in range(repeats)]
    errors = np.array([end.value for end in ends]) - truth
    assert abs(errors.mean()) <= 4 * errors.std() / np.sqrt(repeats)
    assert np.mean(np.abs(errors) <= [end.error for end in ends]) >= 0.9


@pytest.mark.parametrize("tolerance", [0.05, 0.15])
def test_a_run_that_stops_itself_covers_the_truth(tolerance: float) -> None:
    exact = clustered(bulk=110)
    operator, truth, scale = rotated(exact, seed=5), exact.sum(), np.abs(exact).sum()
    held, spent = [], []
    for seed in range(200):
        end = last(t.trace(operator, Draw(seed, "trace", 120), tolerance=tolerance, scale=scale))
        assert end.exact or end.error <= t.allowed_error(end.value, tolerance, scale)
        held.append(end.exact or abs(end.value - truth) <= end.error)
        spent.append(end.products)
    assert np.mean(held) >= 0.9
    assert min(spent) >= 8
    assert len(set(spent)) > 1


def test_deflation_by_a_lanczos_run_shortens_the_interval() -> None:
    exact = clustered(bulk=490)
    operator = rotated(exact, seed=2)
    *_, run = lanczos(operator, normal(500, 0), fresh=fresh(500, 0))
    deflation = t.Deflation(run.vectors(range(10)), run.values[:10])
    plain, deflated = [], []
    for seed in range(40):
        draw = Draw(seed, "trace", 500)
        plain.append(last(t.hutchinson(operator, draw, limit=12)).value - exact.sum())
        deflated.append(last(t.hutchinson(operator, draw, limit=12, deflation=deflation)).value - exact.sum())
    assert np.std(deflated) < 0.6 * np.std(plain)
    assert abs(np.mean(deflated)) <= 4 * np.std(deflated) / np.sqrt(40)


def test_unconverged_vectors_deflate_without_bias() -> None:
    exact = clustered(bulk=90)
    operator = rotated(exact, seed=2)
    *_, run = lanczos(operator, normal(100, 0), limit=4)
    deflation = t.Deflation(run.vectors(range(4)), run.values[:4])
    ends = [last(t.hutchinson(operator, Draw(s, "trace", 100), limit=20, deflation=deflation)) for s in range(60)]
    errors = np.array([end.value for end in ends]) - exact.sum()
    assert abs(errors.mean()) <= 4 * errors.std() / np.sqrt(60)


def test_two_by_two_probes_take_two_values_only() -> None:
    operator = Matrix(torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64))
    firsts = {next(t.hutchinson(operator, Draw(seed, "trace", 2))).value for seed in range(40)}
    assert firsts == {2.0, 6.0}


@given(seed=st.integers(0, 10**6))
def test_sign_probes_are_exact_for_diagonal_operators(seed: int) -> None:
    exact = np.random.default_rng(seed).normal(size=30)
    end = last(t.hutchinson(diagonal(exact), Draw(seed, "trace", 30), limit=3))
    assert end.value == pytest.approx(exact.sum(), abs=1e-12)
    assert end.error == pytest.approx(0, abs=1e-12)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 7))
def test_low_rank_operators_are_exact(seed: int, rank: int) -> None:
    half = np.random.default_rng(seed).normal(size=(30, rank))
    operator, truth = Matrix(torch.from_numpy(half @ half.T)), float((half**2).sum())
    draw = Draw(seed, "trace", 30)
    sketched, exchanged = last(t.hutch_plus_plus(operator, draw, 12)), last(t.xtrace(operator, draw, 12))
    assert sketched.products <= 12
    assert exchanged.products <= 12
    assert (sketched.value == pytest.approx(truth, rel=1e-10)) == (rank <= 4)
    assert (exchanged.value == pytest.approx(truth, rel=1e-10)) == (rank <= 5)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimates_scale_with_the_operator(name: str) -> None:
    operator, draw = rotated(INDEFINITE, seed=1), Draw(3, "trace", 60)
    once, thrice = last(ESTIMATORS[name](operator, draw)), last(ESTIMATORS[name](-3.0 * operator, draw))
    assert thrice.value == pytest.approx(-3 * once.value)
    assert thrice.error == pytest.approx(3 * once.error)


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
def test_hutchinson_is_linear_in_the_operator(kind: str) -> None:
    a, b, draw = rotated(INDEFINITE, 1), rotated(np.linspace(0, 2, 60), 2), Draw(3, "trace", 60)
    values = [last(t.hutchinson(o, draw, limit=9, kind=kind)).value for o in (a, b, 2 * a - b)]  # type: ignore[arg-type]
    assert values[2] == pytest.approx(2 * values[0] - values[1])


@pytest.mark.parametrize("block", [1, 7, 64])
def test_the_exact_sum_spends_a_product_a_coordinate(block: int) -> None:
    operator = rotated(INDEFINITE, seed=4)
    estimates = list(t.exact_trace(operator, block=block))
    assert all(np.isnan(e.value) and not e.exact for e in estimates[:-1])
    end = estimates[-1]
    assert end.value == pytest.approx(INDEFINITE.sum(), abs=1e-11)
    assert (end.error, end.products, end.exact) == (0.0, 60, True)


def test_a_tight_tolerance_switches_to_the_exact_sum() -> None:
    operator = rotated(INDEFINITE, seed=4)
    scale = np.abs(INDEFINITE).sum()
    end = last(t.trace(operator, Draw(0, "trace", 60), tolerance=1e-6, scale=scale))
    assert end.exact
    assert end.error == 0
    assert end.products <= 8 + 60
    assert end.value == pytest.approx(INDEFINITE.sum(), abs=1e-11)
    starved = last(t.trace(operator, Draw(0, "trace", 60), tolerance=1e-6, scale=scale, limit=20))
    assert starved.products == 20
    assert not starved.exact
    assert starved.error > t.allowed_error(starved.value, 1e-6, scale)


def test_a_trace_near_zero_ends() -> None:
    spectrum = np.r_[np.linspace(-1, 1, 3000)]
    end = last(t.trace(rotated_blocks(spectrum), Draw(0, "trace", 3000), tolerance=0.1, scale=np.abs(spectrum).sum()))
    assert not end.exact
    assert end.products < 600
    assert abs(end.value) <= 2 * end.error


def rotated_blocks(spectrum: Floats) -> Operator:
    """Pairs of eigenvalues mixed by 45 degrees: not diagonal, yet cheap at any size."""

    class Pairs(Operator):
        size, dtype, device = len(spectrum), torch.float64, torch.device("cpu")
        values = torch.from_numpy(spectrum.copy())

        def turn(self, vector: torch.Tensor) -> torch.Tensor:
            a, b = vector.chunk(2)
            return torch.cat([a + b, a - b]) / 2**0.5

        def matvec(self, vector: torch.Tensor) -> torch.Tensor:
            return self.turn(self.values * self.turn(vector))

    return Pairs()


def test_looks_are_few_and_grow() -> None:
    looks = [e.samples for e in t.hutchinson(diagonal(INDEFINITE), Draw(0, "trace", 60), limit=100) if e.look]
    assert looks == [8, 12, 18, 27, 41, 62, 93]


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 3"):
        next(t.hutch_plus_plus(diagonal(INDEFINITE), Draw(0, "trace", 60), 2))
    with pytest.raises(ValueError, match="at least 4"):
        next(t.xtrace(diagonal(INDEFINITE), Draw(0, "trace", 60), 3))
    with pytest.raises(ArithmeticError, match="not finite"):
        next(t.hutchinson(diagonal(np.array([1.0, np.inf])), Draw(0, "trace", 2)))
