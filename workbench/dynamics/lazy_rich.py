"""Lazy or rich, along a training: kernel, alignment, displacement, linearisation and features on one time axis."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from workbench.dynamics.checkpoints import Every, every_so_many, last_of
from workbench.figure import ROLES, AnyMark, Axis, Band, Figure, Line, Panel, Points, Rule, step_axis
from workbench.numerics.crossings import Crossing, sustained
from workbench.numerics.kernel_pairs import (
    Estimate,
    blank_alignment,
    kernel_distances,
    one_less_cosine,
    target_kernel,
)
from workbench.numerics.sampling import Draw
from workbench.operators.tangent_examples import picked, targets
from workbench.operators.tangent_kernel import TangentKernel as Kernel
from workbench.operators.tangent_kernel import at_once
from workbench.operators.tangent_named import OUTPUTS, Outputs, blocks, named, naming, rounding
from workbench.probe import Cost, Look, Probe, Reading, Value, Variable
from workbench.probes.displacement import Displacement
from workbench.probes.linearised_gap import LinearisedGap
from workbench.probes.representation_alignment import RepresentationAlignment
from workbench.schema import Choice, Doc, Range
from workbench.several import Pair
from workbench.subject import Subject
from workbench.trajectory import Trajectory

Floats = NDArray[np.float64]
SLACK = 0.1
"""How far below the threshold a reading that confirms may lie, as a share of it."""
CONFIRM = 2
"""Readings after the crossing that must hold it."""
WIDE = 1.96
"""Standard errors on each side of an interval."""
_ESTIMATED = {
    "kernel_distance": "1 - cosine of the kernel and that at the start",
    "centred_kernel_distance": "the same of centred kernels",
    "kernel_change": "‖Θ - Θ₀‖ / ‖Θ₀‖",
    "kernel_growth": "‖Θ‖ / ‖Θ₀‖",
    "velocity": "1 - cosine of the kernel and that before, a step",
    "alignment": "alignment of the kernel with the targets, centred",
    "gap": "squared distance from the linearisation over that moved",
    "loss_gap": "loss of the linearisation less the network's",
    "train_loss": "loss on these examples",
}
_FEATURES = {
    "feature_alignment": "cosine of the feature kernel and that at the start",
    "centred_feature_alignment": "the same of centred features",
}
_MOVED = {
    "displacement": ("total_displacement", "‖θ - θ₀‖"),
    "relative_displacement": ("total_relative", "‖θ - θ₀‖ / ‖θ₀‖"),
    "angle": ("total_angle", "angle between θ and θ₀"),
}
_LEFT = {
    "left": "first step at which the network has left the lazy regime",
    "left_low": "lower end of its interval",
    "left_high": "upper end of its interval, nan where it is open",
}


def _along() -> Iterator[Variable]:
    for words, dims in ((_ESTIMATED, ("step",)), (_FEATURES, ("step", "layer"))):
        for name, long_name in words.items():
            units = "1/step" if name == "velocity" else ""
            yield Variable(name, dims, long_name, units, f"{name}_error")
            yield Variable(f"{name}_error", dims, f"standard error over examples: {long_name}", units)


@dataclass(frozen=True)
class LazyRich(Probe[Trajectory]):
    """Lazy or rich: what kernel, weights and features of a network do along a training, and when it was lazy no more.

    What it measures, at recorded steps t against the first one, on a few fixed examples: ``kernel_distance`` S = 1 -
    cosine of the tangent kernels Θ_t and Θ_0 (not centred), ``centred_kernel_distance``, ``kernel_change`` = ‖Θ_t -
    Θ_0‖ / ‖Θ_0‖, ``kernel_growth`` = ‖Θ_t‖ / ‖Θ_0‖; ``velocity`` = S(Θ_s, Θ_t) / (t - s), s the step read before;
    ``alignment`` of Θ_t with the targets, centred, beside ``identity``, that of K = I; ``relative_displacement`` =
    ‖θ_t - θ_0‖ / ‖θ_0‖ and ``angle`` without norm scales; ``gap`` = Σ ‖f - f_lin‖² / Σ ‖f - f_0‖² of the linearisation
    at θ_0, and ``loss_gap``; by layer ``feature_alignment``, the cosine of feature kernels h hᵀ at t and 0.

    ``left`` is the first step read at which S >= ``threshold`` and at the next two stays above 0.9 of it; nan
    when it never does, and nothing is then said but that it did not by the last step.

    How to read it: lazy, while S, gap and displacement are small, alignment stays and the loss falls all the same;
    rich, when the kernel turns (S of some tenths), towards the targets (alignment rises). A fall of the loss before
    ``left`` was the initial kernel's doing; a later one, of test loss above all, that of features. Velocity is mostly
    large early and dies out.

    What it costs: at each step the kernel of ``examples`` (C backward passes and a Gram), two Jacobian-vector products
    and some six forward passes; three kernels and two models in memory.

    When it misleads: the threshold is a convention, and S at it depends on the number of examples; compare equal ones.
    S sees nothing of a kernel that only grows: see ``kernel_growth``. Few recorded steps make wide intervals: record on
    a logarithmic schedule. The start is the first recorded step, which is the initialisation only if that is step 0.

    Errors: standard errors over examples, by the jackknife. ``left_low`` to ``left_high``: from just after the reading
    before S + 1.96 errors crosses to where S - 1.96 errors does; ``left_error`` is the larger distance to them, nan
    while the upper end is open.

    Source: Fort et al. 2020; Chizat, Oyallon and Bach 2019; Baratin et al. 2021; Liu et al. 2023.
    """

    examples: Annotated[
        int, Range(4, 5000, step=1, log=True, soft=(16, 256)), Doc("Examples, of each class equally many.")
    ] = 64
    outputs: Annotated[Outputs, Choice(OUTPUTS), Doc("Which kernel.")] = "trace"
    threshold: Annotated[
        float, Range(1e-6, 1.0, log=True, soft=(0.01, 0.5)), Doc("Kernel distance S at which it is no longer lazy.")
    ] = 0.1
    every: Every = 1

    looks_at: ClassVar[Look] = "trajectory"
    variables: ClassVar[tuple[Variable, ...]] = (
        *_along(),
        *(Variable(name, ("step",), words, "rad" if name == "angle" else "") for name, (_, words) in _MOVED.items()),
        Variable("identity", (), "centred alignment of the identity"),
        Variable("left", (), _LEFT["left"], "steps", "left_error"),
        Variable("left_error", (), "the larger distance to the ends of its interval", "steps"),
        Variable("left_low", (), _LEFT["left_low"], "steps"),
        Variable("left_high", (), _LEFT["left_high"], "steps"),
        Variable("used_examples", (), "examples that are looked at"),
    )

    def stream(self, subject: Trajectory, draw: Draw) -> Iterator[Reading]:
        """Step after step, in time.

        Raises:
            ValueError: fewer than two recorded steps.
        """
        if len(subject.steps) < 2:
            raise ValueError(f"{subject.label} holds one checkpoint, and leaving takes two; record more steps.")
        run = _Run(self, subject, draw)
        for place in range(len(run.steps)):
            yield from run.read(place)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """When it left, and where it ended."""
        found: dict[str, Value] = {n: float(data[n]) for n in ("left", "left_error", "left_low", "left_high")}
        for name in ("kernel_distance", "alignment", "gap", "relative_displacement"):
            known = np.flatnonzero(np.isfinite(data[name].values))
            for end in ("", "_error"):
                if known.size and f"{name}{end}" in data:
                    found[f"{name}{end}"] = float(data[f"{name}{end}"].values[known[-1]])
        return found

    def figure(self, data: xr.Dataset) -> Figure:
        """Distances with threshold and interval, alignment, gap, features and loss over one logarithmic axis."""
        marks = [*_lines(data, "kernel_distance", "kernel"), *_lines(data, "centred_kernel_distance", "centred", 1)]
        marks += [Line(data["step"].values, data.relative_displacement.values, "‖θ - θ₀‖ / ‖θ₀‖", "third")]
        marks += [Rule(self.threshold, "y", "threshold")]
        marks += [Rule(float(data[n]), "x", n.replace("_", " ")) for n in _LEFT if np.isfinite(float(data[n]))]
        identity = [Rule(float(data.identity), "y", "identity")] if np.isfinite(float(data.identity)) else []
        features: list[AnyMark] = []
        for i, role in zip(range(data.sizes["layer"]), ROLES, strict=False):
            values = data.feature_alignment.isel(layer=i).values
            features.append(Line(data["step"].values, values, str(data["layer"].values[i]), role))
        panels = (
            (marks, "distance from the start"),
            ([*_lines(data, "alignment"), *identity], "alignment with targets"),
            (_lines(data, "gap"), "‖f - f_lin‖² / ‖f - f₀‖²"),
            (features, "feature alignment"),
            (_lines(data, "velocity"), "S per step"),
            (_lines(data, "train_loss"), "train loss"),
        )
        return Figure(tuple(Panel(tuple(m), step_axis(), Axis(words)) for m, words in panels))

    def estimate(self, subject: Trajectory) -> Cost:
        """Three kernels in float64, what one keeps of layers, and what gap and features take."""
        one = picked(subject.subject(subject.steps[0]), self.examples)
        kernel, pair = Kernel(one), Pair(one, one)
        side = kernel.examples * (1 if self.outputs == "trace" else kernel.outputs)
        parts = [probe.estimate(pair).bytes for probe in (_gap(), _features())]
        count = len(every_so_many(subject.steps, self.every))
        words = f"the {self.outputs} kernel of {kernel.examples} examples, {side} x {side}, at {count} checkpoints"
        most = max(kernel.expected_bytes(self.outputs), *parts) + 10 * 8 * side**2
        return Cost(most, count * (kernel.outputs + 8), words)


def _gap() -> LinearisedGap:
    return LinearisedGap(points=2)


def _features() -> RepresentationAlignment:
    return RepresentationAlignment(shuffles=0)


def _lines(data: xr.Dataset, name: str, label: str = "", role: int = 0) -> list[AnyMark]:
    """A curve with its band and points."""
    x, y, error = data["step"].values, data[name].values, np.nan_to_num(data[f"{name}_error"].values)
    band = Band(x, y - error, y + error)
    return [band, Line(x, y, label, ROLES[role]), Points(x, y, role=ROLES[role])]


class _Run:
    """The curves so far; nan where nothing is known yet."""

    def __init__(self, probe: LazyRich, subject: Trajectory, draw: Draw) -> None:
        self.probe, self.subject, self.draw = probe, subject, draw
        self.steps = every_so_many(subject.steps, probe.every)
        self.start = self.opened(self.steps[0])
        self.kernel = Kernel(self.start)
        self.targets = targets(self.start, self.kernel.outputs)
        gap, first = self.kernel.check(), last_of(_features(), Pair(self.start, self.start), draw)
        self.layers: list[str] = [str(layer) for layer in first["layer"].values]
        self.values: dict[str, Any] = {v.name: self.empty(v) for v in probe.variables}
        self.values["used_examples"] = self.start.examples
        if self.targets is not None:
            self.values["identity"] = blank_alignment(self.targets, probe.outputs == "trace")[0]
        self.first, self.before, self.at = torch.empty(0), torch.empty(0), self.steps[0]
        self.whole = True
        self.notes: dict[str, None] = dict.fromkeys(
            (
                *self.start.notes,
                self.start.on,
                f"products on a few examples differ from the kernel by {gap:.0e}",
                *([] if self.steps[0] == 0 else [f"the start is step {self.steps[0]}, the first that was recorded"]),
                *([] if self.targets is not None else ["the targets are not of the outputs' shape: no alignment"]),
            )
        )

    def empty(self, variable: Variable) -> Any:
        """Room for a variable, all unknown."""
        sizes = {"step": len(self.steps), "layer": len(self.layers)}
        return np.full([sizes[d] for d in variable.dims], np.nan)

    def opened(self, step: int) -> Subject:
        """A step on the examples that are looked at."""
        return picked(self.subject.subject(step), self.probe.examples)

    def read(self, place: int) -> Iterator[Reading]:
        """One step; what cannot be measured stays unknown, and a note says why."""
        step, last = self.steps[place], place + 1 == len(self.steps)
        try:
            now = self.start if place == 0 else self.opened(step)
            self.kernels(place, now)
            yield self.report(place + 0.5)
            self.pairs(place, Pair(self.start, now))
        except (ValueError, ArithmeticError) as problem:
            if place == 0:
                raise
            self.notes[f"step {step} was not measured to its end: {problem}"[:300]] = None
            self.whole = False
        self.leave()
        yield self.report(place + 1, last)

    def kernels(self, place: int, now: Subject) -> None:
        """The kernel at a step, against the first, the one before, and the targets."""
        kernel = self.kernel if place == 0 else Kernel(now)
        theta, least = at_once(blocks(kernel, self.probe.outputs)), rounding(kernel)
        if place == 0:
            self.first = theta
        found = kernel_distances(self.first, theta, least)
        self.put("kernel_distance", place, found.distance)
        self.put("centred_kernel_distance", place, found.centred_distance)
        self.put("kernel_change", place, found.relative_change)
        self.put("kernel_growth", place, found.norm_ratio)
        if place:
            self.put("velocity", place, Estimate.of(self.turned(theta) / (self.steps[place] - self.at)))
        if self.targets is not None:
            aim = target_kernel(self.targets, self.probe.outputs == "trace")
            self.put("alignment", place, Estimate.of(1 - one_less_cosine(theta, aim, True, least)))
        self.before, self.at = theta, self.steps[place]

    def turned(self, theta: Tensor) -> Tensor:
        """1 - cosine with the kernel before, of all examples and without each."""
        return one_less_cosine(self.before, theta)

    def pairs(self, place: int, pair: Pair) -> None:
        """What two models at a time say: weights, linearisation, features."""
        moved = last_of(Displacement(), pair, self.draw)
        for name, (total, _) in _MOVED.items():
            self.values[name][place] = float(moved[total])
        gap = last_of(_gap(), pair, self.draw)
        for name in ("gap", "loss_gap", "train_loss"):
            self.put(name, place, Estimate(float(gap[name]), float(gap[f"{name}_error"])))
        features = last_of(_features(), pair, self.draw)
        for name in _FEATURES:
            held = name.removesuffix("feature_alignment") + "alignment"
            self.values[name][place] = features[held].values
            self.values[f"{name}_error"][place] = features[f"{held}_error"].values

    def put(self, name: str, place: int, estimate: Estimate) -> None:
        """A number and its error at a step."""
        self.values[name][place], self.values[f"{name}_error"][place] = estimate.value, estimate.error

    def leave(self) -> None:
        """When S crossed, as far as is known."""
        found = left(self.steps, self.values["kernel_distance"], self.values["kernel_distance_error"], self.probe)
        self.values |= found

    def report(self, done: float, last: bool = False) -> Reading:
        """The reading of now, which names its kernel."""
        coords = {"step": np.array(self.steps), "layer": np.array(self.layers)}
        share = 1.0 if last else min(done / len(self.steps), 1 - 1e-6)
        made = self.probe.reading(
            share, self.values, coords=coords, converged=last and self.whole, notes=tuple(self.notes)
        )
        return naming(made, named(self.kernel, self.probe.outputs))


def left(steps: tuple[int, ...], distance: Floats, error: Floats, probe: LazyRich) -> dict[str, float]:
    """The step of leaving with its interval, from S (steps,) and its standard errors.

    S that may be too small by chance crosses at the earliest where S + 1.96 errors does, and could have done so at any
    step since the reading before; S that may be too large, at the latest where S - 1.96 errors does.
    """
    # At the first step S is 0 by construction and has no error, so that it never crosses there.
    wide = WIDE * np.nan_to_num(error)
    found, early, late = (_crossing(steps, distance + sign * wide, probe) for sign in (0, 1, -1))
    if math.isnan(found.step):
        return dict.fromkeys(("left", "left_error", "left_low", "left_high"), math.nan)
    low, high = min(early.earliest, found.earliest), late.step
    return {
        "left": found.step,
        "left_low": low,
        "left_high": high,
        "left_error": max(found.step - low, high - found.step) if math.isfinite(high) else math.nan,
    }


def _crossing(steps: tuple[int, ...], values: Floats, probe: LazyRich) -> Crossing:
    return sustained(steps, values, probe.threshold, SLACK * probe.threshold, CONFIRM)
