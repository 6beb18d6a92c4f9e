"""Fisher-Rao norms against closed forms and against Jacobians example by example."""

from __future__ import annotations

import pytest
import torch
from architectures import small
from surfaces import double, last, point, quadratic
from torch import Tensor, nn

from workbench.sharpness.fisher_rao import fisher_rao, fisher_rao_empirical
from workbench.sharpness.found import NotDefined
from workbench.subject import Subject


class Product(nn.Module):
    """f(x) = w2 w1 x."""

    def __init__(self, first: float, second: float) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.full((1, 1), w, dtype=torch.float64)) for w in (first, second))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.first @ self.second


def test_two_scalar_layers() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    here = point(Subject(Product(1, 2), (one, 3 * one), loss="half_mse"))
    assert last(fisher_rao_empirical(here)).value == pytest.approx(16, rel=1e-12)  # 4 f² (f - y)²
    model = last(fisher_rao(here))
    assert model.value == pytest.approx(16, rel=1e-12)  # 4 f²
    assert model.extra["fisher_rao_shortcut"] == pytest.approx(1, rel=1e-12)


def test_the_short_cut_holds_for_homogeneous_networks_only() -> None:
    data = (double(30, 5), torch.arange(30) % 3)
    shares = []
    for bias in (False, True):
        torch.manual_seed(0)
        layers = (nn.Linear(5, 8, bias=bias), nn.ReLU(), nn.Linear(8, 6, bias=bias), nn.ReLU())
        net = nn.Sequential(*layers, nn.Linear(6, 3, bias=bias)).double()
        shares.append(last(fisher_rao(point(Subject(net, data, batch_size=8)))).extra["fisher_rao_shortcut"])
    assert shares[0] == pytest.approx(1, rel=1e-12)
    assert abs(shares[1] - 1) > 0.01


def test_both_are_quadratic_forms_of_their_matrices() -> None:
    """θᵀFθ with F summed over examples from Jacobian rows; a token model's positions count as examples."""
    net = small("dense GELU")
    params = list(net.model.parameters())
    weights = torch.cat([p.detach().flatten() for p in params])
    model = empirical = 0.0
    outputs = net.model(net.data[0])
    for row, label in zip(outputs, net.data[1], strict=True):
        grads = [torch.autograd.grad(z, params, retain_graph=True) for z in row]
        pushed = torch.stack([torch.cat([g.flatten() for g in found]) @ weights for found in grads])
        p = row.detach().softmax(0)
        model += float(pushed @ (p.diag() - p.outer(p)) @ pushed) / len(outputs)
        empirical += float((p - nn.functional.one_hot(label, len(p))) @ pushed) ** 2 / len(outputs)
    here = point(Subject(net.model, net.data, batch_size=32))
    assert last(fisher_rao(here)).value == pytest.approx(model, rel=1e-10)
    assert last(fisher_rao_empirical(here)).value == pytest.approx(empirical, rel=1e-10)


def test_the_mean_over_elements_is_the_examples_own_loss() -> None:
    """For mse ℓ_i = ‖f - y‖²/C: half of it, over C, is half_mse, so its empirical norm is (2/C)² times that."""
    data, net = (double(7, 4), double(7, 3, seed=1)), nn.Linear(4, 3).double()
    norms = {
        name: last(fisher_rao_empirical(point(Subject(net, data, loss=name, batch_size=3)))).value
        for name in ("mse", "half_mse")
    }
    assert norms["mse"] == pytest.approx(norms["half_mse"] * (2 / 3) ** 2, rel=1e-10)


def test_tokens_count_as_examples() -> None:
    net = small("tied embedding")
    here = point(Subject(net.model, net.data, batch_size=32))
    found = last(fisher_rao_empirical(here)).value
    params = list(net.model.parameters())
    weights = [p.detach() for p in params]
    outputs, pushed = torch.func.jvp(
        lambda *ws: torch.func.functional_call(net.model, dict(zip(_names(net.model), ws, strict=True)), net.data[0]),
        tuple(weights),
        tuple(weights),
    )
    force = outputs.softmax(-1) - nn.functional.one_hot(net.data[1], outputs.shape[-1])
    assert found == pytest.approx(float(((force * pushed).sum(-1) ** 2).mean()), rel=1e-9)


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def test_an_objective_has_none() -> None:
    here = point(quadratic(torch.eye(2, dtype=torch.float64), 1.0, 1.0))
    for stream in (fisher_rao(here), fisher_rao_empirical(here)):
        with pytest.raises(NotDefined, match="outputs"):
            next(stream)
