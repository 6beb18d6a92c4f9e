"""The edge of stability: sharpness along training beside the value at which the optimizer in use becomes unstable."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from workbench.dynamics.checkpoints import Every, cost_at_each, every_so_many, readings_at
from workbench.figure import AnyMark, Axis, Band, Figure, Line, Panel, Points, Rule, fitting, step_axis
from workbench.landscape.grid import levels
from workbench.numerics.crossings import Crossing, known, sustained
from workbench.numerics.sampling import Draw
from workbench.operators.preconditioned import preconditioner
from workbench.probe import Cost, Look, Probe, Reading, Value, Variable
from workbench.probes.spectrum import HessianSpectrum
from workbench.schema import Doc, Range
from workbench.trajectory import Trajectory

Floats = NDArray[np.float64]
CONFIRM = 2
"""Checkpoints after a crossing that must hold it."""
SLACK = 0.1
"""How far below 1 the ratio may fall at these."""
_CURVES = (
    "stability_threshold", "stability_ratio", "stability_ratio_error", "train_loss", "train_loss_error",
    "checkpoint_products",
)  # fmt: skip
_NUMBERS = ("step_crossing", "sharpening_rate", "ratio_late")


@dataclass(frozen=True)
class EdgeOfStability(Probe[Trajectory]):
    """Sharpness at the checkpoints of a training, over the value at which its optimizer stops being stable.

    What it measures: the ``top`` largest eigenvalues λ_1 >= λ_2 >= ... of the training loss's Hessian at each
    checkpoint, as HessianSpectrum finds them, and ``stability_ratio`` = λ_1 / ``stability_threshold``. The threshold is
    that of the recorded optimizer with the settings it had at that step, so that a schedule moves it: 2/η for gradient
    descent, 2 (1 + β)/η for heavy ball, 2 (1 + β)/((1 + 2β) η) for Nesterov's momentum as PyTorch has it. With
    ``preconditioned``, λ_1 is that of η P⁻¹H and the threshold the update's constant, 2 (1 + β1)/(1 - β1) for Adam.
    ``step_crossing`` is the first checkpoint with a ratio of 1 or more whose next two have 0.9 or more;
    ``sharpening_rate`` the slope of λ_1 over the steps before it (progressive sharpening), by least squares;
    ``ratio_late`` the mean ratio of the last ``late`` checkpoints; ``loss_rises`` the share of pairs of neighbours,
    from the crossing on (all, where nothing crossed), between which the loss rose.

    How to read it: full-batch gradient descent sharpens until the ratio reaches 1 and stays there (``ratio_late`` from
    1.0 to some 1.1) while the loss still falls, though not at every step. A ratio that never reaches 1 is a run whose
    step is small for this problem: ``step_crossing`` is nan.

    What it costs: 8 to 15 products with the Hessian at each checkpoint, each 2 to 5 gradients of all examples.

    When it misleads: the Hessian must be that of the loss that was descended, with its factor (½, 1/C), its examples
    and its BatchNorm mode; a factor of two is a false edge. Under mini-batches λ_1 alone does not show an edge: what
    then settles is curvature along the batch's own gradient (see BatchCurvature). Adam's H without its preconditioner
    says nothing, so that its threshold is unknown then. Weight decay belongs to the update, but not to this H. A
    crossing between checkpoints that fell back in time is not seen.

    Errors: an eigenvalue lies within ``residual`` of each; ``step_crossing_error`` is how much earlier the crossing may
    have been since the checkpoint before; ``sharpening_rate_error`` a standard error with the residuals' share;
    ``ratio_late_error`` the standard deviation over these checkpoints with their mean error. nan where a checkpoint
    could not be measured, as before an adaptive optimizer's first step; the notes say why.

    Source: Cohen et al. 2021 (arXiv:2103.00065), 2022 (arXiv:2207.14484).
    """

    looks_at: ClassVar[Look] = "trajectory"
    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("eigenvalue", ("step", "rank"), "eigenvalue", error="residual"),
        Variable("residual", ("step", "rank"), "residual ‖Hv - λv‖"),
        Variable("stability_threshold", ("step",), "eigenvalue at which the optimizer becomes unstable on a quadratic"),
        Variable("stability_ratio", ("step",), "sharpness over that threshold", error="stability_ratio_error"),
        Variable("stability_ratio_error", ("step",), "residual over that threshold"),
        Variable("train_loss", ("step",), "loss at the checkpoint", error="train_loss_error"),
        Variable("train_loss_error", ("step",), "standard error of the loss over examples"),
        Variable("checkpoint_products", ("step",), "products with the matrix"),
        Variable("checkpoint_converged", ("step",), "whether all eigenvalues converged there", kind="bool"),
        Variable("step_crossing", (), "first step of a sustained crossing", "steps", "step_crossing_error"),
        Variable("step_crossing_error", (), "steps since the checkpoint before", "steps"),
        Variable("sharpening_rate", (), "slope of the sharpness before that", "1/steps", "sharpening_rate_error"),
        Variable("sharpening_rate_error", (), "standard error of the slope", "1/steps"),
        Variable("ratio_late", (), "mean ratio of the last checkpoints", error="ratio_late_error"),
        Variable("ratio_late_error", (), "standard deviation over these checkpoints, with their mean error"),
        Variable("loss_rises", (), "share of neighbouring checkpoints between which the loss rose"),
    )

    top: Annotated[int, Range(1, 3, step=1), Doc("How many of the largest eigenvalues.")] = 1
    preconditioned: Annotated[
        bool, Doc("Whether to look through the optimizer's preconditioner and learning rate: for Adam and its kind.")
    ] = False
    threshold: Annotated[
        float | None,
        Range(1e-12, 1e12, log=True),
        Doc("Eigenvalue at which training becomes unstable; nothing: by the recorded optimizer."),
    ] = None
    tolerance: Annotated[
        float, Range(1e-6, 0.5, log=True, soft=(1e-4, 0.2)), Doc("Residual over eigenvalue that counts as converged.")
    ] = 0.01
    every: Every = 1
    late: Annotated[int, Range(1, 10_000, soft=(2, 50)), Doc("Checkpoints at the end that ratio_late averages.")] = 10

    @property
    def spectrum(self) -> HessianSpectrum:
        """The probe that is run at each checkpoint."""
        return HessianSpectrum(
            preconditioned=self.preconditioned, top=self.top, tolerance=self.tolerance, minimum=False, trace=False,
            density=False, bracket=False,
        )  # fmt: skip

    def stream(self, subject: Trajectory, draw: Draw) -> Iterator[Reading]:
        """Checkpoint after checkpoint, ends and middle first, so that the shape of the curve is there early."""
        steps = every_so_many(subject.steps, self.every)
        if self.preconditioned:
            # What was not recorded is said before work starts; at step 0 an adaptive optimizer has no state yet.
            preconditioner(subject.subject(steps[min(1, len(steps) - 1)]))
        found = _Found(self, steps)
        order = dict.fromkeys(int(place) for level in levels(len(steps)) for place in level)
        for seen, place in enumerate(order):
            try:
                for reading in readings_at(self.spectrum, subject, steps[place], draw.seed):
                    found.put(place, reading)
                    yield found.reading(min((seen + reading.done) / len(steps), 0.999))
            except (ValueError, ArithmeticError) as problem:
                found.skip(place, problem)
                yield found.reading((seen + 0.9) / len(steps))
        yield found.reading(1.0)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """Crossing, sharpening and late ratio with their errors, the share of rises, and the largest ratio."""
        made: dict[str, Value] = {}
        for name in _NUMBERS:
            made |= {name: float(data[name]), f"{name}_error": float(data[f"{name}_error"])}
        ratios = data.stability_ratio.values
        largest = float(np.nanmax(ratios)) if np.isfinite(ratios).any() else math.nan
        return made | {"ratio_largest": largest, "loss_rises": float(data.loss_rises)}

    def figure(self, data: xr.Dataset) -> Figure:
        """Eigenvalues over steps with the threshold, and the loss below them."""
        x, threshold = step_axis(), data.stability_threshold.values
        marks = _eigenvalues(data)
        if np.isfinite(threshold).any():
            marks.append(Line(*known(data["step"].values, threshold), "stability threshold", "reference"))
        crossing = float(data.step_crossing)
        rules: tuple[AnyMark, ...] = (Rule(crossing, "x", "crosses"),) if math.isfinite(crossing) else ()
        first = Panel((*marks, *rules), x, Axis("eigenvalue"))
        at, losses = known(data["step"].values, data.train_loss.values)
        second = Panel((Line(at, losses), Points(at, losses)), x, fitting("loss", "log", losses))
        return Figure((first, second), title=_title(data))

    def estimate(self, subject: Trajectory) -> Cost:
        """The spectrum's cost at the first checkpoint (the last may have diverged), for each checkpoint in turn."""
        return cost_at_each(self.spectrum, subject, self.every)


def crossing_of(steps: Any, ratios: Any) -> Crossing:
    """The first evaluation with a ratio of 1 or more whose next two have 0.9 or more."""
    return sustained(steps, ratios, 1.0, SLACK, CONFIRM)


def at_the_edge(steps: Any, ratios: Any, errors: Any, losses: Any, late: int) -> dict[str, float]:
    """``step_crossing``, ``ratio_late`` with their errors, and ``loss_rises``, as the probe defines them.

    Args:
        steps: of the evaluations, ascending, (n,).
        ratios: sharpness over the stability threshold, (n,); nan where it was not measured.
        errors: of these, (n,).
        losses: at these steps, (n,); see :func:`rises` for losses at others.
        late: evaluations at the end that ``ratio_late`` averages.
    """
    crossing, seen = crossing_of(steps, ratios), np.asarray(ratios, dtype=np.float64)
    last = np.flatnonzero(np.isfinite(seen))[-late:]
    made = {"step_crossing": crossing.step, "step_crossing_error": crossing.error}
    made |= {"ratio_late": math.nan, "ratio_late_error": math.nan}
    if last.size:
        made["ratio_late"] = float(seen[last].mean())
        off = float(np.nan_to_num(np.asarray(errors, dtype=np.float64)[last]).mean())
        made["ratio_late_error"] = math.hypot(float(seen[last].std()), off)
    return made | {"loss_rises": rises(steps, losses, crossing.step)}


def rises(steps: Any, losses: Any, since: float = math.nan) -> float:
    """Share of neighbouring losses (n,) of which the later is the larger, from a step on; all of them without one."""
    at, seen = known(steps, losses)
    after = seen[at >= since] if math.isfinite(since) else seen
    return float((after[1:] > after[:-1]).mean()) if after.size > 1 else math.nan


def sharpening(steps: Any, values: Any, errors: Any) -> tuple[float, float]:
    """Slope of a line through values (n,) over steps (n,) by least squares, and its error; nan under two of them.

    The error joins the standard error of the scatter (from three points on) with what errors of the values make.
    """
    at, seen, reach = (np.asarray(v, dtype=np.float64) for v in (steps, values, errors))
    there = np.isfinite(seen)
    at, seen, reach = at[there], seen[there], np.nan_to_num(reach[there])
    if len(at) < 2:
        return math.nan, math.nan
    centred = at - at.mean()
    spread = float(centred @ centred)
    slope = float(centred @ seen) / spread
    rest = seen - seen.mean() - slope * centred
    scatter = float(rest @ rest) / (len(at) - 2) / spread if len(at) > 2 else 0.0
    return slope, math.sqrt(scatter + float((centred * reach) @ (centred * reach)) / spread**2)


class _Found:
    """The curves while they are read, nan where nothing is known yet."""

    def __init__(self, probe: EdgeOfStability, steps: tuple[int, ...]) -> None:
        self.probe, self.steps = probe, np.array(steps)
        self.curves = {name: np.full(len(steps), np.nan) for name in _CURVES}
        self.curves |= {name: np.full((len(steps), probe.top), np.nan) for name in ("eigenvalue", "residual")}
        self.converged = np.zeros(len(steps), dtype=bool)
        self.notes: dict[str, None] = {}

    def put(self, place: int, reading: Reading) -> None:
        """What the spectrum says of one checkpoint."""
        data, curves = reading.data, self.curves
        for name in ("eigenvalue", "residual"):
            values = data[name].values[: self.probe.top]
            curves[name][place, : len(values)] = values
        limit = float(data.stability_threshold) if self.probe.threshold is None else self.probe.threshold
        curves["stability_threshold"][place] = limit
        curves["stability_ratio"][place] = curves["eigenvalue"][place, 0] / limit
        curves["stability_ratio_error"][place] = curves["residual"][place, 0] / limit
        for name in ("train_loss", "train_loss_error"):
            curves[name][place] = float(data[name])
        curves["checkpoint_products"][place] = float(data.products)
        self.converged[place] = reading.converged
        rule = " is stable on a quadratic while eigenvalues "
        self.notes |= dict.fromkeys(n for n in reading.notes if rule not in n or self.probe.threshold is None)

    def skip(self, place: int, problem: Exception) -> None:
        """Leave a checkpoint unknown, and say why."""
        for held in self.curves.values():
            held[place] = np.nan
        self.converged[place] = False
        self.notes[f"step {self.steps[place]} could not be measured: {problem}"] = None

    def numbers(self) -> dict[str, float]:
        """What the curves so far say in all."""
        curves, ratios = self.curves, self.curves["stability_ratio"]
        errors, losses = curves["stability_ratio_error"], curves["train_loss"]
        edge = at_the_edge(self.steps, ratios, errors, losses, self.probe.late)
        crossed = edge["step_crossing"]
        before = self.steps < (crossed if math.isfinite(crossed) else math.inf)
        rate = sharpening(self.steps[before], curves["eigenvalue"][before, 0], curves["residual"][before, 0])
        return edge | dict(zip(("sharpening_rate", "sharpening_rate_error"), rate, strict=True))

    def reading(self, done: float) -> Reading:
        """The reading of now."""
        values: dict[str, Any] = {name: held.copy() for name, held in self.curves.items()}
        values |= self.numbers() | {"checkpoint_converged": self.converged.copy()}
        coords = {"step": self.steps, "rank": np.arange(1, self.probe.top + 1)}
        over = done == 1
        return self.probe.reading(
            done, values, coords=coords, converged=bool(over and self.converged.all()), notes=self._notes(over)
        )

    def _notes(self, over: bool) -> tuple[str, ...]:
        said = list(self.notes)
        if np.isnan(self.curves["stability_threshold"]).all():
            said.append(
                "no threshold is known: the record names no optimizer, or an adaptive one, which wants preconditioned"
            )
        elif over:
            found = crossing_of(self.steps, self.curves["stability_ratio"])
            if math.isfinite(found.step) and found.confirmed < CONFIRM:
                said.append(f"the run ends {found.confirmed} checkpoints after the crossing, which confirm it")
        return tuple(said)


def _eigenvalues(data: xr.Dataset) -> list[AnyMark]:
    """The first eigenvalue with its band and what has not converged, the others as thin lines."""
    there = np.isfinite(data.eigenvalue.values[:, 0])
    steps, values = data["step"].values[there], data.eigenvalue.values[there]
    first, error = values[:, 0], data.residual.values[there, 0]
    rough = ~data.checkpoint_converged.values[there]
    marks: list[AnyMark] = [Band(steps, first - error, first + error), Line(steps, first, "sharpness")]
    marks += [Line(steps, values[:, k], f"λ{k + 1}", "second") for k in range(1, values.shape[1])]
    if rough.any():
        marks.append(Points(steps[rough], first[rough], label="not converged", role="unconverged"))
    return marks


def _title(data: xr.Dataset) -> str:
    late, step = float(data.ratio_late), float(data.step_crossing)
    if not math.isfinite(late):
        return "sharpness along training; no stability threshold"
    where = f"crosses at step {step:g}" if math.isfinite(step) else "never crosses"
    return f"sharpness over its limit: {late:.3g} ± {float(data.ratio_late_error):.2g} at the end; {where}"
