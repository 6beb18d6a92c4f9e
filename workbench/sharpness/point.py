"""The point whose surroundings are looked at: its weights as one vector, its loss, gradient and Hessian, made once."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from workbench.numerics.basis import norm
from workbench.numerics.sampling import Draw
from workbench.operators.graphs import add_parts
from workbench.operators.hessian import Hessian
from workbench.selftest import SelfTest, self_test
from workbench.sharpness.logits import normalised
from workbench.shell import precise
from workbench.subject import Subject

STUCK = 0.01
"""Share of coordinates left where they were by rounding from which a reader must be told."""


class Point:
    """A subject at its weights, with what several definitions ask for; the weights themselves are never written.

    Memory: the weights and the gradient as vectors, and the Hessian's graphs from its first use until :meth:`close`.
    """

    def __init__(self, subject: Subject, draw: Draw) -> None:
        self.subject, self.draw = subject, draw
        self.weights = subject.flatten(subject.params).clone()
        found = subject.evaluate(metrics=("loss",))
        self.loss, self.loss_error = found["loss"], found.get("loss_error", math.nan)
        self._hessian: Hessian | None = None
        self.tested: SelfTest | None = None

    @functools.cached_property
    def gradient(self) -> Tensor:
        """∇L, (size,), in the subject's precision."""
        return self.subject.flatten(self.subject.gradient())

    @functools.cached_property
    def gradient_norm(self) -> float:
        """‖∇L‖."""
        return float(norm(self.gradient))

    @property
    def rounding(self) -> float:
        """What rounding may add to a difference of two losses: a few units in the last place of the loss, or of 1."""
        return 8 * torch.finfo(self.subject.dtype).eps * max(1.0, abs(self.loss))

    @property
    def comes_apart(self) -> bool:
        """Whether the loss is a sum over examples."""
        return self.subject.examples < 2 or not math.isnan(self.loss_error)

    def rise(self, step: Tensor) -> float:
        """L(θ + step) - L(θ) over all examples: one forward pass."""
        return self.subject.loss(self.subject.unflatten(self.weights + step)) - self.loss

    def unmoved(self, step: Tensor) -> tuple[str, ...]:
        """Words about a step that rounding swallows in more than one of a hundred coordinates; else nothing."""
        asked = step != 0
        stuck = ((self.weights + step == self.weights) & asked).sum() / asked.sum().clamp_min(1)
        share = float(stuck)
        return (f"rounding left {share:.0%} of the coordinates where they were",) if share > STUCK else ()

    @property
    def hessian(self) -> Hessian:
        """The Hessian, with its graphs kept for the definitions to come, and tested once."""
        if self._hessian is None:
            self._hessian = Hessian(self.subject)
            self.tested = self_test(self._hessian)
        return self._hessian

    @functools.cached_property
    def normalised(self) -> Point:
        """The same point of the same classifier with logits of unit size."""
        return Point(normalised(self.subject), self.draw)

    def close(self) -> None:
        """Free the Hessian's graphs, here and with normalised logits."""
        if self._hessian is not None:
            self._hessian.close()
        if "normalised" in vars(self):
            self.normalised.close()


def value_and_slope(subject: Subject, weights: Tensor) -> tuple[Tensor, Tensor]:
    """L (a 0-d float64 tensor) and ∇L (size,) at a vector of weights, from one pass forwards and back, without a sync.

    Values that are not finite come back as they are.
    """
    leaves = {name: t.detach().requires_grad_() for name, t in subject.unflatten(weights).items()}
    slope = torch.zeros_like(weights)
    views = list(subject.unflatten(slope).values())
    loss = torch.zeros((), dtype=torch.float64, device=weights.device)
    buffers = subject.recomputed(leaves) if subject.norm == "recompute" else {}
    with precise(subject.device), torch.enable_grad():
        for batch in subject.batches():
            total = subject.batch_loss(leaves, batch, buffers)
            loss += total.detach()
            if total.requires_grad:
                parts = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
                add_parts(views, parts)
    return loss / subject.total_weight, slope.div_(subject.total_weight)
