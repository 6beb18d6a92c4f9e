"""Worst cases against maxima known exactly: quadratics over balls, boxes and ellipsoids."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from surfaces import Q2, double, last, point, quadratic, surface
from torch import Tensor

from workbench.sharpness.ascent import worst_case
from workbench.sharpness.balls import Ball, Box, Ellipsoid, Euclidean
from workbench.sharpness.first_order import first_order
from workbench.sharpness.found import NotDefined
from workbench.sharpness.keskar import FIRST, SUBSPACES, keskar
from workbench.sharpness.scales import elementwise


def largest(hessian: Tensor, slope: Tensor, scale: Tensor, radius: float) -> float:
    """max of gᵀδ + ½ δᵀHδ over ‖δ ⊘ T‖ <= ρ by bisection of its multiplier, in the eigenvectors of T H T."""
    values, vectors = torch.linalg.eigh(scale[:, None] * hessian * scale)
    along = vectors.T @ (scale * slope)
    low, high = max(float(values[-1]), 0.0), 1e6
    for _ in range(200):
        middle = (low + high) / 2
        outside = ((along / (middle - values)) ** 2).sum() > radius**2
        low, high = (middle, high) if outside else (low, middle)
    step = scale * (vectors @ (along / (high - values)))
    return float(slope @ step + 0.5 * step @ hessian @ step)


def curved(seed: int, size: int = 12) -> tuple[Tensor, Tensor]:
    """A Hessian with eigenvalues of both signs over three decades, and a point off its minimum."""
    basis = torch.linalg.qr(double(size, size, seed=seed))[0]
    values = torch.logspace(1, -2, size, dtype=torch.float64)
    values[-3:] *= -1
    return basis @ torch.diag(values) @ basis.T, 0.3 * double(size, seed=seed + 1)


@pytest.mark.parametrize(
    ("at", "ball", "wanted"),
    [
        ((1.0, 1.0), Euclidean(0.1), 0.23264163),
        ((0.0, 0.0), Euclidean(0.1), 0.01),
        ((1.0, 1.0), Box(0.1, torch.full((2,), 0.1, dtype=torch.float64)), 0.315),
    ],
)
def test_maxima_of_a_quadratic(at: tuple[float, float], ball: Ball, wanted: float) -> None:
    found = last(worst_case(point(quadratic(Q2, *at)), ball, 20))
    assert found.value == pytest.approx(wanted, rel=1e-6)
    assert found.lower_bound
    assert found.converged


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), elliptic=st.booleans(), radius=st.floats(0.02, 2))
def test_a_lower_bound_close_to_the_maximum(seed: int, elliptic: bool, radius: float) -> None:
    hessian, at = curved(seed)
    subject = quadratic(hessian, *at.tolist())
    scale = elementwise(subject, False) if elliptic else torch.ones_like(at)
    ball = Ellipsoid(radius, scale) if elliptic else Euclidean(radius)
    here = point(subject, seed)
    found, first = last(worst_case(here, ball, 20)), last(first_order(here, ball))
    exact = largest(hessian, hessian @ subject.params["weight"][0], scale, radius)
    assert found.value <= exact * (1 + 1e-7) + 1e-12
    assert found.value >= 0.8 * exact
    assert found.value >= first.value - found.error - 1e-12


def test_the_best_of_all_iterates_counts() -> None:
    """A narrow bump that the ascent steps over: what is reported was met, whichever iterate met it."""
    met: list[float] = []

    def bumpy(w: Tensor) -> Tensor:
        loss = torch.sin(40 * w).sum() + w.sum()
        met.append(float(loss.detach()))
        return loss

    subject = surface(bumpy, 0.05, 0.2)
    here = point(subject)
    met.clear()
    found = last(worst_case(here, Euclidean(0.3), 20))
    assert found.value == pytest.approx(max(met) - here.loss, abs=1e-12)


def test_starved_ascents_are_not_called_converged() -> None:
    values = torch.linspace(0.1, 1, 40, dtype=torch.float64)
    subject = quadratic(torch.diag(values), *[0.0] * 40)
    short, long = (last(worst_case(point(subject), Euclidean(1.0), steps)) for steps in (4, 400))
    assert (short.converged, long.converged) == (False, True)
    assert short.value < 0.9 * 0.5
    assert long.value == pytest.approx(0.5, rel=0.01)


def test_keskar_on_a_quadratic() -> None:
    found = last(keskar(point(quadratic(Q2, 1.0, 1.0)), 1e-3))
    assert found.value == pytest.approx(0.24024000, abs=5e-9)


def reached(hessian: Tensor, at: Tensor, directions: Tensor, size: float) -> float:
    """φ of ½ wᵀHw in the box of a subspace: the best of scipy's trust-constr from every corner of the p x p problem."""
    reach = (size * ((directions.T @ at).abs() + 1)).numpy()
    inner, slope = (directions.T @ hessian @ directions).numpy(), (directions.T @ hessian @ at).numpy()
    corners = np.array(list(itertools.product((-1.0, 1.0), repeat=len(reach)))) * reach
    ended = [
        minimize(
            lambda y: -(slope @ y + 0.5 * y @ inner @ y),
            corner,
            jac=lambda y: -(slope + inner @ y),
            method="trust-constr",
            bounds=np.stack([-reach, reach], 1),
            options={"maxiter": 200, "gtol": 1e-12, "xtol": 1e-14},
        ).fun
        for corner in corners
    ]
    loss = float(0.5 * at @ hessian @ at)
    rise = max(-min(ended), max(float(slope @ c + 0.5 * c @ inner @ c) for c in corners))
    return 100 * rise / (1 + loss)


@pytest.mark.parametrize("seed", range(2))
def test_keskar_in_random_subspaces_of_a_quadratic(seed: int) -> None:
    """A subspace's maximum is that of a p x p quadratic over a box; p of P directions, drawn as the measure draws."""
    hessian, at = curved(seed)
    here = point(quadratic(hessian, *at.tolist()), seed)
    exact = []
    for number in range(SUBSPACES):
        drawn = torch.stack([here.draw(FIRST + 3 * number + k) for k in range(3)], 1)
        directions, sizes = torch.linalg.qr(drawn)
        exact.append(reached(hessian, at, directions * sizes.diagonal().sign(), 0.05))
    found = last(keskar(here, 0.05, 3))
    assert found.value == pytest.approx(np.mean(exact), rel=1e-6)
    assert found.error == pytest.approx(np.std(exact, ddof=1) / math.sqrt(SUBSPACES), rel=1e-4)
    assert found.converged
    assert found.lower_bound
    assert "3 random orthonormal directions of 12 parameters" in found.protocol


def test_keskar_in_as_many_directions_as_there_are_sees_a_round_quadratic_as_in_all_weights() -> None:
    """Near the minimum of ½ ‖w‖² the box is a cube of half-width ε, however it is turned: φ = 50 P ε²."""
    tilted = point(surface(lambda w: 0.5 * w @ w + 1e-3 * w.sum(), *[0.0] * 5))
    turned, straight = last(keskar(tilted, 0.1, 5)), last(keskar(tilted, 0.1))
    assert straight.value == pytest.approx(50 * 5 * 0.01 + 100 * 5e-4, rel=1e-9)
    assert turned.value == pytest.approx(50 * 5 * 0.01, rel=0.05)


def test_keskar_refuses_more_directions_than_parameters() -> None:
    with pytest.raises(NotDefined, match="does not fit into 2 parameters"):
        last(keskar(point(quadratic(Q2, 1.0, 1.0)), 1e-3, 3))


def test_ascents_draw_the_same_at_every_checkpoint_and_leave_the_weights() -> None:
    subject = quadratic(Q2, 1.0, 1.0)
    before = subject.params["weight"].clone()
    runs = [[f.value for f in worst_case(point(subject), Euclidean(0.1), 8)] for _ in range(2)]
    assert runs[0] == runs[1]
    assert torch.equal(subject.params["weight"], before)
