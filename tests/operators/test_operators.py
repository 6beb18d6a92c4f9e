"""Curvature products against Hessians computed entry by entry, closed forms and another package's operators."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from architectures import SMALL, Trained, perceptron, small, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from workbench.operators.curvature import Curvature
from workbench.operators.gauss_newton import GaussNewton
from workbench.operators.hessian import Hessian
from workbench.plan import Plan
from workbench.subject import Subject

OPERATORS = (Hessian, GaussNewton)


def double(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gap(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def exact_gauss_newton(net: Trained) -> Tensor:
    """(1/n) Σ Jᵀ (diag(p) - p pᵀ) J, with J row by row."""
    params = [p for p in net.model.parameters() if p.requires_grad]
    total, outputs = torch.zeros(net.size, net.size, dtype=torch.float64), net.model(net.data[0])
    for row in outputs:
        grads = [torch.autograd.grad(z, params, retain_graph=True) for z in row]
        jacobian = torch.stack([torch.cat([g.reshape(-1) for g in found]) for found in grads])
        p = row.softmax(0).detach()
        total += jacobian.T @ (p.diag() - p.outer(p)) @ jacobian
    return total / len(outputs)


# ------------------------------------------------------------------------------------------------------ exact


@pytest.mark.parametrize("name", SMALL)
def test_products_are_those_of_the_exact_hessian(name: str) -> None:
    net = small(name)
    with Hessian(Subject(net.model, net.data, batch_size=32)) as hessian:  # 32, 32 and 6 examples
        block = double(hessian.size, 3)
        assert gap(hessian @ block, net.hessian @ block) < 1e-10
        assert hessian.loss == pytest.approx(net.loss(net.model).item(), rel=1e-12)


def test_gauss_newton_products_are_exact() -> None:
    net = trained(lambda: perceptron(8, nn.GELU), steps=40, count=31)
    block = double(net.size, 3)
    with GaussNewton(Subject(net.model, net.data, batch_size=8)) as matrix:
        assert gap(matrix @ block, exact_gauss_newton(net) @ block) < 1e-10


def test_another_package_agrees() -> None:
    curvlinops = pytest.importorskip("curvlinops")
    net = small("dense GELU")
    params, (x, y) = list(net.model.parameters()), net.data
    batches, vector = [(x[:40], y[:40]), (x[40:], y[40:])], double(net.size)
    subject = Subject(net.model, net.data, batch_size=32)
    for ours, theirs in ((Hessian, curvlinops.HessianLinearOperator), (GaussNewton, curvlinops.GGNLinearOperator)):
        other = theirs(net.model, nn.CrossEntropyLoss(), params, batches, check_deterministic=False)
        with ours(subject) as mine:
            assert gap(mine @ vector, torch.as_tensor(other @ vector)) < 1e-10


class Product(nn.Module):
    """f(x) = w2 w1 x."""

    def __init__(self, first: float, second: float) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.tensor([w], dtype=torch.float64)) for w in (first, second))

    def forward(self, x: Tensor) -> Tensor:
        return self.second * self.first * x


LR4 = torch.tensor([[1, 0], [0, 2], [1, 1], [2, 1]], dtype=torch.float64)
ONE = torch.ones(1, 1, dtype=torch.float64)


def linear(outputs: int) -> nn.Module:
    made = nn.Linear(2, outputs, bias=False).double()
    nn.init.zeros_(made.weight)
    return made


CLOSED = (
    # model, inputs, targets, loss, eigenvalues of H, of G
    (linear(1), LR4, double(4, 1), "half_mse", (2.25, 0.75), (2.25, 0.75)),
    (linear(1), LR4, double(4, 1), "mse", (4.5, 1.5), (4.5, 1.5)),
    (linear(3), LR4, torch.tensor([0, 1, 2, 0]), "cross_entropy", (0.75, 0.75, 0.25, 0.25, 0, 0), None),
    (linear(3), LR4, torch.zeros(4, dtype=torch.long), "cross_entropy", (0.75, 0.75, 0.25, 0.25, 0, 0), None),
    (Product(1, 2), ONE, 3 * ONE, "half_mse", (4.30277563773, 0.69722436227), (5, 0)),
    (Product(1, 1), ONE, 4 * ONE, "half_mse", (3, -1), (2, 0)),
    (Product(0, 0), ONE, ONE, "half_mse", (1, -1), (0, 0)),
    (Product(1, 2), ONE, 2 * ONE, "half_mse", (5, 0), (5, 0)),
)


@pytest.mark.parametrize(("model", "x", "y", "loss", "of_hessian", "of_gauss_newton"), CLOSED)
def test_closed_forms(model: nn.Module, x: Tensor, y: Tensor, loss: str, of_hessian: Any, of_gauss_newton: Any) -> None:
    subject = Subject(model, (x, y), loss=loss, batch_size=3 if len(x) > 1 else None)
    for kind, wanted in ((Hessian, of_hessian), (GaussNewton, of_gauss_newton or of_hessian)):
        found = torch.linalg.eigvalsh(kind(subject).dense()).flip(0)
        assert found.numpy() == pytest.approx(np.array(wanted, dtype=float), abs=1e-10)


# ------------------------------------------------------------------------------------------------------- laws


@settings(max_examples=12)
@given(chunk=st.integers(1, 70), kind=st.sampled_from(OPERATORS), retained=st.booleans())
def test_no_split_and_no_plan_changes_a_product(chunk: int, kind: type[Curvature], retained: bool) -> None:
    net = small("dense GELU")
    subject = Subject(net.model, net.data)
    vector = double(net.size)
    with kind(subject) as whole, kind(subject.with_plan(Plan(chunk, retained))) as split:
        assert gap(split @ vector, whole @ vector) < 1e-12
        assert split.kept == (-(-70 // chunk) if retained else 0)


@pytest.mark.parametrize("kind", OPERATORS)
def test_kept_and_fresh_graphs_agree_bit_for_bit(kind: type[Curvature], monkeypatch: pytest.MonkeyPatch) -> None:
    net = small("conv + BatchNorm")
    subject, block = Subject(net.model, net.data, batch_size=32), double(net.size, 2)
    with kind(subject) as kept:
        kept.matvec(block[:, 0])
        wanted, size = kept @ block, kept.graph_bytes
        assert kept.kept == 3
    for room, chunks in ((5 * size, 2), (0, 0)):  # half of what is free may be taken
        monkeypatch.setattr(Subject, "available_memory", lambda _, room=room: room)
        with kind(subject) as short:
            assert torch.equal(short @ block, wanted)
            assert torch.equal(short @ block, wanted)
            assert short.kept == chunks


def test_memory_is_known_beforehand() -> None:
    net = small("conv + BatchNorm")
    for kind in OPERATORS:
        with kind(Subject(net.model, net.data)) as operator:
            expected, _ = operator.expected_bytes()
            operator.matvec(double(net.size))
            assert 0.7 < expected / operator.graph_bytes < 1.3


# ------------------------------------------------------------------------------------------ corners of autograd


class Corners(nn.Module):
    """A parameter that is not used, one that the output is linear in, one that bends it."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.straight, self.bent = (nn.Parameter(double(2, seed=s)) for s in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.straight + x @ self.bent**3


def test_unused_and_linear_parameters_have_zero_blocks() -> None:
    def total(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return model(batch[0]).sum()

    model, x = Corners(), double(5, 2)
    bent = (6 * model.bent * x.mean(0)).detach().diag()
    subject = Subject(model, (x, torch.zeros(5)), objective=total, reduction="sum")
    assert torch.allclose(Hessian(subject).dense(), torch.block_diag(torch.zeros(4, 4, dtype=torch.float64), bent))
    straight = Subject(model, (x, torch.zeros(5)), objective=total, reduction="sum", parameters=["unused", "straight"])
    assert not Hessian(straight).dense().any()


def test_an_objective_has_no_gauss_newton() -> None:
    net = small("dense GELU")
    subject = Subject(net.model, net.data, objective=lambda m, b: F.cross_entropy(m(b[0]), b[1]), reduction="mean")
    vector = double(net.size)
    assert gap(Hessian(subject) @ vector, net.hessian @ vector) < 1e-10
    with pytest.raises(TypeError, match=r'objective=.*operator="hessian"'):
        GaussNewton(subject)


@pytest.mark.parametrize("kind", OPERATORS)
def test_live_weights_written_meanwhile_are_an_error(kind: type[Curvature]) -> None:
    net = trained(lambda: perceptron(8, nn.Tanh), steps=1, count=20)
    operator, vector = kind(Subject(net.model, net.data)), double(net.size)
    operator.matvec(vector)
    with torch.no_grad():
        net.model[4].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        operator.matvec(vector)


# ----------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("retained", [True, False])
@pytest.mark.parametrize("kind", OPERATORS)
def test_memory_does_not_grow(kind: type[Curvature], retained: bool) -> None:
    net = small("dense GELU")
    operator = kind(Subject(net.model, net.data).with_plan(Plan(retained=retained)))
    vector, resident = double(net.size), psutil.Process().memory_info
    for _ in range(20):
        operator.matvec(vector)
    before = resident().rss
    for _ in range(180):
        operator.matvec(vector)
    assert resident().rss < 1.05 * before


@pytest.mark.parametrize("kind", OPERATORS)
def test_graphs_are_freed_without_the_collector(kind: type[Curvature]) -> None:
    net = small("dense GELU")
    gc.collect()
    gc.disable()
    try:
        with kind(Subject(net.model, net.data)) as operator:
            operator.matvec(double(net.size))
            graph = weakref.ref(next(iter(operator._graphs())))
        assert graph() is None
        whole = weakref.ref(operator)
        del operator
        assert whole() is None
    finally:
        gc.enable()
