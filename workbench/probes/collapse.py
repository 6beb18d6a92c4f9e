"""Neural collapse: what the last-layer features and the classifier became."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from workbench.activations import Classifier, find_classifier
from workbench.features import LabelledRows, labelled_rows, predicted
from workbench.figure import Axis, Bars, Figure, Heat, Panel, Points, Rule
from workbench.numerics import frames
from workbench.numerics.sampling import Draw
from workbench.numerics.stats import ClassMoments
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Doc
from workbench.subject import Subject


@dataclass(frozen=True)
class NeuralCollapse(Probe[Subject]):
    """Neural collapse NC1 to NC4 of the features before the classifier (Papyan, Han, Donoho 2020, PNAS 117:24652).

    What it measures, for features h, class means μ_c, their unweighted mean μ_G, M_c = μ_c - μ_G, classifier W, b and C
    present classes:
    ``nc1`` = Tr(Σ_W Σ_B⁺)/C with Σ_W = (1/N) Σ (h-μ_c)(h-μ_c)ᵀ, Σ_B = (1/C) Σ M_c M_cᵀ, inverted on its C-1 directions;
    ``nc1_ratio`` = Tr Σ_W / Tr Σ_B, which also sees variance outside the span of the means; ``cdnv`` the class-distance
    normalised variance (Galanti et al. 2022); ``nc2_equinorm`` the coefficient of variation of ‖M_c‖; ``nc2_equiangle``
    the mean of |cos(M_c, M_c') + 1/(C-1)|; ``nc2_simplex`` the distance of the means' Gram matrix to the simplex frame;
    ``nc3`` = ‖W/‖W‖ - M/‖M‖‖² in [0, 4]; ``nc4`` the share of examples on which the network and the nearest class mean
    disagree. ``uncentred_cosine`` and ``mean_share`` tell an orthogonal frame (0 and 1/C) from a simplex one: centring
    makes both look alike.

    How to read it: all fall towards 0 as features collapse; compare only networks trained to the same accuracy.

    What it costs: two forward passes over the examples; O(C d) memory in float64, whatever the number of examples.

    When it misleads: before the training error is near zero there is no terminal phase to speak of; on imbalanced data
    the limit is not a simplex; with d < C - 1 there is no room for one; a subset of the examples biases NC1 slightly
    downwards when classes hold few examples.

    Errors: exact for the examples that were used; nan where a quantity does not exist (one class, no classifier).
    """

    layer: Annotated[
        str | None, Doc("Module whose features to read; empty finds the classifier and reads what enters it.")
    ] = None

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("nc1", (), "within-class variability, Tr(Σ_W Σ_B⁺)/C"),
        Variable("nc1_ratio", (), "within-class over between-class variance, Tr Σ_W / Tr Σ_B"),
        Variable("cdnv", (), "class-distance normalised variance, mean over pairs"),
        Variable("nc2_equinorm", (), "spread of the class means' lengths"),
        Variable("nc2_equiangle", (), "mean deviation of cosines from -1/(C-1)"),
        Variable("nc2_simplex", (), "distance of the means to a simplex frame"),
        Variable("nc3", (), "distance of classifier and class means, squared"),
        Variable("nc4", (), "disagreement of the network with the nearest class mean"),
        Variable("uncentred_cosine", (), "mean cosine of the class means before centring"),
        Variable("mean_share", (), "squared length of the global mean over that of the class means"),
        Variable("accuracy", (), "share of examples classified rightly"),
        Variable("class_count", ("class_",), "examples in the class"),
        Variable("class_norm", ("class_",), "length of the centred class mean"),
        Variable("class_variance", ("class_",), "trace of the covariance within the class"),
        Variable("classifier_norm", ("class_",), "length of the classifier's row"),
        Variable("cosine", ("class_", "other"), "cosine between centred class means"),
    )

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """Pass 1: class means. Pass 2: scatter around them, projected on their span, and nearest means."""
        classifier = find_classifier(subject, self.layer)
        moments: ClassMoments | None = None
        seen = 0
        for rows in labelled_rows(subject, classifier.layer):
            moments = (moments or ClassMoments.empty(rows.classes, rows.features.shape[1])).add(
                rows.features, rows.targets
            )
            seen += rows.examples
            yield self._report(subject, classifier, moments, None, 0.5 * seen / subject.examples)
        assert moments is not None
        scatter = _Scatter(moments, _present(moments)[0])
        seen = 0
        for rows in labelled_rows(subject, classifier.layer):
            scatter.add(rows)
            seen += rows.examples
            yield self._report(subject, classifier, moments, scatter, 0.5 + 0.5 * seen / subject.examples)

    def _report(
        self, subject: Subject, classifier: Classifier, moments: ClassMoments, scatter: _Scatter | None, done: float
    ) -> Reading:
        present, notes = _present(moments)
        values: dict[str, Any] = {"class_count": moments.counts}
        if len(present) > 1:
            values |= {**_between(moments, present, classifier), **(scatter.values() if scatter else {})}
        last = done >= 1
        return self.reading(
            min(done, 1.0),
            values,
            coords={"class_": np.arange(len(moments.counts)), "other": np.arange(len(moments.counts))},
            converged=last and len(present) > 1,
            notes=(*subject.notes, *notes, *_layer_words(classifier), *(scatter.words() if scatter else ())),
        )

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """NC1 to NC4 and the accuracy that they must be read with."""
        names = ("nc1", "nc1_ratio", "nc2_equinorm", "nc2_equiangle", "nc3", "nc4", "accuracy")
        missing = int((data.class_count == 0).sum())
        found: dict[str, Value] = {n: float(data[n]) for n in names}
        return found | ({"missing_classes": missing} if missing else {})

    def figure(self, data: xr.Dataset) -> Figure:
        """The measures on a log axis, the cosines between class means, and the lengths of means and classifier rows."""
        names = ("nc1", "nc2_equinorm", "nc2_equiangle", "nc3", "nc4")
        labels = ("NC1", "NC2a", "NC2b", "NC3", "NC4")
        values = [float(data[n]) for n in names]
        classes = data["class_"].values.astype(float)
        present = max(int((data.class_count > 0).sum()), 2)
        measures = Panel(
            (Bars(range(len(names)), values, names=labels),),
            Axis("a: norms, b: angles"),
            Axis("distance from collapse", "log"),
        )
        angles = Panel(
            (Heat(classes, classes, data.cosine.values, diverging=True),),
            Axis("class"),
            Axis("class"),
            Axis(f"cosine (collapse: {-1 / (present - 1):.2f})", limits=(-1.0, 1.0)),
            square=True,
        )
        return Figure((measures, angles, _lengths(data, classes)))

    def estimate(self, subject: Subject) -> Cost:
        """Class means twice and one chunk's activations."""
        classes = subject.classes or 1
        width = max((p.shape[-1] for p in subject.params.values() if p.ndim > 1), default=1)
        return Cost(4 * 8 * classes * width + subject.memory(), 2, "two forward passes over the examples")


def _lengths(data: xr.Dataset, classes: np.ndarray) -> Panel:
    means = (
        data.class_norm.values / np.nanmean(data.class_norm.values)
        if np.isfinite(data.class_norm).any()
        else classes * np.nan
    )
    rows = data.classifier_norm.values
    rows = rows / np.nanmean(rows) if np.isfinite(rows).any() else rows
    marks = (
        Rule(1.0),
        Points(classes, means, label="class means"),
        Points(classes, rows, label="classifier rows", role="second"),
    )
    return Panel(marks, Axis("class"), Axis("length / mean length"))


class _Scatter:
    """Sums of the second pass: scatter around the final class means, and who disagrees with the nearest of them."""

    def __init__(self, moments: ClassMoments, present: Tensor) -> None:
        self.moments, self.present = moments, present
        self.centred = frames.centre(moments.means[present])
        self.inside = torch.zeros_like(self.centred.strengths)
        self.total = torch.zeros_like(moments.counts, dtype=torch.float64)
        self.seen = torch.zeros_like(self.total)
        self.disagree = self.right = 0.0

    def add(self, rows: LabelledRows) -> None:
        """Take in one batch."""
        off = rows.features - self.moments.means[rows.targets]
        self.inside += ((off @ self.centred.axes.T) ** 2).sum(0)
        self.total.index_add_(0, rows.targets, (off**2).sum(1))
        self.seen += torch.bincount(rows.targets, minlength=len(self.seen))
        chosen = predicted(rows.logits)
        self.disagree += float((self._nearest(rows.features) != chosen).sum())
        self.right += float((chosen == rows.targets).sum())

    def _nearest(self, features: Tensor) -> Tensor:
        """The nearest present class mean; distances from centred features, so that a large offset cancels nothing."""
        centred = self.centred
        squared = (centred.rows**2).sum(1) - 2 * (features - centred.mean) @ centred.rows.T
        return self.present[squared.argmin(1)]

    def words(self) -> tuple[str, ...]:
        """What has to be said when the means span fewer directions than distinct ones in enough room would."""
        rank, full = len(self.centred.strengths), len(self.present) - 1
        if rank >= full:
            return ()
        return (
            f"the class means span {rank} of {full} directions (merged classes, or too few features): NC1 uses these",
        )

    def values(self) -> Mapping[str, Any]:
        """NC1 in its variants, NC4 and accuracy over the examples seen so far."""
        count = float(self.seen.sum())
        variance = self.total / self.seen
        between = float((self.centred.rows**2).sum()) / len(self.present)
        return {
            "nc1": float((self.inside / self.centred.strengths**2).sum()) / count,
            "nc1_ratio": float(self.total.sum()) / count / between,
            "cdnv": frames.class_distance_variance(variance[self.present], self.moments.means[self.present]),
            "nc4": self.disagree / count,
            "accuracy": self.right / count,
            "class_variance": variance,
        }


def _present(moments: ClassMoments) -> tuple[Tensor, tuple[str, ...]]:
    present = (moments.counts > 0).nonzero().flatten()
    absent = (moments.counts == 0).nonzero().flatten().tolist()
    notes: list[str] = []
    if absent:
        notes.append(
            f"no example of class {', '.join(map(str, absent))}: the measures use the {len(present)} present ones"
        )
    if len(present) < 2:
        notes.append("fewer than two classes are present, so collapse is not defined: nan")
    return present, tuple(notes)


def _layer_words(classifier: Classifier) -> tuple[str, ...]:
    where = "before" if classifier.layer.side == "input" else "after"
    said = f"features {where} layer {classifier.layer.name!r}"
    return (said,) if classifier.weight is not None else (said, "no classifier there: nc3 is nan")


def _between(moments: ClassMoments, present: Tensor, classifier: Classifier) -> Mapping[str, Any]:
    """What the class means (and the classifier) alone decide."""
    means = moments.means[present]
    centred = frames.centre(means)
    weight = _rows_of(classifier, present, means)
    return {
        "nc2_equinorm": frames.equinorm(centred.rows),
        "nc2_equiangle": frames.equiangle(centred.rows),
        "nc2_simplex": frames.simplex_distance(centred.rows),
        "nc3": float("nan") if weight is None else frames.self_duality(weight, centred.rows),
        "uncentred_cosine": frames.mean_cosine(means),
        "mean_share": float((centred.mean**2).sum() / (means**2).sum(1).mean()),
        "class_norm": _spread(torch.linalg.vector_norm(centred.rows, dim=1), present, moments),
        "classifier_norm": _spread(
            None if weight is None else torch.linalg.vector_norm(weight, dim=1), present, moments
        ),
        "cosine": _spread_square(frames.cosines(centred.rows), present, moments),
    }


def _rows_of(classifier: Classifier, present: Tensor, means: Tensor) -> Tensor | None:
    weight = classifier.weight
    if weight is None or weight.shape[1] != means.shape[1] or len(weight) <= int(present.max()):
        return None
    return weight.to(means)[present]


def _spread(values: Tensor | None, present: Tensor, moments: ClassMoments) -> Tensor | None:
    if values is None:
        return None
    out = torch.full((len(moments.counts),), float("nan"), dtype=torch.float64, device=values.device)
    out[present] = values
    return out


def _spread_square(values: Tensor, present: Tensor, moments: ClassMoments) -> Tensor:
    out = torch.full((len(moments.counts),) * 2, float("nan"), dtype=torch.float64, device=values.device)
    out[present[:, None], present[None, :]] = values
    return out
