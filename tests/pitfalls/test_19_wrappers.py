"""Compiled, replicated, distributed and reparametrised models: looked through, not tripped over."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pitfalls.exact import X, Y, built, dense, derivatives, double, gap
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from workbench.operators.hessian import Hessian
from workbench.subject import Subject

Product = Callable[[nn.Module, Tensor], Tensor]
Wrap = Callable[[nn.Module], Any]


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this PyTorch was built without gloo")
    patience = datetime.timedelta(seconds=30)
    distributed.init_process_group("gloo", f"file://{tmp_path}/group", patience, world_size=1, rank=0)
    yield
    distributed.destroy_process_group()


def equals_the_bare_model(wrap: Wrap, product: Product) -> None:
    """Parameters keep their names, and a product is the exact one of the model inside."""
    net = built(dense)
    wanted = derivatives(net, X, Y)[2]
    v = double(len(wanted))
    wrapped = wrap(net)
    assert list(Subject(wrapped, (X, Y)).params) == [k for k, _ in net.named_parameters()]
    assert gap(product(wrapped, v), wanted @ v) < 1e-10
    assert all(p.grad is None for p in net.parameters())


def ours(net: nn.Module, v: Tensor) -> Tensor:
    return Hessian(Subject(net, (X, Y))) @ v


def through_the_wrapper(net: nn.Module, v: Tensor) -> Tensor:
    """The fault: the wrapper's own forward and the hooks on its gradients."""
    loss = nn.functional.cross_entropy(net(X), Y)
    loss.backward(create_graph=True)
    params = list(net.parameters())
    slope = torch.cat([p.grad.reshape(-1) for p in params])  # type: ignore[union-attr]
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(slope @ v, params)])


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compile", "DataParallel"])
def test_compiled_and_replicated_models_are_the_model_inside(wrap: Wrap) -> None:
    equals_the_bare_model(wrap, ours)


def test_a_distributed_model_is_the_model_inside(group: None) -> None:
    equals_the_bare_model(nn.parallel.DistributedDataParallel, ours)


@pytest.mark.filterwarnings("ignore:Using backward")
def test_going_through_the_wrapper_is_caught(group: None) -> None:
    for wrap in (nn.DataParallel, nn.parallel.DistributedDataParallel):
        with pytest.raises((AssertionError, RuntimeError)):
            equals_the_bare_model(wrap, through_the_wrapper)


# ------------------------------------------------------------------------------------------------ weight_norm


def normed() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3))


def spelt_out(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loss with W = g v / ‖v‖ in plain operations."""
    made = net[0].parametrizations.weight
    g, v = made.original0, made.original1
    hidden = torch.tanh(x @ (g * v / v.pow(2).sum(1, keepdim=True).sqrt()).T + net[0].bias)
    return nn.functional.cross_entropy(net[2](hidden), y)


def follows_the_parametrisation(product: Product) -> None:
    """The Hessian in g and v, of which the weight is made, and the model as before."""
    net = built(normed)
    wanted = derivatives(net, X, Y, spelt_out)[2]
    v = double(len(wanted))
    names = [k for k, _ in net.named_parameters()]
    assert gap(product(net, v), wanted @ v) < 1e-10
    assert [k for k, _ in net.named_parameters()] == names


def without_it(net: nn.Module, v: Tensor) -> Tensor:
    """The fault: the weight itself is what varies, and the parametrisation is gone."""
    torch.nn.utils.parametrize.remove_parametrizations(net[0], "weight")
    hessian = derivatives(net, X, Y)[2]
    return torch.cat([hessian @ v[: len(hessian)], v[len(hessian) :]])


def by_the_fused_kernel(net: nn.Module, v: Tensor) -> Tensor:
    """The fault: PyTorch's own weight_norm, whose second derivative in g and v is wrong on the host (2.13)."""
    return derivatives(net, X, Y)[2] @ v


def test_a_parametrised_weight_varies_through_its_parameters() -> None:
    follows_the_parametrisation(ours)
    for fault in (without_it, by_the_fused_kernel):
        with pytest.raises(AssertionError):
            follows_the_parametrisation(fault)
