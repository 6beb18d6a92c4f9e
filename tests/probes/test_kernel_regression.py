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


def yes_or_no(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Yes for two in three, so that a wrong threshold is seen."""
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x, (x[:, :2].sum(1) + 0.3 * x[:, 2] ** 3 > -0.6).double()


def single(weight: Tensor, bias: float) -> nn.Linear:
    net = nn.Linear(4, 1).double()
    with torch.no_grad():
        net.weight.copy_(weight)
        net.bias.fill_(bias)
    return net


CODES = [(0, "half_mse", 0.5), (-1, "half_mse", 0.0), (0, "binary_cross_entropy_with_logits", 0.0)]


@pytest.mark.parametrize(("no", "loss", "above"), CODES)
@pytest.mark.parametrize("keep_start", [False, True])
def test_one_output_answers_yes_or_no(no: int, loss: str, above: float, keep_start: bool) -> None:
    """By ridge regression of ±1 on (x, 1); the network's own outputs are read where its targets lie."""
    (x, yes), (other, answer) = yes_or_no(40, 0), yes_or_no(150, 1)
    net = single(torch.tensor([[0.5, 0.3, -0.4, 0.2]]), 0.4)
    coded = [y[:, None] * (1 - no) + no for y in (yes, answer)]
    subject = Subject(net, (x, coded[0]), loss=loss, held_out=(other, coded[1]))
    data = KernelRegression(keep_start=keep_start).run(subject).data

    rows, others = (np.c_[v.numpy(), np.ones(len(v))] for v in (x, other))
    wanted, aim = 2 * yes.numpy() - 1, 2 * answer.numpy() - 1
    scale = 2 if above else 1
    f0, own = (scale * (net(v).detach().numpy()[:, 0] - above) for v in (x, other))
    start, end = (f0, own) if keep_start else (0.0, 0.0)
    predicted = others @ weights(rows, wanted - start, float(data.ridge)) + end
    right = ((predicted > 0) == (aim > 0)).mean()
    assert float(data.kernel_loss) == pytest.approx(0.5 * ((predicted - aim) ** 2).mean(), rel=1e-7)
    assert float(data.kernel_accuracy) == pytest.approx(right)
    assert float(data.network_accuracy) == pytest.approx(((net(other)[:, 0] > above) == (aim > 0)).numpy().mean())
    assert float(data.chance) == pytest.approx((aim > 0).mean())
    if loss == "half_mse":
        assert float(data.network_loss) == pytest.approx(0.5 * ((own - aim) ** 2).mean())
    else:
        assert math.isnan(float(data.network_loss))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.booleans())
def test_an_answer_is_a_class(seed: int, zero: bool) -> None:
    """One output for yes or no, between 0 and 1 or between -1 and 1, is two classes whose outputs are opposite."""
    fit, test = yes_or_no(24, seed), yes_or_no(60, seed + 1)
    weight = torch.randn(1, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    classes = nn.Linear(4, 2).double()
    with torch.no_grad():
        classes.weight.copy_(torch.cat([-weight, weight]))
        classes.bias.copy_(torch.tensor([0.3, -0.3]))
    no, share = (0, 0.5) if zero else (-1, 1.0)
    net = single(share * weight, 0.5 * zero - 0.3 * share)
    coded = [(x, y[:, None] * (1 - no) + no) for x, y in (fit, test)]
    pair = (
        Subject(net, coded[0], loss="half_mse", held_out=coded[1]),
        Subject(classes, (fit[0], fit[1].long()), held_out=(test[0], test[1].long())),
    )
    one, two = (KernelRegression(strengths=5, examples=100).run(s).data for s in pair)
    for name in ("kernel_accuracy", "network_accuracy", "chance", "ridge_ratio", "kernel_accuracy_low"):
        assert float(one[name]) == pytest.approx(float(two[name])), name


def test_a_threshold_is_found_in_the_loss_or_not_at_all() -> None:
    fit, test = ((x, y[:, None]) for x, y in (yes_or_no(40, 3), yes_or_no(60, 4)))
    net = single(torch.tensor([[0.5, 0.3, -0.4, 0.2]]), 0.3)

    def read(model: nn.Module, loss: object, **words: bool) -> tuple[float, float]:
        data = KernelRegression(strengths=5, **words).run(Subject(model, fit, loss=loss, held_out=test)).data
        return float(data.kernel_accuracy), float(data.network_accuracy)

    logits = ((net(test[0]) > 0) == (test[1] > 0)).double().mean().item()
    assert read(net, nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0)))[1] == pytest.approx(logits)
    assert read(nn.Sequential(net, nn.Sigmoid()), nn.BCELoss())[1] == pytest.approx(logits)

    def lopsided(outputs: Tensor, targets: Tensor) -> Tensor:
        return ((1 + 3 * targets) * (outputs - targets) ** 2).sum(1)

    known, unknown = read(net, lopsided)
    assert known > 0.6
    assert math.isnan(unknown)
    assert all(math.isnan(v) for v in read(net, lopsided, keep_start=True))


def test_values_that_are_zero_and_one_on_one_side_only_stay_values() -> None:
    """Fitted examples between 0 and 1 and held-out ones beyond are numbers, not answers."""
    x, y = yes_or_no(30, 5)
    subject = Subject(nn.Linear(4, 1).double(), (x, y[:, None]), loss="half_mse", held_out=(x, 3 * y[:, None]))
    data = KernelRegression(strengths=5).run(subject).data
    assert float(data.constant_loss) == pytest.approx(float(0.5 * ((3 * y - y.mean()) ** 2).mean()))
    assert math.isnan(float(data.kernel_accuracy))


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
