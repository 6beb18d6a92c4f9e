"""CKA against its definition in plain loops, against published values, and by its laws."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytest import approx
from scipy.spatial.distance import cdist

from workbench.numerics import similarity
from workbench.numerics.similarity import Estimate, Kernel, MinibatchCKA, cka
from workbench.numerics.stats import jackknife_error

Array = np.ndarray


def published() -> tuple[Array, Array]:
    rng = np.random.RandomState(1337)
    x = rng.randn(100, 10)
    return x, rng.randn(100, 10) + x


def draws(seed: int, n: int, *widths: int) -> list[Array]:
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(n, 2))
    return [rng.normal(size=(n, d)) + common @ rng.normal(size=(2, d)) + 3 for d in widths]


def estimate(one: list[Array], two: list[Array], *, debiased: bool = True, bandwidth: float | None = None) -> Estimate:
    sides = [[Kernel.of(torch.as_tensor(rows), bandwidth) for rows in side] for side in (one, two)]
    *before, (share, found) = cka(*sides, debiased=debiased)
    assert share == 1.0
    assert all(known is None and 0 < done < 1 for done, known in before)
    assert found is not None
    return found


# ------------------------------------------------------------------------ oracles


def linear(rows: Array) -> Array:
    return rows @ rows.T


def gaussian(rows: Array, bandwidth: float, like: Array | None = None) -> Array:
    """The kernel of the published demonstration, its width by the median over all pairs of ``like``."""
    width = bandwidth**2 * np.median(cdist(rows if like is None else like, rows if like is None else like) ** 2)
    return np.exp(-(cdist(rows, rows) ** 2) / (2 * width))


def u_statistic(k: Array, m: Array) -> float:
    """HSIC as the mean of K_ij (L_ij + L_qr - 2 L_iq) over all ordered fours of distinct examples."""
    fours = list(permutations(range(len(k)), 4))
    return sum(k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in fours) / len(fours)


def centred_trace(k: Array, m: Array) -> float:
    flat = np.eye(len(k)) - 1 / len(k)
    return float(np.trace(k @ flat @ m @ flat))


def ratio(hsic, k: Array, m: Array) -> float:
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


# ------------------------------------------------------------- values and errors


@pytest.mark.parametrize("bandwidth", [None, 0.7])
@pytest.mark.parametrize("debiased", [True, False])
def test_every_pair_and_every_example_left_out_equal_the_definition(
    debiased: bool, bandwidth: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, one, two = 8, draws(0, 8, 3, 5), draws(1, 8, 2, 9, 4)
    hsic = u_statistic if debiased else centred_trace
    grams = [[linear(r) if bandwidth is None else gaussian(r, bandwidth) for r in side] for side in (one, two)]
    want = [[ratio(hsic, k, m) for m in grams[1]] for k in grams[0]]
    again = np.empty((n, 2, 3))
    for i in range(n):
        kept = np.delete(np.arange(n), i)
        again[i] = [[ratio(hsic, k[kept][:, kept], m[kept][:, kept]) for m in grams[1]] for k in grams[0]]
    for memory in (similarity.TILE_BYTES, 1):  # all at once, and an example at a time
        monkeypatch.setattr(similarity, "TILE_BYTES", memory)
        found = estimate(one, two, debiased=debiased, bandwidth=bandwidth)
        np.testing.assert_allclose(found.value, want, rtol=1e-10)
        np.testing.assert_allclose(found.replicates, again, rtol=1e-9)
    spread = np.sqrt((n - 1) * again.var(0))
    np.testing.assert_allclose(found.error, spread, rtol=1e-9)
    means = again.mean((1, 2))
    value, error = found.mean(list(np.ndindex(2, 3)))
    assert (value, error) == approx((np.mean(want), np.sqrt((n - 1) * means.var())), rel=1e-9)


def test_published_values() -> None:
    x, y = published()
    assert estimate([x], [y]).value.item() == approx(0.51345649, abs=1e-8)
    assert estimate([x], [y], debiased=False).value.item() == approx(0.55761326, abs=1e-8)
    assert estimate([x], [y], debiased=False, bandwidth=0.5).value.item() == approx(0.65483, abs=5e-6)
    square = np.array([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    assert estimate([square], [square[:, :1]], debiased=False).value.item() == approx(0.5**0.5, abs=1e-12)


def test_unrelated_wide_features_are_unlike_only_without_the_bias() -> None:
    rng = np.random.default_rng(0)
    one, two = ([rng.normal(size=(50, 200)) for _ in range(5)] for _ in range(2))
    assert estimate(one, two, debiased=False).value.mean() == approx(0.8, abs=0.01)
    assert abs(estimate(one, two).value.mean()) < 0.02


def test_the_error_covers_what_other_examples_would_give() -> None:
    """Repeated draws of examples spread as the jackknife says, and two errors cover the value of very many."""
    rng = np.random.default_rng(3)
    mix, other = rng.normal(size=(4, 6)), rng.normal(size=(4, 5))

    def sample(n: int) -> tuple[list[Array], list[Array]]:
        hidden = rng.normal(size=(n, 4))
        return [hidden @ mix + rng.normal(size=(n, 6))], [hidden @ other + 2 * rng.normal(size=(n, 5))]

    truth = estimate(*sample(4000)).value.item()
    found = [estimate(*sample(80)) for _ in range(250)]
    values, errors = (np.array([getattr(f, name).item() for f in found]) for name in ("value", "error"))
    assert abs(values.mean() - truth) < 4 * values.std() / np.sqrt(250) + 0.01
    assert np.sqrt((errors**2).mean()) / values.std() == approx(1, abs=0.15)
    assert 0.88 <= (np.abs(values - truth) < 2 * errors).mean() <= 0.99


# ------------------------------------------------------------------------- laws


@given(
    seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3), debiased=st.booleans(),
    bandwidth=st.none() | st.floats(0.2, 3),
)  # fmt: skip
def test_rotation_scale_and_shift_change_nothing(
    seed: int, scale: float, debiased: bool, bandwidth: float | None
) -> None:
    x, y = draws(seed, 12, 4, 6)
    rng = np.random.default_rng(seed)
    moved = scale * x @ np.linalg.qr(rng.normal(size=(4, 4)))[0] + scale * rng.normal(size=4)
    found = estimate([x, moved, y], [y, x], debiased=debiased, bandwidth=bandwidth)
    assert found.value[1] == approx(found.value[0], abs=1e-9)
    assert found.value[1, 1] == approx(1, abs=1e-12)
    assert np.abs(found.value[0, 0] - found.value[2, 1]) < 1e-12, "the order of the two is of no matter"
    assert found.error[2, 0] < 1e-7, "a layer with itself is 1 with any examples"
    if not debiased:
        assert (found.value >= 0).all()
        assert (found.value <= 1 + 1e-12).all()


@given(seed=st.integers(0, 10**6))
def test_a_linear_map_that_is_no_rotation_does_change_it(seed: int) -> None:
    x, _ = draws(seed, 40, 4, 4)
    assert estimate([x], [x * [100, 1, 1, 1]]).value.item() < 0.999


# ----------------------------------------------------------------- mini-batches


def batched(x: Array, y: Array, parts: list[Array]) -> Estimate:
    sums = MinibatchCKA()
    for part in parts:
        sums.add([torch.from_numpy(x[part])], [torch.from_numpy(y[part])])
    return sums.estimate()


@pytest.mark.parametrize(("size", "value"), [(10, 0.54373081), (20, 0.53371836), (100, 0.51345649)])
def test_published_values_of_mini_batches(size: int, value: float) -> None:
    x, y = published()
    assert batched(x, y, list(np.arange(100).reshape(-1, size))).value.item() == approx(value, abs=1e-8)


@pytest.mark.parametrize("size", [4, 5])
def test_all_batches_of_one_size_together_are_the_whole(size: int) -> None:
    """HSIC_1 is unbiased: its mean over every possible mini-batch is that of all examples, so that the ratio is too."""
    x, y = draws(5, 9, 3, 4)
    every = [np.array(part) for part in combinations(range(9), size)]
    whole = ratio(u_statistic, linear(x), linear(y))
    assert batched(x, y, every).value.item() == approx(whole, rel=1e-10)


def test_batches_count_by_their_size_and_tiny_ones_not_at_all() -> None:
    x, y = draws(6, 16, 3, 4)
    parts = [np.arange(8), np.arange(8, 13), np.arange(13, 16)]
    k, m = linear(x), linear(y)

    def over(one: Array, two: Array) -> float:
        return sum(len(p) * u_statistic(one[p][:, p], two[p][:, p]) for p in parts[:2])

    assert batched(x, y, parts).value.item() == approx(ratio(over, k, m), rel=1e-10)


def test_mini_batches_keep_one_gaussian_width_and_leave_whole_batches_out() -> None:
    x, y = draws(7, 24, 3, 4)
    sums, parts = MinibatchCKA(0.6), list(np.arange(24).reshape(3, 8))
    for part in parts:
        sums.add([torch.from_numpy(x[part])], [torch.from_numpy(y[part])])
    grams = [[gaussian(rows[part], 0.6, rows[:8]) for part in parts] for rows in (x, y)]

    def of(kept: list[int]) -> float:
        sums = [sum(u_statistic(grams[a][i], grams[b][i]) for i in kept) for a, b in ((0, 1), (0, 0), (1, 1))]
        return sums[0] / np.sqrt(sums[1] * sums[2])

    again = np.array([of([1, 2]), of([0, 2]), of([0, 1])])
    found = sums.estimate()
    assert found.value.item() == approx(of([0, 1, 2]), rel=1e-10)
    assert found.error.item() == approx(np.sqrt(2 * again.var()), rel=1e-9)


# ------------------------------------------------------------------ what is not known


@pytest.mark.parametrize("bandwidth", [None, 1.0])
def test_constant_features_and_nan_are_unknown_and_touch_no_other_layer(bandwidth: float | None) -> None:
    x, y = draws(8, 20, 3, 4)
    spoilt = x.copy()
    spoilt[3, 1] = np.nan
    far = (1e4 + np.zeros((20, 3))).astype(np.float32) * np.float32(1.1)  # its mean is not the number itself
    found = estimate([x, np.full((20, 2), 0.1), spoilt, far, x * np.inf], [y], bandwidth=bandwidth)
    assert np.isfinite(found.value[0])
    assert np.isfinite(found.error[0])
    assert np.isnan(found.value[1:]).all()
    value, error = found.mean([(i, 0) for i in range(5)])
    assert (value, error) == approx((found.value[0, 0], found.error[0, 0]))
    assert np.isnan(found.mean([(1, 0)])).all()
    assert np.isnan(found.mean([])).all()


def test_a_large_offset_in_single_precision_costs_no_more_than_its_rounding() -> None:
    x, y = draws(9, 60, 3, 4)
    far = x.astype(np.float32) + np.float32(1000)
    assert estimate([far], [y]).value.item() == approx(estimate([x], [y]).value.item(), abs=1e-4)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_too_few_examples_have_no_error(n: int) -> None:
    x, y = draws(10, n, 3, 4)
    found = estimate([x], [y])
    assert np.isnan(found.error).all()
    assert np.isnan(found.value).all() == (n < 4)
    assert np.isnan(jackknife_error(np.ones((1, 2)))).all()
