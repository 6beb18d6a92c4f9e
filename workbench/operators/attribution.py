"""What each example adds to vᵀAv, for all examples of a batch at once and by reverse mode only.

For the Hessian, weights w_i are put on the losses: vᵀ∇(vᵀ∇ Σ w_i ℓ_i) is linear in them, and its derivative by w_i is
vᵀ∇²ℓ_i v. That is three backward passes for a batch, whatever its size, where a loop takes two for each example.
Forward over reverse would be cheaper and is silently wrong through LayerNorm and BatchNorm. So are PyTorch's third
derivatives (torch 2.13), by a factor, where that by the weights, in which everything is linear, is right: slopes by the
inputs are therefore differences of second derivatives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from workbench.data import Batch
from workbench.operators.graphs import pull, zeros_like
from workbench.shell import precise
from workbench.subject import Subject

Parts = Sequence[Tensor]
AttributedName = Literal["hessian", "ggn"]


@dataclass(frozen=True)
class Forms:
    """A batch's part of vᵀAv, not divided by the subject's total weight.

    Attributes:
        each: vᵀA_i v, (n,) float64; A_i is the curvature of example i's part of the loss.
        turned: rᵀA_i v, (n,) float64, for a second direction r: half of how ``each`` changes as v turns towards r.
        product: Σ A_i v, parameter by parameter.
    """

    each: Tensor
    turned: Tensor
    product: Parts


def forms(
    subject: Subject,
    leaves: Mapping[str, Tensor],
    batch: Batch,
    direction: Parts,
    other: Parts,
    operator: AttributedName = "hessian",
) -> Forms:
    """What each example of a batch adds to vᵀAv, v = ``direction``, and to rᵀAv, r = ``other``.

    Cost: the gradient's graph and three more backward passes, some 9 gradients' time (4 for Gauss-Newton) and 4
    gradients' memory. Where examples see each other (statistics of a batch), an example's part is that of its own loss.

    Raises:
        ValueError: the batch's loss is not a sum over examples.
    """
    with precise(subject.device), torch.enable_grad():
        form = _hessian if operator == "hessian" else _gauss_newton
        return form(subject, leaves, batch, direction, other)


def single_input(batch: Batch) -> Tensor | None:
    """The batch's only input where it is a tensor of real numbers, one row an example; None else."""
    if batch.kwargs or len(batch.args) != 1 or not isinstance(batch.args[0], Tensor):
        return None
    found = batch.args[0]
    return found if found.is_floating_point() and found.ndim > 1 and len(found) == batch.size else None


def _hessian(subject: Subject, leaves: Mapping[str, Tensor], batch: Batch, direction: Parts, other: Parts) -> Forms:
    losses, params = subject.batch_losses(leaves, batch), list(leaves.values())
    if losses is None:
        raise ValueError(NOT_APART)
    weights = torch.ones_like(losses, requires_grad=True)
    gradient = pull([(weights * losses).sum()], params, None, differentiable=True) or zeros_like(params)
    product = pull([_dot(gradient, direction)], params, None, differentiable=True) or zeros_like(params)
    sums = [_dot(product, direction), _dot(product, other)]
    each, turned = ((pull([s], [weights], None) or zeros_like([weights]))[0].double() for s in sums)
    return Forms(each, turned, [p.detach() for p in product])


def _gauss_newton(
    subject: Subject, leaves: Mapping[str, Tensor], batch: Batch, direction: Parts, other: Parts
) -> Forms:
    """(Jv)ᵀ (∂²ℓ_i/∂z²) (Jv), row by row of the outputs z."""
    params, outputs = list(leaves.values()), subject.batch_outputs(leaves, batch)
    if len(outputs) != batch.size:
        raise ValueError(NOT_APART)
    weights = torch.zeros_like(outputs, requires_grad=True)
    pulled = pull([outputs], params, [weights], differentiable=True) or zeros_like(params)
    moved, turned = ((pull(pulled, [weights], p) or zeros_like([outputs]))[0] for p in (direction, other))
    force = pull([subject.output_loss(outputs, batch)], [outputs], None, differentiable=True) or zeros_like([outputs])
    bent = (pull(force, [outputs], [moved]) or zeros_like([outputs]))[0]
    each, mixed = ((bent * m).detach().double().reshape(batch.size, -1).sum(1) for m in (moved, turned))
    return Forms(each, mixed, pull([outputs], params, [bent]) or zeros_like(params))


# --- inputs ---------------------------------------------------------------------------------------------------------


def slopes(
    subject: Subject,
    leaves: Mapping[str, Tensor],
    batch: Batch,
    direction: Parts,
    step: float,
    operator: AttributedName = "hessian",
) -> Tensor:
    """∂(vᵀA_i v)/∂x_i for the batch's :func:`single_input` x, of its shape, by central differences along v.

    For the Hessian (s(θ + hv) - s(θ - hv)) / 2h with s = ∂(vᵀ∇Σℓ)/∂x; for Gauss-Newton Jv is a difference of outputs.
    Error O(h²) and rounding of eps/h: eps^(1/3) times the weights' norm is a good ``step`` h. Cost: some 8 gradients.
    """
    found = single_input(batch)
    if found is None:
        raise ValueError("the batch has no single input of real numbers with one row for each example.")
    x = found.detach().clone().requires_grad_()
    inner = dataclasses.replace(batch, args=(x,))
    ends = [_moved(leaves, direction, h) for h in (step, -step)]
    with precise(subject.device), torch.enable_grad():
        if operator == "hessian":
            ahead, behind = (_mixed(subject, end, inner, direction, x) for end in ends)
            return (ahead - behind) / (2 * step)
        ahead, behind = (subject.batch_outputs(end, inner) for end in ends)
        return _bent_slope(subject, leaves, inner, (ahead - behind) / (2 * step), x)


def _moved(leaves: Mapping[str, Tensor], direction: Parts, step: float) -> dict[str, Tensor]:
    pairs = zip(leaves.items(), direction, strict=True)
    return {name: leaf.detach().add(part, alpha=step).requires_grad_() for (name, leaf), part in pairs}


def _mixed(subject: Subject, params: Mapping[str, Tensor], batch: Batch, direction: Parts, x: Tensor) -> Tensor:
    leaves = list(params.values())
    gradient = pull([subject.batch_loss(params, batch)], leaves, None, differentiable=True) or zeros_like(leaves)
    return (pull([_dot(gradient, direction)], [x], None) or zeros_like([x]))[0]


def _bent_slope(subject: Subject, leaves: Mapping[str, Tensor], batch: Batch, moved: Tensor, x: Tensor) -> Tensor:
    outputs = subject.batch_outputs({name: leaf.detach() for name, leaf in leaves.items()}, batch)
    force = pull([subject.output_loss(outputs, batch)], [outputs], None, differentiable=True) or zeros_like([outputs])
    bent = pull(force, [outputs], [moved], differentiable=True) or zeros_like([outputs])
    return (pull([_dot(bent, [moved])], [x], None) or zeros_like([x]))[0]


def _dot(one: Parts, two: Parts) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(one, two, strict=True)]).sum()


NOT_APART = (
    "the loss is not a sum over examples (it couples those of a batch, or gives one number for all of them), so no "
    "example carries a part of the curvature. Pass a loss that PyTorch computes for each example, such as "
    'loss="cross_entropy", or one with a reduction="none" of its own; for objective= return one value for each example.'
)
