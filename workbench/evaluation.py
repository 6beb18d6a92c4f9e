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
        self.wrong = self.decided = 0.0

    def add(self, totals: Tensor, weights: Tensor | float) -> None:
        """Totals and weights of a batch's examples (n,), or of the batch where examples do not come apart."""
        self.apart &= totals.ndim == 1
        self.totals.append(totals.detach().double().reshape(-1))
        self.weights.append(torch.as_tensor(weights, dtype=torch.float64, device=totals.device).reshape(-1))

    def decide(self, loss: Loss, outputs: Tensor, targets: Any) -> None:
        """Count a batch's wrong decisions."""
        found = loss.wrong(outputs, targets)
        self.wrong += float(found[0].sum()) if found else math.nan
        self.decided += float(found[1].sum()) if found else math.nan

    def result(self) -> dict[str, float]:
        """``loss``, ``loss_error`` and ``error_rate``; nan where not known."""
        t, w = torch.cat(self.totals), torch.cat(self.weights)
        loss = float(t.sum() / w.sum())
        rate = self.wrong / self.decided if self.decided else math.nan
        return {"loss": loss, "loss_error": self._error(t, w, loss), "error_rate": rate}

    def _error(self, t: Tensor, w: Tensor, loss: float) -> float:
        n = len(t)
        if not self.apart or n < 2:
            return math.nan
        return math.sqrt(n / (n - 1) * float(((t - loss * w) ** 2).sum())) / float(w.sum())


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
