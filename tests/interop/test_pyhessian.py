"""PyHessian on subjects: the same function whatever the data look like, and nothing of the process moved."""

from __future__ import annotations

import gc
import math
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyhessian as package
import pytest
import torch
from torch import Tensor, nn

from workbench.interop.pyhessian import PyHessian
from workbench.plan import Plan
from workbench.subject import Subject


class Weights(nn.Module):
    """A quadratic ½ Σ a_i (w_i - 1)² times an input, with a parameter that the loss does not use and a linear one."""

    def __init__(self, *curvatures: float) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(len(curvatures), dtype=torch.float64))
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.linear = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.curvatures = torch.tensor(curvatures, dtype=torch.float64)

    def forward(self, scale: Tensor) -> Tensor:
        return scale * (self.curvatures * (self.weights - 1) ** 2).sum() / 2 + self.linear


def quadratic(*curvatures: float, count: int = 10) -> Subject:
    """Curvatures as given, since the inputs' mean is 1; in any batches the batches' own means differ."""
    scale = torch.linspace(0.2, 1.8, count, dtype=torch.float64).reshape(-1, 1)
    return Subject(Weights(*curvatures), (scale, scale), loss=lambda out, y: out.mean())


def masked() -> tuple[nn.Module, Any]:
    """Token losses, of which batches hold very unequal numbers: a batch's weight is not its number of examples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 4)).double()
    x = torch.randint(0, 5, (9, 6))
    y = torch.randint(0, 4, (9, 6))
    for row in range(9):
        y[row, : min(row, 5)] = -100
    return model, (x, y)


class Swapped(nn.Module):
    """Classes on the second axis, as cross_entropy wants them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).transpose(1, 2)


def exact(subject: Subject) -> np.ndarray:
    """All eigenvalues by the plain definition: the Hessian of the whole loss, entry by entry, in float64."""
    names, point = list(subject.params), list(subject.params.values())
    flat = torch.cat([p.reshape(-1) for p in point])

    def loss(vector: Tensor) -> Tensor:
        pieces = vector.split([p.numel() for p in point])
        params = {n: v.reshape(p.shape) for n, v, p in zip(names, pieces, point, strict=True)}
        return sum(subject.batch_loss(params, b) for b in subject.batches()) / subject.total_weight

    return torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat)).numpy()


@pytest.mark.parametrize("chunk", [None, 4])
def test_iterated_to_the_end_it_finds_the_exact_values_of_our_loss(chunk: int | None) -> None:
    model, data = masked()
    subject = Subject(Swapped(model), data, loss="cross_entropy").with_plan(Plan(chunk=chunk))
    wanted = exact(subject)
    by_size = wanted[np.argsort(-abs(wanted))][:3]
    with PyHessian(subject) as theirs:
        found = theirs.eigenvalues(3, limit=1000, tolerance=1e-13)
        trace = theirs.trace(limit=150, tolerance=0.0)
        node, weight = theirs.density(steps=subject.size)
    assert [f.value for f in found] == pytest.approx(by_size, rel=1e-4)
    assert all(f.residual < 1e-2 for f in found)
    assert abs(trace.value - wanted.sum()) < 4 * trace.error
    assert trace.vectors == 150
    assert float(weight.sum()) == pytest.approx(1)
    assert float(node.max()) == pytest.approx(wanted.max(), rel=1e-4)


def test_left_alone_it_weighs_batches_otherwise() -> None:
    """The fault that the criterion undoes: an average over examples, where the loss is one over unmasked tokens."""
    model, (x, y) = masked()
    batches = [(x[i : i + 4], y[i : i + 4]) for i in (0, 4, 8)]
    naive = package.hessian(Swapped(model), nn.CrossEntropyLoss(), dataloader=batches, cuda=False)
    vector = [torch.ones_like(p) for p in naive.params]
    naive_product = float(naive.dataloader_hv_product(vector)[0])
    with PyHessian(Subject(Swapped(model), (x, y)).with_plan(Plan(chunk=4))) as theirs:
        ours = theirs._watched(vector)[0]
    assert abs(naive_product / ours - 1) > 0.02


def test_parameters_that_do_not_matter_are_no_obstacle() -> None:
    with PyHessian(quadratic(5.0, -3.0, 1.0)) as theirs:
        found = theirs.eigenvalues(3, tolerance=1e-12)
        assert [f.value for f in found] == pytest.approx([5, -3, 1], abs=1e-5), "by magnitude, whatever the sign"
        assert theirs.trace().value == pytest.approx(3), "±1 vectors are exact for a diagonal matrix"


def test_a_negative_mean_ends_its_trace_at_once() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.randn(12, 3, dtype=torch.float64)
    subject = Subject(model, (x, x[:, :1]), loss=lambda out, y: -((out - y) ** 2).mean() - 9)
    with PyHessian(subject) as theirs:
        found = theirs.trace()
    assert found.value < 0
    assert (found.vectors, found.stopped) == (2, "rule")


def test_it_says_why_it_stopped() -> None:
    with PyHessian(quadratic(5.0, 4.999, 4.998)) as theirs:
        (rule,) = theirs.eigenvalues(1)
        (limit,) = theirs.eigenvalues(1, limit=4, tolerance=1e-16)
    assert (rule.stopped, limit.stopped, limit.products) == ("rule", "limit", 4)
    with PyHessian(quadratic(5.0, 4.999, 4.998), seconds=0.0) as theirs:
        (cut,) = theirs.eigenvalues(3)
        assert theirs.trace().stopped == "time"
    assert (cut.stopped, cut.products) == ("time", 1)
    assert 0 < cut.value < 5, "the quotient of a random vector"
    assert math.isnan(cut.residual)


def state(model: nn.Module) -> list[Any]:
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002 - the state that others share is what must not move
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        [m.training for m in model.modules()],
        [p.grad if p.grad is None else p.grad.clone().tolist() for p in model.parameters()],
        [p._version for p in model.parameters()],
        {
            name: vars(package.hessian).get(name)
            for name in ("eigenvalues", "trace", "density", "dataloader_hv_product")
        },
        package.hessian.density.__globals__["torch"] is torch,
    ]


def everything(subject: Subject) -> None:
    with PyHessian(subject) as theirs:
        theirs.eigenvalues(2)
        theirs.trace()
        theirs.density(5)


def failing(subject: Subject) -> None:
    with PyHessian(subject) as theirs:
        theirs._product = _raise
        theirs.eigenvalues(1)


def _raise(vector: Any) -> Any:
    raise ArithmeticError("half-way")


@pytest.mark.parametrize("use", [everything, failing])
@pytest.mark.filterwarnings("error:Using backward")
def test_nothing_global_moves(use: Callable[[Subject], None]) -> None:
    model, data = masked()
    model = Swapped(model).train()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before = state(model)
    try:
        use(Subject(model, data))
    except ArithmeticError:
        assert use is failing
    assert state(model) == before


def test_the_same_seed_gives_the_same_numbers_while_others_draw() -> None:
    subject, stop = quadratic(5.0, 3.0, -2.0), threading.Event()

    def others() -> None:
        while not stop.is_set():
            torch.randn(3)

    with PyHessian(subject, seed=3) as theirs:
        alone = theirs.eigenvalues(2)
    beside = threading.Thread(target=others)
    beside.start()
    try:
        with PyHessian(subject, seed=3) as theirs:
            assert theirs.eigenvalues(2) == alone
    finally:
        stop.set()
        beside.join()
    with PyHessian(subject, seed=4) as theirs:
        assert theirs.eigenvalues(2) != alone


def kept() -> Iterator[Tensor]:
    return (t for t in gc.get_objects() if isinstance(t, Tensor) and t.grad_fn is not None)


def test_its_graph_is_freed() -> None:
    subject = quadratic(2.0, 1.0)
    gc.collect()
    before = sum(1 for _ in kept())
    with PyHessian(subject) as theirs:
        theirs.eigenvalues(1)
    gc.collect()
    assert sum(1 for _ in kept()) == before


def test_as_it_is_its_density_fails_and_a_second_object_is_wrong() -> None:
    """The faults that are adapted from outside; when these pass no more, the adapter may go."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(6, 2)
    torch.set_default_dtype(torch.float64)
    try:
        first = package.hessian(model, nn.MSELoss(), data=(x, x[:, :1]), cuda=False)
        with pytest.raises(RuntimeError, match="eig"):
            first.density(3)
        direct = package.hessian(model, nn.MSELoss(), data=(x, x[:, :1]), cuda=False)
        again = package.hessian(model, nn.MSELoss(), data=(x, x[:, :1]), cuda=False)
        values = [made.eigenvalues(tol=1e-10)[0][0] for made in (direct, again)]
    finally:
        torch.set_default_dtype(torch.float32)
        model.zero_grad()
    subject = Subject(model, (x, x[:, :1]), loss="mse")
    for _ in range(2):
        with PyHessian(subject) as theirs:
            assert theirs.eigenvalues(1, tolerance=1e-10)[0].value == pytest.approx(exact(subject)[-1], rel=1e-5)
    assert max(values) > 1.9 * exact(subject)[-1], "the first object's gradients stayed in .grad"
