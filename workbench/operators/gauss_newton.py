"""The generalised Gauss-Newton matrix of a subject's loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from workbench.data import Batch
from workbench.operators.curvature import Curvature, Graph
from workbench.operators.graphs import pull, zeros_like
from workbench.shell import precise
from workbench.subject import Subject


class OutputGraph:
    """One chunk's outputs z with the graphs of z and of w ↦ Jᵀw, which is linear: its derivative along v is Jv."""

    def __init__(self, outputs: Tensor, leaves: Sequence[Tensor], loss: Tensor, inner: Tensor) -> None:
        self.leaves, self.outputs, self.inner = leaves, outputs, inner
        self.weights = torch.zeros_like(outputs, requires_grad=True)
        self.pulled = pull([outputs], leaves, [self.weights], differentiable=True) or zeros_like(leaves)
        self.force = pull([loss], [inner], None, differentiable=True) or zeros_like([inner])
        self.loss = loss.detach()
        self.slope = pull([outputs], leaves, [self.force[0].detach()]) or zeros_like(leaves)

    def push(self, parts: Sequence[Tensor]) -> Tensor:
        """J v: how the outputs move along a direction of the parameters."""
        moved = pull(self.pulled, [self.weights], parts)
        return moved[0] if moved else torch.zeros_like(self.inner)

    def product(self, parts: Sequence[Tensor]) -> Sequence[Tensor] | None:
        """Jᵀ (∂²ℓ/∂z²) J parts."""
        bent = pull(self.force, [self.inner], [self.push(parts)])
        return pull([self.outputs], self.leaves, bent) if bent else None

    def roots(self) -> Iterable[Tensor]:
        """Outputs, Jᵀw and the loss's slope at the outputs."""
        return (*self.pulled, self.outputs, *self.force)


class GaussNewton(Curvature):
    """G = (1/W) Σ Jᵀ (∂²ℓ/∂z²) J, the generalised Gauss-Newton matrix, with J the Jacobian of the outputs z.

    Positive semi-definite when ℓ is convex in z (cross-entropy on logits, squared error). J v by differentiating Jᵀw
    along v (twice reverse, so it works wherever the Hessian does). Cost: 1.2 to 2.3 gradients a product on kept graphs.
    The split lies at what the model returns: return logits, not probabilities. Source: Schraudolph 2002; Martens 2020.

    Raises:
        TypeError: the subject was made with ``objective=``, which does not tell outputs from loss.
    """

    words = "Gauss-Newton matrix"
    rests_on = "outputs"

    def __init__(self, subject: Subject) -> None:
        if not subject.has_outputs:
            raise TypeError(
                "GaussNewton needs outputs and a loss of them; this subject was made with objective=, which gives only "
                'their composition. Make it with loss= (a name or f(outputs, targets)), or use operator="hessian".'
            )
        super().__init__(subject)

    def _graph(self, batch: Batch) -> Graph:
        outputs = self.subject.batch_outputs(self.leaves, batch)
        inner = outputs.detach().requires_grad_()
        return OutputGraph(outputs, list(self.leaves.values()), self.subject.output_loss(inner, batch), inner)

    def field(self, params: Mapping[str, Tensor]) -> Tensor:
        """The outputs of all examples, flat."""
        with torch.no_grad(), precise(self.device):
            return torch.cat([self.subject.batch_outputs(params, b).reshape(-1) for b in self.subject.batches()])

    def field_derivative(self, direction: Tensor) -> Tensor:
        """J v of all examples, flat."""
        parts = self.split(direction)
        with precise(self.device):
            return torch.cat([cast("OutputGraph", graph).push(parts).reshape(-1) for graph in self._graphs()])
