"""Overlap of spans by inner products, and bounds on how far Ritz vectors are from eigenvectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench.numerics.geometry import subspace_angles, subspace_overlap
from workbench.numerics.overlap import angles, cosines, overlaps, span_sines, vector_sines


def frame(rng: np.random.Generator, rows: int, size: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((size, rows)))[0].T


def test_overlaps_and_angles_are_those_of_projections() -> None:
    rng = np.random.default_rng(0)
    first, second = (torch.from_numpy(frame(rng, 4, 9)) for _ in range(2))
    inner = cosines(first, second)
    assert overlaps(inner) == pytest.approx([subspace_overlap(first[:k], second[:k]) for k in range(1, 5)])
    assert angles(inner) == pytest.approx(subspace_angles(first, second))
    assert overlaps(cosines(first, first)) == pytest.approx(np.ones(4))
    assert angles(cosines(first, first)) == pytest.approx(np.zeros(4), abs=1e-7)


def test_unrelated_directions_overlap_by_chance() -> None:
    rng = np.random.default_rng(1)
    found = [overlaps(frame(rng, 5, 40) @ frame(rng, 5, 40).T) for _ in range(400)]
    assert np.mean(found, axis=0) == pytest.approx(np.arange(1, 6) / 40, rel=0.15)


@given(st.integers(0, 10**6), st.floats(1e-6, 0.1), st.floats(1e-3, 1.0))
def test_no_vector_is_further_off_than_its_residual_and_gap_allow(seed: int, noise: float, spread: float) -> None:
    """Ritz pairs of a disturbed span, against the eigenvectors themselves; gaps of every size."""
    rng, size, wanted = np.random.default_rng(seed), 20, 5
    values = np.sort(np.r_[rng.uniform(1, 1 + spread, wanted), rng.uniform(-1, 0.9, size - wanted)])[::-1]
    vectors = frame(rng, size, size)
    matrix = vectors.T @ np.diag(values) @ vectors
    span = np.linalg.qr((vectors[:wanted] + noise * rng.standard_normal((wanted, size)) / size).T)[0]
    ritz, inside = np.linalg.eigh(span.T @ matrix @ span)
    ritz, found = ritz[::-1], (span @ inside[:, ::-1]).T
    residuals = np.linalg.norm(found @ matrix - ritz[:, None] * found, axis=1)
    bounds, singles = span_sines(ritz, residuals), vector_sines(ritz, residuals)
    for k in range(1, wanted):
        off = np.linalg.norm(found[:k] - found[:k] @ vectors[:k].T @ vectors[:k])
        assert np.isnan(bounds[k - 1]) or off <= bounds[k - 1] + 1e-9
        one = np.linalg.norm(found[k - 1] - found[k - 1] @ vectors[k - 1] * vectors[k - 1])
        assert np.isnan(singles[k - 1]) or one <= singles[k - 1] + 1e-9


def test_a_cluster_has_a_span_but_no_vectors() -> None:
    values, residuals = np.array([2.0, 1.0, 1.0, 0.5]), np.full(4, 1e-3)
    assert span_sines(values, residuals) == pytest.approx([1e-3 / 0.999, np.nan, 3**0.5 * 1e-3 / 0.499], nan_ok=True)
    assert vector_sines(values, residuals) == pytest.approx([1e-3 / 0.999, np.nan, np.nan], nan_ok=True)
