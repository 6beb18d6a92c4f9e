"""Gradient descents side by side: against the closed form of a quadratic, and its own end."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from workbench.experiments.descent import Descents, half_square, readings_at
from workbench.losses import named

CURVED = np.array([1.0, 4.0])


def valley(start: tuple[float, float] = (1.0, 0.1)) -> tuple[nn.Linear, tuple[torch.Tensor, torch.Tensor]]:
    """½ Σ_i λ_i w_i², as the half mean square of two examples, with λ = (1, 4)."""
    net = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([start]))
    return net, (torch.from_numpy(np.diag(np.sqrt(2 * CURVED))), torch.zeros(2, 1).double())


def expected(rate: float, momentum: float, steps: int) -> np.ndarray:
    """Losses of heavy ball on the valley, coordinate by coordinate."""
    w, velocity, losses = np.array([1.0, 0.1]), np.zeros(2), []
    for _ in range(steps + 1):
        losses.append(float((CURVED * w**2).sum() / 2))
        velocity = momentum * velocity + CURVED * w
        w = w - rate * velocity
    return np.array(losses)


@pytest.mark.parametrize(("rate", "momentum"), [(0.3, 0.0), (0.55, 0.0), (0.55, 0.6)])
def test_losses_ratios_and_rises_are_those_of_a_quadratic(rate: float, momentum: float) -> None:
    curves, (net, data) = Descents(2, readings_at(30, 7, 3)), valley()
    kept: list[int] = []
    assert list(curves.descend(1, net, data, rate, momentum, kept.append)) == [0, 1, 2, 3, 7, 14, 21, 28, 30]
    assert kept == list(range(31))
    found = {name: held[1] for name, held in curves.now().items()}
    losses = expected(rate, momentum, 30)
    assert found["train_loss"] == pytest.approx(losses)
    assert found["sharpness"] == pytest.approx(4.0)
    ratio = 4 * rate / (2 * (1 + momentum))
    assert found["stability_ratio"] == pytest.approx(ratio)
    assert found["ratio_late"] == pytest.approx(ratio)
    assert found["step_crossing"] == pytest.approx(0.0 if ratio >= 1 else math.nan, nan_ok=True)
    assert found["loss_rises"] == pytest.approx((np.diff(losses) > 0).mean())
    assert half_square(net, data).item() == pytest.approx(losses[-1]), "no step is taken after the last reading"
    assert np.isnan(curves.curves["train_loss"][0]).all(), "the other arm has not begun"


def test_a_descent_that_diverges_ends_at_the_next_reading() -> None:
    curves, (net, data) = Descents(1, readings_at(400, 100)), valley()
    assert list(curves.descend(0, net, data, 1e3)) == [0, 100]
    assert not math.isfinite(curves.curves["train_loss"][0, 100])
    assert np.isnan(curves.curves["train_loss"][0, 101:]).all()
    assert np.isnan(curves.curves["sharpness"][0, 2:]).all()
    assert curves.curves["loss_rises"][0] > 0


def test_the_loss_is_the_one_that_the_gauge_reads() -> None:
    net = nn.Linear(3, 4).double()
    data = (torch.randn(5, 3).double(), torch.randn(5, 4).double())
    total = named("half_mse").total(net(data[0]), data[1], 5)
    assert half_square(net, data).item() == pytest.approx(total.item() / 5)
