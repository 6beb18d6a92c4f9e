"""What each example adds to vᵀAv, for all examples of a batch at once and by reverse mode only.

For the Hessian, weights w_i are put on the losses: vᵀ∇(vᵀ∇ Σ w_i ℓ_i) is linear in them, and its derivative by w_i is
vᵀ∇²ℓ_i v. That is three backward passes for a batch, whatever its size, where a loop takes two for each example. For
second moments of gradients, the derivative of vᵀ∇ Σ w_i ℓ_i by w_i is v·∇ℓ_i.
Forward over reverse would be cheaper and is silently wrong through LayerNorm and BatchNorm. So are PyTorch's third
derivatives (torch 2.13), by a factor, where that by the weights, in which everything is linear, is right: slopes by the
inputs are therefore differences of second derivatives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from workbench.data import Batch
from workbench.numerics.operator import Operator
from workbench.operators.curvature import Curvature
from workbench.operators.fisher import Fisher, SampledFisher
from workbench.operators.gauss_newton import GaussNewton
from workbench.operators.gradients import EmpiricalFisher, GradientCovariance
from workbench.operators.graphs import pull, zeros_like
from workbench.operators.hessian import Hessian
from workbench.operators.likelihood import likelihood
from workbench.operators.preconditioned import Preconditioned
from workbench.shell import precise
from workbench.subject import Subject

Parts = Sequence[Tensor]
Ends = Sequence[Mapping[str, Tensor]]
AttributedName = Literal["hessian", "ggn", "fisher", "empirical_fisher", "gradient_covariance"]
DRAWN = (
    "Labels are drawn for it, so an example's part would be that of the label that it happened to get: look at "
    "'fisher', which takes all labels by their probabilities."
)
"""Why there are no parts of a sampled Fisher matrix."""
MIXED = (
    "Its preconditioner is made of the gradients of all examples together, so no example adds a part of its own: look "
    "at the matrix within, its attribute operator."
)
"""Why there are none of a preconditioned matrix."""


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


def forms(matrix: Operator, batch: Batch, direction: Parts, other: Parts) -> Forms:
    """What each example of a batch adds to vᵀAv, v = ``direction``, and to rᵀAv, r = ``other``.

    A_i is the Hessian of the example's loss, its Gauss-Newton or Fisher matrix, W/n g_i g_iᵀ for the empirical Fisher
    matrix and W/(n-1) (g_i - ḡ)(g_i - ḡ)ᵀ for the gradient covariance, with W the subject's total weight and g_i as
    these operators have them: over all examples the parts add up to W vᵀAv.

    Cost: the gradient's graph and three more backward passes, some 9 gradients' time (4 for the others) and 4
    gradients' memory. Where examples see each other (statistics of a batch), an example's part is that of its own loss.

    Raises:
        TypeError: a matrix that is no sum over examples: of drawn labels, preconditioned, or a stranger's.
        ValueError: the batch's loss is not a sum over examples.
    """
    if type(matrix) not in _FORMS or not isinstance(matrix, Curvature):
        raise TypeError(_no_sum(matrix))
    with precise(matrix.subject.device), torch.enable_grad():
        return _FORMS[type(matrix)](matrix, batch, direction, other)


def _no_sum(matrix: Operator) -> str:
    name = type(matrix).__name__
    if isinstance(matrix, SampledFisher | Preconditioned):
        return f"{name} is no sum over examples. {DRAWN if isinstance(matrix, SampledFisher) else MIXED}"
    return f"{name} is not known as a sum over examples; known are {', '.join(t.__name__ for t in _FORMS)}."


def single_input(batch: Batch) -> Tensor | None:
    """The batch's only input where it is a tensor of real numbers, one row an example; None else."""
    if batch.kwargs or len(batch.args) != 1 or not isinstance(batch.args[0], Tensor):
        return None
    found = batch.args[0]
    return found if found.is_floating_point() and found.ndim > 1 and len(found) == batch.size else None


def _hessian(matrix: Curvature, batch: Batch, direction: Parts, other: Parts) -> Forms:
    losses, params = _losses(matrix, batch), list(matrix.leaves.values())
    weights = torch.ones_like(losses, requires_grad=True)
    gradient = pull([(weights * losses).sum()], params, None, differentiable=True) or zeros_like(params)
    product = pull([_dot(gradient, direction)], params, None, differentiable=True) or zeros_like(params)
    sums = [_dot(product, direction), _dot(product, other)]
    each, turned = ((pull([s], [weights], None) or zeros_like([weights]))[0].double() for s in sums)
    return Forms(each, turned, [p.detach() for p in product])


def _losses(matrix: Curvature, batch: Batch) -> Tensor:
    losses = matrix.subject.batch_losses(matrix.leaves, batch)
    if losses is None:
        raise ValueError(NOT_APART)
    return losses


def _outputs(matrix: Curvature, batch: Batch, direction: Parts, other: Parts) -> Forms:
    """(Jv)ᵀ B_i (Jv), row by row of the outputs z, with B_i = ∂²ℓ_i/∂z² or E[s sᵀ]."""
    params, outputs = list(matrix.leaves.values()), matrix.subject.batch_outputs(matrix.leaves, batch)
    if len(outputs) != batch.size:
        raise ValueError(NOT_APART)
    weights = torch.zeros_like(outputs, requires_grad=True)
    pulled = pull([outputs], params, [weights], differentiable=True) or zeros_like(params)
    moved, turned = ((pull(pulled, [weights], p) or zeros_like([outputs]))[0] for p in (direction, other))
    bent = _bent(matrix, outputs, batch, moved)
    each, mixed = ((bent * m).detach().double().reshape(batch.size, -1).sum(1) for m in (moved, turned))
    return Forms(each, mixed, pull([outputs], params, [bent]) or zeros_like(params))


def _bent(matrix: Curvature, outputs: Tensor, batch: Batch, moved: Tensor, differentiable: bool = False) -> Tensor:
    """B u for u = ``moved``, as a function of the outputs where that is asked for."""
    subject = matrix.subject
    if isinstance(matrix, Fisher):
        return dataclasses.replace(likelihood(subject, outputs, batch), outputs=outputs).expected(moved)
    force = pull([subject.output_loss(outputs, batch)], [outputs], None, differentiable=True) or zeros_like([outputs])
    return (pull(force, [outputs], [moved], differentiable=differentiable) or zeros_like([outputs]))[0]


def _gradients(matrix: Curvature, batch: Batch, direction: Parts, other: Parts) -> Forms:
    """W/d (g_i·v - m)² from all g_i·v at once; ḡ needs no second place in the product, as Σ (g_i·v - m) = 0."""
    losses, params = _losses(matrix, batch), list(matrix.leaves.values())
    weights = torch.ones_like(losses, requires_grad=True)
    pulled = pull([losses], params, [weights], differentiable=True) or zeros_like(params)
    rates = ((pull(pulled, [weights], p) or zeros_like([losses]))[0] for p in (direction, other))
    along, turned = (_centred(matrix, rate, p) for rate, p in zip(rates, (direction, other), strict=True))
    n, total, degrees = matrix.subject.examples, matrix.subject.total_weight, _degrees(matrix)
    product = pull([losses], params, [(n / degrees * along).to(losses)]) or zeros_like(params)
    return Forms(total / degrees * along**2, total / degrees * along * turned, product)


def _centred(matrix: Curvature, rates: Tensor, direction: Parts) -> Tensor:
    """g_i·v - m of the losses' derivatives along v; m = ḡ·v for the covariance and 0 for the uncentred moment."""
    found = rates.double() * (matrix.subject.examples / matrix.subject.total_weight)
    if not isinstance(matrix, GradientCovariance):
        return found
    return found - _dot(matrix.split(matrix.gradient), [p.double() for p in direction])


def _degrees(matrix: Curvature) -> int:
    """By what the squares are divided: n, or n - 1 with a mean taken off."""
    return matrix.subject.examples - isinstance(matrix, GradientCovariance)


_FORMS: Mapping[type[Operator], Callable[[Curvature, Batch, Parts, Parts], Forms]] = {
    Hessian: _hessian,
    GaussNewton: _outputs,
    Fisher: _outputs,
    EmpiricalFisher: _gradients,
    GradientCovariance: _gradients,
}


# --- inputs ---------------------------------------------------------------------------------------------------------


def slopes(matrix: Curvature, batch: Batch, direction: Parts, step: float) -> Tensor:
    """∂(vᵀA_i v)/∂x_i for the batch's :func:`single_input` x, of its shape, by central differences along v.

    For the Hessian (s(θ + hv) - s(θ - hv)) / 2h with s = ∂(vᵀ∇Σℓ)/∂x; for Gauss-Newton and Fisher Jv is a difference of
    outputs, for moments of gradients g_i·v one of losses. The mean gradient of the covariance is held, which gives the
    slopes of W vᵀAv itself. Error O(h²) and rounding of eps/h: eps^(1/3) times the weights' norm is a good ``step`` h.
    Cost: some 8 gradients.

    Raises:
        TypeError: as :func:`forms`.
        ValueError: the batch has no single input.
    """
    found = single_input(batch)
    if found is None:
        raise ValueError("the batch has no single input of real numbers with one row for each example.")
    if type(matrix) not in _FORMS:
        raise TypeError(_no_sum(matrix))
    x = found.detach().clone().requires_grad_()
    inner = dataclasses.replace(batch, args=(x,))
    ends = [_moved(matrix.leaves, direction, h) for h in (step, -step)]
    with precise(matrix.subject.device), torch.enable_grad():
        if isinstance(matrix, Hessian):
            ahead, behind = (_mixed(matrix.subject, end, inner, direction, x) for end in ends)
            return (ahead - behind) / (2 * step)
        gradients = isinstance(matrix, EmpiricalFisher)
        sums = (_squares if gradients else _curved)(matrix, ends, inner, direction, 2 * step)
        return (pull([sums], [x], None) or zeros_like([x]))[0]


def _moved(leaves: Mapping[str, Tensor], direction: Parts, step: float) -> dict[str, Tensor]:
    pairs = zip(leaves.items(), direction, strict=True)
    return {name: leaf.detach().add(part, alpha=step).requires_grad_() for (name, leaf), part in pairs}


def _mixed(subject: Subject, params: Mapping[str, Tensor], batch: Batch, direction: Parts, x: Tensor) -> Tensor:
    leaves = list(params.values())
    gradient = pull([subject.batch_loss(params, batch)], leaves, None, differentiable=True) or zeros_like(leaves)
    return (pull([_dot(gradient, direction)], [x], None) or zeros_like([x]))[0]


def _squares(matrix: Curvature, ends: Ends, batch: Batch, direction: Parts, span: float) -> Tensor:
    """Σ W/d (g_i·v - m)², with m a number."""
    losses = [matrix.subject.batch_losses(end, batch) for end in ends]
    if losses[0] is None or losses[1] is None:
        raise ValueError(NOT_APART)
    along = _centred(matrix, (losses[0] - losses[1]) / span, direction)
    return matrix.subject.total_weight / _degrees(matrix) * along.square().sum()


def _curved(matrix: Curvature, ends: Ends, batch: Batch, direction: Parts, span: float) -> Tensor:
    """Σ (Jv)ᵀ B_i (Jv)."""
    ahead, behind = (matrix.subject.batch_outputs(end, batch) for end in ends)
    moved = (ahead - behind) / span
    outputs = matrix.subject.batch_outputs({name: leaf.detach() for name, leaf in matrix.leaves.items()}, batch)
    return _dot([_bent(matrix, outputs, batch, moved, differentiable=True)], [moved])


def _dot(one: Parts, two: Parts) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(one, two, strict=True)]).sum()


NOT_APART = (
    "the loss is not a sum over examples (it couples those of a batch, or gives one number for all of them), so no "
    "example carries a part of the curvature. Pass a loss that PyTorch computes for each example, such as "
    'loss="cross_entropy", or one with a reduction="none" of its own; for objective= return one value for each example.'
)
