"""Ranks and similarities against published values and their invariances."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench.numerics import kernels as k


@pytest.mark.parametrize(
    ("values", "entropy", "entropy_squared", "ratio_squared", "ratio", "stable", "threshold", "threshold_squared"),
    [
        ((3, 1), 1.75476535, 1.38414549, 1.21951220, 1.6, 1.11111111, 2, 2),
        ((99.5, 0.5), 1.03197977, 1.00029262, 1.00005050, 1.01004997, 1.00002525, 1, 1),
    ],
)
def test_the_known_table_of_ranks(
    values: tuple[float, float], entropy: float, entropy_squared: float, ratio_squared: float, ratio: float,
    stable: float, threshold: int, threshold_squared: int,
) -> None:  # fmt: skip
    sigma = np.array(values, dtype=float)
    assert k.effective_rank(sigma) == pytest.approx(entropy, abs=3e-8)
    assert k.effective_rank(sigma**2) == pytest.approx(entropy_squared, abs=3e-8)
    assert k.participation_ratio(sigma**2) == pytest.approx(ratio_squared, abs=3e-8)
    assert k.participation_ratio(sigma) == pytest.approx(ratio, abs=3e-8)
    assert k.stable_rank(sigma) == pytest.approx(stable, abs=3e-8)
    assert k.threshold_rank(sigma) == threshold
    assert k.threshold_rank(sigma**2) == threshold_squared


@given(count=st.integers(1, 30), scale=st.floats(1e-3, 1e3), zeros=st.integers(0, 5))
def test_equal_values_fill_their_number_of_dimensions(count: int, scale: float, zeros: int) -> None:
    sigma = np.r_[np.full(count, scale), np.zeros(zeros)]
    for rank in (k.effective_rank, k.stable_rank, k.participation_ratio, k.numerical_rank):
        assert rank(sigma) == pytest.approx(count)
    assert k.threshold_rank(sigma) == pytest.approx(np.ceil(0.99 * count - 1e-9))


def test_ranks_of_nothing() -> None:
    assert np.isnan(k.effective_rank([0.0]))
    assert np.isnan(k.stable_rank([0.0, 0.0]))
    assert np.isnan(k.participation_ratio([0.0]))
    assert k.threshold_rank([0.0]) == k.numerical_rank([0.0]) == 0
    assert k.numerical_rank([1, 0.5, 0.01, 5e-4]) == 3
    with pytest.raises(ValueError, match=">= 0"):
        k.effective_rank([1.0, -1.0])


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.RandomState(1337)
    x = rng.randn(100, 10)
    return torch.from_numpy(x), torch.from_numpy(rng.randn(100, 10) + x)


def test_published_similarities() -> None:
    x, y = pair()
    assert k.linear_cka(x, y, debiased=False) == pytest.approx(0.55761326, abs=1e-8)
    assert k.linear_cka(x, y) == pytest.approx(0.51345649, abs=1e-8)
    square = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]], dtype=torch.float64)
    assert k.linear_cka(square, square[:, :1], debiased=False) == pytest.approx(0.70710678, abs=1e-8)


@given(seed=st.integers(0, 10**6), scale=st.floats(0.1, 10), debiased=st.booleans())
def test_similarity_ignores_rotation_scale_and_shift(seed: int, scale: float, debiased: bool) -> None:
    rng = np.random.default_rng(seed)
    x, y = torch.from_numpy(rng.normal(size=(12, 4))), torch.from_numpy(rng.normal(size=(12, 6)))
    turn = torch.from_numpy(np.linalg.qr(rng.normal(size=(4, 4)))[0])
    moved = scale * x @ turn + torch.from_numpy(rng.normal(size=4))
    assert k.linear_cka(moved, y, debiased=debiased) == pytest.approx(k.linear_cka(x, y, debiased=debiased), abs=1e-9)
    assert k.linear_cka(moved, x, debiased=debiased) == pytest.approx(1)


def test_debiasing_sees_that_wide_features_are_independent() -> None:
    rng = np.random.default_rng(0)
    pairs = [[torch.from_numpy(rng.normal(size=(50, 200))) for _ in range(2)] for _ in range(20)]
    assert np.mean([k.linear_cka(x, y, debiased=False) for x, y in pairs]) == pytest.approx(0.8, abs=0.01)
    assert abs(np.mean([k.linear_cka(x, y) for x, y in pairs])) < 0.03


def test_the_mean_over_all_batches_of_four_is_the_whole() -> None:
    from itertools import combinations

    rng = np.random.default_rng(0)
    a, b = (k.gram(torch.from_numpy(rng.normal(size=(7, 3)))) for _ in range(2))
    parts = [float(k.hsic(a[list(i)][:, list(i)], b[list(i)][:, list(i)])) for i in combinations(range(7), 4)]
    assert np.mean(parts) == pytest.approx(float(k.hsic(a, b)))


def test_alignment_and_bad_input() -> None:
    kernel = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    assert k.alignment(kernel, 5 * kernel) == pytest.approx(1)
    assert np.isnan(k.alignment(kernel, 0 * kernel))
    assert np.isnan(k.linear_cka(torch.ones(5, 2), torch.rand(5, 2), debiased=False))
    with pytest.raises(ValueError, match="n >= 4"):
        k.hsic(kernel, kernel)
    with pytest.raises(ValueError, match="are wanted"):
        k.linear_cka(torch.ones(5, 2), torch.ones(4, 2))
