"""Pitfall 2: a number that has not converged is never returned as if it had."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pitfalls.exact import X, Y, built, dense, derivatives, double
from spectra import clustered, rotated

from workbench.figure import Points
from workbench.numerics.krylov import lanczos
from workbench.numerics.operator import Matrix
from workbench.numerics.sampling import Draw
from workbench.numerics.trace import trace
from workbench.probe import Reading
from workbench.probes.spectrum import HessianSpectrum
from workbench.subject import Subject


@functools.cache
def exact() -> torch.Tensor:
    return derivatives(built(dense), X, Y)[2]


# ------------------------------------------------------------------------------------------------ eigenvalues


def finds_the_top(eigenvalues: Callable[[int, int], np.ndarray]) -> None:
    """The k largest of (k, seed) to 1e-4, for every k = 1..5 and 20 seeds."""
    truth = torch.linalg.eigvalsh(exact()).flip(0).numpy()
    for k in range(1, 6):
        for seed in range(20):
            assert eigenvalues(k, seed) == pytest.approx(truth[:k], rel=1e-4), f"k = {k}, seed {seed}"


def ours(k: int, seed: int) -> np.ndarray:
    start = Draw(seed, "pitfall", 123)(0)
    last = list(lanczos(Matrix(exact()), start, top=k, bottom=0, tolerance=1e-4, fresh=Draw(seed, "fresh", 123)))[-1]
    assert last.converged
    return last.top_values


def power_iteration(k: int, seed: int) -> np.ndarray:
    """The fault: a few rounds of power iteration with deflation, each value returned as it stands."""
    left, found = exact().clone(), []
    for i in range(k):
        v = double(123, seed=100 * seed + i)
        for _ in range(5):
            v = left @ (v / v.norm())
        u = v / v.norm()
        found.append(float(u @ left @ u))
        left = left - found[-1] * u.outer(u)
    return np.array(found)


def test_the_largest_eigenvalues_are_exact_for_every_number_of_them() -> None:
    finds_the_top(ours)
    with pytest.raises(AssertionError, match="k = 1, seed 0"):
        finds_the_top(power_iteration)


# ------------------------------------------------------------------------------------------------ trace


def covers(estimate: Callable[[int], tuple[float, float]]) -> None:
    """(value, half-width of a 95 % interval) holds the trace in at least 90 % of 200 runs, and is not just wide."""
    truth, found = clustered().sum(), [estimate(seed) for seed in range(200)]
    inside = sum(abs(value - truth) <= error + 1e-12 * truth for value, error in found)
    assert inside >= 180, f"{inside} of 200 runs"
    assert np.median([error for _, error in found]) < 0.5 * truth


@functools.cache
def matrix() -> Any:
    return rotated(clustered())


def our_trace(seed: int) -> tuple[float, float]:
    last = list(trace(matrix(), Draw(seed, "trace", 300), tolerance=0.2, scale=1.0))[-1]
    assert last.error <= 0.2 * abs(last.value)
    return last.value, last.error


def trace_until_it_stands_still(seed: int) -> tuple[float, float]:
    """The fault: stop when the mean moves by less than the tolerance, and take that for the error."""
    draw, samples, before = Draw(seed, "trace", 300), [], np.inf
    for i in range(200):
        v = draw(i, kind="rademacher")
        samples.append(float(v @ (matrix() @ v)))
        mean = float(np.mean(samples))
        if abs(mean - before) < 0.05 * abs(mean):
            break
        before = mean
    return mean, 0.05 * abs(mean)


def test_the_interval_of_the_trace_covers_it() -> None:
    covers(our_trace)
    with pytest.raises(AssertionError, match="of 200 runs"):
        covers(trace_until_it_stands_still)


# ------------------------------------------------------------------------------------------------ starved budgets


def owns_up(reading: Reading) -> None:
    """A starved reading says it did not converge, in its flag, in its data and in its picture."""
    assert not reading.converged
    assert not reading.data.converged.any()
    marks = [m for m in reading.figure().panels[0].marks if isinstance(m, Points)]
    drawn = {m.role: int(np.isfinite(m.y).sum()) for m in marks}
    assert drawn.get("main", 0) == 0
    assert drawn["unconverged"] > 0


def test_a_starved_budget_says_so_and_marks_the_figure() -> None:
    starved = HessianSpectrum(top=1, trace=False, density=False).run(Subject(built(dense), (X, Y)), seconds=1e-9)
    assert float(starved.data.eigenvalue[0]) < 0.9 * float(torch.linalg.eigvalsh(exact())[-1]), "it is far off"
    owns_up(starved)
    claimed = starved.data.assign_attrs(converged=1)
    unmarked = starved.data.assign(converged=starved.data.converged | True)
    for faulty in (replace(starved, data=claimed), replace(starved, data=unmarked)):
        with pytest.raises(AssertionError):
            owns_up(faulty)
