"""Frames of class means: closed forms of the simplex and the orthogonal frame, and what rotation must not change."""

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytest import approx

from workbench.numerics import frames


def simplex(classes: int, dim: int) -> torch.Tensor:
    """C unit vectors in R^dim with pairwise cosine -1/(C-1)."""
    rows = torch.eye(classes, dim, dtype=torch.float64)
    rows = rows - rows.mean(0)
    return rows / rows.norm(dim=1, keepdim=True)


def test_a_simplex_frame_is_collapsed_in_every_measure():
    rows = frames.centre(simplex(4, 6) + 5.0).rows
    assert frames.equinorm(rows) == approx(0, abs=1e-12)
    assert frames.equiangle(rows) == approx(0, abs=1e-12)
    assert frames.simplex_distance(rows) == approx(0, abs=1e-12)
    assert frames.self_duality(2 * rows, rows) == approx(0, abs=1e-12)
    assert frames.self_duality(-rows, rows) == approx(4)


def test_the_orthogonal_frame_differs_before_centring_only():
    identity = torch.eye(4, dtype=torch.float64)
    assert frames.simplex_distance(identity) == approx(math.sqrt(2 - 2 * math.sqrt(3 / 4)))
    assert frames.simplex_distance(frames.centre(identity).rows) == approx(0, abs=1e-12)
    assert frames.mean_cosine(identity) == 0
    assert frames.mean_cosine(simplex(4, 4)) == approx(-1 / 3)


def test_class_distance_variance_of_a_simplex():
    assert frames.class_distance_variance(torch.full((4,), 0.01, dtype=torch.float64), simplex(4, 4)) == approx(0.00375)


@given(st.integers(2, 6), st.integers(0, 2**31 - 1))
def test_centring_finds_the_span_of_the_means(classes: int, seed: int):
    rng = np.random.default_rng(seed)
    means = torch.from_numpy(rng.normal(size=(classes, 7)) + 100)
    found = frames.centre(means)
    exact = np.linalg.svd(means.numpy() - means.numpy().mean(0), compute_uv=False)[: classes - 1]
    assert np.allclose(np.sort(found.strengths.numpy())[::-1], exact, rtol=1e-7)
    inside = found.rows @ found.axes.T @ found.axes
    assert torch.allclose(inside, found.rows, atol=1e-9)


def test_merged_classes_lower_the_rank_instead_of_inverting_rounding():
    means = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0]], dtype=torch.float64)
    assert len(frames.centre(means).strengths) == 1


@given(st.integers(0, 2**31 - 1), st.floats(0.01, 100))
def test_rotating_and_scaling_the_features_changes_nothing(seed: int, scale: float):
    rng = np.random.default_rng(seed)
    means, weight = (torch.from_numpy(rng.normal(size=(5, 6))) for _ in range(2))
    turn = torch.linalg.qr(torch.from_numpy(rng.normal(size=(6, 6))))[0]
    before, after = (frames.centre(m).rows for m in (means, scale * means @ turn))
    assert frames.equinorm(after) == approx(frames.equinorm(before), rel=1e-9)
    assert frames.equiangle(after) == approx(frames.equiangle(before), rel=1e-9)
    assert frames.self_duality(weight @ turn / scale, after) == approx(frames.self_duality(weight, before), rel=1e-9)
