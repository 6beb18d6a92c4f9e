"""What class sizes and weight decay say of a classifier without a bias under squared loss, beside what was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.activations import Classifier
from workbench.numerics.orthogonal_frame import OrthogonalFrame, orthogonal_frame
from workbench.numerics.stats import ClassMoments
from workbench.parameters import optimizer_settings
from workbench.subject import Subject

SQUARED = {"mse": 2.0, "half_mse": 1.0}
"""Losses the theory is about, and how often they hold half the squared distance."""
_NEAR_ZERO = 0.1
"""A row of less than this share of a length counts as zero beside it."""


@dataclass(frozen=True, eq=False)
class Theory:
    """The orthogonal frame predicted for the present classes, and the objective where the network stands.

    ``objective`` and ``frame.minimum`` are in units of half the squared distance per example. Decays too: λ_W, λ_H.
    """

    frame: OrthogonalFrame
    objective: float
    weight_decay: float
    feature_decay: float
    implied: bool

    @property
    def gap(self) -> float:
        """How far the network's objective lies above the least possible one."""
        return self.objective - self.frame.minimum

    def words(self, classes: Sequence[int], rows: Tensor) -> list[str]:
        """What the lengths of the classifier's rows (C,) say: given up as it should be, or stuck at zero."""
        said = [
            f"orthogonal frame for λ_W = {self.weight_decay:.3g}, λ_H = {self.feature_decay:.3g}"
            + (" (as the balance of classifier and features implies)" if self.implied else "")
        ]
        if not self.frame.row_norm.any():
            return [*said, "every class is best given up at these decays"]
        lengths, largest = rows.cpu().numpy(), float(self.frame.row_norm.max())
        for k, number in enumerate(classes):
            wanted, gone = float(self.frame.row_norm[k]), bool(self.frame.collapsed[k])
            near = lengths[k] < _NEAR_ZERO * (largest if gone else wanted)
            if gone and near:
                said.append(f"class {number} is given up, as is best at these decays: minority collapse")
            elif gone:
                said.append(f"class {number} has length {lengths[k]:.3g}, where giving it up would be best")
            elif near:
                said.append(
                    f"class {number} is at zero, where the minimum has length {wanted:.3g}: not minority collapse but "
                    f"an optimiser that is stuck, {self.gap:.3g} above the least objective"
                )
        return said


def coupled_decay(subject: Subject) -> float | None:
    """The weight decay that the subject's optimizer adds to the loss, λ/2 ‖θ‖²; None: none, several, or decoupled."""
    if subject.optimizer is None:
        return None
    kind, groups = optimizer_settings(subject.optimizer)
    found = {float(str(group.get("weight_decay", 0.0))) for group in groups}
    decoupled = kind.endswith("W") or any(group.get("decoupled_weight_decay") for group in groups)
    return found.pop() or None if len(found) == 1 and not decoupled else None


def unit_of(subject: Subject) -> float | None:
    """The factor of ½ Σ ‖f(x) - y‖² over all examples in the subject's loss; None of a loss that is no squared one."""
    factor = SQUARED.get(subject.describe()["loss"])
    return (
        None
        if factor is None
        else factor * subject.examples / subject.total_weight / (subject.available or subject.examples)
    )


def inapplicable(subject: Subject, classifier: Classifier) -> str:
    """Why the theory says nothing of this network; empty where it does."""
    if subject.describe()["loss"] not in SQUARED:
        return "the loss is not a squared one"
    if classifier.weight is None:
        return "there is no classifier at this layer"
    return "the classifier has a bias" if classifier.bias is not None else ""


def predict(
    subject: Subject,
    classifier: Classifier,
    moments: ClassMoments,
    *,
    matrices: int = 1,
    weight_decay: float | None = None,
    feature_decay: float | None = None,
) -> Theory | None:
    """The frame for the present classes; None where the theory does not apply or no weight decay is known.

    Decays are those of the loss as the subject has it, L + λ_W/2 Σ‖W_j‖² + λ_H/2 ‖H‖². Without ``weight_decay`` the
    optimizer's is taken. Without ``feature_decay``, λ_H follows from stationarity, λ_W ‖W‖² = λ_H ‖H‖², which
    holds at every minimum. A subject of some of its examples stands for all of them. Cost: one pass for the loss.
    """
    decay = weight_decay or coupled_decay(subject)
    if decay is None or inapplicable(subject, classifier) or classifier.weight is None:
        return None
    kept = moments.counts > 0
    counts = moments.counts[kept].double() * ((subject.available or subject.examples) / subject.examples)
    if len(classifier.weight) <= int(kept.nonzero().max()):
        return None
    unit = SQUARED[subject.describe()["loss"]] * float(moments.counts.sum()) / subject.total_weight
    weight = float((classifier.weight.double() ** 2).sum())
    features = float(counts @ (moments.scatter[kept] / moments.counts[kept] + (moments.means[kept] ** 2).sum(1)))
    implied = feature_decay is None
    other = decay * weight / features if feature_decay is None else feature_decay
    if not other > 0:
        return None
    penalty = (matrices + 1) * decay * weight if matrices > 1 else decay * weight + other * features
    objective = (float(subject.loss()) + penalty / 2) / unit
    frame = orthogonal_frame(counts.cpu().numpy(), decay / unit, other / unit, matrices)
    return Theory(frame, objective, decay / unit, other / unit, implied)


def row_lengths(classifier: Classifier, classes: Sequence[int]) -> Tensor:
    """Lengths of the classifier's rows of these classes."""
    assert classifier.weight is not None
    return torch.linalg.vector_norm(classifier.weight.double()[list(classes)], dim=1)
