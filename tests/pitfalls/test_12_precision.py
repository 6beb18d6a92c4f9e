"""Pitfall 12: half precision, integer buffers, and sums that a short format cannot hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pitfalls.exact import X, Y, built, cross_entropy, derivatives, double, flat, gap
from torch import Tensor, nn

from workbench.landscape.line import Line
from workbench.numerics.basis import dot
from workbench.operators.hessian import Hessian
from workbench.probe import drive
from workbench.subject import Subject

HALVES = (torch.bfloat16, torch.float16)
Measured = tuple[float, Tensor, Tensor]
TOLERANCE = 1e-4
"""Stated for models in half precision: they are computed in a float32 copy of the same weights."""


def net() -> nn.Module:
    made = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 3))
    made(torch.randn(32, 6))
    return made


def is_as_exact_as_stated(measure: Callable[[nn.Module, Tensor], Measured], dtype: torch.dtype) -> None:
    """Loss, gradient and product of a half-precision model against float64 at the very same weights and inputs."""
    model, x = built(net, dtype), X.to(dtype)
    loss, gradient, hessian = derivatives(copy.deepcopy(model).double().eval(), x.double(), Y)
    v = double(len(gradient))
    found = measure(model, v)
    assert found[0] == pytest.approx(loss, rel=TOLERANCE), "the loss"
    assert gap(found[1].double(), gradient) < TOLERANCE, "the gradient"
    assert gap(found[2].double(), hessian @ v) < TOLERANCE, "the product"
    assert {p.dtype for p in model.parameters()} == {dtype}


def ours(model: nn.Module, v: Tensor) -> Measured:
    subject = Subject(model, (X.to(next(model.parameters()).dtype), Y))
    assert any("float32 copy" in note for note in subject.notes)
    return subject.loss(), subject.flatten(subject.gradient()), Hessian(subject) @ v.to(subject.dtype)


def in_half_precision(model: nn.Module, v: Tensor) -> Measured:
    """The fault: everything in the model's own format."""
    params = list(model.eval().parameters())
    loss = cross_entropy(model, X.to(params[0].dtype), Y)
    gradient = flat(torch.autograd.grad(loss, params, create_graph=True))
    product = flat(torch.autograd.grad(gradient @ v.to(gradient.dtype), params))
    return loss.item(), gradient.detach(), product


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_models_are_measured_to_the_stated_tolerance(dtype: torch.dtype) -> None:
    is_as_exact_as_stated(ours, dtype)
    with pytest.raises(AssertionError):
        is_as_exact_as_stated(in_half_precision, dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_copy_in_half_precision_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"float32 or torch\.float64"):
        Subject(built(net), (X, Y), dtype=dtype)


# ------------------------------------------------------------------------------------------------ integer buffers

Buffers = Callable[[nn.Module], dict[str, Tensor]]


def keeps_integers(buffers: Buffers) -> None:
    """Counters are still counters after the statistics were estimated anew on two batches."""
    found = buffers(built(net))
    assert found["1.num_batches_tracked"].dtype == torch.int64
    assert int(found["1.num_batches_tracked"]) == 2


def our_buffers(model: nn.Module) -> dict[str, Tensor]:
    subject = Subject(model, (X.float(), Y), norm="recompute", batch_size=35, dtype=torch.float32)
    assert subject.tensors()["1.num_batches_tracked"].dtype == torch.int64
    return subject.recomputed()


def cast_with_the_rest(model: nn.Module) -> dict[str, Tensor]:
    """The fault: every tensor of the state gets the working precision."""
    return {name: b.float() for name, b in our_buffers(model).items()}


def moved_with_the_rest(model: nn.Module) -> dict[str, Tensor]:
    """The fault: every tensor of the state is moved along a direction, counters too."""
    return {name: b + torch.ones((), dtype=b.dtype) for name, b in our_buffers(model).items()}


def test_integer_buffers_stay_integral() -> None:
    keeps_integers(our_buffers)
    for fault in (cast_with_the_rest, moved_with_the_rest):
        with pytest.raises(AssertionError):
            keeps_integers(fault)


# ------------------------------------------------------------------------------------------------ sums

COUNT = 20_000


def adds_up(mean: Callable[[nn.Module, Tensor, Tensor], float]) -> None:
    """The mean of 20 000 losses of a float32 model to 1e-7 of float64's: single squares are rounded, either way."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    x = double(COUNT, 1).abs().float() + 100
    y = torch.zeros(COUNT, 1)
    truth = float((x.double() ** 2).mean())
    assert mean(model, x, y) == pytest.approx(truth, rel=1e-7)


def our_mean(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return Subject(model, (x, y), "mse", batch_size=7, max_examples=None).loss()


def one_after_another(dtype: torch.dtype) -> Callable[[nn.Module, Tensor, Tensor], float]:
    """The fault: a running sum in a short format."""

    def mean(model: nn.Module, x: Tensor, y: Tensor) -> float:
        total = torch.zeros((), dtype=dtype)
        with torch.no_grad():
            for one, target in zip(x.split(7), y.split(7), strict=True):
                total += F.mse_loss(model(one), target, reduction="sum").to(dtype)
        return float(total) / COUNT

    return mean


def test_losses_are_added_in_float64() -> None:
    adds_up(our_mean)
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(AssertionError):
            adds_up(one_after_another(dtype))


def multiplies_vectors(product: Callable[[Tensor, Tensor], Any]) -> None:
    """Inner products of long float32 vectors keep what a float32 accumulator would lose."""
    a = torch.cat([torch.full((1,), 2.0**13), torch.full((4096,), 2.0**-1)])
    assert float(product(a, a)) == 2.0**26 + 1024


def test_inner_products_are_added_in_float64() -> None:
    def running(a: Tensor, b: Tensor) -> Tensor:
        total = torch.zeros(())
        for x, y in zip(a, b, strict=True):
            total = total + x * y
        return total

    multiplies_vectors(dot)
    with pytest.raises(AssertionError):
        multiplies_vectors(running)


# ------------------------------------------------------------------------------------------------ steps that are none


def reports_what_did_not_move(share: Callable[[int, float], float]) -> None:
    """Steps of 2e-7 filter lengths leave much of float32 where it is, and steps of a tenth do not."""
    assert share(1001, 1e-4) > 0.01
    assert share(3, 0.1) < 0.01


def our_share(points: int, extent: float) -> float:
    subject = Subject(built(net).float(), (X.float(), Y))
    return float(next(iter(drive(Line(points=points, extent=extent), subject))).data.unmoved_share)


def test_coordinates_that_rounding_left_in_place_are_reported() -> None:
    reports_what_did_not_move(our_share)
    with pytest.raises(AssertionError):
        reports_what_did_not_move(lambda points, extent: 0.0)
