"""Kernel ridge regression against ridge regression of a linear model's weights, with examples really left out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from architectures import small
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from workbench.numerics.kernel_ridge import KernelRidge
from workbench.probes.kernel_regression import KernelRegression
from workbench.subject import Subject


def clouds(n: int, seed: int, labels: bool) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=rng, dtype=torch.float64)
    y = x @ torch.tensor([[1.0, -1.0, 0.5], [0.0, 2.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.3]], dtype=torch.float64)
    y = y + torch.randn(n, 3, generator=rng, dtype=torch.float64)
    return x, y.argmax(1) if labels else y


def weights(x: np.ndarray, y: np.ndarray, ridge: float) -> np.ndarray:
    """Ridge regression in the space of weights, without an offset."""
    return np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ y)


@settings(max_examples=25, deadline=None)
@given(st.integers(4, 9), st.integers(1, 3), st.booleans(), st.floats(-3, 2), st.integers(0, 100))
def test_leaving_out_is_leaving_out(n: int, q: int, together: bool, log_ridge: float, seed: int) -> None:
    rng, ridge = np.random.default_rng(seed), 10.0**log_ridge
    blocks = 1 if together else q
    rows, y = rng.standard_normal((n * blocks, 5)), rng.standard_normal((n, q))
    kernel = torch.from_numpy((rows @ rows.T).reshape(n, blocks, n, blocks))
    made = KernelRidge.of(kernel, torch.from_numpy(y))
    flat, wanted = y.reshape(n * blocks, -1), np.zeros_like(y)
    for i in range(n):
        kept = np.ones(n * blocks, dtype=bool)
        kept[i * blocks : (i + 1) * blocks] = False
        found = rows[~kept] @ weights(rows[kept], flat[kept], ridge)
        wanted[i] = y[i] - found.reshape(q)
    assert made.residuals(ridge).numpy() == pytest.approx(wanted, rel=1e-7, abs=1e-9)
    fitted = made.predicted(kernel, ridge).numpy()
    assert fitted == pytest.approx((rows @ weights(rows, flat, ridge)).reshape(n, q), rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("outputs", ["trace", "full"])
def test_a_linear_model_is_ridge_regression_of_its_weights(outputs: str) -> None:
    (x, y), (other, aim) = (clouds(n, s, False) for n, s in ((30, 0), (50, 1)))
    net = nn.Linear(4, 3, bias=False).double()
    subject = Subject(net, (x, y), loss="half_mse", held_out=(other, aim))
    data = KernelRegression(outputs=outputs, strengths=13).run(subject).data
    ridge = float(data.ridge)
    predicted = other.numpy() @ weights(x.numpy(), y.numpy(), ridge)
    losses = 0.5 * ((predicted - aim.numpy()) ** 2).sum(1)
    assert float(data.kernel_loss) == pytest.approx(losses.mean(), rel=1e-8)
    assert float(data.kernel_loss_error) == pytest.approx(losses.std(ddof=1) / math.sqrt(50), rel=1e-8)
    own = 0.5 * ((net(other) - aim) ** 2).sum(1).mean()
    assert float(data.network_loss) == pytest.approx(own.item())
    assert float(data.left_out.min()) == pytest.approx(float(data.left_out.sel(strength=data.ridge_ratio)))
    mean = np.trace((x @ x.T).numpy()) / 30
    assert ridge == pytest.approx(float(data.ridge_ratio) * mean, rel=1e-9)
    assert math.isnan(float(data.kernel_accuracy))


def test_what_is_subtracted_comes_back() -> None:
    """With f₀ kept, the regression moves the weights from where they are: W = W₀ + argmin of the residual's ridge."""
    (x, y), (other, aim) = (clouds(n, s, False) for n, s in ((20, 2), (10, 3)))
    net = nn.Linear(4, 3, bias=False).double()
    subject = Subject(net, (x, y), loss="half_mse", held_out=(other, aim))
    data = KernelRegression(keep_start=True).run(subject).data
    start = net.weight.detach().numpy().T
    moved = start + weights(x.numpy(), y.numpy() - x.numpy() @ start, float(data.ridge))
    assert float(data.kernel_loss) == pytest.approx(0.5 * ((other.numpy() @ moved - aim.numpy()) ** 2).sum(1).mean())


def test_classes_are_counted_beside_the_network() -> None:
    fit, test = clouds(60, 4, True), clouds(80, 5, True)
    net = nn.Linear(4, 3, bias=False).double()
    data = KernelRegression(strengths=9).run(Subject(net, fit, held_out=test)).data
    one_hot = np.eye(3)[fit[1].numpy()] - 1 / 3
    predicted = test[0].numpy() @ weights(fit[0].numpy(), one_hot, float(data.ridge))
    right = (predicted.argmax(1) == test[1].numpy()).mean()
    assert float(data.kernel_accuracy) == pytest.approx(right)
    assert float(data.kernel_accuracy_low) < right < float(data.kernel_accuracy_high)
    own = (net(test[0]).argmax(1) == test[1]).double().mean()
    assert float(data.network_accuracy) == pytest.approx(float(own))
    assert math.isnan(float(data.network_loss))
    assert float(data.kernel_accuracy) > float(data.chance)


def test_single_precision_is_raised_and_no_examples_are_refused() -> None:
    net = small("dense GELU")
    x, y = net.data
    held = (x[:20], y[:20])
    rows = [Subject(net.model, (x[20:], y[20:]), held_out=held, dtype=d) for d in (torch.float32, torch.float64)]
    probe = KernelRegression(examples=24, held_out_examples=20)
    single, double = (probe.run(s).data for s in rows)
    assert float(single.kernel_loss) == pytest.approx(float(double.kernel_loss), rel=1e-3)
    with pytest.raises(ValueError, match="held_out="):
        probe.run(Subject(net.model, (x, y)))
