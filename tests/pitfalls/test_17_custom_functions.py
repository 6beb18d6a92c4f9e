"""A custom autograd Function with a detached context: symmetric, repeatable, and not the derivative of the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pitfalls.exact import X, Y, built, double
from torch import Tensor, nn

from workbench.operators.hessian import Hessian
from workbench.selftest import NotAHessian, check_symmetry, self_test
from workbench.subject import Subject


class Detached(torch.autograd.Function):
    """sin, whose backward multiplies by a cosine that knows nothing of where it came from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = x.detach().cos()
        return x.sin()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * ctx.slope


class Saved(torch.autograd.Function):
    """sin, as one should."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * ctx.saved_tensors[0].cos()


class Bend(nn.Module):
    """Any function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def hessian(function: Callable[[Tensor], Tensor]) -> Hessian:
    net = built(lambda: nn.Sequential(nn.Linear(6, 12), Bend(function), nn.Linear(12, 3)))
    return Hessian(Subject(net, (X, Y)))


def tells_them_apart(test: Callable[[Hessian], object]) -> None:
    """Accepts the sound function and rejects the detached one."""
    test(hessian(Saved.apply))
    assert _rejected(test) == "derivative", "a wrong Hessian was accepted"


def _rejected(test: Callable[[Hessian], object]) -> str | None:
    try:
        test(hessian(Detached.apply))
    except NotAHessian as problem:
        return problem.leg
    return None


def symmetry_and_repetition(matrix: Hessian) -> None:
    """The fault: all tests but the difference of gradients."""
    u, v = double(matrix.size, seed=1), double(matrix.size, seed=2)
    first = matrix @ v
    assert torch.equal(first, matrix @ v)
    apart = float(u @ first - v @ (matrix @ u)) / float(first.norm() * u.norm())
    check_symmetry(abs(apart))


def test_the_self_test_finds_a_detached_context() -> None:
    tells_them_apart(self_test)
    with pytest.raises(AssertionError, match="was accepted"):
        tells_them_apart(symmetry_and_repetition)


def test_the_detached_hessian_is_wrong_though_symmetric() -> None:
    sound, wrong = (hessian(f).dense() for f in (Saved.apply, Detached.apply))
    assert torch.allclose(wrong, wrong.T, atol=1e-12)
    assert float((wrong - sound).norm() / sound.norm()) > 0.01
