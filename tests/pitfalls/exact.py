"""The toy on which other tools went wrong, and its exact Hessian by plain autograd, shared by the tests of pitfalls."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

N = 70


def double(*shape: int, seed: int = 0) -> Tensor:
    """A normal tensor in float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, Y = double(N, 6), torch.randint(0, 3, (N,), generator=torch.Generator().manual_seed(1))
IDS = torch.randint(0, 7, (N, 5), generator=torch.Generator().manual_seed(2))


def dense() -> nn.Sequential:
    """Linear(6, 12)-Tanh-Linear(12, 3)."""
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))


def built(make: Callable[[], Any], dtype: torch.dtype = torch.float64) -> Any:
    """A net from a fixed seed; the global random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return make().to(dtype)


def cross_entropy(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean over all examples, or tokens."""
    outputs = net(x)
    return F.cross_entropy(outputs.reshape(-1, outputs.shape[-1]), y.reshape(-1))


def flat(tensors: Any) -> Tensor:
    """One vector."""
    return torch.cat([t.reshape(-1) for t in tensors])


def derivatives(
    net: nn.Module, x: Tensor, y: Tensor, loss: Callable[..., Tensor] = cross_entropy
) -> tuple[float, Tensor, Tensor]:
    """(loss, gradient, Hessian) over what requires gradients, row by row, on a copy in the mode that the net is in."""
    net = copy.deepcopy(net)
    params = [p for p in net.parameters() if p.requires_grad]
    words: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    with sdpa_kernel(SDPBackend.MATH):
        value = loss(net, x, y)
        gradient = flat(torch.autograd.grad(value, params, create_graph=True, **words))
        rows = [flat(torch.autograd.grad(g, params, retain_graph=True, **words)) for g in gradient]
    return value.item(), gradient.detach(), torch.stack(rows)


def gap(found: Tensor, wanted: Tensor) -> float:
    """How far apart, over the length of what is wanted."""
    return float((found - wanted).norm() / wanted.norm())
