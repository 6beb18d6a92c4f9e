"""Custom autograd Functions whose backward knows too little: symmetric, repeatable, not the derivative of the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pitfalls.exact import X, Y, built, double
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from workbench.operators.hessian import Hessian
from workbench.probes.spectrum import HessianSpectrum
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


class Once(torch.autograd.Function):
    """sin, whose backward says that it has no derivative of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * ctx.saved_tensors[0].cos()


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


def test_a_function_that_is_differentiable_once_is_refused_in_words() -> None:
    """Not a matrix in which its part is silently zero."""
    probe = HessianSpectrum(top=2, trace=False, density=False)
    sound, wrong = (hessian(f).subject for f in (Saved.apply, Once.apply))
    assert probe.run(sound).converged
    with pytest.raises((RuntimeError, NotAHessian), match=r"once_differentiable|derivative"):
        probe.run(wrong)
