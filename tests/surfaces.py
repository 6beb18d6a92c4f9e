"""Losses known exactly, as subjects of one weight: what sharpness is measured on when the answer is a formula."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from workbench.numerics.sampling import Draw
from workbench.sharpness.found import Found
from workbench.sharpness.point import Point
from workbench.subject import Subject

Q2 = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
"""The Hessian of ½ (2 w_1² + w_2²)."""


class Weight(nn.Module):
    """One weight (1, P); what is made of it is the objective's business."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values.double().reshape(1, -1))


def surface(function: Callable[[Tensor], Tensor], *at: float) -> Subject:
    """A subject whose loss is ``function`` of its weight (P,), at the point ``at``."""
    data = (torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1))
    return Subject(
        Weight(torch.tensor(at)), data, objective=lambda model, _: function(model.weight[0]), reduction="mean"
    )


def quadratic(hessian: Tensor, *at: float) -> Subject:
    """½ wᵀ H w at the point ``at``."""
    return surface(lambda w: 0.5 * w @ hessian @ w, *at)


def point(subject: Subject, seed: int = 0) -> Point:
    """The subject's own point with random numbers of a seed."""
    return Point(subject, Draw(seed, "test", subject.size, subject.dtype, subject.device))


def last(stream: object) -> Found:
    """The final answer of a definition, after looking at how its progress behaves."""
    found = list(stream)  # type: ignore[call-overload]
    done = [f.done for f in found]
    assert done == sorted(done)
    assert done[-1] == 1
    assert not any(f.converged for f in found[:-1] if f.done < 1 and f.lower_bound)
    return found[-1]


def double(*shape: int, seed: int = 0) -> Tensor:
    """Gaussian numbers of a generator of their own."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
