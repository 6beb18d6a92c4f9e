"""Sums over examples in float64, and the bytes that a forward pass keeps."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.losses import Loss


@dataclass(frozen=True)
class Metric:
    """A user's metric: f(outputs, targets), a number for each example or one for the batch, or ``whole``: f(model)."""

    function: Callable[..., Any]
    whole: bool

    @classmethod
    def of(cls, name: str, function: Callable[..., Any], has_outputs: bool) -> Metric:
        """Tell the two kinds apart by how many arguments are required.

        Raises:
            ValueError: a name that is taken; a metric of outputs where there are none; neither one nor two arguments.
            TypeError: something that cannot be called.
        """
        if not callable(function):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"metric {name!r} must be f(outputs, targets) or f(model); got {type(function).__name__}.")
        if name.startswith(("loss", "error_rate")) or name.endswith("_error") or not name:
            raise ValueError(f"a metric cannot be called {name!r}: names like loss, error_rate and *_error are taken.")
        count = _required(function)
        if count not in (1, 2):
            raise ValueError(f"metric {name!r} requires {count} arguments; wanted f(outputs, targets) or f(model).")
        if count == 2 and not has_outputs:
            raise ValueError(
                f"metric {name!r} takes outputs and targets, which a subject made with objective= does not have; give "
                "f(model) instead."
            )
        return cls(function, count == 1)

    def of_batch(self, outputs: Tensor, targets: Any, size: int) -> tuple[Tensor, Tensor | float]:
        """Totals and weights of a batch, for :meth:`Sums.measure`."""
        found = torch.as_tensor(self.function(outputs, targets))
        if found.ndim and found.shape[0] == size and found.numel() == size:
            return found.reshape(size), torch.ones(size, device=found.device)
        if found.numel() != 1:
            raise ValueError(f"a metric gave shape {tuple(found.shape)} for {size} examples; wanted ({size},) or one.")
        return found.reshape(()) * size, float(size)


def _required(function: Callable[..., Any]) -> int:
    """How many arguments must be given by place; two for built-in functions, which do not say."""
    try:
        held = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 2
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in by_place and p.default is inspect.Parameter.empty for p in held)


class Sums:
    """Loss, its standard error and the error rate, gathered batch by batch in float64."""

    def __init__(self) -> None:
        self.totals: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.apart = True
        self.wrong: list[Tensor] = []
        self.decided: list[Tensor] = []
        self.own: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def add(self, totals: Tensor, weights: Tensor | float) -> None:
        """Totals and weights of a batch's examples (n,), or of the batch where examples do not come apart."""
        self.apart &= totals.ndim == 1
        self.totals.append(totals.detach().double().reshape(-1))
        self.weights.append(torch.as_tensor(weights, dtype=torch.float64, device=totals.device).reshape(-1))

    def decide(self, loss: Loss, outputs: Tensor, targets: Any) -> None:
        """Count the wrong decisions on each of a batch's examples."""
        for kept, counts in zip((self.wrong, self.decided), loss.wrong(outputs, targets) or (), strict=False):
            kept.append(counts.double())

    def measure(self, name: str, totals: Tensor, weights: Tensor | float) -> None:
        """Totals and weights of one of the user's metrics on a batch, as in :meth:`add`."""
        held = torch.as_tensor(weights, dtype=torch.float64, device=totals.device).reshape(-1)
        self.own.setdefault(name, []).append((totals.detach().double().reshape(-1), held))

    def result(self) -> dict[str, float]:
        """``loss`` and ``error_rate``, each with the standard error over examples; nan where not known."""
        loss, error = _ratio(torch.cat(self.totals), torch.cat(self.weights))
        rate, doubt = _ratio(torch.cat(self.wrong), torch.cat(self.decided)) if self.wrong else (math.nan, math.nan)
        loss_error = error if self.apart else math.nan
        found = {"loss": loss, "loss_error": loss_error, "error_rate": rate, "error_rate_error": doubt}
        return found | self._own()

    def _own(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, held in self.own.items():
            totals, weights = (torch.cat(parts) for parts in zip(*held, strict=True))
            found[name], found[f"{name}_error"] = _ratio(totals, weights)
        return found


def _ratio(t: Tensor, w: Tensor) -> tuple[float, float]:
    """Σ t / Σ w and its standard error as a ratio of means over the n entries; nan where there are too few."""
    n, total = len(t), float(w.sum())
    if not total:
        return math.nan, math.nan
    ratio = float(t.sum()) / total
    spread = float(((t - ratio * w) ** 2).sum())
    return ratio, math.sqrt(n / (n - 1) * spread) / total if n > 1 else math.nan


def saved_bytes(evaluate: Callable[[], Any], outside: set[int]) -> int:
    """Bytes that ``evaluate()`` makes autograd save, each storage once, without those at the addresses ``outside``."""
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in outside:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kept = evaluate()
        total = sum(sizes.values())
        del kept
    return total


def check_finite(loss: float, own_point: bool) -> None:
    """Raise ValueError for a loss that is not a number at the model's own point; elsewhere such values are data."""
    if own_point and not math.isfinite(loss):
        raise ValueError(
            f"the loss at the model's own point is {loss}: check that training did not diverge (NaN weights), that "
            "inputs, "
            "targets and class weights are finite, and that the loss takes the model's outputs as they are (logits or "
            "log-probabilities)."
        )
