"""Curvature as an adaptive optimizer sees it: P^(-1/2) A P^(-1/2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.fingerprint import digest
from workbench.numerics.operator import Operator
from workbench.optimizers import Scale, scales, threshold
from workbench.subject import Subject

Root = Tensor | Callable[[Tensor], Tensor]


class Preconditioned(Operator):
    """P^(-1/2) A P^(-1/2), symmetric, with the eigenvalues of P⁻¹A: what an optimizer with preconditioner P feels.

    Args:
        operator: A.
        root: P^(-1/2): the diagonal as a vector (size,), or a function of a vector that applies it, symmetric (for
            Shampoo, Muon and the like, block by block).

    A product costs one of A and two multiplications of vectors.

    Raises:
        ValueError: a vector of another length, or with entries that are negative or not finite.
    """

    def __init__(self, operator: Operator, root: Root) -> None:
        self.operator = operator
        self.size, self.dtype, self.device = operator.size, operator.dtype, operator.device
        self.root = root if callable(root) else self._checked(root)

    def _checked(self, root: Tensor) -> Tensor:
        if root.shape != (self.size,):
            raise ValueError(
                f"root, the diagonal of P^(-1/2), must have shape ({self.size},); got {tuple(root.shape)}."
            )
        if not bool(torch.isfinite(root).all()) or bool((root < 0).any()):
            raise ValueError("root, the diagonal of P^(-1/2), has entries that are negative or not finite.")
        return root.to(device=self.device, dtype=self.dtype)

    def apply(self, vector: Tensor) -> Tensor:
        """P^(-1/2) v."""
        return self.root(vector) if callable(self.root) else self.root * vector

    def matvec(self, vector: Tensor) -> Tensor:
        return self.apply(self.operator.matvec(self.apply(vector)))

    def matmat(self, block: Tensor) -> Tensor:
        return self._columns(self.operator.matmat(self._columns(block)))

    def _columns(self, block: Tensor) -> Tensor:
        if isinstance(self.root, Tensor):
            return self.root[:, None] * block
        return torch.stack([self.apply(column) for column in block.unbind(1)], dim=1) if block.shape[1] else block


@dataclass(frozen=True, eq=False)
class Preconditioner:
    """P^(-1/2) of a subject's optimizer as one vector, and the eigenvalue at which training stops being stable.

    ``root`` (size,) in the subject's precision. With learning rates folded in, eigenvalues of the preconditioned
    Hessian have no unit and ``threshold`` is the constant c of the update (2 for gradient descent); without, they are
    those of P⁻¹H and ``threshold`` is c / η. ``words`` name the optimizer, ``notes`` say what a reader must know.
    """

    root: Tensor
    threshold: float
    words: str
    notes: tuple[str, ...] = ()

    def of(self, operator: Operator) -> Preconditioned:
        """An operator of the subject's parameters, preconditioned."""
        return Preconditioned(operator, self.root)

    def fingerprint(self) -> str:
        """A hash of all of it: what a reading depends on beyond the subject (see ``Probe.context``)."""
        return digest(self.root, self.threshold, self.words)


def preconditioner(subject: Subject, *, rates: bool = True) -> Preconditioner:
    """The preconditioner of ``subject.optimizer``, live or recorded, as it is now.

    P is that of PyTorch's update, at the step taken last: Adam, AdamW (also AMSGrad)
    (1 - β1^t) (√(ν / (1 - β2^t)) + ε); NAdam the same without the first factor; Adamax (1 - β1^t) u; RMSprop √ν + ε,
    centred where asked; Adagrad (√Σg² + ε) (1 + (t - 1) decay); SGD 1. Weight decay is never part of it, nor of the
    Hessian. Source: Cohen et al. 2022 (Adam's edge of stability).

    Args:
        subject: made with ``optimizer=``, or opened from a trajectory that was recorded with ``keep_optimizer=True``.
        rates: fold each group's learning rate in (and, where groups differ in c, c too), so that one number without
            units says whether all groups together are stable. Without, the threshold is nan where groups differ.

    Raises:
        ValueError: no optimizer, one that has not stepped or is not known here, or one of other parameters.
    """
    if subject.optimizer is None:
        raise ValueError(
            "the subject has no optimizer: make it with wb.Subject(model, data, optimizer=optimizer), or open it from "
            "a trajectory recorded with Recorder(..., optimizer, keep_optimizer=True)."
        )
    own = dict(subject.module.named_parameters())
    named = {name: own[name] for name in subject.params}
    limit, found = threshold(subject.optimizer, own), scales(subject.optimizer, named)
    smallest = min(scale.constant for scale in found.values())
    root = torch.empty(subject.size, dtype=subject.dtype, device=subject.device)
    for view, (name, scale) in zip(root.split([p.numel() for p in named.values()]), found.items(), strict=True):
        factor = scale.rate * smallest / scale.constant if rates else 1.0
        view.copy_(_root(name, scale, factor, named[name]))
    return Preconditioner(root, _threshold(found, smallest, rates), limit.words, _notes(subject, found))


def _root(name: str, scale: Scale, factor: float, like: Tensor) -> Tensor:
    """√(factor / P), flat; 0 for a parameter that the optimizer never moved."""
    if not scale.moved:
        return torch.zeros(like.numel(), dtype=torch.float64)
    if not isinstance(scale.entries, Tensor):
        return torch.full((like.numel(),), math.sqrt(factor), dtype=torch.float64)
    entries = scale.entries.reshape(-1)
    if not bool(((entries > 0) & torch.isfinite(entries)).all()):
        raise ValueError(
            f"the preconditioner of {name} has entries that are zero or not finite: its gradient was always zero and "
            "the optimizer's eps is 0, or training diverged. Give the optimizer eps > 0, or leave that parameter out."
        )
    return (factor / entries).sqrt_()


def _threshold(found: Mapping[str, Scale], smallest: float, rates: bool) -> float:
    limits = {scale.constant / scale.rate if scale.rate else math.inf for scale in found.values()}
    return smallest if rates else (limits.pop() if len(limits) == 1 else math.nan)


def _notes(subject: Subject, found: Mapping[str, Scale]) -> tuple[str, ...]:
    said: list[str] = []
    still = [name for name, scale in found.items() if not scale.moved]
    if still:
        said.append(f"the optimizer never moved {', '.join(still[:4])}: its preconditioner counts as infinite")
    rates = sorted({scale.rate for scale in found.values()})
    if len(rates) > 1:
        said.append(f"parameter groups have {len(rates)} learning rates, {rates[0]:g} to {rates[-1]:g}")
    groups = getattr(subject.optimizer, "param_groups", ())
    if any(group.get("weight_decay") for group in groups):
        said.append("weight decay belongs to the update and not to the loss: it is left out")
    return tuple(said)
