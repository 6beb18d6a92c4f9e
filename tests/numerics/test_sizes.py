"""Traces and Frobenius norms beside a Lanczos run: unbiased exactly, covering, and exact where that is cheaper."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workbench.numerics import sizes as module
from workbench.numerics.krylov import Krylov, lanczos
from workbench.numerics.operator import Diagonal, Matrix, Operator
from workbench.numerics.sampling import Draw
from workbench.numerics.sizes import sizes


def symmetric(size: int, seed: int) -> Matrix:
    square = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return Matrix(square + square.T)


def ran(operator: Operator, products: int, seed: int = 0) -> Krylov:
    """A Lanczos run's state after so many products."""
    start = Draw(seed, "start", operator.size)(0)
    states = lanczos(operator, start, top=1, bottom=1, tolerance=1e-12, limit=products)
    return list(states)[-1]


class Signs:
    """Every vector of plus and minus ones, one after another."""

    def __init__(self, size: int) -> None:
        self.all = list(itertools.product((-1.0, 1.0), repeat=size))

    def __call__(self, vector: int, chunk: int | None = None, **_: Any) -> Tensor:
        return torch.tensor(self.all[vector % len(self.all)], dtype=torch.float64)


@given(seed=st.integers(0, 10**6), products=st.integers(2, 6))
@settings(max_examples=20, deadline=None)
def test_the_mean_over_all_sign_vectors_is_exact(seed: int, products: int) -> None:
    """Whatever the Lanczos run knows, converged or not."""
    operator = symmetric(8, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LARGEST_EXACT", 0)
        found = list(sizes(operator, Signs(8), ran(operator, products), tolerance=1e-14, limit=256, first=0))
    assert len(found) == 256
    assert not found[-1].met
    matrix = operator.matrix
    assert found[-1].trace == pytest.approx(float(matrix.trace()), abs=1e-9)
    assert found[-1].squares == pytest.approx(float(matrix.square().sum()), rel=1e-9)


def test_intervals_cover() -> None:
    """A bulk with spikes of both signs: nominal 95 %, and a little more since runs stop when they look good."""
    entries = torch.linspace(-0.3, 1, 120, dtype=torch.float64)
    entries[:4] = torch.tensor([30.0, 11.0, 7.0, -9.0])
    rotation = torch.linalg.qr(symmetric(120, 5).matrix)[0]
    operator = Matrix(rotation @ entries.diag() @ rotation.T)
    trace, norm, inside = float(entries.sum()), float(entries.norm()), np.zeros(2)
    for seed in range(200):
        state = ran(operator, 12, seed)
        last = list(sizes(operator, Draw(seed, "sizes", 120), state, tolerance=0.08))[-1]
        assert last.met
        assert last.trace_error <= 0.08 * max(abs(last.trace), 0.5 * float(np.abs(state.values).sum()))
        assert last.norm_error <= 0.08 * last.norm
        inside += [abs(last.trace - trace) <= last.trace_error, abs(last.norm - norm) <= last.norm_error]
    assert (inside / 200 >= 0.93).all()


def test_all_columns_where_that_costs_less() -> None:
    operator = symmetric(40, 3)
    found = list(sizes(operator, Draw(0, "sizes", 40), ran(operator, 8), tolerance=1e-3))
    assert found[-1].exact
    assert found[-1].met
    assert (found[-1].trace_error, found[-1].norm_error) == (0, 0)
    assert found[-1].trace == pytest.approx(float(operator.matrix.trace()))
    assert found[-1].norm == pytest.approx(float(operator.matrix.norm()))
    assert len(found) < 20


def test_a_complete_run_needs_no_products() -> None:
    operator = Diagonal(torch.tensor([3.0, -1.0, 2.0], dtype=torch.float64))
    (only,) = sizes(operator, Draw(0, "sizes", 3), ran(operator, 50), tolerance=0.1)
    assert (only.trace, only.trace_error) == (pytest.approx(4), 0)
    assert only.norm == pytest.approx(math.sqrt(14))


def test_products_that_are_not_finite_are_named() -> None:
    operator = symmetric(40, 0)
    state = ran(operator, 8)
    operator.matrix[0, 0] = math.nan
    with pytest.raises(ArithmeticError, match="not finite"):
        next(iter(sizes(operator, Draw(0, "sizes", 40), state, tolerance=0.1)))
