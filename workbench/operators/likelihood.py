"""The label distribution that a loss stands for, p(y | z) ∝ exp(-ℓ(z, y)), where it is one of the usual four."""

# pyright: reportPrivateUsage=false
# What the loss is lies with the subject's criterion, which has no public name.

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.data import Batch
from workbench.losses import Loss, as_values, class_last
from workbench.subject import Subject

FEW = 64
"""Examples on which a loss is recognised."""
Uniform = Callable[[int], Tensor]
"""So many numbers from 0 to 1, on the host, float64."""


@dataclass(frozen=True)
class Likelihood(ABC):
    """p(y | z) at a chunk's outputs z (n, ...): its Fisher matrix in z, and scores of labels drawn from it."""

    outputs: Tensor

    @abstractmethod
    def expected(self, moved: Tensor) -> Tensor:
        """E[s sᵀ] u with the score s = ∂ℓ/∂z, in the shape of the outputs."""

    @abstractmethod
    def score(self, uniform: Uniform) -> Tensor:
        """s of labels that are drawn, in the shape of the outputs."""

    @abstractmethod
    def along(self, score: Tensor, moved: Tensor) -> Tensor:
        """s · u over what one label decides, so that s times it has the mean E[s sᵀ] u."""


@dataclass(frozen=True)
class Softmax(Likelihood):
    """Class numbers at each position: ℓ = -log p_y, p the softmax of z (which log-probabilities are their own of)."""

    kept: Tensor
    class_dim: int

    @property
    def probabilities(self) -> Tensor:
        """p, zero where no label counts."""
        return self.outputs.softmax(self.class_dim) * self.kept

    def expected(self, moved: Tensor) -> Tensor:
        p = self.probabilities
        return p * moved - p * self.along(p, moved)

    def score(self, uniform: Uniform) -> Tensor:
        p = self.probabilities
        total = p.cumsum(self.class_dim)
        drawn = uniform(self.kept.numel()).to(p).reshape(self.kept.shape)
        # A number from 0 to 1 falls into class c with probability p_c.
        label = (total < drawn).sum(self.class_dim, keepdim=True).clamp_max(p.shape[self.class_dim] - 1)
        return p - torch.zeros_like(p).scatter_(self.class_dim, label, 1.0) * self.kept

    def along(self, score: Tensor, moved: Tensor) -> Tensor:
        return (score * moved).sum(self.class_dim, keepdim=True)


@dataclass(frozen=True)
class _Joint(Likelihood):
    """Independent entries, whose labels are drawn together for each example."""

    def along(self, score: Tensor, moved: Tensor) -> Tensor:
        found = (score * moved).reshape(len(moved), -1).sum(1)
        return found.reshape(-1, *[1] * (moved.ndim - 1))


@dataclass(frozen=True)
class Bernoulli(_Joint):
    """Yes or no at each entry: ℓ = -log σ(±z)."""

    def expected(self, moved: Tensor) -> Tensor:
        p = self.outputs.sigmoid()
        return p * (1 - p) * moved

    def score(self, uniform: Uniform) -> Tensor:
        p = self.outputs.sigmoid()
        return p - (uniform(p.numel()).to(p).reshape(p.shape) < p).to(p)


@dataclass(frozen=True)
class Gaussian(_Joint):
    """Values with ℓ = ½ ``precision`` (z - y)²: noise of variance 1 / precision."""

    precision: float

    def expected(self, moved: Tensor) -> Tensor:
        return self.precision * moved

    def score(self, uniform: Uniform) -> Tensor:
        z = self.outputs
        normal = torch.special.ndtri(uniform(z.numel()).clamp(1e-12, 1 - 1e-12))
        return self.precision**0.5 * normal.to(z).reshape(z.shape)


def likelihood(subject: Subject, outputs: Tensor, batch: Batch) -> Likelihood:
    """The label distribution of a subject's loss at a batch's outputs.

    The loss is compared with the negative log-likelihoods a little off the outputs, and on labels that go through all
    classes, so that any function that equals one of them will do: cross-entropy on logits, nll on log-probabilities,
    binary cross-entropy with logits, squared error (½ or whole).

    Raises:
        ValueError: it is none of them (class weights, label smoothing, soft labels, another loss).
    """
    loss, z = subject._criterion.loss, outputs.detach()
    assert loss is not None
    steps = torch.arange(z.numel(), device=z.device, dtype=torch.float64).sin().reshape(z.shape).to(z)
    moved, tried = z + 0.1 * steps, dataclasses.replace(batch, targets=_every_label(loss, z, batch.targets))
    found = float(subject.output_loss(moved, tried).detach())
    for made, value in _candidates(loss, z, moved, tried):
        if abs(value - found) <= 1e-4 * abs(found):
            return made
    raise ValueError(
        f"the loss {loss.name} is no negative log-likelihood that is known here (cross-entropy, nll on "
        "log-probabilities, binary cross-entropy, squared error; without class weights, label smoothing or soft "
        'labels), so labels have no distribution to take a Fisher matrix of; use "ggn" or "empirical_fisher".'
    )


def _every_label(loss: Loss, z: Tensor, targets: Any) -> Any:
    """Class numbers that go through all classes in turn, those that are ignored left so; other targets unchanged."""
    if loss.kind != "classes" or targets.is_floating_point():
        return targets
    scores, labels = class_last(z, targets, loss.class_first)
    turn = torch.arange(labels.numel(), device=z.device).reshape(labels.shape) % scores.shape[-1]
    return torch.where(labels == loss.ignore_index, labels, turn.to(labels.dtype)).reshape(targets.shape)


def _candidates(loss: Loss, z: Tensor, moved: Tensor, batch: Batch) -> list[tuple[Likelihood, float]]:
    """Distributions at z that labels may have, with their negative log-likelihoods at ``moved``."""
    if loss.kind == "classes":
        return [] if batch.targets.is_floating_point() else [_softmax(loss, z, moved, batch)]
    try:
        y = as_values(z, batch.targets, loss.name)
    except ValueError:
        return []
    square = float((moved - y).square().sum())
    found: list[tuple[Likelihood, float]] = [(Gaussian(z, 1.0), square / 2), (Gaussian(z, 2.0), square)]
    if bool(((y == 0) | (y == 1)).all()):
        found.append((Bernoulli(z), float(F.binary_cross_entropy_with_logits(moved, y, reduction="sum"))))
    return found


def _softmax(loss: Loss, z: Tensor, moved: Tensor, batch: Batch) -> tuple[Likelihood, float]:
    scores, labels = class_last(moved, batch.targets, loss.class_first)
    dim = z.ndim - 1 if scores is moved else 1
    kept = (labels != loss.ignore_index).to(z.dtype).unsqueeze(-1).movedim(-1, dim)
    flat, target = scores.reshape(-1, scores.shape[-1]), labels.reshape(-1).long()
    if "nll" in loss.name.lower():  # what is off the outputs is no distribution any more
        value = F.nll_loss(flat, target, ignore_index=loss.ignore_index, reduction="sum")
        normal = torch.allclose(z.exp().sum(dim), torch.ones_like(z.sum(dim)), atol=1e-3)
        return Softmax(z, kept, dim), float(value) if normal else math.nan
    value = F.cross_entropy(flat, target, ignore_index=loss.ignore_index, reduction="sum")
    return Softmax(z, kept, dim), float(value)


def check_likelihood(subject: Subject) -> None:
    """Refuse, before work starts, a subject whose loss is no negative log-likelihood that is known here.

    Raises:
        ValueError: as :func:`likelihood`.
    """
    batch = next(iter(subject.batches(FEW)))
    with torch.no_grad():
        likelihood(subject, subject.batch_outputs({}, batch), batch)
