"""Calibration: whether what is predicted with 80 % happens in 80 % of the cases; temperature scaling."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import numpy as np
import xarray as xr

from workbench.decisions import Decisions, decision_loss, decisions, shape_of
from workbench.figure import Axis, Bars, Figure, Line, Panel, Points, Role
from workbench.numerics.calibration import (
    MEASURES,
    Predictions,
    Temperature,
    fit_temperature,
    resampled,
    spread_of,
)
from workbench.numerics.sampling import Draw
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Doc, Range
from workbench.subject import Subject

SWEEP = (2, 5, 10, 15, 20, 30, 50, 100)
"""Numbers of bins for which the expected calibration error is measured."""
STAGES = ("before", "after")
"""Before and after the logits are divided by the temperature."""
_LONG = {
    "ece": "expected calibration error, bins of equal width",
    "ece_equal_mass": "expected calibration error, bins of equal mass (adaptive)",
    "ece_classwise": "calibration error of each class's probability, mean over classes",
    "ece_top_label": "expected calibration error within each predicted class",
    "ece_max": "largest gap between accuracy and confidence of a bin",
    "rms": "root mean square of the bins' gaps",
    "rms_squared_debiased": "mean square of the bins' gaps, debiased (may be negative)",
    "overconfidence": "mean confidence minus accuracy (signed)",
    "ks": "largest gap between cumulative confidence and accuracy",
    "kernel_squared": "squared kernel calibration error, unbiased (may be negative)",
    "brier": "Brier score, summed over classes (0 to 2)",
    "nll": "negative log-likelihood",
    "accuracy": "share of predictions that are right",
}


def _measures() -> Iterator[Variable]:
    for name in MEASURES:
        yield Variable(name, ("stage",), _LONG[name], "nat" if name == "nll" else "", f"{name}_error")
        yield Variable(f"{name}_error", ("stage",), f"bootstrap standard error of {name}")


@dataclass(frozen=True)
class Calibration(Probe[Subject]):
    """Calibration of a classifier's probabilities, before and after temperature scaling (Guo et al. 2017).

    What it measures: with confidence q = max_c p_c, correctness a, and bins b of n_b among N predictions,
    ``ece`` = Σ_b (n_b/N) |acc_b - conf_b| over bins (l, u] of equal width; ``ece_equal_mass`` over bins that hold
    equally many predictions; ``ece_classwise`` of every class's p_c against 1[y = c], averaged over the classes;
    ``ece_top_label`` with bins within each predicted class (Gupta and Ramdas 2022); ``ece_max`` the largest gap;
    ``rms`` = √Σ (n_b/N) gap²; ``rms_squared_debiased`` = Σ (n_b/N) (gap² - acc(1 - acc)/(n_b - 1)) (Kumar et al. 2019);
    ``overconfidence`` = mean(q - a); without bins ``ks`` = max_q |Σ_{q_i <= q} (a_i - q_i)|/N (Gupta et al. 2021) and
    ``kernel_squared`` = Σ_{i≠j} r_i r_j exp(-|q_i - q_j|/``kernel_width``)/(N(N - 1)) with r = a - q (Kumar et al.
    2018, without its diagonal; Widmann et al. 2019). ``brier`` = mean Σ_c (p_c - 1[y = c])², twice the two-class Brier
    score of one probability; ``nll`` = mean -log p_y. ``temperature`` T minimises the nll of softmax(z/T) on other
    examples.

    How to read it: points under the diagonal are overconfident. A binned ECE of a perfectly calibrated model is not 0:
    compare it with ``ece_floor``, what perfect calibration with these confidences would show, which grows as √(bins/N).
    ``rms_squared_debiased`` and ``kernel_squared`` are 0 on average there. T > 1 says that the logits are too large.

    What it costs: one forward pass over the examples and one over the held-out ones, then sorting and ``resamples``
    passes over the predictions; about 60 bytes for each logit on the host.

    When it misleads: on training examples a network looks far better calibrated than on new ones: make the subject of
    test examples and give the validation set as ``held_out``. T is fitted on ``held_out``; without one, on a random
    half of the examples, and everything is then measured on the other half. ECE looks at the top class alone, depends
    on the bins, and a constant prediction of the base rates has none; nll and Brier score see sharpness too.

    Errors: bootstrap over examples (all tokens of one together), the bins held fixed; they do not hold the bias of
    the binned measures, and are too large for ``kernel_squared`` and ``rms_squared_debiased`` near 0. The intervals of
    a bin's accuracy are Clopper and Pearson's, exact for independent predictions. That of T is normal in log T over
    held-out examples; what follows from T in the numbers after scaling is not in their errors.
    """

    bins: Annotated[
        int, Range(1, 1000, step=1, soft=(5, 50)), Doc("Bins of the diagram and of the binned measures.")
    ] = 15
    kernel_width: Annotated[
        float, Range(0.05, 5.0, log=True), Doc("Distance of confidences at which the Laplace kernel falls to 1/e.")
    ] = 0.4
    resamples: Annotated[
        int, Range(2, 10000, step=1, soft=(50, 1000)), Doc("Bootstrap samples behind each standard error.")
    ] = 200

    variables: ClassVar[tuple[Variable, ...]] = (
        *_measures(),
        Variable("ece_floor", ("stage",), "expected calibration error that perfect calibration would show"),
        Variable("ece_by_bins", ("stage", "bin_count"), "ECE, bins of equal width", error="ece_by_bins_error"),
        Variable("ece_by_bins_error", ("stage", "bin_count"), "its bootstrap standard error"),
        Variable("mass_by_bins", ("stage", "bin_count"), "ECE, bins of equal mass", error="mass_by_bins_error"),
        Variable("mass_by_bins_error", ("stage", "bin_count"), "its bootstrap standard error"),
        Variable("floor_by_bins", ("stage", "bin_count"), "ECE of equal width under perfect calibration"),
        Variable("bin_size", ("stage", "bin"), "predictions in the bin"),
        Variable("bin_confidence", ("stage", "bin"), "mean confidence in the bin"),
        Variable("bin_accuracy", ("stage", "bin"), "accuracy in the bin", error="bin_accuracy_error"),
        Variable("bin_accuracy_error", ("stage", "bin"), "half the width of its 95 % interval"),
        Variable("bin_accuracy_low", ("stage", "bin"), "lower end of the accuracy's 95 % interval"),
        Variable("bin_accuracy_high", ("stage", "bin"), "upper end of the accuracy's 95 % interval"),
        Variable("temperature", (), "temperature with the least held-out nll", error="temperature_error"),
        Variable("temperature_error", (), "its standard error over held-out examples"),
        Variable("temperature_low", (), "lower end of its 95 % interval"),
        Variable("temperature_high", (), "upper end of its 95 % interval"),
        Variable("temperature_at_bound", (), "no minimum between exp(-5) and exp(5)", kind="bool"),
        Variable("predictions", (), "predictions that were measured"),
        Variable("fitted_on", (), "predictions that the temperature was fitted on"),
    )

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """The examples before scaling, sharper as they come; the temperature; the bootstrap of both stages."""
        decision_loss(subject)
        measured, fitted, words = _split(subject, draw)
        run = _Run(self, (*subject.notes, *words))
        yield from run.gather(measured, 0.4)
        yield from run.fit(fitted, 0.7)
        yield from run.resample(draw)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """ECE with what chance alone would show, nll, and both after scaling with the temperature."""
        found: dict[str, Value] = {}
        for stage, ending in (("before", ""), ("after", "_after")):
            for name in ("ece", "nll"):
                found[name + ending] = float(data[name].sel(stage=stage))
                found[f"{name}{ending}_error"] = float(data[f"{name}_error"].sel(stage=stage))
        found["ece_floor"] = float(data.ece_floor[0])
        found |= {n: float(data[n][0]) for n in ("accuracy", "accuracy_error", "brier", "brier_error")}
        found |= {"temperature": float(data.temperature), "temperature_error": float(data.temperature_error)}
        return found | {"predictions": int(data.predictions)}

    def figure(self, data: xr.Dataset) -> Figure:
        """The reliability diagram with exact intervals, ECE against the number of bins, and all measures."""
        value, low, high = (float(data[n]) for n in ("temperature", "temperature_low", "temperature_high"))
        note = f"temperature {value:.3g} (95 %: {low:.3g} to {high:.3g})" if math.isfinite(value) else ""
        return Figure((_diagram(data), _sweep(data), _table(data)), note=note, columns=1)

    def estimate(self, subject: Subject) -> Cost:
        """The logits of both sets, and what is kept of each to weigh it anew."""
        rows, classes = shape_of(subject)
        held = subject.held_out
        others, classes_held = shape_of(held) if held is not None else (0, 0)
        bytes_ = 80 * rows * (classes + 40) + 16 * others * classes_held
        passes = 1 + (held is not None)
        return Cost(bytes_ + subject.memory(), passes, f"{passes} passes over the examples, and all logits on the host")


def _split(subject: Subject, draw: Draw) -> tuple[Subject, Subject, tuple[str, ...]]:
    """What is measured, what the temperature is fitted on, and words about it: never the same examples."""
    if subject.held_out is not None:
        words = f"the temperature is fitted on the {subject.held_out.examples} held-out examples"
        return subject, subject.held_out, (words,)
    if subject.examples < 2:
        raise ValueError("one example cannot be split into one to fit a temperature on and one to measure: give more.")
    order = draw.generator(0).permutation(subject.examples)
    half = subject.examples // 2
    words = (
        f"no held-out examples: the temperature is fitted on a random half of the examples ({half}), and every measure "
        f"is of the other {subject.examples - half}; give held_out= to measure on all"
    )
    return subject.selected(order[half:].tolist()), subject.selected(order[:half].tolist()), (words,)


@dataclass
class _Run:
    """What one stream knows so far."""

    probe: Calibration
    notes: tuple[str, ...]
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    stages: list[Predictions] = field(default_factory=list[Predictions])

    def gather(self, subject: Subject, until: float) -> Iterator[Reading]:
        """Read the predictions; what is known is measured whenever twice as many have come."""
        parts: list[Decisions] = []
        last, seen, examples = 0, 0, 0
        for part in decisions(subject):
            parts.append(part)
            seen += len(part.labels)
            examples = int(part.examples[-1]) + 1 if len(part.labels) else examples
            if seen >= 2 * last and seen:
                self.measure([self.predictions(_joined(parts))])
                last = seen
            yield self.report(until * min(examples / subject.examples, 1.0))
        if not seen:
            raise ValueError("every target is ignored by the loss, so there is nothing to measure; give other targets.")
        self.decided = _joined(parts)
        if last < seen:
            self.measure([self.predictions(self.decided)])

    def fit(self, subject: Subject, until: float) -> Iterator[Reading]:
        """Find the temperature, and measure again with it."""
        parts: list[Decisions] = []
        for part in decisions(subject):
            parts.append(part)
            yield self.report(
                0.4 + (until - 0.4) * 0.9 * min(1.0, (int(part.examples.max(initial=0)) + 1) / subject.examples)
            )
        other = _joined(parts)
        if not len(other.labels):
            raise ValueError("every target of the held-out examples is ignored, so no temperature can be fitted.")
        found = fit_temperature(other.logits, other.labels, other.examples)
        self.values |= _temperature(found) | {"fitted_on": len(other.labels)}
        self.notes = (*self.notes, *_words(found))
        scaled = Decisions(self.decided.logits / found.value, self.decided.labels, self.decided.examples)
        self.measure([self.stages[0], self.predictions(scaled)])
        yield self.report(until)

    def resample(self, draw: Draw) -> Iterator[Reading]:
        """Bootstrap over examples; both stages see the same samples."""
        _, owners = np.unique(self.decided.examples, return_inverse=True)
        count, every = int(owners.max()) + 1, max(self.probe.resamples // 10, 1)
        samples: list[list[dict[str, float]]] = [[], []]
        sweeps: list[list[np.ndarray]] = [[], []]
        for k in range(self.probe.resamples if count > 1 else 0):
            weights = resampled(count, draw.generator(1, k))[owners]
            for i, stage in enumerate(self.stages):
                samples[i].append(stage.measure(weights))
                sweeps[i].append(np.stack(stage.sweep_over(weights)))
            if k > 1 and k % every == 0:
                self.errors(samples, sweeps)
                yield self.report(0.7 + 0.29 * k / self.probe.resamples)
        self.errors(samples, sweeps)
        yield self.report(1.0, last=True)

    def predictions(self, found: Decisions) -> Predictions:
        """The decisions with this probe's settings."""
        return Predictions(found.logits, found.labels, self.probe.bins, SWEEP, self.probe.kernel_width)

    def measure(self, stages: list[Predictions]) -> None:
        """Every number of each stage, without errors."""
        self.stages = stages
        found = [_numbers(stage) for stage in stages]
        found += [{name: np.full_like(v, np.nan) for name, v in found[0].items()}] * (2 - len(found))
        self.values |= {name: np.stack([f[name] for f in found]) for name in found[0]}
        self.values["predictions"] = len(stages[0].labels)

    def errors(self, samples: list[list[dict[str, float]]], sweeps: list[list[np.ndarray]]) -> None:
        """Standard errors from the bootstrap samples so far."""
        spreads = [spread_of(s) for s in samples]
        self.values |= {f"{name}_error": [s[name] for s in spreads] for name in MEASURES}
        if len(sweeps[0]) > 1:
            both = np.std(np.array(sweeps), axis=1, ddof=1)
            self.values |= {"ece_by_bins_error": both[:, 0], "mass_by_bins_error": both[:, 1]}

    def report(self, done: float, last: bool = False) -> Reading:
        """The reading of now."""
        centres = (np.arange(self.probe.bins) + 0.5) / self.probe.bins
        coords = {"stage": np.array(STAGES), "bin": centres, "bin_count": np.array(SWEEP)}
        lonely = self.stages[0].lonely() if last else 0
        said = f"{lonely} bins hold one prediction, and are left out of rms_squared_debiased"
        notes = (*self.notes, said) if lonely else self.notes
        return self.probe.reading(done, self.values, coords=coords, converged=last, notes=notes)


def _joined(parts: list[Decisions]) -> Decisions:
    labels, examples = np.concatenate([p.labels for p in parts]), np.concatenate([p.examples for p in parts])
    return Decisions(np.concatenate([p.logits for p in parts]), labels, examples)


def _numbers(stage: Predictions) -> dict[str, np.ndarray]:
    """One stage's variables without their errors."""
    diagram, (width, mass) = stage.reliability(), stage.sweep_over()
    return {
        **{name: np.asarray(value) for name, value in stage.measure().items()},
        "ece_floor": np.asarray(stage.floor(stage.bins)),
        "ece_by_bins": width,
        "mass_by_bins": mass,
        "floor_by_bins": np.array([stage.floor(bins) for bins in SWEEP]),
        "bin_size": diagram.counts,
        "bin_confidence": diagram.confidence,
        "bin_accuracy": diagram.accuracy,
        "bin_accuracy_error": (diagram.high - diagram.low) / 2,
        "bin_accuracy_low": diagram.low,
        "bin_accuracy_high": diagram.high,
    }


def _temperature(found: Temperature) -> dict[str, Any]:
    return {
        "temperature": found.value,
        "temperature_error": found.error,
        "temperature_low": found.low,
        "temperature_high": found.high,
        "temperature_at_bound": found.at_bound,
    }


def _words(found: Temperature) -> tuple[str, ...]:
    if not found.at_bound:
        return ()
    why = "say nothing about their labels" if found.value > 1 else "are right everywhere"
    return (f"the held-out logits {why}: the best temperature lies beyond {found.value:.3g}, where the search ends",)


def _diagram(data: xr.Dataset) -> Panel:
    marks: list[Any] = [Line([0, 1], [0, 1], label="calibrated", role="reference")]
    roles: dict[str, Role] = {"before": "main", "after": "second"}
    for stage, role in roles.items():
        one = data.sel(stage=stage)
        q = one.bin_confidence.values
        low, high = one.bin_accuracy_low.values, one.bin_accuracy_high.values
        if stage == "before":  # one interval a bin is enough to see how sure the diagram is
            ends = np.stack([low, high, np.full_like(low, np.nan)], 1).ravel()
            marks.append(Line(np.repeat(q, 3), ends, label="95 % interval", role="uncertainty"))
        marks.append(Points(q, one.bin_accuracy.values, label=f"{stage} scaling", role=role))
    return Panel(tuple(marks), Axis("confidence", limits=(0, 1)), Axis("accuracy", limits=(0, 1)), square=True)


def _sweep(data: xr.Dataset) -> Panel:
    counts, before = data.bin_count.values.astype(float), data.sel(stage="before")
    marks = (
        Points(counts, before.ece_by_bins.values, before.ece_by_bins_error.values, label="equal width"),
        Points(counts * 1.06, before.mass_by_bins.values, before.mass_by_bins_error.values, "equal mass", "second"),
        Line(counts, before.floor_by_bins.values, label="if calibrated", role="reference"),
        Line(counts, data.ece_by_bins.sel(stage="after").values, label="equal width, after scaling", role="third"),
    )
    return Panel(marks, Axis("bins", "log"), Axis("expected calibration error"))


def _table(data: xr.Dataset) -> Panel:
    names = ("ece", "ece_equal_mass", "ece_classwise", "ece_top_label", "ece_max", "rms", "ks")
    labels = ("ECE", "equal mass", "classwise", "top label", "maximum", "RMS", "KS")
    at = np.arange(len(names), dtype=float)
    (before, error), (after, error_after) = (
        [[float(data[n + e].sel(stage=s)) for n in names] for e in ("", "_error")] for s in STAGES
    )
    marks = (
        Bars(at, before, error, label="before scaling", names=labels),
        Points(at, after, error_after, label="after scaling", role="second"),
    )
    return Panel(marks, Axis(""), Axis("calibration error"))
