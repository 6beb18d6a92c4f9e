"""Contraction of classes near given features: numbers worked out by hand, and least squares solved row by row."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx

from workbench.numerics.near_collapse import contraction


def test_factors_are_those_worked_out_by_hand() -> None:
    found = contraction(torch.tensor([[2.0, 0, 0], [0, 1, 0]]), 0.1, 0.4)
    assert found.numpy() == approx([0.08888889, 0.26666667, 0.8], rel=1e-7)
    square = contraction(torch.eye(2), 0.0, 1.0)
    assert square[:2].numpy() == approx([0.5, 0.5])
    assert torch.isnan(square[2]), "rows span everything"
    with pytest.raises(ValueError, match="proximity > 0"):
        contraction(torch.eye(2), 0.1, 0.0)


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 6), st.floats(0, 2), st.floats(0.01, 5), st.integers(0, 999))
def test_deviations_of_the_least_squares_solution_shrink_by_the_factors(
    rows: int, width: int, decay: float, proximity: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weight, start = rng.normal(size=(rows, width)), rng.normal(size=(8, width))
    labels = np.arange(8) % 2
    targets = rng.normal(size=(2, rows))[labels]
    parts = [weight, np.sqrt(decay) * np.eye(width), np.sqrt(proximity) * np.eye(width)]
    wanted = [np.concatenate([y, np.zeros(width), np.sqrt(proximity) * h]) for y, h in zip(targets, start, strict=True)]
    moved = np.array([np.linalg.lstsq(np.vstack(parts), one, rcond=None)[0] for one in wanted])
    basis = np.linalg.svd(weight)[2]
    before, after = ((h - np.stack([h[labels == c].mean(0) for c in (0, 1)])[labels]) @ basis.T for h in (start, moved))
    factors = contraction(torch.from_numpy(weight), decay, proximity).numpy()
    known = min(rows, width)
    assert after[:, :known] == approx(before[:, :known] * factors[:known], abs=1e-9)
    if width > rows:
        assert after[:, rows:] == approx(before[:, rows:] * factors[-1], abs=1e-9)
    else:
        assert np.isnan(factors[known:]).all()
