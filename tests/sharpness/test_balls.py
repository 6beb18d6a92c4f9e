"""Projections by what characterises them, steepest points by comparison with all others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from surfaces import double
from torch import Tensor

from workbench.sharpness.balls import Ball, Box, Ellipsoid, Euclidean

KINDS = ("ball", "box", "ellipsoid", "long ellipsoid")


def made(kind: str, seed: int, size: int = 9) -> tuple[Ball, Tensor]:
    """A set and the scale in whose units it is a unit ball or box, some entries zero."""
    scale = double(size, seed=seed).abs()
    if kind == "ball":
        return Euclidean(0.7), torch.ones(size, dtype=torch.float64)
    scale[0] = 0.0
    if kind == "box":
        return Box(0.3, 0.3 * scale), scale
    if kind == "long ellipsoid":
        scale = scale ** torch.linspace(1, 12, size, dtype=torch.float64)
    return Ellipsoid(0.7, scale), scale


def length(ball: Ball, step: Tensor, scale: Tensor) -> float:
    """The step's length in the set's own norm, over the radius."""
    relative = torch.where(scale > 0, step / scale.clamp_min(1e-300), 0.0)
    return float(relative.abs().max() if isinstance(ball, Box) else relative.norm()) / ball.radius


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), far=st.floats(0.01, 100))
def test_a_projection_is_the_nearest_point(kind: str, seed: int, far: float) -> None:
    """p = P(z) if and only if p lies in the set and (z - p)·(y - p) <= 0 for every y in it."""
    ball, scale = made(kind, seed)
    z = far * double(9, seed=seed + 1)
    p = ball.project(z)
    assert length(ball, p, scale) <= 1 + 1e-9
    assert (p[scale == 0] == 0).all()
    others = [ball.random(double(9, seed=seed + 2 + k)) for k in range(20)] + [ball.steepest(z - p)]
    for y in others:
        assert float((z - p) @ (y - p)) <= 1e-7 * float(z.norm()) * float(y.norm() + p.norm())
    torch.testing.assert_close(ball.project(p), p, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_no_point_of_the_set_lies_further_along_the_slope_than_the_steepest(kind: str) -> None:
    ball, scale = made(kind, 3)
    slope = double(9, seed=4)
    best = ball.steepest(slope)
    assert length(ball, best, scale) == pytest.approx(1, rel=1e-9)
    for k in range(200):
        other = ball.random(double(9, seed=10 + k))
        assert length(ball, other, scale) <= 1 + 1e-9
        assert float(slope @ other) <= float(slope @ best) * (1 + 1e-9)


def test_a_rescaling_is_no_projection_on_an_ellipsoid() -> None:
    ball, z = Ellipsoid(1.0, torch.tensor([1.0, 10.0], dtype=torch.float64)), torch.full((2,), 5.0).double()
    shrunk = z / length(ball, z, ball.scale)
    assert float((z - ball.project(z)).norm()) < 0.8 * float((z - shrunk).norm())


def test_a_slope_of_zero_moves_nothing() -> None:
    for kind in KINDS:
        ball = made(kind, 0)[0]
        assert not ball.steepest(torch.zeros(9, dtype=torch.float64)).any()
