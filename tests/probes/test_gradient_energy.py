"""The gradient along leading eigenvectors: against dense Hessians, closed forms, and rotations of known angle."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

import workbench as wb
from workbench.dynamics.along import Along
from workbench.probes.gradient_energy import GradientEnergy
from workbench.spectra.energy import turned
from workbench.subject import Subject


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    rng = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=rng, dtype=torch.float64))
    return model.to(dtype)


def examples(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(17, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return x.to(dtype), torch.arange(17) % 3


def exact_energies() -> np.ndarray:
    """(v_j·g)²/‖g‖² of the dense Hessian of the plain loss, largest eigenvalue first."""
    model, data = net(), examples()
    shapes = [(name, p.shape) for name, p in model.named_parameters()]

    def loss(vector: torch.Tensor) -> torch.Tensor:
        parts = vector.split([shape.numel() for _, shape in shapes])
        params = {name: part.view(shape) for (name, shape), part in zip(shapes, parts, strict=True)}
        return nn.functional.cross_entropy(functional_call(model, params, (data[0],)), data[1])

    flat = torch.cat([p.detach().flatten() for p in model.parameters()]).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(flat), flat)
    vectors = np.linalg.eigh(torch.autograd.functional.hessian(loss, flat).numpy())[1].T[::-1]
    return (vectors @ gradient.numpy()) ** 2 / float(gradient @ gradient)


@pytest.mark.parametrize(("tolerance", "dtype"), [(1e-6, torch.float64), (0.1, torch.float64), (1e-3, torch.float32)])
def test_energies_and_shares_are_those_of_a_dense_hessian_within_their_errors(
    tolerance: float, dtype: torch.dtype
) -> None:
    exact = exact_energies()[:5]
    reading = GradientEnergy(top=5, tolerance=tolerance).run(Subject(net(dtype), examples(dtype)))
    data = reading.data
    assert reading.converged
    for name, truth in (("energy", exact), ("share", exact.cumsum())):
        off = np.abs(data[name].values - truth)
        assert (off <= data[f"{name}_error"].values + 1e-12).all(), name
        assert tolerance > 1e-3 or off.max() < (1e-8 if dtype == torch.float64 else 1e-3), name
    assert reading.summary["gradient_share"] == pytest.approx(exact.sum(), abs=0.05)
    assert reading.summary["chance"] == 5 / 31
    assert exact.sum() > 2 * 5 / 31, "the gradient lies in sharp directions, more than by chance"


def linear(scales: list[float], weights: list[float]) -> Subject:
    """Loss (1/2n) Σ (s_i w_i)²: curvature s_i²/n along coordinate i, gradient s_i² w_i / n."""
    n = len(scales)
    model = nn.Linear(n, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([weights]))
    return Subject(model, (torch.diag(torch.tensor(scales).double()), torch.zeros(n, 1).double()), "half_mse")


def test_all_directions_together_hold_the_whole_gradient() -> None:
    data = GradientEnergy(top=10).run(linear([3.0, 2.0, 1.0], [1.0, 1.0, 1.0])).data
    assert data.energy.values[:3] == pytest.approx(np.array([81.0, 16.0, 1.0]) / 98)
    assert np.isnan(data.energy.values[3:]).all()
    assert float(data.gradient_share) == pytest.approx(1.0)
    assert float(data.gradient_share_error) < 1e-9


def test_in_a_cluster_the_span_is_known_and_its_vectors_are_not() -> None:
    subject = linear([2.0, 2.0, 1.0], [1.0, 0.0, 2.0])
    data = GradientEnergy(top=2, tolerance=1e-6).run(subject).data
    assert np.isnan(data.energy_error).all()
    assert np.isnan(data.share_error[0])
    assert float(data.gradient_share) == pytest.approx(16 / 20)
    assert float(data.gradient_share_error) < 1e-6
    one = GradientEnergy(top=1, tolerance=1e-6).run(subject)
    assert not one.converged
    assert any("no gap after eigenvalue 1" in note for note in one.notes)


def test_a_gradient_of_no_length_has_no_direction() -> None:
    reading = GradientEnergy(top=1).run(linear([2.0, 1.0], [0.0, 0.0]))
    assert math.isnan(reading.summary["gradient_share"])
    assert not reading.converged
    assert "the gradient is zero: it has no direction" in reading.notes


def test_along_descent_at_the_edge_the_gradient_turns_into_the_sharpest_direction(tmp_path: Path) -> None:
    """x = (±10, 1), y = 1: H = diag(100, 1), and with a step just above 2/100 the first coordinate swings and grows."""
    x, y = torch.tensor([[10.0, 1.0], [-10.0, 1.0]]).double(), torch.ones(2, 1).double()
    model = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.01, 0.0]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0201)
    with wb.Recorder(tmp_path / "run", model, optimizer, every=1) as recorder:
        for _ in range(60):
            optimizer.zero_grad()
            (0.5 * (model(x) - y).square().mean()).backward()
            optimizer.step()
            recorder.step()
    trajectory = wb.Trajectory.open(tmp_path / "run").using(nn.Linear(2, 1, bias=False).double(), (x, y), "half_mse")
    data = Along(GradientEnergy(top=1), every=15).run(trajectory).data
    steps = data["step"].values
    first, second = 100 * 0.01 * (1 - 2.01) ** steps, -((1 - 0.0201) ** steps)
    assert data.gradient_share.values == pytest.approx(first**2 / (first**2 + second**2))
    assert data.gradient_share.values[0] == pytest.approx(0.5)
    assert data.gradient_share.values[-1] > 0.9


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.integers(1, 5), st.floats(0.0, 1.5), st.integers(0, 10**6))
def test_a_span_that_turns_by_an_angle_holds_no_more_and_no_less_than_its_bound(
    size: int, count: int, angle: float, seed: int
) -> None:
    """A span, and the same turned by a rotation in one plane: its largest principal angle is that of the rotation."""
    rng, count = np.random.default_rng(seed), min(count, size - 1)
    basis = np.linalg.qr(rng.normal(size=(size, size)))[0].T
    span = basis[:count]
    other = span.copy()
    other[0] = math.cos(angle) * basis[0] + math.sin(angle) * basis[count]
    direction = rng.normal(size=size)
    direction /= np.linalg.norm(direction)
    one, two = (((rows @ direction) ** 2).sum() for rows in (span, other))
    bound = turned(np.array([one]), np.array([math.sin(angle)]))[0]
    assert abs(two - one) <= bound + 1e-9
    inside = turned(np.array([1.0]), np.array([math.sin(angle)]))[0]
    assert inside == pytest.approx(math.sin(angle) ** 2), "reached by a direction within the span"
