"""Recorded trainings of deep linear networks against their exact solution: every singular mode learns by itself.

With whitened inputs, W* = U diag(s) Vᵀ and layers that begin balanced and aligned with W*, the product of D layers
stays U diag(u(t)) Vᵀ with u' = D u^(2 - 2/D) (s - u), t = learning rate · steps (Saxe, McClelland and Ganguli 2014).
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from torch import Tensor, nn

import workbench as wb
from workbench.dynamics import gauges
from workbench.dynamics.along import Along
from workbench.dynamics.distance import DistanceFromInit
from workbench.numerics.crossings import sustained
from workbench.probes.weight_spectra import WeightSpectra
from workbench.trajectory import Trajectory

Floats = NDArray[np.float64]
STRENGTHS = (3.0, 2.0)
START = {2: (1e-3, 1e-3), 3: (0.05, 0.02)}
KEPT = 12
"""Checkpoints of each training."""


def exact(depth: int, times: Floats) -> Floats:
    """u of each mode (times, modes): in closed form for two layers, else by integrating the equation."""
    found = []
    for s, start in zip(STRENGTHS, START[depth], strict=True):
        if depth == 2:
            growth = np.exp(2 * s * times)
            found.append(s * growth / (growth - 1 + s / start))
        else:
            solved = solve_ivp(
                lambda _, u, s=s: depth * u ** (2 - 2 / depth) * (s - u), (0, times[-1]), [start],
                t_eval=times, rtol=1e-11, atol=1e-13,
            )  # fmt: skip
            found.append(solved.y[0])
    return np.stack(found, 1)


def turn(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double())[0]


def task() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Whitened inputs (20, 3) with their targets (20, 2), and U, V of the map between them."""
    x = torch.linalg.qr(torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).double())[0] * math.sqrt(20)
    left, right = turn(2, 1), turn(3, 2)[:, :2]
    return x, x @ right @ torch.diag(torch.tensor(STRENGTHS).double()) @ left.T, left, right


def network(depth: int) -> nn.Sequential:
    """Layers R_l diag(u^(1/D)) R_(l-1)ᵀ between orthogonal bases: R_0 = V and R_D = U, those between at random."""
    _, _, left, right = task()
    bases = [right, *(turn(4, 10 + k)[:, :2] for k in range(depth - 1)), left]
    root = torch.diag(torch.tensor(START[depth], dtype=torch.float64) ** (1 / depth))
    net = nn.Sequential(*(nn.Linear(len(a), len(b), bias=False) for a, b in itertools.pairwise(bases)))
    with torch.no_grad():
        for layer, (a, b) in zip(net.double(), itertools.pairwise(bases), strict=True):
            layer.weight.copy_(b @ root @ a.T)
    return net


def record(folder: Path, depth: int, steps: int, time: float) -> Trajectory:
    """Full-batch gradient descent on ½ mean ‖f(x) - y‖² for so long, in so many steps."""
    x, y, _, _ = task()
    net = network(depth)
    optimizer = torch.optim.SGD(net.parameters(), lr=time / steps)
    each = [gauges.WeightNorm(steps // KEPT), gauges.Sharpness(steps // 2, tolerance=1e-6, limit=40)]
    given = {"every": steps // KEPT, "data": (x, y), "loss": "half_mse", "gauges": each}
    with wb.Recorder(folder, net, optimizer, **given) as recorder:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = (net(x) - y).square().sum() / (2 * len(x))
            loss.backward()
            optimizer.step()
            recorder.step(train_loss=loss)
    return Trajectory.open(folder).using(network(depth))


def modes(trajectory: Trajectory) -> Floats:
    """Strengths in the product of the recorded layers, which must lie in the modes of the task alone; (steps, 2)."""
    _, _, left, right = task()
    found = []
    for step in trajectory.steps:
        product = torch.linalg.multi_dot(list(reversed(trajectory.weights(step).values())))
        turned = left.T @ product @ right
        assert float((product - left @ torch.diag(turned.diagonal()) @ right.T).norm()) < 1e-10, "nothing beside modes"
        found.append(turned.diagonal().numpy())
    return np.stack(found)


def test_the_oracle_has_its_known_values() -> None:
    for time, wanted in ((1.0, 0.35571248), (1.5, 2.18961160)):
        assert exact(2, np.array([time]))[0, 0] == pytest.approx(wanted, abs=1e-8)
    solved = solve_ivp(
        lambda _, u: 3 * u ** (4 / 3) * (3 - u), (0, 3), [1e-3], t_eval=[1, 2, 3], rtol=1e-11, atol=1e-13
    )
    assert solved.y[0] == pytest.approx([0.00291329, 0.01552319, 0.67488141], rel=1e-5)


@pytest.mark.parametrize(("depth", "time"), [(2, 3.0), (3, 2.0)])
def test_each_recorded_mode_learns_as_the_exact_solution_says(tmp_path: Path, depth: int, time: float) -> None:
    """Gradient descent is the flow up to O(η): half the rate is half as far, and both extrapolate to the curve."""
    coarse, fine = (record(tmp_path / str(n), depth, n, time) for n in (480, 960))
    times = np.array(fine.steps) * time / 960
    wanted = exact(depth, times)
    one, two = modes(coarse), modes(fine)
    assert np.abs(one - wanted).max() == pytest.approx(2 * np.abs(two - wanted).max(), rel=0.1)
    assert 2 * two - one == pytest.approx(wanted, abs=2e-3)
    assert wanted[-1] == pytest.approx(STRENGTHS, rel=0.05), "both were learned"
    half = [sustained(times, two[:, k], s / 2, 0).step for k, s in enumerate(STRENGTHS)]
    assert half[0] < half[1], "the stronger mode first"
    if depth == 2:
        exactly = [math.log(s / u - 1) / (2 * s) for s, u in zip(STRENGTHS, START[2], strict=True)]
        assert all(0 <= h - e <= time / KEPT for h, e in zip(half, exactly, strict=True))
    _check_probes(fine, depth, two, wanted)


def _check_probes(trajectory: Trajectory, depth: int, found: Floats, wanted: Floats) -> None:
    """What the project's own probes and gauges say of the record, from the modes alone."""
    spectra = Along(WeightSpectra(resamples=0)).run(trajectory).data
    for layer in spectra.eigenvalue.values.transpose(1, 0, 2):
        assert layer[:, :2] == pytest.approx(np.sort(found)[:, ::-1] ** (2 / depth), abs=1e-9), "balanced throughout"
    root, start = found ** (1 / depth), np.array(START[depth]) ** (1 / depth)
    away = np.sqrt(depth * np.square(root - start).sum(1))
    assert DistanceFromInit().run(trajectory).data.distance.values == pytest.approx(away, abs=1e-9)
    table = trajectory.scalars
    norm = np.sqrt(depth * (wanted ** (2 / depth)).sum(1))
    assert table.weight_norm.dropna().to_numpy() == pytest.approx(norm[1:], rel=0.02)
    loss = 0.5 * np.square(np.array(STRENGTHS) - wanted).sum(1)
    assert table.train_loss.loc[list(trajectory.steps[1:])].to_numpy() == pytest.approx(loss[1:], abs=0.02 * loss[0])
    # At the minimum the steepest direction is the strongest mode's own: D s^(2 - 2/D).
    last = table.sharpness.dropna().iloc[-1]
    assert last == pytest.approx(depth * STRENGTHS[0] ** (2 - 2 / depth), rel=0.02)
