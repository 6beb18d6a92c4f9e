"""Gauss-Newton products by every way of pushing a direction through the outputs, against Jacobians row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import SMALL, small
from torch import Tensor, nn

from workbench.operators.gauss_newton import GaussNewton
from workbench.plan import Plan
from workbench.subject import Subject


def exact(net: nn.Module, x: Tensor) -> Tensor:
    """(1/n) Σ Jᵀ (diag(p) - p pᵀ) J over the rows of outputs."""
    params = [p for p in net.parameters() if p.requires_grad]
    rows = net(x).flatten(0, -2)
    size = sum(p.numel() for p in params)
    total = torch.zeros(size, size, dtype=torch.float64)
    for row in rows:
        each = [torch.autograd.grad(z, params, retain_graph=True) for z in row]
        jacobian = torch.stack([torch.cat([g.reshape(-1) for g in found]) for found in each])
        p = row.softmax(0).detach()
        total += jacobian.T @ (p.diag() - p.outer(p)) @ jacobian
    return total / len(rows)


def direction(size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", sorted(set(SMALL) - {"LSTM"}))
def test_every_way_gives_the_exact_product(name: str) -> None:
    net = small(name)
    x, y = (t[:9] for t in net.data)
    wanted = None  # 5 and 4 examples at once
    for push in ("graph", "forward", "linearised"):
        with GaussNewton(Subject(net.model, (x, y), batch_size=5).with_plan(Plan(push=push))) as matrix:
            v = direction(matrix.size)
            wanted = exact(net.model, x) @ v if wanted is None else wanted
            for found in (matrix.matvec(v), matrix.matvec(v)):  # the first builds, the second uses what is kept
                assert (found - wanted).norm() < 1e-10 * wanted.norm(), push


def test_a_traced_lstm_that_is_right_only_once_is_refused() -> None:
    net = small("LSTM")
    wanted = exact(net.model, net.data[0][:9])
    with GaussNewton(Subject(net.model, [t[:9] for t in net.data]).with_plan(Plan(push="forward"))) as matrix:
        v = direction(matrix.size)
        assert (matrix.matvec(v) - wanted @ v).norm() < 1e-10 * (wanted @ v).norm()
    with (
        pytest.raises(RuntimeError, match=r"differs by .* from reverse mode's.*use Plan\(push=None\)"),
        GaussNewton(Subject(net.model, net.data).with_plan(Plan(push="linearised"))) as traced,
    ):
        traced.matvec(v)


def test_graphs_that_are_not_kept_are_not_traced_again() -> None:
    net = small("conv + BatchNorm")
    plan = Plan(push="linearised", retained=False)
    with GaussNewton(Subject(net.model, net.data, batch_size=40).with_plan(plan)) as matrix:
        v = direction(matrix.size)
        traced, torch.func.linearize = torch.func.linearize, _refuse
        try:
            with pytest.raises(RuntimeError, match='the way "linearised"'):
                matrix.matvec(v)
        finally:
            torch.func.linearize = traced
        first = matrix.matvec(v)
        torch.func.linearize = _refuse
        try:
            torch.testing.assert_close(matrix.matvec(v), first, rtol=1e-10, atol=1e-12)
        finally:
            torch.func.linearize = traced


def _refuse(*_: Any, **__: Any) -> Any:
    raise RuntimeError("not now")


class Doubled(torch.autograd.Function):
    """The identity, with a forward-mode formula that is wrong by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope.clone()

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 2 * tangent


class Wrong(nn.Module):
    """A convolution, so that forward mode suggests itself, and an operation that spoils it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(1, 2, 3)
        self.head = nn.Linear(72, 10)

    def forward(self, x: Tensor) -> Tensor:
        return Doubled.apply(self.head(self.body(x).tanh().flatten(1)))


def test_a_wrong_forward_formula_is_noticed() -> None:
    x, y = (t[:6] for t in small("conv + BatchNorm").data)
    net = Wrong().double()
    with GaussNewton(Subject(net, (x, y))) as matrix:  # left to itself, it goes back to reverse mode
        v = direction(matrix.size)
        wanted = exact(net, x) @ v
        assert (matrix.matvec(v) - wanted).norm() < 1e-10 * wanted.norm()
    with (
        pytest.raises(RuntimeError, match=r"differs by .* from reverse mode"),
        GaussNewton(Subject(net, (x, y)).with_plan(Plan(push="forward"))) as asked,
    ):
        asked.matvec(v)


def test_convolutions_go_by_forward_mode_and_hold_less() -> None:
    net = small("conv + BatchNorm")
    held = {}
    for push in (None, "graph"):
        with GaussNewton(Subject(net.model, net.data).with_plan(Plan(push=push))) as matrix:
            matrix.matvec(direction(matrix.size))
            held[push] = matrix.graph_bytes
    assert held[None] < 0.8 * held["graph"]


def test_a_way_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one of graph, forward, linearised, compiled or None; got 'backward'"):
        Plan(push="backward")


@pytest.mark.slow  # half a minute of compiling
def test_a_compiled_push_gives_the_same_products() -> None:
    net = small("dense GELU")
    found = []
    for push in ("graph", "compiled"):
        with GaussNewton(Subject(net.model, net.data).with_plan(Plan(push=push))) as matrix:
            found += [matrix.matvec(direction(matrix.size)) for _ in range(2)]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-8, atol=1e-12)
