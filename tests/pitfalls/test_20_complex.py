"""Complex parameters are refused by name, before anything is computed, and never halved in silence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pitfalls.exact import X, Y
from torch import Tensor, nn

from workbench.subject import Subject


class Complex(nn.Module):
    """Scores by a complex matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.complex(torch.ones(6, 3), torch.ones(6, 3)).to(torch.complex128))
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return (x.to(self.mix.dtype) @ self.mix).abs()


def refuses(size: Callable[[nn.Module], int]) -> None:
    """By a ValueError that names the parameter, before the model has run."""
    net = Complex()
    try:
        found = size(net)
    except ValueError as problem:
        words = str(problem)
    else:
        raise AssertionError(f"{found} real numbers were made of 18 complex ones")
    assert "mix is complex" in words
    assert net.passes == 0


def the_real_parts(net: nn.Module) -> int:
    """The fault."""
    return sum(p.detach().real.numel() for p in net.parameters())


def too_late(net: nn.Module) -> int:
    """The fault: the refusal comes once the work is done."""
    net(X)
    return Subject(net, (X, Y)).size


def test_complex_parameters_are_refused() -> None:
    refuses(lambda net: Subject(net, (X, Y)).size)
    for fault in (the_real_parts, too_late):
        with pytest.raises(AssertionError):
            refuses(fault)
