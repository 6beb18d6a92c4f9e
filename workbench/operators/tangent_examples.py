"""Which examples a kernel is looked at on, and their targets as the outputs should be."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
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
    return joint_targets([subject], outputs)[0]


def joint_targets(subjects: Sequence[Subject], outputs: int) -> list[Tensor | None]:
    """As :func:`targets`, of several sets of examples: yes or no in one of them only where it is in all."""
    found = [_rows(subject, outputs) for subject in subjects]
    coded = outputs == 1 and all(t is None or _are(t, 0, 1) for t in found)
    return [2 * t - 1 if coded and t is not None else t for t in found]


def _rows(subject: Subject, outputs: int) -> Tensor | None:
    """One-hot rows or the values as they are."""
    labels = _labels(subject)
    if labels is not None:
        fits = subject.classes == outputs
        return F.one_hot(labels, outputs).double().to(subject.device) if fits else None
    given = _given(subject)
    if not all(isinstance(t, Tensor) and t.numel() == len(t) * outputs for t in given):
        return None
    return torch.cat([t.reshape(-1, outputs) for t in given]).double()


def _are(found: Tensor, no: float, yes: float) -> bool:
    return bool(((found == no) | (found == yes)).all())


@dataclass(frozen=True)
class Answers:
    """How a single output answers yes or no: targets of ``no`` (0 or -1) or 1, and yes for outputs ``above`` this.

    ``above`` is nan where the loss does not tell it.
    """

    no: float
    above: float

    @property
    def on_scale(self) -> bool:
        """Whether outputs are where targets are, rather than logits: they change their answer midway."""
        return self.above == (self.no + 1) / 2

    def centred(self, outputs: Tensor) -> Tensor:
        """Outputs as they are to ±1 what they were to their targets, so that yes is above 0; logits stay."""
        return 2 * outputs - 1 if self.on_scale and self.no == 0 else outputs


def answers(subjects: Sequence[Subject], outputs: int) -> Answers | None:
    """How the only output of these examples answers yes or no; None where the targets are no answers.

    They are where each example has one number and nothing but 0 and 1, or -1 and 1, occurs, both at least once (for
    binary cross-entropy, one will do). An output's answer changes at 0 for logits (binary cross-entropy, and losses
    that have them in their name), else at 0 or 1/2, where the loss is the same for yes as for no: at 0 for squared
    error between -1 and 1 or a margin loss, at 1/2 for squared error between 0 and 1 or cross-entropy of probabilities.
    """
    found = [_rows(subject, outputs) for subject in subjects] if outputs == 1 else [None]
    rows, loss = [t for t in found if t is not None], subjects[0]._criterion.loss
    if len(rows) < len(found) or loss is None:
        return None
    joint, binary = torch.cat(rows), loss.kind == "binary"
    no = 0.0 if binary else float(joint.min())
    if no not in (0, -1) or not _are(joint, no, 1) or not (binary or bool((joint == 1).any())):
        return None
    if binary or "logits" in loss.name.lower():
        return Answers(no, 0.0)
    return Answers(no, next((t for t in (0.0, 0.5) if _undecided(subjects[0], t, no)), math.nan))


@torch.no_grad()
def _undecided(subject: Subject, output: float, no: float) -> bool:
    """Whether the loss of this output is the same for both answers."""
    batch = next(iter(subject.batches(1)))
    at = torch.full_like(subject.batch_outputs({}, batch), output)
    either = [dataclasses.replace(batch, targets=torch.full_like(batch.targets, value)) for value in (no, 1.0)]
    first, second = (float(subject.output_loss(at, answer)) for answer in either)
    return math.isclose(first, second, rel_tol=1e-5)
