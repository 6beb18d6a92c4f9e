"""Lazy or rich along a training, against the closed forms of a diagonal network and loops in NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import workbench as wb
from workbench.dynamics.lazy_rich import LazyRich, left

X = torch.randn(24, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.3
Y = X @ torch.tensor([[1.0], [0.5], [-0.2]], dtype=torch.float64)
W0 = torch.tensor([1.0, 0.8, 1.2], dtype=torch.float64)


class Weighted(nn.Module):
    """h(x) = w x, feature by feature."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(W0.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.w * x


class Diagonal(nn.Module):
    """f(x) = α Σ_k (w_k² - w⁰_k²) x_k: the kernel is 4 α² X diag(w²) Xᵀ, and that of hidden features X diag(w²) Xᵀ."""

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha, self.hidden = alpha, Weighted()

    @property
    def w(self) -> nn.Parameter:
        return self.hidden.w

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * (self.hidden(x) @ self.w - x @ W0**2)[:, None]


def recorded(folder: Path, net: Diagonal, steps: Sequence[int], move: Callable[[int], None]) -> wb.Trajectory:
    """What ``move`` does at each step, with checkpoints at some of them."""
    folder.mkdir()
    for t in range(max(steps) + 1):
        if t:
            move(t)
        if t in steps:
            torch.save(net.state_dict(), folder / f"step_{t}.pt")
    return wb.Trajectory.adopt(folder / "*.pt").using(Diagonal(net.alpha), (X, Y), "half_mse")


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))


def jackknifed(numbers: np.ndarray) -> float:
    return float(np.sqrt((len(numbers) - 1) / len(numbers) * ((numbers - numbers.mean()) ** 2).sum()))


def test_every_curve_has_its_closed_form(tmp_path: Path) -> None:
    net, steps = Diagonal(), [0, 1, 2, 4, 8]

    def move(t: int) -> None:
        with torch.no_grad():
            net.w.copy_(W0 + 0.1 * t * torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64))

    trajectory = recorded(tmp_path / "a", net, steps, move)
    assert list(trajectory.steps) == steps
    data = LazyRich(examples=24).run(trajectory).data
    x, h = X.numpy(), np.eye(24) - 1 / 24
    w = [W0.numpy() + 0.1 * t * np.array([1.0, -0.5, 0.2]) for t in steps]
    k = [4 * (x * v**2) @ x.T for v in w]
    for i, t in enumerate(steps):
        assert float(data.kernel_distance[i]) == pytest.approx(1 - cosine(k[i], k[0]), abs=1e-12)
        assert float(data.centred_kernel_distance[i]) == pytest.approx(
            1 - cosine(h @ k[i] @ h, h @ k[0] @ h), abs=1e-12
        )
        assert float(data.kernel_growth[i]) == pytest.approx(np.linalg.norm(k[i]) / np.linalg.norm(k[0]))
        aim = h @ Y.numpy() @ Y.numpy().T @ h
        assert float(data.alignment[i]) == pytest.approx(cosine(h @ k[i] @ h, aim))
        moved = np.linalg.norm(w[i] - w[0])
        assert float(data.relative_displacement[i]) == pytest.approx(moved / np.linalg.norm(w[0]))
        if i:
            velocity = (1 - cosine(k[i], k[i - 1])) / (t - steps[i - 1])
            assert float(data.velocity[i]) == pytest.approx(velocity, rel=1e-7)
            gap = ((x @ (w[i] - w[0]) ** 2) ** 2).sum() / ((x @ (w[i] ** 2 - w[0] ** 2)) ** 2).sum()
            assert float(data.gap[i]) == pytest.approx(gap, rel=1e-9)
            loss = 0.5 * ((x @ (w[i] ** 2 - w[0] ** 2) - Y.numpy()[:, 0]) ** 2).mean()
            assert float(data.train_loss[i]) == pytest.approx(loss)
    assert math.isnan(float(data.velocity[0]))
    without = [np.ix_(*2 * ([j for j in range(24) if j != a],)) for a in range(24)]
    error = jackknifed(np.array([1 - cosine(k[-1][s], k[0][s]) for s in without]))
    assert float(data.kernel_distance_error[-1]) == pytest.approx(error, rel=1e-8)
    features = data.feature_alignment.sel(layer="hidden").values
    assert features == pytest.approx(1 - data.kernel_distance.values)


def trained(folder: Path, alpha: float) -> wb.Trajectory:
    """Gradient descent on (1/2α²) mean (f - y)²."""
    net = Diagonal(alpha)

    def move(t: int) -> None:
        loss = 0.5 * ((net(X) - Y) ** 2).mean() / alpha**2
        (slope,) = torch.autograd.grad(loss, [net.w])
        with torch.no_grad():
            net.w.sub_(0.01 * slope)

    return recorded(folder, net, [0, 1, 2, 4, 8, 16, 32, 64, 128, 256], move)


def test_a_large_scale_stays_lazy_and_a_small_one_leaves(tmp_path: Path) -> None:
    probe = LazyRich(threshold=0.05)
    rich, lazy = (probe.run(trained(tmp_path / f"{alpha}", alpha)).data for alpha in (0.3, 100.0))
    assert math.isnan(float(lazy.left))
    assert float(lazy.kernel_distance[-1]) < 1e-4
    assert float(lazy.gap[-1]) < 1e-4
    assert float(lazy.train_loss[-1]) < 0.2 * float(lazy.train_loss[0])
    assert 1 < float(rich.left_low) <= float(rich.left) <= float(rich.left_high)
    assert float(rich.kernel_distance.sel(step=int(rich.left))) >= 0.05
    assert float(rich.alignment[-1]) > float(rich.alignment[0]) + 0.05
    assert float(rich.gap[-1]) > 0.01


def test_the_moment_of_leaving_is_an_interval() -> None:
    steps = (0, 1, 3, 10, 30, 100, 300)
    s = np.array([0.0, 0.01, 0.11, 0.02, 0.2, 0.4, 0.5])  # the crossing at 3 does not last
    sure = left(steps, s, np.zeros(7), LazyRich())
    assert (sure["left"], sure["left_low"], sure["left_high"], sure["left_error"]) == (30, 11, 30, 19)
    unsure = left(steps, s, np.array([0.0, 0.02, 0.02, 0.05, 0.06, 0.05, 0.05]), LazyRich())
    assert (unsure["left"], unsure["left_low"], unsure["left_high"]) == (30, 2, 100)
    assert unsure["left_error"] == 70
    open_ended = left(steps, s, np.full(7, 0.3), LazyRich())
    assert open_ended["left"] == 30
    assert math.isnan(open_ended["left_high"])
    assert math.isnan(open_ended["left_error"])
    never = left(steps, s / 10, np.zeros(7), LazyRich())
    assert all(math.isnan(v) for v in never.values())


def test_a_step_that_cannot_be_measured_stays_unknown(tmp_path: Path) -> None:
    net = Diagonal()

    def move(t: int) -> None:
        with torch.no_grad():
            net.w.mul_(1.01 if t < 4 else math.nan)

    reading = LazyRich(examples=8).run(recorded(tmp_path / "a", net, [0, 2, 4], move))
    assert np.isfinite(reading.data.kernel_distance.values).tolist() == [True, True, False]
    assert any("step 4" in note for note in reading.notes)
    assert reading.done == 1
    assert not reading.converged
    with pytest.raises(ValueError, match="one checkpoint"):
        LazyRich().run(recorded(tmp_path / "b", Diagonal(), [1], move))
