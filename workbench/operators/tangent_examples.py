"""Which examples a kernel is looked at on, and their targets as the outputs should be."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.subject import Subject


def picked(subject: Subject, count: int) -> Subject:
    """The subject on ``count`` of its examples: of each class equally many, as they come; else evenly spread.

    The choice depends on nothing but the examples, so that kernels at several weights are of the same ones.
    """
    if count >= subject.examples:
        return subject
    labels = _labels(subject)
    if labels is None:
        return subject.selected([i * subject.examples // count for i in range(count)])
    # The k-th example of its class comes before every (k + 1)-th.
    order = F.one_hot(labels).cumsum(0).gather(1, labels[:, None])[:, 0]
    return subject.selected(torch.argsort(order, stable=True)[:count].tolist())


def _given(subject: Subject) -> list[Any]:
    return [batch.targets for batch in subject.batches()]


def _labels(subject: Subject) -> Tensor | None:
    """One class number for each example, (n,), on the host; None where there is none or more than one."""
    given = _given(subject)
    if subject.classes is None or not all(isinstance(t, Tensor) and not t.is_floating_point() for t in given):
        return None
    found = torch.cat([t.reshape(len(t), -1) for t in given]).cpu()
    return found[:, 0].long() if found.shape[1] == 1 and int(found.min()) >= 0 else None


def targets(subject: Subject, outputs: int) -> Tensor | None:
    """What the ``outputs`` numbers of each example should be, (n, outputs) float64, on the subject's device.

    One-hot rows for classes, ±1 for a single yes or no, the values themselves else; None for other targets (several
    labels an example, outputs of another shape).
    """
    labels = _labels(subject)
    if labels is not None:
        fits = subject.classes == outputs
        return F.one_hot(labels, outputs).double().to(subject.device) if fits else None
    given = _given(subject)
    if not all(isinstance(t, Tensor) and t.numel() == len(t) * outputs for t in given):
        return None
    found = torch.cat([t.reshape(-1, outputs) for t in given]).double()
    return 2 * found - 1 if outputs == 1 and bool(((found == 0) | (found == 1)).all()) else found
