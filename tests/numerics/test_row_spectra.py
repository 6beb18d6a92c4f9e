"""Spectra of rows that come in batches against dense singular values, centred or not, whole and without a group."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytest import approx

from workbench.numerics import row_spectra
from workbench.numerics.row_spectra import GroupedRows, RowSpectrum, kept_bytes, summed


def last(rows: np.ndarray, groups: int = 4, centred: bool = False, step: int = 7) -> RowSpectrum:
    """What is left of rows that come ``step`` at a time."""
    given_rows = torch.from_numpy(rows)
    held = GroupedRows(*rows.shape, groups, centred, given_rows.dtype)
    for at in range(0, len(rows), step):
        held.add(given_rows[at : at + step])
    return list(held.spectra())[-1]


def dense(rows: np.ndarray, size: int, centred: bool) -> np.ndarray:
    """NumPy's singular values over √n, with zeros to fill up."""
    rows = rows.astype(np.float64)
    found = np.linalg.svd(rows - rows.mean(0) * centred, compute_uv=False) / np.sqrt(len(rows))
    return np.pad(found, (0, size))[:size]


SHAPES = {"second moments": (90, 5), "rows": (30, 12), "inner products": (14, 25)}


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("way", "shape"), list(SHAPES.items()))
@pytest.mark.parametrize("tile", [4, 2048])
def test_all_ways_equal_dense_singular_values(
    way: str, shape: tuple[int, int], centred: bool, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_spectra, "TILE", tile)
    assert summed(*shape, 4, torch.float64) == (way == "second moments")
    rows = np.random.default_rng(0).normal(size=shape) * 0.5 ** np.arange(shape[1]) + 2
    found, size = last(rows, 4, centred), min(shape)
    scale = 1e-7 * found.values[0]
    np.testing.assert_allclose(found.values, dense(rows, size, centred), atol=scale, rtol=1e-9)
    for group in range(4):
        want = dense(np.delete(rows, np.s_[group::4], 0), size, centred)
        np.testing.assert_allclose(found.replicates[group], want, atol=scale, rtol=1e-9)
    spread = np.sqrt(3 * found.replicates.var(0))
    np.testing.assert_allclose(found.error, spread, rtol=1e-9)


@given(
    n=st.integers(1, 40), d=st.integers(1, 20), groups=st.integers(0, 6), step=st.integers(1, 40),
    centred=st.booleans(), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_batches_and_the_way_of_keeping_make_no_difference(
    n: int, d: int, groups: int, step: int, centred: bool, seed: int
) -> None:
    rows = np.random.default_rng(seed).normal(size=(n, d)) + 3
    found = last(rows, groups, centred, step)
    np.testing.assert_allclose(found.values, dense(rows, min(n, d), centred), atol=1e-6)
    assert len(found.replicates) == (groups if groups > 1 and n >= 2 * groups else 0)
    assert not centred or n > d or found.values[-1] < 1e-6, "a centred matrix of n rows has rank n - 1 at most"


@pytest.mark.parametrize("shape", SHAPES.values())
def test_what_only_rounding_makes_is_nothing(shape: tuple[int, int]) -> None:
    equal = np.full(shape, 0.1, dtype=np.float32) * np.linspace(1, 2, shape[1], dtype=np.float32)
    assert (last(equal, centred=True).values == 0).all()
    plain = last(equal).values
    assert plain[0] == approx(np.linalg.norm(equal[0].astype(float)), rel=1e-6)
    assert (plain[1:] < 1e-6 * plain[0]).all()


@pytest.mark.parametrize("shape", SHAPES.values())
def test_a_large_offset_does_not_cancel(shape: tuple[int, int]) -> None:
    rows = np.random.default_rng(1).normal(size=shape)
    want = last(rows, centred=True)
    found = last(rows + 1e6, centred=True)
    np.testing.assert_allclose(found.values, want.values, atol=1e-6)
    np.testing.assert_allclose(found.replicates, want.replicates, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES.values())
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_is_unknown(shape: tuple[int, int], bad: float) -> None:
    rows = np.ones(shape)
    rows[5, 2] = bad
    assert np.isnan(last(rows).values).all()


def test_what_is_kept_is_bounded_by_the_squares_of_the_columns() -> None:
    for dtype in (torch.float32, torch.float64):
        for d in (3, 100, 2048):
            sizes = [kept_bytes(n, d, 10, dtype) for n in (10, 1000, 10**5, 10**6, 10**7)]
            assert max(sizes) <= 12 * 8 * d * d
            assert all(size <= n * d * dtype.itemsize for size, n in zip(sizes, (10, 1000, 10**5, 10**6), strict=False))
