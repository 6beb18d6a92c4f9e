"""From what a user calls a loss to a :class:`~workbench.losses.Loss`: its form, and how it combines a batch."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.losses import (
    CLASS_NAMES,
    Loss,
    Reduction,
    class_loss,
    custom_loss,
    each_loss,
    has_class_first,
    named,
    one_by_one,
)

_KNOWN: dict[Any, str] = {
    F.mse_loss: "mse",
    F.l1_loss: "l1",
    F.binary_cross_entropy_with_logits: "binary_cross_entropy_with_logits",
    nn.MSELoss: "mse",
    nn.L1Loss: "l1",
}
_CLASS_FORMS = {F.cross_entropy: F.cross_entropy, F.nll_loss: F.nll_loss}
_CLASS_MODULES = {nn.CrossEntropyLoss: F.cross_entropy, nn.NLLLoss: F.nll_loss}
_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError)


def make(loss: Any, reduction: Reduction | None, outputs: Tensor, targets: Any, size: int) -> Loss:
    """The :class:`Loss` behind a name, a function or a module, tried on one batch's outputs and targets.

    The reduction is what is given, else a module's ``reduction``, else the default of a function of
    ``torch.nn.functional``, else read off the result's shape, else found by repeating the batch (a mean stays, a sum
    doubles).

    Raises:
        ValueError: an unknown name, a result of the wrong length, a reduction that cannot be found, or a loss
        that fails.
    """
    if reduction not in (None, "mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none'; got {reduction!r}.")
    if isinstance(loss, str):
        ordered = loss in CLASS_NAMES and has_class_first(outputs, targets)
        made = named(loss, "sum" if reduction == "sum" else "mean", ordered)
    elif callable(loss):
        stated = reduction or stated_reduction(loss)
        made = _torchs(loss, stated or "mean") or _custom(loss, stated, outputs.detach(), targets, size)
    else:
        raise TypeError(f"loss must be a name, a function f(outputs, targets) or a module; got {type(loss).__name__}.")
    made.check(outputs, targets)
    return made


def _inner(loss: Any) -> Any:
    return loss.func if isinstance(loss, functools.partial) else loss


def stated_reduction(loss: Any) -> Reduction | None:
    """The reduction that a loss declares: a module's attribute, or the default of a function of PyTorch's."""
    found: Any = None
    if isinstance(loss, nn.Module):
        found = getattr(loss, "reduction", None)
    elif getattr(_inner(loss), "__module__", "") == "torch.nn.functional":
        known = inspect.signature(loss).parameters.get("reduction")
        found = known.default if known else None
    return found if found in ("mean", "sum", "none") else None


def _torchs(loss: Any, reduction: Reduction) -> Loss | None:
    """PyTorch's commonest losses with their exact denominators; None for all others."""
    if type(loss) in _CLASS_MODULES:
        score, words = _CLASS_MODULES[type(loss)], {"weight": loss.weight, "ignore_index": loss.ignore_index}
        if isinstance(loss, nn.CrossEntropyLoss):
            score = functools.partial(score, label_smoothing=loss.label_smoothing)
        return class_loss(type(loss).__name__, score, reduction, **words)
    inner, plain = _inner(loss), not getattr(loss, "args", ())
    words = {k: v for k, v in getattr(loss, "keywords", {}).items() if k != "reduction"}
    if inner in _CLASS_FORMS and plain and not set(words) - {"weight", "ignore_index", "label_smoothing"}:
        kept = {k: words.pop(k) for k in ("weight", "ignore_index") if k in words}
        return class_loss(inner.__name__, functools.partial(_CLASS_FORMS[inner], **words), reduction, **kept)
    known = _KNOWN.get(type(loss) if isinstance(loss, nn.Module) else inner)
    return named(known, "mean" if reduction == "mean" else "sum") if known and plain and not words else None


def _custom(loss: Any, reduction: Reduction | None, outputs: Tensor, targets: Any, size: int) -> Loss:
    name = getattr(_inner(loss), "__name__", type(loss).__name__)
    values = _unreduced(loss, outputs, targets, size)
    if values is not None and reduction is not None:
        function = _without_reduction(loss)
        return each_loss(name, function, reduction, values.numel() // size if reduction == "mean" else 1)
    found = _try(loss, outputs, targets, name)
    told = reduction or by_shape(found, size, name)
    if told == "none":
        if found.shape != (size,):
            raise ValueError(f"the loss {name} gave shape {tuple(found.shape)}; reduction='none' wants ({size},).")
        return each_loss(name, loss, "none")
    moved = _moved(outputs)
    told = told or by_doubling(lambda times: loss(torch.cat([moved] * times), repeat(targets, times, size)), name)
    if found.numel() != 1:
        raise ValueError(f"the loss {name} gave shape {tuple(found.shape)}, but reduction={told!r} wants one number.")
    return custom_loss(name, loss, cast("Any", told), _comes_apart(loss, moved, targets, told))


def _unreduced(loss: Any, outputs: Tensor, targets: Any, size: int) -> Tensor | None:
    """The values of one of PyTorch's other losses, where it has one for every element: its mean is over elements."""
    home = type(loss) if isinstance(loss, nn.Module) else _inner(loss)
    if getattr(home, "__module__", "") not in ("torch.nn.functional", "torch.nn.modules.loss"):
        return None
    try:
        values = _without_reduction(loss)(outputs, targets)
    except _FAILURES:
        return None
    return values if values.ndim and len(values) == size else None


def _without_reduction(loss: Any) -> Callable[[Tensor, Any], Tensor]:
    if not isinstance(loss, nn.Module):
        return functools.partial(loss, reduction="none")
    made = copy.copy(loss)
    made.__dict__ = {**loss.__dict__, "reduction": "none"}
    return made


def _try(loss: Any, outputs: Tensor, targets: Any, name: str) -> Tensor:
    try:
        found = loss(outputs, targets)
    except _FAILURES as problem:
        what = (
            f"{tuple(targets.shape)} {str(targets.dtype)[6:]}"
            if isinstance(targets, Tensor)
            else type(targets).__name__
        )
        raise ValueError(
            f"the loss {name} failed on the first batch, outputs {tuple(outputs.shape)} {str(outputs.dtype)[6:]}, "
            "targets "
            f"{what}: {problem}"
        ) from problem
    if not isinstance(found, Tensor):
        raise TypeError(f"the loss {name} must give a tensor; got {type(found).__name__}.")
    return found


def by_shape(found: Tensor, size: int, name: str) -> Reduction | None:
    """The reduction that a result's shape tells: (size,) is none at all, a single number leaves it open.

    Raises:
        ValueError: any other shape.
    """
    if found.ndim == 0 or (found.numel() == 1 and size > 1):
        return None
    if found.shape == (size,):
        return "none"
    raise ValueError(
        f"the loss {name} gave shape {tuple(found.shape)} for a batch of {size} examples; it must give one number, "
        "or one for "
        f"each example: ({size},)."
    )


def _moved(outputs: Tensor) -> Tensor:
    """Outputs a little off their values, so that a loss of zero does not hide its reduction."""
    if not outputs.is_floating_point():
        return outputs
    steps = torch.arange(outputs.numel(), device=outputs.device, dtype=torch.float64).sin().reshape(outputs.shape)
    return outputs + 0.1 * steps.to(outputs.dtype)


def by_doubling(evaluate: Callable[[int], Tensor], name: str) -> Reduction:
    """The reduction of ``evaluate(times)``, the loss of a batch repeated so often: a mean stays, a sum doubles.

    Raises:
        ValueError: neither, as for losses that couple the examples of a batch.
    """
    with torch.no_grad():
        try:
            once, twice = float(evaluate(1)), float(evaluate(2))
        except _FAILURES:
            once = twice = float("nan")
    if once != 0 and abs(twice - once) <= 1e-4 * abs(once):
        return "mean"
    if once != 0 and abs(twice - 2 * once) <= 1e-4 * abs(once):
        return "sum"
    raise ValueError(
        f"cannot tell whether {name} averages or sums over the batch (one batch gives {once:.6g}, the same batch twice "
        f"{twice:.6g}); say reduction='mean' or reduction='sum'. If it is not a number, check the loss at this point."
    )


def _comes_apart(loss: Any, outputs: Tensor, targets: Any, reduction: Reduction) -> bool:
    """Whether a loss of three examples is the mean (or sum) of the losses of each: then it has per-example losses."""
    n = min(3, len(outputs))
    if not isinstance(targets, Tensor) or len(targets) != len(outputs) or n < 2:
        return False
    with torch.no_grad():
        try:
            singles = float(one_by_one(loss, outputs[:n], targets[:n]).sum())
            whole = float(loss(outputs[:n], targets[:n])) * (n if reduction == "mean" else 1)
        except _FAILURES:
            return False
    return abs(singles - whole) <= 1e-5 * abs(whole)


def repeat(tree: Any, times: int, size: int) -> Any:
    """A batch repeated along dimension 0, tensors of ``size`` rows only; anything else stays."""
    if isinstance(tree, Tensor):
        return torch.cat([tree] * times) if tree.ndim and len(tree) == size else tree
    if isinstance(tree, dict):
        return type(tree)({k: repeat(v, times, size) for k, v in cast("dict[str, Any]", tree).items()})
    if isinstance(tree, tuple):
        return tuple(repeat(v, times, size) for v in cast("tuple[Any, ...]", tree))
    return tree
