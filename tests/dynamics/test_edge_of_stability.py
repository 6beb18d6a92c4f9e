"""The edge of stability: against dense Hessians, closed forms of two weights, and Adam's own state."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import linregress
from torch import nn

import workbench as wb
from workbench.dynamics.edge_of_stability import EdgeOfStability, sharpening
from workbench.trajectory import Trajectory

ONE = (torch.ones(1, 1).double(), torch.ones(1, 1).double())


def product(first: float, second: float) -> nn.Sequential:
    """f(x) = w2 w1 x."""
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight.fill_(first)
        net[1].weight.fill_(second)
    return net


def small(seed: int = 1) -> tuple[nn.Sequential, tuple[torch.Tensor, torch.Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=rng, dtype=torch.float64))
    return net, (torch.randn(12, 3, generator=rng).double(), torch.randn(12, 2, generator=rng).double())


def record(folder: Path, net: nn.Module, data: tuple, optimizer, steps: int, every: int = 1, **told) -> Trajectory:
    """Full-batch training on half the squared distance; ``rates`` are what the learning rate is set to after steps."""
    rates = told.pop("rates", {})
    with wb.Recorder(folder, net, optimizer, every=every, **told) as recorder:
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            ((net(data[0]) - data[1]) ** 2).sum(1).mean().div(2).backward()
            optimizer.step()
            optimizer.param_groups[0]["lr"] = rates.get(step, optimizer.param_groups[0]["lr"])
            recorder.step()
    return Trajectory.open(folder).using(net, data, "half_mse")


def dense(path: Trajectory, step: int, data: tuple) -> tuple[torch.Tensor, float]:
    """The whole Hessian (P, P), and the loss, at one step, by plain double differentiation."""
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    held = {name: path.weights(step)[name] for name in names}

    def loss(*weights: torch.Tensor) -> torch.Tensor:
        w = dict(zip(names, weights, strict=True))
        out = torch.tanh(data[0] @ w["0.weight"].T + w["0.bias"]) @ w["2.weight"].T + w["2.bias"]
        return ((out - data[1]) ** 2).sum(1).mean() / 2

    blocks = torch.autograd.functional.hessian(loss, tuple(held.values()))
    sizes = [t.numel() for t in held.values()]
    rows = [[b.reshape(n, m) for b, m in zip(row, sizes, strict=True)] for row, n in zip(blocks, sizes, strict=True)]
    return torch.cat([torch.cat(row, 1) for row in rows]), float(loss(*held.values()))


def test_eigenvalues_and_ratios_are_those_of_the_dense_hessian_under_a_schedule(tmp_path: Path) -> None:
    net, data = small()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.5)
    path = record(tmp_path / "run", net, data, optimizer, 8, rates={5: 0.9})
    found = EdgeOfStability(top=3, tolerance=1e-6).run(path).data
    wanted = [dense(path, step, data) for step in path.steps]
    largest = np.array([torch.linalg.eigvalsh(h).flip(0)[:3].tolist() for h, _ in wanted])
    assert found.eigenvalue.values == pytest.approx(largest, rel=1e-6)
    assert found.train_loss.values == pytest.approx([loss for _, loss in wanted])
    limits = [2 * 1.5 / (0.05 if step < 5 else 0.9) for step in path.steps]
    assert found.stability_threshold.values == pytest.approx(limits)
    ratios = largest[:, 0] / limits
    assert found.stability_ratio.values == pytest.approx(ratios, rel=1e-6)
    assert ratios[4] < 1 < ratios[5:8].min(), "the schedule alone takes it over the edge"
    assert (float(found.step_crossing), float(found.step_crossing_error)) == (5.0, 0.0)
    slope = linregress(path.steps[:5], largest[:5, 0])
    assert float(found.sharpening_rate) == pytest.approx(slope.slope, rel=1e-4)
    assert float(found.sharpening_rate_error) == pytest.approx(slope.stderr, rel=1e-2)
    assert float(found.ratio_late) == pytest.approx(ratios[-10:].mean(), rel=1e-6)


@pytest.mark.parametrize(("start", "rate", "sharpness"), [((2.5, 0.3), 0.2, 6.46068), ((1.9, 0.4), 0.55, 3.2000)])
def test_two_weights_that_stay_below_their_limit(tmp_path: Path, start, rate: float, sharpness: float) -> None:
    """Gradient descent on ½(w2 w1 - 1)²; where a gradient flow would end is a little sharper, √(6.16² + 4)."""
    net = product(*start)
    path = record(tmp_path / "run", net, ONE, torch.optim.SGD(net.parameters(), lr=rate), 200, every=20)
    reading = EdgeOfStability(late=3).run(path)
    assert float(reading.data.eigenvalue[-1, 0]) == pytest.approx(sharpness, rel=1e-4)
    assert reading.summary["ratio_late"] == pytest.approx(sharpness * rate / 2, rel=1e-3)
    assert math.isnan(reading.summary["step_crossing"])
    assert reading.converged
    given = EdgeOfStability(threshold=sharpness / 2, every=5).run(path)
    assert given.data["step"].values.tolist() == [0, 100, 200]
    assert given.summary["ratio_late"] == pytest.approx(2, rel=0.1)
    assert given.summary["step_crossing"] <= 100


@pytest.mark.parametrize(("told", "constant"), [({}, 2.0), ({"momentum": 0.9}, 3.8),
                                               ({"momentum": 0.9, "nesterov": True}, 1.35714286)])  # fmt: skip
def test_the_limit_is_that_of_the_update(tmp_path: Path, told: dict, constant: float) -> None:
    net = product(1.0, 1.0)
    path = record(tmp_path / "run", net, ONE, torch.optim.SGD(net.parameters(), lr=0.01, **told), 2)
    assert EdgeOfStability().run(path).data.stability_threshold.values == pytest.approx(constant / 0.01)


def test_adam_is_seen_through_its_own_state(tmp_path: Path) -> None:
    net, data = small(3)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    path = record(tmp_path / "run", net, data, optimizer, 5, keep_optimizer=True)
    reading = EdgeOfStability(preconditioned=True, tolerance=1e-6).run(path)
    found = reading.data
    assert np.isnan(found.eigenvalue.values[0]).all()
    assert any("step 0 could not be measured" in note for note in reading.notes)
    assert found.stability_threshold.values[1:] == pytest.approx(2 * 1.9 / 0.1)
    for place, step in enumerate(path.steps[1:], 1):
        state = path.optimizer(step)["state"]
        square = torch.cat([state[i]["exp_avg_sq"].flatten() for i in sorted(state)]) / (1 - 0.999**step)
        scale = (1 - 0.9**step) * (square.sqrt() + 1e-8) / 0.01
        hessian, _ = dense(path, step, data)
        largest = torch.linalg.eigvals(hessian / scale[:, None]).real.max()
        assert float(found.eigenvalue[place, 0]) == pytest.approx(float(largest), rel=1e-5)
    plain = EdgeOfStability().run(path)
    assert plain.data.stability_ratio.isnull().all(), "H without P says nothing of Adam"
    assert any("no threshold is known" in note for note in plain.notes)


def test_a_state_that_was_not_kept_is_said_before_work_starts(tmp_path: Path) -> None:
    net, data = small()
    path = record(tmp_path / "run", net, data, torch.optim.Adam(net.parameters()), 2)
    with pytest.raises(ValueError, match="keep_optimizer=True"):
        EdgeOfStability(preconditioned=True).run(path)


def test_a_run_that_diverges_is_known_up_to_there(tmp_path: Path) -> None:
    net, data = small()
    path = record(tmp_path / "run", net, data, torch.optim.SGD(net.parameters(), lr=1e200), 3)
    reading = EdgeOfStability().run(path)
    assert np.isfinite(reading.data.eigenvalue.values[0]).all()
    assert np.isnan(reading.data.eigenvalue.values[-1]).all()
    assert not reading.converged


@settings(max_examples=50, deadline=None)
@given(st.floats(-5, 5), st.lists(st.floats(-1, 1), min_size=3, max_size=12))
def test_the_slope_is_that_of_a_regression(slope: float, noise: list[float]) -> None:
    steps = np.cumsum(np.arange(1, len(noise) + 1))
    values = 3 + slope * steps + np.array(noise)
    wanted = linregress(steps, values)
    got, error = sharpening(steps, values, np.zeros(len(noise)))
    assert got == pytest.approx(wanted.slope, abs=1e-9)
    stderr = np.nan_to_num(wanted.stderr)  # scipy: nan for values that are all equal
    assert error == pytest.approx(stderr, abs=1e-7)
    _, wider = sharpening(steps, values, np.ones(len(noise)))
    assert wider == pytest.approx(math.hypot(stderr, 1 / np.sqrt(((steps - steps.mean()) ** 2).sum())), abs=1e-7)
    assert all(math.isnan(v) for v in sharpening(steps[:1], values[:1], [0.0]))
