"""Sums over examples in float64, and the bytes that a forward pass keeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from workbench.losses import Loss


class Sums:
    """Loss, its standard error and the error rate, gathered batch by batch in float64."""

    def __init__(self) -> None:
        self.totals: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.apart = True
        self.wrong: list[Tensor] = []
        self.decided: list[Tensor] = []

    def add(self, totals: Tensor, weights: Tensor | float) -> None:
        """Totals and weights of a batch's examples (n,), or of the batch where examples do not come apart."""
        self.apart &= totals.ndim == 1
        self.totals.append(totals.detach().double().reshape(-1))
        self.weights.append(torch.as_tensor(weights, dtype=torch.float64, device=totals.device).reshape(-1))

    def decide(self, loss: Loss, outputs: Tensor, targets: Any) -> None:
        """Count the wrong decisions on each of a batch's examples."""
        for kept, counts in zip((self.wrong, self.decided), loss.wrong(outputs, targets) or (), strict=False):
            kept.append(counts.double())

    def result(self) -> dict[str, float]:
        """``loss`` and ``error_rate``, each with the standard error over examples; nan where not known."""
        loss, error = _ratio(torch.cat(self.totals), torch.cat(self.weights))
        rate, doubt = _ratio(torch.cat(self.wrong), torch.cat(self.decided)) if self.wrong else (math.nan, math.nan)
        loss_error = error if self.apart else math.nan
        return {"loss": loss, "loss_error": loss_error, "error_rate": rate, "error_rate_error": doubt}


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
