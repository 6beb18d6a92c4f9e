"""The Fisher-Rao norm: how far the outputs' distribution moves when all weights grow in proportion."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from workbench.data import Batch
from workbench.numerics.basis import dot
from workbench.operators.gauss_newton import GaussNewton
from workbench.sharpness.found import Found, NotDefined
from workbench.sharpness.point import Point
from workbench.sharpness.scales import weight_names
from workbench.shell import precise


def fisher_rao(point: Point) -> Iterator[Found]:
    """‖θ‖²_FR = θᵀFθ = (1/N) Σ uᵀ H_ℓ u with u = J θ and H_ℓ = ∂²ℓ/∂f², the model's own Fisher matrix.

    One product with the Gauss-Newton matrix, which equals F for cross-entropy and for half_mse; no homogeneity is
    assumed. ``fisher_rao_shortcut`` is the ratio to it of D² (1/N) Σ fᵀ H_ℓ f, D the number of weight tensors: 1 for
    networks without biases that are positively homogeneous. Error: rounding. Cost: a few gradients. Source: Liang et
    al. 2019 (arXiv:1711.01530).
    """
    with _matrix(point) as matrix:
        value = float(dot(point.weights, matrix.matvec(point.weights)))
    depth = len(weight_names(point.subject))
    shortcut = depth**2 * _own_curvature(point) / value if value else math.nan
    yield Found(
        value,
        _rounding(point, value),
        converged=True,
        protocol=(
            "θᵀFθ with the model's Fisher matrix over all chosen parameters, from J θ; the short cut that assumes "
            f"{depth} homogeneous layers gives {shortcut:.4g} times that; the error is rounding"
        ),
        extra={"fisher_rao_shortcut": shortcut},
    )


def fisher_rao_empirical(point: Point) -> Iterator[Found]:
    """(1/N) Σ ⟨J_i θ, ∂ℓ_i/∂f⟩² = θᵀ F_emp θ with the labels of the data: at interpolation far below the model's.

    Sums over the positions of token models as over examples. Error: rounding. Cost: a gradient and a forward pass.
    """
    if not point.comes_apart:
        raise NotDefined("the loss is no sum over examples")
    with _matrix(point) as matrix:
        pushed = matrix.field_derivative(point.weights)
    square, start, rows = 0.0, 0, 0
    for batch in point.subject.batches():
        force = _force(point, batch)
        along = (force * pushed[start : start + force.numel()].view_as(force)).flatten(0, -2).sum(-1)
        square = square + along.double().square().sum()
        start, rows = start + force.numel(), rows + (batch.size if force.ndim == 2 else 0)
    count, total = rows or point.subject.total_weight, point.subject.total_weight
    value = float(square) * count / total**2
    protocol = "θᵀF_empθ over all chosen parameters, with the labels of the data instead of the model's own"
    yield Found(value, _rounding(point, value), converged=True, protocol=f"{protocol}; the error is rounding")


def _matrix(point: Point) -> GaussNewton:
    if not point.subject.has_outputs:
        raise NotDefined("it needs outputs and a loss of them; the subject was made with objective=")
    return GaussNewton(point.subject)


def _rounding(point: Point, value: float) -> float:
    return 8 * torch.finfo(point.subject.dtype).eps * math.sqrt(point.subject.size) * abs(value)


def _force(point: Point, batch: Batch) -> Tensor:
    """∂(Σ ℓ)/∂f of a batch, in the shape of the outputs with at least two dims."""
    outputs, loss = _at_outputs(point, batch)
    found = torch.autograd.grad(loss, outputs)[0]
    return found if found.ndim > 1 else found[:, None]


def _own_curvature(point: Point) -> float:
    """(1/N) Σ fᵀ H_ℓ f."""
    total = torch.zeros((), dtype=torch.float64, device=point.subject.device)
    for batch in point.subject.batches():
        outputs, loss = _at_outputs(point, batch)
        slope = torch.autograd.grad(loss, outputs, create_graph=True)[0]
        if slope.requires_grad:
            still = outputs.detach()
            total += (torch.autograd.grad(slope, outputs, still)[0] * still).double().sum()
    return float(total) / point.subject.total_weight


def _at_outputs(point: Point, batch: Batch) -> tuple[Tensor, Tensor]:
    subject = point.subject
    with torch.no_grad(), precise(subject.device):
        outputs = subject.batch_outputs({}, batch)
    outputs = outputs.detach().requires_grad_()
    with torch.enable_grad():
        return outputs, subject.output_loss(outputs, batch)
