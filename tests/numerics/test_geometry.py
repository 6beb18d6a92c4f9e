"""Frames, subspaces and paths whose geometry is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import subspace_angles as scipy_angles

from workbench.numerics import geometry as g


@pytest.mark.parametrize(("classes", "dimension"), [(2, 2), (4, 4), (10, 13)])
def test_the_simplex_frame_is_equiangular_and_tight(classes: int, dimension: int) -> None:
    frame = g.simplex_frame(classes, dimension)
    gram = (frame @ frame.T).numpy()
    np.testing.assert_allclose(np.diag(gram), 1, atol=1e-14)
    np.testing.assert_allclose(gram[~np.eye(classes, dtype=bool)], -1 / (classes - 1), atol=1e-14)
    np.testing.assert_allclose(frame.sum(0), 0, atol=1e-14)
    with pytest.raises(ValueError, match="at least as many dimensions"):
        g.simplex_frame(4, 3)


@given(seed=st.integers(0, 10**6), k=st.integers(1, 5), m=st.integers(1, 5))
def test_angles_equal_those_of_scipy_in_any_basis(seed: int, k: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(k, 12)), rng.normal(size=(m, 12))
    expected = np.sort(scipy_angles(a.T, b.T))
    mixed = rng.normal(size=(k, k)) @ a
    np.testing.assert_allclose(g.subspace_angles(torch.from_numpy(a), torch.from_numpy(b)), expected, atol=1e-12)
    np.testing.assert_allclose(g.subspace_angles(torch.from_numpy(mixed), torch.from_numpy(b)), expected, atol=1e-8)
    overlap = g.subspace_overlap(torch.from_numpy(a), torch.from_numpy(b))
    assert overlap == pytest.approx(np.mean(np.cos(expected) ** 2))


@pytest.mark.parametrize("angle", [1e-12, 1e-6, 0.5, np.pi / 2 - 1e-9])
def test_small_and_large_angles_keep_their_digits(angle: float) -> None:
    a = torch.eye(2, 6, dtype=torch.float64)
    b = a.clone()
    b[1, 1], b[1, 4] = np.cos(angle), np.sin(angle)
    np.testing.assert_allclose(g.subspace_angles(a, b), [0, angle], rtol=1e-9, atol=1e-15)
    with pytest.raises(ValueError, match="dependent"):
        g.subspace_angles(a[[0, 0]], b)


def descent(steps: int = 50) -> torch.Tensor:
    """Gradient descent on (x² + 0.1 y²) / 2 with step 0.5 from (1, 1)."""
    factors = torch.tensor([0.5, 0.95], dtype=torch.float64)
    return factors ** torch.arange(steps + 1, dtype=torch.float64)[:, None]


def test_the_known_shares_of_a_descent() -> None:
    path = descent()
    axes = g.principal_path(path, path[-1])
    np.testing.assert_allclose(axes.explained, [0.84217299, 0.15782701], atol=1e-8)
    np.testing.assert_allclose(axes.directions @ axes.directions.T, np.eye(2), atol=1e-12)
    np.testing.assert_allclose(axes.coordinates[-1], 0, atol=1e-14)
    rebuilt = torch.from_numpy(axes.coordinates) @ axes.directions + path[-1]
    torch.testing.assert_close(rebuilt, path)


@given(seed=st.integers(0, 10**6), count=st.integers(4, 12), lazy=st.booleans())
def test_path_axes_equal_those_of_a_singular_value_decomposition(seed: int, count: int, lazy: bool) -> None:
    rng = np.random.default_rng(seed)
    path, reference = rng.normal(size=(count, 40)).cumsum(axis=0), rng.normal(size=40)
    points = [torch.from_numpy(p) for p in path] if lazy else torch.from_numpy(path)
    axes = g.principal_path(points, torch.from_numpy(reference), components=3)
    _, values, right = np.linalg.svd(path - path.mean(0), full_matrices=False)
    np.testing.assert_allclose(axes.explained, (values**2 / (values**2).sum())[:3], rtol=1e-9)
    np.testing.assert_allclose(np.abs(axes.directions.numpy() @ right[:3].T), np.eye(3), atol=1e-6)
    np.testing.assert_allclose(axes.coordinates, (path - reference) @ axes.directions.numpy().T, atol=1e-9)
    assert (axes.coordinates[np.abs(axes.coordinates).argmax(0), np.arange(3)] > 0).all()


def test_a_straight_line_has_one_axis() -> None:
    line = torch.linspace(0, 1, 7, dtype=torch.float64)[:, None] * torch.tensor([3.0, 4.0], dtype=torch.float64)
    axes = g.principal_path(line, line[0], components=1)
    assert axes.explained[0] == pytest.approx(1)
    np.testing.assert_allclose(axes.directions[0], [0.6, 0.8])
    with pytest.raises(ValueError, match="fewer than 2 dimensions"):
        g.principal_path(line, line[0])
    with pytest.raises(ValueError, match="path of 7 points"):
        g.principal_path(line, line[0], components=7)


def test_random_walks_explain_much_by_themselves() -> None:
    np.testing.assert_allclose(g.random_walk_explained(2), [0.60792710, 0.15198178], atol=1e-8)
    np.testing.assert_allclose(g.random_walk_explained(2, 10), [0.61914331, 0.15866873], atol=1e-8)
    walk = torch.randn(10, 20_000, generator=torch.Generator().manual_seed(0)).cumsum(0)
    found = g.principal_path(walk, walk[-1])
    np.testing.assert_allclose(found.explained, found.random_walk, atol=0.01)


@given(seed=st.integers(0, 10**6))
def test_coordinates_are_least_squares_for_skewed_axes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    directions, points, origin = rng.normal(size=(2, 9)), rng.normal(size=(4, 9)), rng.normal(size=9)
    found, distances = g.coordinates(*(torch.from_numpy(x) for x in (points, origin, directions)))
    expected = np.linalg.lstsq(directions.T, (points - origin).T, rcond=None)[0].T
    np.testing.assert_allclose(found, expected, atol=1e-9)
    np.testing.assert_allclose(distances, np.linalg.norm(points - origin - expected @ directions, axis=1), atol=1e-9)
