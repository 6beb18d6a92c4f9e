"""Second moments of the examples' own gradients: empirical Fisher matrix and gradient covariance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.data import Batch
from workbench.numerics.basis import dot
from workbench.operators.gauss_newton import Bend, OutputCurvature, OutputGraph
from workbench.operators.graphs import pull, zeros_like
from workbench.shell import precise
from workbench.subject import Subject


@dataclass
class _Mean:
    """ḡ · v of the product that is being computed; 0 where nothing is centred. Shared with the graphs."""

    along: Tensor | float = 0.0


class EmpiricalFisher(OutputCurvature):
    """F_emp = (1/n) Σ g_i g_iᵀ, uncentred, with g_i the gradient of example i's own loss; (size, size).

    The g_i are scaled so that their mean is ∇L (which matters for losses with weights). It depends on the data's labels
    and is not the Fisher matrix (Kunstner, Balles, Hennig 2019, arXiv:1905.12558). All tokens of an example make
    one g_i. A product costs what one with the Gauss-Newton matrix costs; no gradient of one example is ever stored.

    Raises:
        TypeError: the subject was made with ``objective=``.
        ValueError: examples have no gradients of their own: batch statistics, or a loss that couples examples.
    """

    words = "empirical Fisher matrix"

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        check_apart(subject)
        self.mean = _Mean()

    def _bend(self, graph: OutputGraph, batch: Batch) -> Bend:
        score, mean = graph.force[0].detach(), self.mean
        scale = self.subject.examples / self.subject.total_weight

        def bend(moved: Tensor) -> Tensor:
            # (n/W) s_i · u_i is the derivative of example i's scaled loss along the direction.
            along = scale * (score * moved).reshape(len(moved), -1).sum(1) - mean.along
            return score * along.reshape(-1, *[1] * (moved.ndim - 1))

        return bend


class GradientCovariance(EmpiricalFisher):
    """C = 1/(n-1) Σ (g_i - ḡ)(g_i - ḡ)ᵀ, the covariance of the examples' gradients; (size, size).

    What noise of mini-batches comes from: that of B examples drawn with replacement is C/B. Cost as
    :class:`EmpiricalFisher`, and one pass for ḡ.

    Raises:
        As :class:`EmpiricalFisher`; ValueError for a single example.
    """

    words = "gradient covariance"

    def __init__(self, subject: Subject) -> None:
        if subject.examples < 2:
            raise ValueError("a covariance needs at least two examples; the subject has one.")
        super().__init__(subject)

    def _products(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        if not self._chunks:
            super()._products([])  # the mean comes with the first pass
        found: list[Tensor] = []
        for vector in vectors:
            self.mean.along = dot(self.gradient, vector.double()).to(self.dtype)
            found += super()._products([vector])
        return [product.mul_(self.subject.examples / (self.subject.examples - 1)) for product in found]


def gradients_of_examples(subject: Subject) -> Iterator[Mapping[str, Tensor]]:
    """∇ℓ_i of one example after another, by parameter; of a subject that :func:`check_apart` lets pass.

    ℓ_i is what the example adds to the sum, so that their sum over ``total_weight`` is ∇L.
    """
    leaves = {name: p.detach().requires_grad_() for name, p in subject.params.items()}
    params = list(leaves.values())
    for batch in subject.batches(1):
        with precise(subject.device), torch.enable_grad():
            losses = subject.batch_losses(leaves, batch)
            assert losses is not None  # refused before
            found = [pull([loss], params, None) or zeros_like(params) for loss in losses]
        for one in found:
            yield dict(zip(leaves, one, strict=True))


def check_apart(subject: Subject) -> None:
    """Refuse subjects whose examples have no gradients of their own.

    Raises:
        ValueError: with what to do.
    """
    if subject.norm == "batch":
        raise ValueError(
            "with BatchNorm on batch statistics an example has no gradient of its own; make the subject with "
            "norm='eval'."
        )
    batch = next(iter(subject.batches(2)))
    with torch.no_grad():
        each, outputs = subject.batch_losses({}, batch), subject.batch_outputs({}, batch)
    if each is None or len(outputs) != batch.size:
        raise ValueError(
            "the loss does not come apart into its examples, so they have no gradients of their own; let the model "
            "keep examples in dimension 0 and the loss give one number for each (reduction='none')."
        )
