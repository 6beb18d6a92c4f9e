"""Reverse-over-forward products are silently wrong through LayerNorm and BatchNorm; ours are reverse-over-reverse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pitfalls.exact import X, Y, built, derivatives, double, gap
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp

from workbench.operators.hessian import Hessian
from workbench.subject import Subject

Product = Callable[[nn.Module, Tensor, Any], Tensor]


def net(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), norm, nn.Tanh(), nn.Linear(8, 3))


NETS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "LayerNorm": (lambda: net(nn.LayerNorm(8)), "eval"),
    "BatchNorm": (lambda: net(nn.BatchNorm1d(8)), "batch"),
    "none": (lambda: net(nn.Identity()), "eval"),
}


def equals_exact(name: str, product: Product) -> None:
    """A product is the Hessian's, row by row, with the statistics of the batch where there are any."""
    make, norm = NETS[name]
    model = built(make).train()
    wanted = derivatives(model, X, Y)[2]
    v = double(len(wanted))
    assert gap(product(model, v, norm), wanted @ v) < 1e-9


def ours(model: nn.Module, v: Tensor, norm: Any) -> Tensor:
    return Hessian(Subject(model, (X, Y), norm=norm, batch_size=70)) @ v


def reverse_over_forward(model: nn.Module, v: Tensor, norm: Any) -> Tensor:
    """The fault: the gradient of a directional derivative."""
    params = {k: p.detach() for k, p in model.named_parameters()}
    pieces = v.split([p.numel() for p in params.values()])
    along = {k: piece.view(p.shape) for (k, p), piece in zip(params.items(), pieces, strict=True)}

    def loss(point: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, point, (X,)), Y)

    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean = module.running_var = module.num_batches_tracked = None
    found = grad(lambda point: jvp(loss, (point,), (along,))[1])(params)
    return torch.cat([g.reshape(-1) for g in found.values()])


@pytest.mark.parametrize("name", NETS)
def test_products_through_norms_are_exact(name: str) -> None:
    equals_exact(name, ours)


@pytest.mark.parametrize("name", ["LayerNorm", "BatchNorm"])
def test_the_gradient_of_a_directional_derivative_is_caught(name: str) -> None:
    with pytest.raises(AssertionError):
        equals_exact(name, reverse_over_forward)


def test_it_is_right_without_a_norm() -> None:
    """So that the test above can tell a wrong derivative from a wrong use of it."""
    equals_exact("none", reverse_over_forward)
