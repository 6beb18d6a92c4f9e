"""Losses as totals and weights, so that L = Σ total / Σ weight holds for any split of the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Reduction = Literal["mean", "sum", "none"]
Kind = Literal["classes", "binary", "values", "custom"]


@dataclass(frozen=True)
class Loss:
    """A loss over batches: L = Σ_b total_b / Σ_b weight_b.

    Attributes:
        name: what it is called.
        reduction: how the user's loss combines a batch.
        total: (outputs, targets, size) -> the batch's contribution, a differentiable scalar.
        weight: (shape of outputs, targets, size) -> the batch's share of the denominator: examples, unmasked tokens,
            their class weights, or elements, whichever the loss averages over.
        each: (outputs, targets) -> totals and weights of each example (n,); None where the loss does not come apart.
        kind: what targets are: class numbers or probabilities, yes or no, values of the outputs' shape, or unknown.
        ignore_index: the class number that does not count.
        class_first: classes are in dimension 1 (PyTorch's convention) rather than in the last.
    """

    name: str
    reduction: Reduction
    total: Callable[[Tensor, Any, int], Tensor]
    weight: Callable[[torch.Size, Any, int], float]
    each: Callable[[Tensor, Any], tuple[Tensor, Tensor]] | None = None
    kind: Kind = "custom"
    ignore_index: int = -100
    class_first: bool = False

    def check(self, outputs: Tensor, targets: Any) -> None:
        """Raise ValueError where a batch's targets do not fit its outputs in shape or type."""
        if self.kind == "classes":
            _check_classes(self, outputs, targets)
        elif self.kind in ("values", "binary"):
            as_values(outputs, targets, self.name)

    def check_all(self, shape: torch.Size, targets: Any) -> None:
        """Raise ValueError where any target is out of range, given the shape of some batch's outputs."""
        if self.kind == "classes" and not targets.is_floating_point():
            _check_range(targets, shape[1 if self.class_first else -1], self.ignore_index)
        elif self.kind == "binary" and not bool(((targets >= 0) & (targets <= 1)).all()):
            raise ValueError(f"{self.name} wants targets from 0 to 1; these lie in {_span(targets)}.")

    def wrong(self, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor] | None:
        """Each example's numbers of wrong decisions and of decisions, (n,) both; None for losses without classes."""
        if self.kind == "binary":
            wrong = (outputs > 0) != (as_values(outputs, targets, self.name) > 0.5)
            return _counted(wrong), _counted(torch.ones_like(wrong))
        if not isinstance(targets, Tensor) or self.kind == "values" or outputs.ndim < 2 or outputs.shape[-1] < 2:
            return None
        scores, labels = class_last(outputs, targets, self.class_first)
        if labels.is_floating_point():
            labels = labels.argmax(-1) if labels.shape == scores.shape else labels
        if labels.shape != scores.shape[:-1] or labels.is_floating_point():
            return None
        kept = labels != self.ignore_index
        return _counted((scores.argmax(-1) != labels) & kept), _counted(kept)


def _counted(true: Tensor) -> Tensor:
    return true.reshape(len(true), -1).sum(1)


def _span(targets: Tensor) -> str:
    return f"[{float(targets.min()):g}, {float(targets.max()):g}]"


# --- classes --------------------------------------------------------------------------------------------------------


def class_last(outputs: Tensor, targets: Tensor, class_first: bool) -> tuple[Tensor, Tensor]:
    """Scores with the classes in the last dimension; labels (N, 1) become (N,); soft targets follow the scores.

    Without ``class_first``, (N, S, C) and (N, C, S) are told apart by the labels' shape; where both fit, the last
    dimension holds the classes.
    """
    soft = targets.is_floating_point() and targets.shape == outputs.shape
    if not soft and outputs.ndim == 2 and targets.shape == (len(outputs), 1):
        targets = targets[:, 0]
    if outputs.ndim > 2 and (class_first or (not soft and outputs.shape[:-1] != targets.shape)):
        return outputs.movedim(1, -1), targets.movedim(1, -1) if soft else targets
    return outputs, targets


def has_class_first(outputs: Tensor, targets: Any) -> bool:
    """Whether outputs are (N, C, S) rather than (N, S, C) for class numbers (N, S), by their shapes.

    Raises:
        ValueError: both fit, because there are as many positions as classes: a guess would be silently wrong.
    """
    if outputs.ndim < 3 or not isinstance(targets, Tensor) or targets.is_floating_point():
        return False
    last = outputs.shape[:-1] == targets.shape
    first = (outputs.shape[0], *outputs.shape[2:]) == tuple(targets.shape)
    if last and first:
        raise ValueError(
            f"outputs {tuple(outputs.shape)} with targets {tuple(targets.shape)} fit both (N, S, C) and (N, C, S). Say "
            "which: loss=torch.nn.functional.cross_entropy reads classes in dimension 1; for classes in the last "
            "dimension pass loss=lambda outputs, targets: cross_entropy(outputs.flatten(0, -2), targets.flatten())."
        )
    return first


def _check_classes(loss: Loss, outputs: Tensor, targets: Any) -> None:
    if not isinstance(targets, Tensor):
        raise ValueError(f"{loss.name} wants a tensor of targets; got {type(targets).__name__}.")
    scores, labels = class_last(outputs, targets, loss.class_first)
    what = f"outputs {tuple(outputs.shape)} and {str(targets.dtype)[6:]} targets {tuple(targets.shape)}"
    if labels.is_floating_point():
        if labels.shape != scores.shape:
            raise ValueError(
                f"{loss.name} got {what}; it wants class numbers (targets.long()), or one probability for each "
                "class; for real "
                "values use loss='half_mse'."
            )
    elif labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{loss.name} got {what}; it wants class numbers: pass targets.long().")
    elif scores.ndim < 2 or labels.shape != scores.shape[:-1]:
        order = "(N, C, S)" if loss.class_first else "(N, S, C)"
        raise ValueError(
            f"{loss.name} got {what}; it wants outputs (N, C) with targets (N,), or {order} with (N, S). "
            "For one yes-or-no output use loss='binary_cross_entropy_with_logits'; loss='cross_entropy' takes "
            "both orders."
        )


def _check_range(labels: Tensor, classes: int, ignore_index: int) -> None:
    kept = labels[labels != ignore_index]
    if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < classes:
        worst = int(kept.max()) if int(kept.max()) >= classes else int(kept.min())
        raise ValueError(
            f"label {worst} is out of range: the model has {classes} outputs, so labels lie in 0 to {classes - 1} "
            "(or are "
            f"{ignore_index}, which is ignored); check the width of the last layer and the numbering of the labels."
        )


@dataclass(frozen=True)
class ClassScore:
    """Cross-entropy or negative log-likelihood of class numbers (with ignore_index and class weights) or probabilities.

    ``score`` is PyTorch's function; the denominator is that of its mean: Σ class weights of the targets that count.
    For reduction="sum" each target that counts has weight 1.
    """

    score: Callable[..., Tensor]
    reduction: Reduction
    weight: Tensor | None
    ignore_index: int
    class_first: bool

    def values(self, outputs: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """The loss of every position (n·positions,), or its sum."""
        scores, labels = class_last(outputs, targets, self.class_first)
        flat = scores.reshape(-1, scores.shape[-1])
        words: dict[str, Any] = {
            "weight": None if self.weight is None else self.weight.to(flat),
            "reduction": reduction,
        }
        if labels.is_floating_point():
            return self.score(flat, labels.reshape(flat.shape).to(flat.dtype), **words)
        return self.score(flat, labels.reshape(-1).long(), ignore_index=self.ignore_index, **words)

    def total(self, outputs: Tensor, targets: Tensor, size: int) -> Tensor:
        """The batch's sum."""
        return self.values(outputs, targets, "sum")

    def each(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Totals and weights of each example."""
        values = self.values(outputs, targets, "none").reshape(len(outputs), -1)
        soft = targets.is_floating_point()
        shares = torch.ones_like(values) if soft else self.shares(targets).reshape(values.shape).to(values.dtype)
        return values.sum(1), shares.sum(1)

    def shares(self, labels: Tensor) -> Tensor:
        """What each label adds to the denominator."""
        kept = labels != self.ignore_index
        if self.weight is None or self.reduction != "mean":
            return kept.double()
        return kept * self.weight.to(labels.device).double()[torch.where(kept, labels, 0).long()]

    def share(self, shape: torch.Size, targets: Tensor, size: int) -> float:
        """What a batch adds to the denominator."""
        if targets.is_floating_point():
            return float(targets.numel() // shape[1 if self.class_first else -1])
        return float(self.shares(targets).sum())


def class_loss(
    name: str,
    score: Callable[..., Tensor],
    reduction: Reduction,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    class_first: bool = True,
) -> Loss:
    """The :class:`Loss` of a :class:`ClassScore`."""
    form = ClassScore(score, reduction, weight, ignore_index, class_first)
    return Loss(name, reduction, form.total, form.share, form.each, "classes", ignore_index, class_first)


# --- values ---------------------------------------------------------------------------------------------------------


def as_values(outputs: Tensor, targets: Any, name: str) -> Tensor:
    """Targets in the outputs' shape: labels become one-hot, (N,) becomes (N, 1); nothing is broadcast."""
    if isinstance(targets, Tensor) and targets.ndim:
        if targets.shape == outputs.shape:
            return targets.to(outputs.dtype)
        if [d for d in targets.shape[1:] if d > 1] == [d for d in outputs.shape[1:] if d > 1] and len(targets) == len(
            outputs
        ):
            return targets.reshape(outputs.shape).to(outputs.dtype)
        if not targets.is_floating_point() and targets.shape == outputs.shape[:-1]:
            _check_range(targets, outputs.shape[-1], -100)
            return F.one_hot(targets.long(), outputs.shape[-1]).to(outputs.dtype)
    found = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
    raise ValueError(f"{name} wants targets of the outputs' shape {tuple(outputs.shape)}; got {found}.")


@dataclass(frozen=True)
class ValueScore:
    """Σ form(a, b) over outputs and targets, averaged over elements (PyTorch's mean) or over examples."""

    name: str
    form: Callable[[Tensor, Tensor], Tensor]
    by_element: bool

    def total(self, outputs: Tensor, targets: Any, size: int) -> Tensor:
        """The batch's sum."""
        return self.form(outputs, as_values(outputs, targets, self.name)).sum()

    def each(self, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        """Totals and weights of each example."""
        values = self.form(outputs, as_values(outputs, targets, self.name)).reshape(len(outputs), -1)
        return values.sum(1), torch.full_like(values[:, 0], values.shape[1] if self.by_element else 1)

    def share(self, shape: torch.Size, targets: Tensor, size: int) -> float:
        """What a batch adds to the denominator: elements (one-hot ones counted), or examples."""
        hot = not targets.is_floating_point() and targets.ndim == len(shape) - 1
        return float(targets.numel() * (shape[-1] if hot else 1) if self.by_element else size)


def value_loss(
    name: str, form: Callable[[Tensor, Tensor], Tensor], reduction: Reduction, kind: Kind = "values"
) -> Loss:
    """The :class:`Loss` of a :class:`ValueScore`; over elements only where the loss itself averages."""
    score = ValueScore(name, form, by_element=reduction == "mean" and name != "half_mse")
    return Loss(name, reduction, score.total, score.share, score.each, kind)


def _half_square(a: Tensor, b: Tensor) -> Tensor:
    return 0.5 * (a - b) ** 2


def _square(a: Tensor, b: Tensor) -> Tensor:
    return (a - b) ** 2  # PyTorch's own kernel ends the process under torch.func.linearize (torch 2.13)


def _absolute(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs()


def _binary(a: Tensor, b: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(a, b, reduction="none")


NAMES = ("cross_entropy", "half_mse", "mse", "l1", "binary_cross_entropy_with_logits", "nll")
"""The losses that are known by name."""
CLASS_NAMES = ("cross_entropy", "nll")
"""Those of classes, whose outputs may hold the classes in dimension 1 or in the last."""


def named(name: str, reduction: Reduction = "mean", class_first: bool = False) -> Loss:
    """A loss by name: L is a mean over examples or unmasked tokens, for mse, l1 and binary cross-entropy over elements.

    ``reduction="sum"`` makes these three a sum over an example's elements; "half_mse" is that always, ½
    Σ_outputs (f - y)². ``class_first`` puts the classes of "cross_entropy" and "nll" into dimension 1.

    Raises:
        ValueError: no such name.
    """
    if name == "cross_entropy":
        return class_loss(name, F.cross_entropy, reduction, class_first=class_first)
    if name == "nll":
        return class_loss(name, F.nll_loss, reduction, class_first=class_first)
    if name == "binary_cross_entropy_with_logits":
        return value_loss(name, _binary, reduction, "binary")
    forms = {"half_mse": _half_square, "mse": _square, "l1": _absolute}
    if name not in forms:
        raise ValueError(
            f"there is no loss called {name!r}; there are {', '.join(NAMES)}; or pass f(outputs, targets)."
        )
    return value_loss(name, forms[name], reduction)


def custom_loss(
    name: str, function: Callable[[Tensor, Any], Tensor], reduction: Literal["mean", "sum"], singly: bool
) -> Loss:
    """A user's loss that gives one number a batch, weighted by examples; ``singly``: it is a sum over examples."""
    scale: Callable[[int], float] = float if reduction == "mean" else _one

    def each(outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        values = one_by_one(function, outputs, targets)
        return values, torch.ones_like(values)

    def total(outputs: Tensor, targets: Any, size: int) -> Tensor:
        return function(outputs, targets).reshape(()) * scale(size)

    return Loss(name, reduction, total, _examples, each if singly else None)


def one_by_one(function: Callable[[Tensor, Any], Tensor], outputs: Tensor, targets: Tensor) -> Tensor:
    """A batch loss of each example by itself (n,), in one vectorised call."""
    return torch.vmap(lambda o, t: function(o[None], t[None]).reshape(()))(outputs, targets)


def each_loss(name: str, function: Callable[[Tensor, Any], Tensor], reduction: Reduction, per: int = 1) -> Loss:
    """A loss known by its values, (n,) or (n, ...), with ``per`` of them to an example in the denominator."""

    def each(outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        found = function(outputs, targets)
        if found.ndim == 0 or len(found) != len(outputs):
            raise ValueError(f"the loss {name} gave shape {tuple(found.shape)} for {len(outputs)} examples.")
        totals = found.reshape(len(found), -1).sum(1)
        return totals, torch.full_like(totals, per)

    def total(outputs: Tensor, targets: Any, size: int) -> Tensor:
        return each(outputs, targets)[0].sum()

    return Loss(name, reduction, total, lambda shape, targets, size: float(size * per), each)


def _one(size: int) -> float:
    return 1.0


def _examples(shape: torch.Size, targets: Any, size: int) -> float:
    return float(size)
