"""Fisher matrices and second moments of gradients against loops over examples and labels, and closed forms."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from architectures import SMALL, Trained, small
from torch import Tensor, nn

from workbench.operators.fisher import Fisher, SampledFisher
from workbench.operators.gauss_newton import GaussNewton
from workbench.operators.gradients import EmpiricalFisher, GradientCovariance
from workbench.operators.table import OPERATORS, curvature
from workbench.subject import Subject

X = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [2.0, 1.0]], dtype=torch.float64)


def softmax_regression(labels: tuple[int, ...]) -> Subject:
    """No bias, weights zero, three classes."""
    net = nn.Linear(2, 3, bias=False).double()
    nn.init.zeros_(net.weight)
    return Subject(net, (X, torch.tensor(labels)))


def eigenvalues(operator: Any) -> np.ndarray:
    return np.linalg.eigvalsh(operator.dense().numpy())[::-1]


@pytest.mark.parametrize("labels", [(0, 1, 2, 0), (0, 0, 0, 0)])
def test_softmax_regression_has_known_spectra(labels: tuple[int, ...]) -> None:
    subject = softmax_regression(labels)
    for name in ("hessian", "ggn", "fisher"):
        assert eigenvalues(curvature(subject, name)) == pytest.approx([0.75, 0.75, 0.25, 0.25, 0, 0], abs=1e-12)
    wanted = {0: (1.5, 0.5, 0, 0, 0, 0), 2: (1.08741673, 0.73509669, 0.16426472, 0.01322187, 0, 0)}[max(labels)]
    empirical = EmpiricalFisher(subject)
    assert eigenvalues(empirical) == pytest.approx(wanted, abs=1e-8)
    assert float(empirical.dense().trace()) == pytest.approx(2)


def gradients(net: Trained) -> Tensor:
    """g_i (n, P), one example at a time in plain PyTorch, token losses averaged over all tokens as in L."""
    model, rows = copy.deepcopy(net.model), []
    params = [p for p in model.parameters() if p.requires_grad]
    for i in range(len(net.data[0])):
        one = Trained(model, (net.data[0][i : i + 1], net.data[1][i : i + 1]))
        found = torch.autograd.grad(one.loss(model), params, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1) for g in found]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", SMALL)
def test_second_moments_of_gradients_are_those_of_a_loop(name: str) -> None:
    net = small(name)
    rows, subject = gradients(net), Subject(net.model, net.data, batch_size=32)
    v = torch.linspace(-1, 1, subject.size, dtype=torch.float64)
    uncentred, centred = EmpiricalFisher(subject), GradientCovariance(subject)
    scale = float((rows.T @ (rows @ v)).abs().max()) / len(rows)
    assert torch.allclose(uncentred.matvec(v), rows.T @ (rows @ v) / len(rows), atol=1e-9 * scale)
    apart = rows - rows.mean(0)
    assert torch.allclose(centred.matvec(v), apart.T @ (apart @ v) / (len(rows) - 1), atol=1e-9 * scale)
    block = torch.stack([v, v.flip(0)], dim=1)
    assert torch.allclose(centred @ block, torch.stack([centred @ v, centred @ v.flip(0)], dim=1), atol=1e-9 * scale)


@pytest.mark.parametrize("name", SMALL)
def test_the_exact_matrix_is_gauss_newton_for_cross_entropy(name: str) -> None:
    net = small(name)
    subject = Subject(net.model, net.data, batch_size=32)
    v = torch.linspace(-1, 1, subject.size, dtype=torch.float64)
    wanted = GaussNewton(subject).matvec(v)
    assert torch.allclose(Fisher(subject).matvec(v), wanted, atol=1e-10 * float(wanted.abs().max()))


def dense_net(outputs: int) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


def expected_by_loop(net: nn.Module, x: Tensor, labels: list[Any], loss: Callable[..., Tensor], p: Any) -> Tensor:
    """(1/n) Σ_i Σ_y p(y | x_i) ∇ℓ ∇ℓᵀ over every label there is."""
    params, total = list(net.parameters()), 0.0
    for i in range(len(x)):
        for y in labels:
            z = net(x[i : i + 1])
            g = torch.cat([t.reshape(-1) for t in torch.autograd.grad(loss(z, y), params)])
            total = total + p(z, y) * torch.outer(g, g)
    return (total / len(x)).detach()  # type: ignore[union-attr]


def test_the_exact_matrix_sums_over_every_label() -> None:
    torch.manual_seed(1)
    x, net = torch.randn(6, 3, dtype=torch.float64), dense_net(3)
    every = [torch.tensor([y]) for y in range(3)]
    wanted = expected_by_loop(net, x, every, F.cross_entropy, lambda z, y: float(z.softmax(1)[0, y]))
    assert torch.allclose(Fisher(Subject(net, (x, torch.zeros(6).long()))).dense(), wanted, atol=1e-12)
    as_nll = nn.Sequential(net, nn.LogSoftmax(dim=1))
    assert torch.allclose(Fisher(Subject(as_nll, (x, torch.ones(6).long()), "nll")).dense(), wanted, atol=1e-12)

    two = dense_net(2)
    pairs = [torch.tensor([p], dtype=torch.float64) for p in itertools.product((0.0, 1.0), repeat=2)]
    binary = "binary_cross_entropy_with_logits"
    loss = lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction="sum")  # noqa: E731
    wanted = expected_by_loop(two, x, pairs, loss, lambda z, y: float((-loss(z, y)).exp()))
    # PyTorch's mean is over both entries, so each example weighs two.
    found = Fisher(Subject(two, (x, (x[:, :2] > 0).double()), binary)).dense()
    assert torch.allclose(2 * found, wanted, atol=1e-12)


@pytest.mark.parametrize(("loss", "share"), [("half_mse", 1.0), ("mse", 2 / 3)])
def test_squared_error_stands_for_gaussian_noise(loss: str, share: float) -> None:
    torch.manual_seed(1)
    net, x = dense_net(3), torch.randn(6, 3, dtype=torch.float64)
    rows = torch.autograd.functional.jacobian(
        lambda w: torch.func.functional_call(net, unflat(net, w), (x,)).reshape(-1), flat(net)
    )
    found = Fisher(Subject(net, (x, torch.randn(6, 3, dtype=torch.float64)), loss)).dense()
    assert torch.allclose(found, share * rows.T @ rows / 6, atol=1e-12)


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def unflat(net: nn.Module, w: Tensor) -> dict[str, Tensor]:
    parts = w.split([p.numel() for p in net.parameters()])
    return {n: part.view(p.shape) for part, (n, p) in zip(parts, net.named_parameters(), strict=True)}


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy_with_logits", "half_mse"])
def test_sampled_matrices_have_the_exact_mean_and_do_not_mind_the_batches(loss: str) -> None:
    torch.manual_seed(1)
    net, x = dense_net(3), torch.randn(10, 3, dtype=torch.float64)
    y = torch.arange(10) % 3 if loss == "cross_entropy" else (x > 0).double()
    subject = Subject(net, (x, y), loss)
    exact = Fisher(subject).dense()
    mean = SampledFisher(subject, samples=4000, seed=5).dense()
    assert float((mean - exact).norm() / exact.norm()) < 0.06
    once, again = (SampledFisher(Subject(net, (x, y), loss, batch_size=b), samples=3, seed=1) for b in (10, 3))
    assert torch.allclose(once.dense(), again.dense(), atol=1e-12)
    assert not torch.allclose(once.dense(), SampledFisher(subject, samples=3, seed=2).dense(), atol=1e-3)
    assert torch.equal(once.dense(), once.dense())


def test_tokens_that_are_ignored_have_no_labels() -> None:
    torch.manual_seed(3)
    net, ids = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5)).double(), torch.randint(0, 5, (6, 3))
    targets = ids.roll(-1, 1).masked_fill(torch.arange(18).reshape(6, 3) % 4 == 0, -100)
    subject = Subject(net, (ids, targets))
    v = torch.linspace(-1, 1, subject.size, dtype=torch.float64)
    assert torch.allclose(Fisher(subject).matvec(v), GaussNewton(subject).matvec(v), atol=1e-12)


def test_what_has_no_such_matrix_is_refused_with_words() -> None:
    net, x, y = dense_net(3), torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 3
    v = torch.ones(sum(p.numel() for p in net.parameters()), dtype=torch.float64)
    weights = torch.tensor([1.0, 1.0, 9.0], dtype=torch.float64)
    for loss in (nn.CrossEntropyLoss(weight=weights), nn.CrossEntropyLoss(label_smoothing=0.1)):
        with pytest.raises(ValueError, match="no negative log-likelihood"):
            Fisher(Subject(net, (x, y.clamp_max(1)), loss))  # no label of the data has the large weight
        assert EmpiricalFisher(Subject(net, (x, y), loss)).matvec(v).isfinite().all()
    with pytest.raises(ValueError, match="no negative log-likelihood"):
        Fisher(Subject(net, (x, x), "l1"))
    objective = Subject(net, (x, y), objective=lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    for kind in OPERATORS:
        if kind != "hessian":
            with pytest.raises(TypeError, match="objective="):
                curvature(objective, kind)
    norm = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    with pytest.raises(ValueError, match="batch statistics"):
        EmpiricalFisher(Subject(norm, (x, y), norm="batch"))
    with pytest.raises(ValueError, match="at least two examples"):
        GradientCovariance(Subject(net, (x[:1], y[:1])))
    with pytest.raises(ValueError, match="at least 1"):
        SampledFisher(Subject(net, (x, y)), samples=0)
