"""Outputs and loss of a batch at given parameters, from a loss of outputs or from an objective of model and batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from workbench.data import Batch
from workbench.feed import describe
from workbench.losses import Loss, Reduction
from workbench.reductions import by_doubling, by_shape, make, repeat
from workbench.shell import Shell
from workbench.trees import rows, take

Params = Mapping[str, Tensor]
Objective = Callable[[nn.Module, Any], Tensor]
_UNKNOWN = torch.Size()
_NO_OUTPUTS = "a subject made with objective= has no outputs of its own; pass loss=f(outputs, targets) instead."


@dataclass(frozen=True)
class Criterion:
    """What is summed over batches: ``loss`` of the model's outputs, or ``objective`` of model and batch.

    ``shape`` is that of the outputs on the first examples, ``reduction`` how an objective combines a batch; ``coupled``
    says that a batch is more than its examples (contrastive losses), so that batches must stay as they are.
    """

    name: str
    reduction: Reduction
    loss: Loss | None = None
    objective: Objective | None = None
    shape: torch.Size = _UNKNOWN
    coupled: bool = False

    def outputs(self, shell: Shell, params: Params, batch: Batch, buffers: Params) -> Tensor:
        """The model's outputs for a batch."""
        if self.loss is None:
            raise ValueError(_NO_OUTPUTS)
        return shell.run(functools.partial(_outputs, batch), params, buffers)

    def output_loss(self, shell: Shell, outputs: Tensor, batch: Batch) -> Tensor:
        """A batch's contribution as a function of its outputs."""
        if self.loss is None:
            raise ValueError(_NO_OUTPUTS)
        return shell.apply(self.loss.total, outputs, batch.targets, batch.size)

    def total(self, shell: Shell, params: Params, batch: Batch, buffers: Params) -> Tensor:
        """A batch's contribution, a scalar."""
        if self.loss is None:
            return self._objective_totals(shell, params, batch, buffers).sum()
        function = functools.partial(_loss, self.loss, batch)
        return shell.run(function, params, buffers)

    def score(self, shell: Shell, params: Params, batch: Batch, buffers: Params) -> tuple[Tensor, Any, Tensor | None]:
        """Totals, weights and outputs of a batch: (n,) each where examples come apart, else the batch's own."""
        if self.loss is None:
            totals = self._objective_totals(shell, params, batch, buffers)
            return totals, torch.ones_like(totals) if totals.ndim else batch.weight, None
        outputs = self.outputs(shell, params, batch, buffers)
        if self.loss.each is None:
            return self.output_loss(shell, outputs, batch), batch.weight, outputs
        return (*shell.apply(self.loss.each, outputs, batch.targets), outputs)

    def forward(self, shell: Shell, params: Params, batch: Batch, statistics: Params) -> None:
        """Run the model on a batch only to update its running statistics."""
        shell.run(functools.partial(_any, self.objective, batch), params, recompute=statistics)

    def weigh(self, targets: Any, size: int) -> float:
        """A batch's share of the loss's denominator."""
        return self.loss.weight(self.shape, targets, size) if self.loss else float(size)

    def check_targets(self, parts: Iterable[tuple[Any, int]]) -> float:
        """Check every label; the sum of all weights, from targets and number of examples of each part of the data."""
        total = 0.0
        for targets, size in parts:
            if self.loss is not None:
                self.loss.check_all(self.shape, targets)
            total += self.weigh(targets, size)
        if not total > 0:
            raise ValueError("the targets weigh nothing: all are ignored (ignore_index), or of classes of weight zero.")
        return total

    def _objective_totals(self, shell: Shell, params: Params, batch: Batch, buffers: Params) -> Tensor:
        found = shell.run(functools.partial(_any, self.objective, batch), params, buffers)
        return _totals(found, self.reduction, batch.size)


def of_loss(shell: Shell, loss: Any, reduction: Reduction | None, batch: Batch) -> Criterion:
    """Try model and loss on the first batch, and settle what the loss's reduction is.

    Raises:
        ValueError: the model or the loss fails, or does not fit the targets.
    """
    if batch.targets is None:
        raise ValueError("the batches hold no targets: pass (inputs, targets), or objective=f(model, batch).")
    try:
        outputs: Tensor = shell.run(functools.partial(_outputs, batch))
    except (ValueError, RuntimeError, IndexError, KeyError, AttributeError) as problem:
        if isinstance(problem, torch.OutOfMemoryError):
            raise
        raise ValueError(f"the model failed on the first batch ({describe(batch)}): {problem}") from problem
    form: Loss = shell.apply(make, loss, reduction, outputs, batch.targets, batch.size)
    coupled = form.each is None and shell.apply(_couples_examples, form, outputs, batch)
    return Criterion(form.name, form.reduction, form, None, outputs.shape, coupled)


def of_objective(shell: Shell, objective: Objective, reduction: Reduction | None, batch: Batch) -> Criterion:
    """Try an objective on the first batch, and settle what its reduction is."""

    def evaluate(times: int) -> Tensor:
        return shell.run(functools.partial(_objective, objective, repeat(batch.raw, times, batch.size)))

    name = getattr(objective, "__name__", "objective")
    found = evaluate(1)
    if not isinstance(found, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"the objective must return a tensor; got {type(found).__name__}.")
    told = reduction or by_shape(found, batch.size, name) or by_doubling(evaluate, name)
    total = float(_totals(found, told, batch.size).sum())
    parts = [
        (take(batch.raw, part, batch.size), rows(take(batch.raw, part, batch.size))) for part in _halves(batch.size)
    ]
    halves = [_totals(shell.run(functools.partial(_objective, objective, raw)), told, n).sum() for raw, n in parts]
    return Criterion(name, told, objective=objective, coupled=_differ(total, sum(map(float, halves))))


def _couples_examples(loss: Loss, outputs: Tensor, batch: Batch) -> bool:
    """Whether a batch's total is not the sum of those of its halves."""
    outputs = outputs.detach()
    total = float(loss.total(outputs, batch.targets, batch.size))
    parts = [(outputs[part], take(batch.targets, part, batch.size)) for part in _halves(batch.size)]
    return _differ(total, sum(float(loss.total(o, t, len(o))) for o, t in parts))


def _halves(size: int) -> tuple[slice, ...]:
    cut = -(-size // 2)
    return (slice(0, cut), slice(cut, size)) if size > 1 else (slice(0, size),)


def _differ(whole: float, parts: float) -> bool:
    return abs(whole - parts) > 1e-4 * abs(whole)


def _outputs(batch: Batch, model: nn.Module) -> Tensor:
    return tensor_of(model(*batch.args, **batch.kwargs))


def _loss(loss: Loss, batch: Batch, model: nn.Module) -> Tensor:
    return loss.total(_outputs(batch, model), batch.targets, batch.size)


def _objective(objective: Objective, raw: Any, model: nn.Module) -> Tensor:
    return objective(model, raw)


def _any(objective: Objective | None, batch: Batch, model: nn.Module) -> Any:
    return objective(model, batch.raw) if objective else model(*batch.args, **batch.kwargs)


def tensor_of(found: Any) -> Tensor:
    """The outputs in what a model returned: a tensor, what is called logits, or a tuple's first entry.

    Raises:
        TypeError: none of these.
    """
    if isinstance(found, Tensor):
        return found
    logits = cast("Any", found).get("logits") if isinstance(found, Mapping) else getattr(found, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(found, (tuple, list)) and found and isinstance(found[0], Tensor):
        return found[0]
    raise TypeError(
        f"the model returned {type(found).__name__}; wanted a tensor, something with .logits, or a tuple that "
        "begins with a "
        "tensor. For anything else pass objective=f(model, batch), which may read the model's outputs as it likes."
    )


def _totals(found: Tensor, reduction: Reduction, size: int) -> Tensor:
    """An objective's result as totals: a scalar sum, or (n,) per example."""
    if reduction == "none":
        if found.shape != (size,):
            raise ValueError(f"the objective gave shape {tuple(found.shape)} for {size} examples; wanted ({size},).")
        return found
    if found.numel() != 1:
        raise ValueError(f"the objective gave shape {tuple(found.shape)}; reduction={reduction!r} wants one number.")
    return found.reshape(()) * (size if reduction == "mean" else 1)
