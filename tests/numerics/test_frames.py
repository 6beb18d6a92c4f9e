"""Frames of class means: closed forms of the simplex and the orthogonal frame, and what rotation must not change."""

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytest import approx
from scipy.linalg import orthogonal_procrustes

from workbench.numerics import frames
from workbench.numerics.stats import ClassMoments


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


def nearest_simplex_by_hand(rows: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """The relative residual of the best scaled rotation of a simplex frame, by SciPy on whole feature matrices."""
    ideal = (np.eye(classes) - 1 / classes)[labels]
    ideal = np.pad(ideal - ideal.mean(0), ((0, 0), (0, rows.shape[1] - classes)))
    apart = rows - rows.mean(0)
    turn, gain = orthogonal_procrustes(ideal, apart)
    fit = gain / (ideal**2).sum() * ideal @ turn
    return float(np.linalg.norm(apart - fit) / np.linalg.norm(apart))


@given(st.integers(2, 5), st.integers(0, 2**31 - 1), st.floats(0.0, 3.0))
def test_the_distance_to_collapse_is_that_of_procrustes_on_all_features(classes: int, seed: int, noise: float):
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, 20)])
    rows = rng.normal(size=(classes, 7))[labels] + noise * rng.normal(size=(len(labels), 7))
    moments = ClassMoments.of(torch.from_numpy(rows), torch.from_numpy(labels), classes)
    found = frames.distance_to_collapse(moments.means, moments.counts, moments.scatter)
    assert found == approx(nearest_simplex_by_hand(rows, labels, classes), abs=1e-6)


@given(st.integers(3, 6), st.floats(0.1, 10), st.floats(0.0, 0.4))
def test_known_perturbations_of_a_simplex_have_known_distances(classes: int, scale: float, noise: float):
    """Noise in a direction of its own, of length ``noise`` times the frame's: what is left over is that noise."""
    means = torch.nn.functional.pad(scale * simplex(classes, classes), (0, 1)) + 3.0
    counts, scatter = torch.full((classes,), 8), torch.full((classes,), 8 * (scale * noise) ** 2, dtype=torch.float64)
    assert frames.distance_to_collapse(means, counts, scatter) == approx(noise / math.sqrt(1 + noise**2), abs=1e-6)


def test_classifier_products_angles_and_outside_means():
    rows = simplex(4, 6)
    assert frames.product_distance(2 * rows, rows) == approx(0, abs=1e-12)
    assert frames.product_distance(-rows, rows) == approx(2)
    assert frames.row_cosine(3 * rows, rows) == approx(1)
    assert frames.row_cosine(-rows, rows) == approx(-1)
    assert frames.outside_cosine(rows, torch.eye(6, dtype=torch.float64)[5]) == 0
    assert frames.outside_cosine(rows, rows[0]) == approx((1 + 3 * (1 / 3)) / 4)


def test_orthogonal_frames_of_any_lengths_are_told_from_others():
    lengths = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    means = torch.diag(lengths)
    assert frames.orthogonal_distance(means) == approx(0, abs=1e-12)
    assert frames.orthogonal_distance(means, 5 * lengths) == approx(0, abs=1e-12)
    assert frames.orthogonal_distance(torch.eye(3, dtype=torch.float64), lengths) == approx(
        math.sqrt(sum((1 / math.sqrt(3) - k / math.sqrt(98)) ** 2 for k in (9, 4, 1)))
    )
    assert frames.mean_cosine(torch.tensor([[1.0, 0], [1, 0], [-1, 0]]), absolute=True) == approx(1)


def test_means_that_differ_by_rounding_alone_are_one():
    exact = torch.full((3, 5), 1e6, dtype=torch.float64)
    means = exact * (1 + 2e-16 * torch.arange(3)[:, None])
    assert len(frames.centre(means).strengths) == 0
    assert frames.merged(means) == [(0, 1), (0, 2), (1, 2)]
    assert frames.merged(torch.eye(3, dtype=torch.float64)) == []
