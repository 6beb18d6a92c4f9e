"""Neural collapse: what the last-layer features and the classifier became."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import xarray as xr

from workbench.activations import Classifier, find_classifier
from workbench.collapsing import (
    Passes,
    Values,
    duality,
    each_fold,
    of_frame,
    of_scatter,
    present,
    spread,
    weight_rows,
    with_errors,
    words,
)
from workbench.figure import Axis, Bars, Figure, Heat, Line, Panel, Points, Rule
from workbench.imbalance import Theory, inapplicable, predict, row_lengths, unit_of
from workbench.numerics import frames
from workbench.numerics.collapse import of_moments
from workbench.numerics.near_collapse import contraction
from workbench.numerics.sampling import Draw
from workbench.numerics.stats import ClassMoments, known_mean
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Choice, Doc, Range
from workbench.subject import Subject

_MEASURES = {
    "nc1": "within-class variability, Tr(Σ_W Σ_B⁺)/C",
    "nc1_ratio": "within-class over between-class variance, Tr Σ_W / Tr Σ_B",
    "cdnv": "class-distance normalised variance, mean over pairs",
    "nc2_equinorm": "spread of the class means' lengths",
    "nc2_equiangle": "mean deviation of cosines from -1/(C-1)",
    "nc2_simplex": "distance of the means to a simplex frame",
    "nc3": "distance of classifier and class means, squared",
    "nc3_product": "distance of classifier times means to a simplex frame",
    "nc3_cosine": "mean cosine of classifier rows and class means",
    "nc4": "disagreement of the network with the nearest class mean",
    "distance": "least perturbation to collapsed features, relative",
    "accuracy": "share of examples classified rightly",
}
_OF_FRAME = {
    "uncentred_cosine": "mean cosine of the class means before centring",
    "mean_share": "squared length of the global mean over that of the class means",
    "orthogonality": "mean |cos| of the class means before centring",
    "frame_distance": "distance of the uncentred means to an orthogonal frame",
    "nc5": "mean |cos| of class means and the mean of outside examples",
}
_BY_CLASS = {
    "class_norm": "length of the centred class mean",
    "class_mean_length": "length of the class mean, uncentred",
    "class_variance": "trace of the covariance within the class",
}
_THEORY = {
    "theory_mean_length": "length of the class mean at the minimum",
    "theory_row_norm": "length of the classifier's row at the minimum",
    "theory_logit": "logit of the own class at the minimum",
}
_NOTHING = 1e-9
"""What lies below is rounding, and is left out of the picture."""
_DRAWN = {"nc1": "NC1", "nc2_equinorm": "NC2a", "nc2_equiangle": "NC2b", "nc3": "NC3", "nc4": "NC4", "nc5": "NC5"}


def _estimated(names: dict[str, str], dims: tuple[str, ...] = (), prefix: str = "") -> tuple[Variable, ...]:
    said = ", held out" if prefix else ""
    found = {f"{prefix}{name}": long_name + said for name, long_name in names.items()}
    values = (Variable(name, dims, long_name, error=f"{name}_error") for name, long_name in found.items())
    return (*values, *(Variable(f"{name}_error", dims, f"standard error of {name} over examples") for name in found))


@dataclass(frozen=True)
class NeuralCollapse(Probe[Subject]):
    """Neural collapse NC1 to NC5 of the features before the classifier (Papyan, Han, Donoho 2020, PNAS 117:24652).

    What it measures, for features h, class means μ_c, their unweighted mean μ_G, M_c = μ_c - μ_G, classifier W, b and C
    present classes:
    ``nc1`` = Tr(Σ_W Σ_B⁺)/C with Σ_W = (1/N) Σ (h-μ_c)(h-μ_c)ᵀ, Σ_B = (1/C) Σ M_c M_cᵀ, inverted on its C-1 directions;
    ``nc1_ratio`` = Tr Σ_W / Tr Σ_B, which also sees variance outside the span of the means; ``cdnv`` the class-distance
    normalised variance (Galanti et al. 2022); ``nc2_equinorm`` the coefficient of variation of ‖M_c‖; ``nc2_equiangle``
    the mean of |cos(M_c, M_c') + 1/(C-1)|; ``nc2_simplex`` the distance of the means' Gram matrix to the simplex frame;
    ``nc3`` = ‖W/‖W‖ - M/‖M‖‖² in [0, 4]; ``nc3_product`` the distance of W Mᵀ to the simplex frame and ``nc3_cosine``
    the mean cosine of w_c and M_c; ``nc4`` the share of examples on which the network and the nearest class mean
    disagree; ``nc5`` the mean |cos(μ_c, μ_out)| with the mean of examples from outside the classes. ``distance``: how
    much of the features' spread must change to make them a collapsed simplex. ``uncentred_cosine`` and ``mean_share``
    tell an orthogonal frame (0 and 1/C) from a simplex one: centring makes both look alike. ``held_out_...``: the same
    of the examples held out, around their own means; their nearest mean is one of training. For squared loss without a
    bias, ``theory_...`` are the lengths of the least objective for these class sizes (Dang et al. 2023), and
    ``loss_gap`` what lies between; a class at zero is minority collapse only where they are zero too. With
    ``proximity`` β: what least squares would make of features H that must stay near these, with β/2 ‖H - H_0‖² and
    ``feature_decay`` (else none) added to the loss: ``contraction``, the factors of their deviations within classes
    along the classifier's singular directions, the largest first, and last of those outside of its rows.

    How to read it: all fall towards 0 as features collapse (``nc3_cosine`` rises to 1); compare only networks trained
    to the same accuracy. NC5 is about the means of two sets and wants a set of another kind, not of hard examples.

    What it costs: two forward passes over the examples, and two over those held out; O(groups C d) memory in float64,
    whatever the number of examples.

    When it misleads: before the training error is near zero there is no terminal phase to speak of; on imbalanced data
    the limit is not a simplex; with d < C - 1 there is no room for one; a subset of the examples biases NC1 slightly
    downwards when classes hold few examples. Prescribed lengths hold for free features: the decay that is implied
    for them is right at a minimum only, and a network that cannot move its features at will has longer or shorter ones.

    Errors: standard errors over examples, by the jackknife: all is computed again without each of ``groups`` groups.
    They are about other examples of the same kind; the values are exact for those that were used. nan where a quantity
    does not exist (one class, no classifier), and where a class would be empty without a group.

    Source: Papyan et al. 2020; Zhu et al. 2021 (nc3_product); Ammar et al. 2024 (nc5); Dang et al. 2023 (theory);
    Tirer, Huang, Niles-Weed 2023 (contraction).
    """

    layer: Annotated[
        str | None, Doc("Module whose features to read; empty finds the classifier and reads what enters it.")
    ] = None
    groups: Annotated[int, Range(0, 100, step=1, soft=(0, 20)), Doc("Groups of examples for errors; 0: none.")] = 10
    held_out: Annotated[
        Literal["test", "outside", "unused"],
        Choice(
            {
                "test": "more examples of the same classes",
                "outside": "examples of no class, for NC5; their labels are not looked at",
                "unused": "not looked at",
            }
        ),
        Doc("What the subject's held-out examples are."),
    ] = "test"
    matrices: Annotated[int, Range(1, 100, step=1, soft=(1, 10)), Doc("Linear layers the classifier is made of.")] = 1
    weight_decay: Annotated[
        float | None, Range(1e-12, 1e3, log=True), Doc("λ of the classifier, λ/2 ‖W‖²; nothing: the optimizer's.")
    ] = None
    feature_decay: Annotated[
        float | None,
        Range(1e-12, 1e3, log=True),
        Doc("λ of all features together, λ/2 ‖H‖²; nothing: what balances the classifier's."),
    ] = None
    proximity: Annotated[
        float | None, Range(1e-12, 1e3, log=True), Doc("β of β/2 ‖H - H_0‖², for contraction; nothing: not looked at.")
    ] = None

    variables: ClassVar[tuple[Variable, ...]] = (
        *_estimated(_MEASURES),
        *_estimated(_OF_FRAME),
        *_estimated(_MEASURES, prefix="held_out_"),
        Variable("class_count", ("class_",), "examples in the class"),
        Variable("held_out_class_count", ("class_",), "examples in the class, held out"),
        *_estimated(_BY_CLASS, ("class_",)),
        Variable("classifier_norm", ("class_",), "length of the classifier's row"),
        *_estimated({"cosine": "cosine between centred class means"}, ("class_", "other")),
        *(Variable(name, ("class_",), long_name) for name, long_name in _THEORY.items()),
        Variable("contraction", ("direction",), "factor of deviations within classes near these features"),
        Variable("given_up", ("class_",), "whether the minimum gives the class up (1) or not (0)"),
        Variable("loss_gap", (), "objective above the least possible one"),
        Variable("theory_loss", (), "least objective, half the squared distance per example"),
    )

    def validate(self) -> None:
        """Several matrices need to know what holds the features back: the balance is seen with one only."""
        if self.matrices > 1 and self.feature_decay is None:
            raise ValueError(
                f"matrices={self.matrices} needs feature_decay: the features before the first of them are not seen."
            )

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """Class means, then scatter around them and nearest means; then the same of the held-out examples."""
        run = _Run(self, subject, find_classifier(subject, self.layer))
        yield from run.train()
        yield from run.held()
        yield run.report(1.0)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """NC1 to NC5 and the accuracy that they must be read with, of training and held-out examples."""
        names = ["nc1", "nc1_ratio", "nc2_equinorm", "nc2_equiangle", "nc3", "nc4", "accuracy"]
        names += [n for n in ("nc5", "held_out_nc1", "held_out_nc4", "held_out_accuracy") if np.isfinite(data[n])]
        found: dict[str, Value] = {}
        for name in names:
            found |= {name: float(data[name]), f"{name}_error": float(data[f"{name}_error"])}
        missing = int((data.class_count == 0).sum())
        gap: dict[str, Value] = {"loss_gap": float(data.loss_gap)} if np.isfinite(data.loss_gap) else {}
        return found | gap | ({"missing_classes": missing} if missing else {})

    def figure(self, data: xr.Dataset) -> Figure:
        """The measures on a log axis, the cosines between class means, and the lengths of means and classifier rows."""
        classes = data["class_"].values.astype(float)
        present_ones = max(int((data.class_count > 0).sum()), 2)
        angles = Panel(
            (Heat(classes, classes, data.cosine.values, diverging=True),),
            Axis("class"),
            Axis("class"),
            Axis(f"cosine (collapse: {-1 / (present_ones - 1):.2f})", limits=(-1.0, 1.0)),
            square=True,
        )
        return Figure((_measures(data), angles, _lengths(data, classes)))

    def estimate(self, subject: Subject) -> Cost:
        """Class means without each group twice, a tile, and one chunk's activations."""
        classes = subject.classes or 2
        width = max((p.shape[-1] for p in subject.params.values() if p.ndim > 1), default=1)
        kept = 8 * (3 * max(self.groups, 1) + 4) * classes * width
        passes = 4 if subject.held_out is not None and self.held_out != "unused" else 2
        return Cost(kept + subject.memory(), passes, f"{passes} forward passes over the examples")


def _measures(data: xr.Dataset) -> Panel:
    names = [name for name in _DRAWN if name != "nc5" or np.isfinite(data.nc5)]
    values, errors = ([float(data[f"{name}{end}"]) for name in names] for end in ("", "_error"))
    both = bool(np.isfinite(data.held_out_nc1))
    marks: list[Any] = [
        Bars(range(len(names)), values, errors, "training" if both else "", names=tuple(_DRAWN[n] for n in names))
    ]
    if both:
        held = [float(data[f"held_out_{name}"]) if name != "nc5" else np.nan for name in names]
        bars = [float(data[f"held_out_{name}_error"]) if name != "nc5" else np.nan for name in names]
        marks.append(Points(range(len(names)), held, bars, "held out", "second"))
    positive = [v for v in values if v > 0]
    limits = (_NOTHING, 2 * max(positive)) if positive and min(positive) < _NOTHING < max(positive) else None
    return Panel(tuple(marks), Axis("a: norms, b: angles"), Axis("distance from collapse", "log", limits=limits))


def _lengths(data: xr.Dataset, classes: np.ndarray) -> Panel:
    if np.isfinite(data.theory_row_norm).any():
        return _beside_theory(data, classes)
    means, error = data.class_norm.values, data.class_norm_error.values
    rows = data.classifier_norm.values
    marks = (
        Rule(1.0),
        Points(classes, means / known_mean(means), error / known_mean(means), label="class means"),
        Points(classes, rows / known_mean(rows), label="classifier rows", role="second"),
    )
    return Panel(marks, Axis("class"), Axis("length / mean length"))


def _beside_theory(data: xr.Dataset, classes: np.ndarray) -> Panel:
    marks = (
        Line(classes, data.theory_mean_length.values, "minimum: means"),
        Line(classes, data.theory_row_norm.values, "minimum: rows", "second"),
        Points(classes, data.class_mean_length.values, data.class_mean_length_error.values, "class means"),
        Points(classes, data.classifier_norm.values, label="classifier rows", role="second"),
    )
    return Panel(marks, Axis("class"), Axis("length, uncentred"))


@dataclass
class _Run:
    """What one stream knows so far."""

    probe: NeuralCollapse
    subject: Subject
    classifier: Classifier
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    said: list[str] = field(default_factory=list[str])
    complete: bool = False

    def __post_init__(self) -> None:
        self.other = None if self.probe.held_out == "unused" else self.subject.held_out
        self.passes = Passes(self.subject, (self.classifier.layer,), self.probe.groups)
        self.share = self.subject.examples / (self.subject.examples + (self.other.examples if self.other else 0))
        self.classes = 0
        weight = self.classifier.weight
        self.directions = np.arange(1 if weight is None else len(weight) + 1)

    def train(self) -> Iterator[Reading]:
        """Both passes over the training examples, then what theory has to say of their class sizes."""
        for done in self.passes.means():
            self.take_means()
            yield self.report(self.share * done / 2)
        for done in self.passes.spread():
            self.take(self.passes, done, self.of_fold, "")
            yield self.report(self.share * (1 + done) / 2)
        self.complete = len(present(self.passes.scatters[0].whole)) > 1
        self.foresee(self.passes.scatters[0].whole)
        self.near()

    def take_means(self) -> None:
        """What the class means so far say, without errors."""
        moments = self.passes.moments[0].whole()
        self.classes = len(moments.counts)
        self.values["class_count"] = moments.counts
        self.said = words(moments)
        if len(present(moments)) > 1:
            self.values |= self.of_means(moments)

    def take(self, passes: Passes, done: float, of: Callable[[ClassMoments, int, Passes], Values], prefix: str) -> None:
        """What both passes say, with errors at their end."""
        sums = passes.scatters[0]
        if len(present(sums.whole)) < 2:
            return
        found = each_fold(sums, lambda fold, k: of(fold, k, passes), errors=done == 1)
        self.values |= {f"{prefix}{name}": value for name, value in found.items()}

    def held(self) -> Iterator[Reading]:
        """The same of the examples held out: of the same classes, or of none."""
        if self.other is None or not self.complete:
            return
        outside = self.probe.held_out == "outside"
        centres = None if outside else (self.passes.scatters[0].whole,)
        held = Passes(self.other, (self.classifier.layer,), self.probe.groups, centres)
        for done in held.means():
            yield self.report(self.share + (1 - self.share) * done / 2)
        if outside:
            self.take_outside(held)
            return
        self.said += words(held.moments[0].whole(), " held out")
        self.values["held_out_class_count"] = held.moments[0].whole().counts
        for done in held.spread():
            self.take(held, done, self.common, "held_out_")
            yield self.report(min(self.share + (1 - self.share) * (1 + done) / 2, 0.999))

    def of_fold(self, fold: ClassMoments, k: int, passes: Passes) -> Values:
        """All that the training examples of one fold say."""
        return {**self.of_means(fold), **self.common(fold, k, passes)}

    def common(self, fold: ClassMoments, k: int, passes: Passes) -> Values:
        """What is asked of training and of held-out examples alike."""
        found = of_scatter(passes.scatters[0], k)
        shares = {"nc1": found["nc1"], "nc4": found["differ"], "accuracy": found["right"]}
        return {**of_moments(fold), **duality(fold, self.classifier), **shares}

    def of_means(self, fold: ClassMoments) -> Values:
        """What class means and classifier decide."""
        kept = present(fold)
        weight = weight_rows(self.classifier, kept, fold.means)
        if weight is not None:
            self.values["classifier_norm"] = spread(torch.linalg.vector_norm(weight, dim=1), kept, len(fold.counts))
        return {**of_moments(fold), **duality(fold, self.classifier), **of_frame(fold)}

    def take_outside(self, held: Passes) -> None:
        """NC5, its error from both sets: without each group of both."""
        moments = held.moments[0].folds()
        ours = self.passes.scatters[0].folds
        outside = [(m.counts.double() @ m.means) / m.counts.sum() for m in moments]
        values = [frames.outside_cosine(o.means[present(o)], x) for o, x in zip(ours, outside, strict=False)]
        found = values if len(ours) == len(moments) else values[:1]
        self.values |= with_errors([{"nc5": value} for value in found])

    def foresee(self, moments: ClassMoments) -> None:
        """Lengths of the least objective, where the theory speaks of this network."""
        asked = self.probe.weight_decay is not None or self.probe.feature_decay is not None
        why = inapplicable(self.subject, self.classifier)
        if asked and why:
            self.said.append(f"no lengths from class sizes: {why}")
        if not self.complete:
            return
        theory = predict(
            self.subject,
            self.classifier,
            moments,
            matrices=self.probe.matrices,
            weight_decay=self.probe.weight_decay,
            feature_decay=self.probe.feature_decay,
        )
        if theory is not None:
            self.beside(theory, present(moments))

    def beside(self, theory: Theory, kept: list[int]) -> None:
        """Theory's values, and what they say of each class."""
        frame, of = theory.frame, lambda value: spread(torch.from_numpy(value).double(), kept, self.classes)
        self.said += theory.words(kept, row_lengths(self.classifier, kept))
        self.values |= {"loss_gap": theory.gap, "theory_loss": frame.minimum}
        self.values |= {"theory_mean_length": of(frame.mean_norm), "theory_row_norm": of(frame.row_norm)}
        self.values |= {"theory_logit": of(frame.logit), "given_up": of(frame.collapsed)}

    def near(self) -> None:
        """How far features that may move a little from here would contract."""
        weight, given = self.classifier.weight, self.probe.proximity
        unit = unit_of(self.subject)
        if given is not None and (weight is None or unit is None):
            self.said.append("no contraction: it is of a squared loss, and of the features before a classifier")
        elif given is not None and weight is not None and unit is not None:
            self.values["contraction"] = contraction(weight, (self.probe.feature_decay or 0.0) / unit, given / unit)

    def report(self, done: float) -> Reading:
        """A reading of what is known."""
        numbers = np.arange(self.classes)
        return self.probe.reading(
            min(done, 1.0),
            self.values,
            coords={"class_": numbers, "other": numbers, "direction": self.directions},
            converged=done >= 1 and self.complete,
            notes=(*self.subject.notes, *self.said, *_layer_words(self.classifier)),
        )


def _layer_words(classifier: Classifier) -> tuple[str, ...]:
    where = "before" if classifier.layer.side == "input" else "after"
    said = f"features {where} layer {classifier.layer.name!r}"
    return (said,) if classifier.weight is not None else (said, "no classifier there: nc3 is nan")
