"""The generalised Gauss-Newton matrix of a subject's loss, and what all matrices of the form Jᵀ B J share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from workbench.data import Batch
from workbench.operators.curvature import Curvature, Graph
from workbench.operators.graphs import pull, zeros_like
from workbench.operators.pushes import Graphed, Outputs, Push, Way, checked, made, suggested
from workbench.shell import precise
from workbench.subject import Subject

Bend = Callable[[Tensor], Tensor | None]
"""B u for u = J v, both in the shape of a chunk's outputs; None where it is zero."""


class OutputGraph:
    """One chunk's outputs z with their graph, and ``push`` for their derivative along a direction.

    ``inner`` stands for z by itself, with ``loss`` a function of it; ``bend`` is B in Jᵀ B J, None for ∂²ℓ/∂z².
    """

    def __init__(self, outputs: Tensor, leaves: Sequence[Tensor], loss: Tensor, inner: Tensor, push: Push) -> None:
        self.leaves, self.outputs, self.inner, self.push = leaves, outputs, inner, push
        self.force = pull([loss], [inner], None, differentiable=True) or zeros_like([inner])
        self.loss = loss.detach()
        self.slope = pull([outputs], leaves, [self.force[0].detach()]) or zeros_like(leaves)
        self.bend: Bend | None = None

    def _curved(self, moved: Tensor) -> Tensor | None:
        """(∂²ℓ/∂z²) u."""
        found = pull(self.force, [self.inner], [moved])
        return found[0] if found else None

    def product(self, parts: Sequence[Tensor]) -> Sequence[Tensor] | None:
        """Jᵀ B J parts."""
        bent = (self.bend or self._curved)(self.push(parts))
        return None if bent is None else pull([self.outputs], self.leaves, [bent])

    def roots(self) -> Iterable[Tensor]:
        """Outputs, what the push holds, and the loss's slope at the outputs."""
        return (*self.push.roots(), self.outputs, *self.force)


class OutputCurvature(Curvature):
    """Matrices (1/W) Σ Jᵀ B J with J the Jacobian of the outputs z: subclasses say what B is.

    Raises:
        TypeError: the subject was made with ``objective=``, which does not tell outputs from loss.
    """

    rests_on = "outputs"

    def __init__(self, subject: Subject) -> None:
        if not subject.has_outputs:
            raise TypeError(
                f"{type(self).__name__} needs outputs and a loss of them; this subject was made with objective=, which "
                "gives only their composition. Make it with loss= (a name or f(outputs, targets)), or use "
                'operator="hessian".'
            )
        super().__init__(subject)
        self._way: Way | None = None

    @abstractmethod
    def _bend(self, graph: OutputGraph, batch: Batch) -> Bend | None:
        """B of one chunk; None for the loss's own curvature in the outputs. Must not hold the graph."""

    def _graph(self, batch: Batch) -> Graph:
        outputs = self.subject.batch_outputs(self.leaves, batch)
        inner = outputs.detach().requires_grad_()
        loss, push = self.subject.output_loss(inner, batch), self._push(outputs, batch)
        graph = OutputGraph(outputs, list(self.leaves.values()), loss, inner, push)
        graph.bend = self._bend(graph, batch)
        return graph

    def _push(self, outputs: Tensor, batch: Batch) -> Push:
        """J v the way that the plan says, or that suits; compared with reverse mode on the first chunk."""
        leaves, subject, names = list(self.leaves.values()), self.subject, list(self.leaves)

        def again(tensors: Sequence[Tensor]) -> Tensor:
            return subject.batch_outputs(dict(zip(names, tensors, strict=True)), batch)

        if self._way is None:
            return self._first_push(outputs, again, leaves)
        # A graph that is not kept lives for one product: nothing that is built once pays off there.
        once = bool(self._chunks) and self._way in ("linearised", "compiled")
        return (
            Graphed(outputs, leaves) if self._way == "graph" else made("forward" if once else self._way, again, leaves)
        )

    def _first_push(self, outputs: Tensor, again: Outputs, leaves: list[Tensor]) -> Push:
        asked: Way | None = self.subject.plan.push
        graphed, self._way = Graphed(outputs, leaves), asked or suggested(outputs)
        if self._way == "graph":
            return graphed
        try:
            return checked(self._way, again, leaves, graphed)
        except RuntimeError:
            if asked:
                raise
            self._way = "graph"
            return graphed

    def field(self, params: Mapping[str, Tensor]) -> Tensor:
        """The outputs of all examples, flat."""
        with torch.no_grad(), precise(self.device):
            return torch.cat([self.subject.batch_outputs(params, b).reshape(-1) for b in self.subject.batches()])

    def field_derivative(self, direction: Tensor) -> Tensor:
        """J v of all examples, flat."""
        parts = self.split(direction)
        with precise(self.device):
            return torch.cat([cast("OutputGraph", graph).push(parts).reshape(-1) for graph in self._graphs()])


class GaussNewton(OutputCurvature):
    """G = (1/W) Σ Jᵀ (∂²ℓ/∂z²) J, the generalised Gauss-Newton matrix, with J the Jacobian of the outputs z.

    Positive semi-definite when ℓ is convex in z (cross-entropy on logits, squared error). J v by differentiating Jᵀw
    along v (twice reverse, so it works wherever the Hessian does), by forward mode in nets with convolutions, or as
    ``Plan(push=...)`` says. Cost: 1.2 to 1.6 gradients a product on kept graphs.
    The split lies at what the model returns: return logits, not probabilities. Source: Schraudolph 2002; Martens 2020.

    Raises:
        TypeError: the subject was made with ``objective=``, which does not tell outputs from loss.
    """

    words = "Gauss-Newton matrix"

    def _bend(self, graph: OutputGraph, batch: Batch) -> None:
        return None
