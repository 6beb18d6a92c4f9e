"""Mean-field theory of wide dense networks at initialisation: what second moments and gradients become with depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
CELLS, REACH = 8000, 10.0
"""Gaussian means are midpoint sums over so many cells of [-REACH, REACH]: kinks and jumps at 0 fall between cells."""


@dataclass(frozen=True)
class Affine:
    """A dense layer: ``weight`` mean square of the entries of W, ``bias`` mean square of b; ``ins`` and ``outs``."""

    weight: float
    bias: float
    ins: int
    outs: int


Step = Affine | Callable[[Tensor], Tensor]


def gaussian_moments(function: Callable[[Tensor], Tensor], variance: float) -> tuple[float, float]:
    """(E φ(u)², E φ'(u)²) for u ~ N(0, ``variance``) and an activation φ that acts on each entry."""
    width = 2 * REACH / CELLS
    z = (torch.arange(CELLS, dtype=torch.float64) + 0.5) * width - REACH
    weights = torch.exp(-0.5 * z**2)
    weights = weights / weights.sum()
    with torch.enable_grad():
        u = (z * variance**0.5).requires_grad_()
        value = function(u.clone())  # a copy, for activations that write in place
        (slope,) = torch.autograd.grad(value.sum(), u)
    return float((weights * value.detach() ** 2).sum()), float((weights * slope**2).sum())


def forward(steps: Sequence[Step], second: float) -> tuple[Floats, Floats]:
    """(second moments after each step, E φ'² of each activation and nan for dense layers), each (steps,).

    A dense layer gives q = ins · E[W²] · E[x²] + E[b²], an activation E φ(√q z)². Right as widths grow.
    Source: Poole et al. 2016; Schoenholz et al. 2017.
    """
    found, slopes = np.full(len(steps), np.nan), np.full(len(steps), np.nan)
    for i, step in enumerate(steps):
        if isinstance(step, Affine):
            second = step.ins * step.weight * second + step.bias
        else:
            second, slopes[i] = gaussian_moments(step, second)
        found[i] = second
    return found, slopes


def backward(steps: Sequence[Step], slopes: Floats, last: float) -> Floats:
    """Second moments of the loss's gradient with respect to each step's output, from that of the last, (steps,).

    A dense layer hands down outs · E[W²] times its own, an activation E φ'² times its own, taking weights on the way
    back as independent of those on the way there.
    """
    found = np.full(len(steps), np.nan)
    for i in range(len(steps) - 1, -1, -1):
        found[i] = last
        step = steps[i]
        last *= step.outs * step.weight if isinstance(step, Affine) else float(slopes[i])
    return found
