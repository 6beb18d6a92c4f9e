"""What a classifier decides: its logits as rows, with their labels, whichever of the known losses it was trained by."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workbench.data import Batch
from workbench.losses import Loss, as_values, class_last
from workbench.subject import Subject

_INSTEAD = (
    'make the subject with loss="cross_entropy" (outputs are logits), "nll" (log-probabilities) or '
    '"binary_cross_entropy_with_logits".'
)


@dataclass(frozen=True, eq=False)
class Decisions:
    """Logits (n, C) in float64, labels (n,) and the example that each row belongs to (n,), on the host.

    A token, or an output of a binary loss, is a row of its own; a single logit z becomes the two logits (0, z).
    """

    logits: NDArray[np.float64]
    labels: NDArray[np.int64]
    examples: NDArray[np.int64]


def decision_loss(subject: Subject) -> Loss:
    """The subject's loss, where it says what the outputs' probabilities are.

    Raises:
        ValueError: an objective, a loss of values or of an unknown kind, which do not.
    """
    loss = subject._criterion.loss
    if loss is None:
        raise ValueError(f"a subject made with objective= has no outputs to read probabilities from; {_INSTEAD}")
    if loss.kind not in ("classes", "binary"):
        raise ValueError(f"the loss {loss.name} does not say what the outputs' probabilities are; {_INSTEAD}")
    return loss


def shape_of(subject: Subject) -> tuple[int, int]:
    """How many decisions there are at most, and among how many classes: known without running the model."""
    loss = decision_loss(subject)
    batch = next(iter(subject.batches(1)))
    each = batch.targets.numel() / batch.size
    return max(int(each * subject.examples), 1), 2 if loss.kind == "binary" else int(subject.classes or 2)


@torch.no_grad()
def decisions(subject: Subject) -> Iterator[Decisions]:
    """The decisions on each batch of the subject's examples, targets that the loss ignores left out.

    Raises:
        ValueError: targets that are probabilities rather than classes; outputs that are not finite, or, for the loss
            nll, no log-probabilities.
    """
    loss, seen = decision_loss(subject), 0
    for batch in subject.batches():
        with subject.lock:
            outputs = subject.batch_outputs({}, batch)
        rows, labels, kept = (_binary if loss.kind == "binary" else _classes)(loss, outputs, batch)
        owners = torch.arange(len(labels), device=labels.device) // max(len(labels) // batch.size, 1) + seen
        seen += batch.size
        found = _on_host(rows[kept]), labels[kept].cpu().numpy(), owners[kept].cpu().numpy()
        _check(loss, found[0])
        yield Decisions(*found)


def _classes(loss: Loss, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    scores, labels = class_last(outputs, batch.targets, loss.class_first)
    if labels.is_floating_point():
        raise ValueError(
            "the targets are probabilities of classes; calibration compares predictions with labels that happened: "
            "pass class numbers, such as targets.argmax(-1)."
        )
    flat = labels.reshape(-1).long()
    return scores.reshape(-1, scores.shape[-1]), flat, flat != loss.ignore_index


def _binary(loss: Loss, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    targets = as_values(outputs, batch.targets, loss.name).reshape(-1)
    if not bool(((targets == 0) | (targets == 1)).all()):
        raise ValueError(
            f"the targets of {loss.name} lie between 0 and 1; calibration compares predictions with labels that "
            "happened: pass targets that are 0 or 1."
        )
    z = outputs.reshape(-1)
    return torch.stack([torch.zeros_like(z), z], 1), targets.long(), torch.ones_like(targets, dtype=torch.bool)


def _on_host(rows: Tensor) -> NDArray[np.float64]:
    return rows.double().cpu().numpy()


def _check(loss: Loss, rows: NDArray[np.float64]) -> None:
    bad = int((~np.isfinite(rows)).any(1).sum())
    if bad:
        raise ValueError(
            f"{bad} of {len(rows)} rows of the model's outputs hold nan or infinity, so they are no probabilities; "
            "look at the weights (did training diverge?) and the inputs."
        )
    if "nll" in loss.name.lower() and len(rows) and np.abs(np.exp(rows).sum(1) - 1).max() > 1e-3:
        raise ValueError(
            f"the loss {loss.name} wants log-probabilities, and the exponentials of these outputs do not sum to 1; "
            'end the model with log_softmax, or make the subject with loss="cross_entropy" where they are logits.'
        )
