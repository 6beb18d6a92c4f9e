"""The covariance of examples' gradients as an operator, with the two halves that it is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from workbench.data import Batch
from workbench.numerics.basis import dot
from workbench.numerics.operator import Operator
from workbench.operators.graphs import pull, zeros_like
from workbench.shell import precise
from workbench.subject import Subject

ROWS_BYTES = 2**28
"""All examples' gradients are stored while they take no more than this, and no more than an eighth of free memory."""


class GradientNoise(Operator):
    """C = 1/(n-1) Σ (g_i - ḡ)(g_i - ḡ)ᵀ of the examples' gradients g_i, whose mean ḡ is ∇L: what gradient noise is.

    A mini-batch of B examples drawn with replacement has a gradient of covariance C/B. For losses with weights (class
    weights, masked tokens) g_i is scaled so that the mean over examples is ∇L.

    Small models' gradients (see ``ROWS_BYTES``) are computed once, n passes of one example, and stored. Else nothing
    of size n P exists: a product builds the gradient's graph under weights w_i on the losses; its derivative along v
    and by w_i is g_i · v, all of them in one pass; about 3 to 4 gradients for :meth:`project`, 5 for :meth:`matvec`.

    Raises:
        ValueError: one example only, or a loss in which examples have no gradients of their own.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject, self.examples = subject, subject.examples
        self.size, self.dtype, self.device = subject.size, subject.dtype, subject.device
        self.leaves = {name: p.detach().requires_grad_() for name, p in subject.params.items()}
        self.products = 0
        _refuse(subject)
        self.share = subject.examples / subject.total_weight
        self.mean = subject.flatten(subject.gradient())
        self.rows = self._every_gradient() if stores_rows(subject) else None

    def project(self, vector: Tensor) -> Tensor:
        """(g_i - ḡ) · v for each example, (n,), float64."""
        self.products += 1
        if self.rows is not None:
            return (self.rows @ vector).double()
        middle = dot(self.mean, vector)
        return torch.cat([self._along(b, vector)[0] - middle for b in self.subject.batches()])

    def matvec(self, vector: Tensor) -> Tensor:
        """C v."""
        self.products += 1
        if self.rows is not None:
            return (self.rows.T @ (self.rows @ vector)) / (self.examples - 1)
        middle, total = dot(self.mean, vector), torch.zeros_like(self.mean)
        for batch in self.subject.batches():
            along, losses = self._along(batch, vector)
            with precise(self.device):
                found = pull([losses], list(self.leaves.values()), [(along - middle).to(losses.dtype)], keep=False)
            if found is not None:
                total += self._flat(found)
        return total.mul_(self.share / (self.examples - 1))

    @property
    def trace(self) -> float | None:
        """tr C exactly where the gradients are stored; None else."""
        if self.rows is None:
            return None
        return float(torch.linalg.vector_norm(self.rows, dtype=torch.float64) ** 2) / (self.examples - 1)

    def close(self) -> None:
        """Free the stored gradients; later products do without them."""
        self.rows = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _along(self, batch: Batch, vector: Tensor) -> tuple[Tensor, Tensor]:
        """g_i · v of a batch's examples, (n,) float64, and their losses with their graph."""
        params = list(self.leaves.values())
        with precise(self.device), torch.enable_grad():
            losses = _losses(self.subject, self.leaves, batch)
            weights = torch.ones_like(losses, requires_grad=True)
            gradient = pull([(weights * losses).sum()], params, None, differentiable=True) or zeros_like(params)
            parts = self.subject.unflatten(vector).values()
            slope = torch.stack([(g * p).sum() for g, p in zip(gradient, parts, strict=True)]).sum()
            along = pull([slope], [weights], None)
        found = torch.zeros_like(losses) if along is None else along[0]
        return found.detach().double() * self.share, losses

    def _every_gradient(self) -> Tensor:
        """All g_i - ḡ, (n, size)."""
        rows = torch.empty(self.examples, self.size, dtype=self.dtype, device=self.device)
        for i, gradient in enumerate(self._singly()):
            rows[i] = gradient
        return rows.mul_(self.share).sub_(self.mean)

    def _singly(self) -> Iterator[Tensor]:
        params = list(self.leaves.values())
        for batch in self.subject.batches(1):
            with precise(self.device), torch.enable_grad():
                losses = _losses(self.subject, self.leaves, batch)
                for loss in losses:  # data of unequal shapes come in batches of their own
                    yield self._flat(pull([loss], params, None) or zeros_like(params))

    def _flat(self, parts: Sequence[Tensor]) -> Tensor:
        return self.subject.flatten(dict(zip(self.leaves, parts, strict=True)))


def stores_rows(subject: Subject) -> bool:
    """Whether all examples' gradients are stored."""
    needed = subject.examples * subject.size * subject.dtype.itemsize
    return needed <= min(ROWS_BYTES, subject.available_memory() // 8)


def _losses(subject: Subject, leaves: Mapping[str, Tensor], batch: Batch) -> Tensor:
    losses = subject.batch_losses(leaves, batch)
    if losses is None:
        raise ValueError(_NOT_APART)
    return losses


_NOT_APART = (
    "examples have no gradients of their own here: the loss is a function of whole batches (BatchNorm with batch "
    "statistics, a loss that couples examples, or an objective that returns one number). Use norm='eval', or an "
    "objective with one loss an example and reduction='none'."
)


def _refuse(subject: Subject) -> None:
    if subject.examples < 2:
        raise ValueError(f"the covariance of gradients wants at least 2 examples; got {subject.examples}.")
    if subject.norm == "batch" or subject.losses() is None:
        raise ValueError(_NOT_APART)
