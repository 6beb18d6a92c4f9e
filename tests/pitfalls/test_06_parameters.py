"""Pitfall 6: frozen, unused, tied, re-used and bare parameters each have exactly the block that calculus gives them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pitfalls.exact import IDS, X, Y, built, cross_entropy, dense, derivatives, flat, gap
from torch import Tensor, nn

from workbench.operators.curvature import Curvature
from workbench.operators.fisher import Fisher
from workbench.operators.hessian import Hessian
from workbench.subject import Subject

WORDS: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}


def frozen() -> nn.Module:
    net = dense()
    net[0].requires_grad_(False)
    return net


class Unused(nn.Module):
    """A layer that the forward pass leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class Tied(nn.Module):
    """An embedding that is also the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.embed(ids)))


class Reused(nn.Module):
    """One layer, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Bare(nn.Module):
    """A scalar and a vector that belong to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.ones(3))
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x) * self.scale) + self.shift


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, Tensor]]] = {
    "frozen": (frozen, (X, Y)),
    "unused": (Unused, (X, Y)),
    "tied": (Tied, (IDS, IDS)),
    "re-used": (Reused, (X, Y)),
    "bare": (Bare, (X, Y)),
}
Dense = Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]


def exact_fisher(net: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """(1/n) Σ_i Σ_c p_c s_c s_cᵀ with s_c = ∇ log p_c, one gradient for each example (token) and class."""
    net = copy.deepcopy(net)
    params = [p for p in net.parameters() if p.requires_grad]
    log_p = net(data[0]).log_softmax(-1)
    log_p = log_p.reshape(-1, log_p.shape[-1])
    entries = [(float(v.detach().exp()), v) for row in log_p for v in row]
    scores = torch.stack([flat(torch.autograd.grad(v, params, retain_graph=True, **WORDS)) for _, v in entries])
    weights = torch.tensor([p for p, _ in entries], dtype=torch.float64)
    return scores.T @ (weights[:, None] * scores) / len(log_p)


def has_the_exact_matrix(name: str, matrix: Dense, reference: Dense) -> None:
    """Of the shape of what can vary, and equal entry by entry."""
    make, data = NETS[name]
    net = built(make)
    wanted, found = reference(net, data), matrix(net, data)
    assert found.shape == wanted.shape, f"{found.shape[0]} parameters instead of {wanted.shape[0]}"
    assert gap(found, wanted) < 1e-10, "other entries"


def hessian(net: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return derivatives(net, *data)[2]


def ours(kind: type[Curvature]) -> Dense:
    return lambda net, data: kind(Subject(net, data, batch_size=32)).dense()


@pytest.mark.parametrize(("kind", "reference"), [(Hessian, hessian), (Fisher, exact_fisher)], ids=["Hessian", "Fisher"])
@pytest.mark.parametrize("name", NETS)
def test_hessian_and_fisher_are_exact(name: str, kind: type[Curvature], reference: Dense) -> None:
    has_the_exact_matrix(name, ours(kind), reference)


def test_unused_gives_zeros_tied_counts_once_and_frozen_is_said() -> None:
    subjects = {name: Subject(built(make), data) for name, (make, data) in NETS.items()}
    unused = Hessian(subjects["unused"]).dense()
    assert unused[:21, :21].any()
    assert not unused[21:].any()
    assert list(subjects["tied"].params) == ["embed.weight"]
    assert "frozen parameters are excluded: 0.weight, 0.bias (84 scalars)" in " ".join(subjects["frozen"].notes)
    assert list(subjects["bare"].params)[:2] == ["scale", "shift"]


# ------------------------------------------------------------------------------------------------ what others do


def of_all_parameters(net: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """Frozen or not."""
    net = copy.deepcopy(net)
    return hessian(net.requires_grad_(True), data)


def ties_counted_twice(net: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    net = copy.deepcopy(net)
    params = [p for m in net.modules() for p in m.parameters(recurse=False)]
    gradient = flat(torch.autograd.grad(cross_entropy(net, *data), params, create_graph=True))
    return torch.stack([flat(torch.autograd.grad(g, params, retain_graph=True)) for g in gradient])


def of_layers_only(net: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """Parameters that lie in no known layer are dropped."""
    net = copy.deepcopy(net)
    for name, p in net.named_parameters():
        p.requires_grad_("." in name)
    return hessian(net, data)


def only_the_last_use(net: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """As by hooks that keep one input and one output of each layer."""

    def last(outer: nn.Module, x: Tensor) -> Tensor:
        layer, head = outer.layer, outer.head
        first = nn.functional.linear(x, layer.weight.detach(), layer.bias.detach())
        return head(torch.tanh(layer(torch.tanh(first))))

    def loss(outer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(last(outer, x), y)

    return derivatives(net, *data, loss)[2]


@pytest.mark.parametrize(
    ("name", "fault", "words"),
    [
        ("frozen", of_all_parameters, "123 parameters instead of 39"),
        ("tied", ties_counted_twice, "56 parameters instead of 28"),
        ("bare", of_layers_only, "21 parameters instead of 25"),
        ("re-used", only_the_last_use, "other entries"),
    ],
)
def test_each_way_of_counting_wrongly_is_caught(name: str, fault: Dense, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        has_the_exact_matrix(name, fault, hessian)


def test_a_product_that_cannot_do_without_a_parameter_is_caught() -> None:
    def needs_all(net: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
        return flat(torch.autograd.grad(cross_entropy(net, *data), list(net.parameters()), create_graph=True))

    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        has_the_exact_matrix("unused", needs_all, hessian)
