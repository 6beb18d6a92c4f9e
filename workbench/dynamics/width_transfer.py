"""Whether training looks the same at every width: sharpness and tangent kernel over runs that differ in it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from workbench.dynamics.labels import trajectories
from workbench.figure import ROLES, AnyMark, Axis, Band, Figure, Line, Panel, Points, Rule, step_axis
from workbench.numerics.sampling import Draw
from workbench.probe import Cost, Look, Probe, Reading, Value, Variable
from workbench.probes.kernel_distance import KernelDistance
from workbench.probes.spectrum import HessianSpectrum
from workbench.schema import Choice, Doc, Range
from workbench.several import Runs
from workbench.subject import Subject
from workbench.trajectory import Trajectory

Floats = NDArray[np.float64]
_WIDTH = re.compile(r"(?:width|\bN|\bn|\bd|\bw)\s*[=:_ -]?\s*(\d+)", re.IGNORECASE)
STABLE = 2.0
"""The scaled sharpness above which gradient descent is unstable."""


@dataclass(frozen=True)
class WidthTransfer(Probe[Runs]):
    """Sharpness and tangent kernel along training across widths: does a learning rate carry over from one to another?

    What it measures, at recorded steps that all runs share: ``sharpness`` = λ_1 of η P^(-1/2) H P^(-1/2) with the
    learning rates η that the optimizer had for each parameter (P = 1 for gradient descent), or of H itself;
    ``kernel_distance`` = 1 - cosine between the tangent kernels of this step and of the first. ``gap`` of a width N to
    the widest N': max over steps of |λ^N - λ^N'| / λ^N'; ``kernel_gap`` = max over steps of |S^N - S^N'|.

    How to read it: with learning rates folded in, a factor in front of a weight and its learning rate together change
    nothing, so that parametrisations can be compared. Under maximal-update parametrisation sharpness curves of all
    widths lie on one another ("super-consistency") and so do kernel distances; under neural-tangent parametrisation
    kernel distances fall like 1/width; under PyTorch's own the scaled sharpness at the start grows with the width, and
    the best learning rate falls.

    What it costs: one eigenvalue by Lanczos at each step of each run, and with ``kernel`` the kernels of ``examples``
    examples.

    When it misleads: runs that differ in more than the width, or in the seed as well; few steps miss a peak between
    them. Momentum shrinks the bound of 2 by (1 - β)/(1 + β). Without recorded learning rates sharpness is that of H
    (a note says so), which parametrisations do change. The full-batch sharpness is looked at, whatever training used.

    Errors: residual bounds for sharpness, the jackknife over examples for kernels; of a gap, both added. A width is
    what the label says ("width 64"), else the number of parameters.

    Source: Noci et al. 2024 (arXiv 2402.17457); Yang et al. 2022 (Tensor Programs V); Cohen et al. 2021.
    """

    scaled: Annotated[
        Literal["rates", "plain"],
        Choice({"rates": "with the learning rates folded in", "plain": "of the Hessian itself"}),
        Doc("Which sharpness."),
    ] = "rates"
    moments: Annotated[int, Range(2, 200, step=1, soft=(2, 20)), Doc("Recorded steps to look at, of all shared.")] = 5
    kernel: Annotated[bool, Doc("Whether to follow the tangent kernel too.")] = True
    examples: Annotated[
        int, Range(2, 4096, step=1, log=True, soft=(8, 256)), Doc("Examples of the kernel, of each class equally many.")
    ] = 32

    looks_at: ClassVar[Look] = "runs"
    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("width", ("run",), "width, or the number of parameters"),
        Variable("sharpness", ("run", "step"), "largest eigenvalue", error="sharpness_error"),
        Variable("sharpness_error", ("run", "step"), "residual bound"),
        Variable("train_loss", ("run", "step"), "loss", error="train_loss_error"),
        Variable("train_loss_error", ("run", "step"), "standard error of the loss"),
        Variable("kernel_distance", ("run", "step"), "1 - cosine to the first kernel", error="kernel_distance_error"),
        Variable("kernel_distance_error", ("run", "step"), "its standard error"),
        Variable("gap", ("run",), "largest relative difference of sharpness to the widest", error="gap_error"),
        Variable("gap_error", ("run",), "errors of both, at that step"),
        Variable(
            "kernel_gap", ("run",), "largest difference of kernel distances to the widest", error="kernel_gap_error"
        ),
        Variable("kernel_gap_error", ("run",), "errors of both, at that step"),
        Variable("converged", ("run", "step"), "whether the eigenvalue converged", kind="bool"),
    )

    def stream(self, subject: Runs, draw: Draw) -> Iterator[Reading]:
        """Step by step, all runs at each: first and last step first."""
        run = _Run(self, trajectories(subject, self.name), draw.seed)
        total = len(run.labels) * len(run.steps)
        for seen, (place, number) in enumerate(run.order(), 1):
            run.look(number, place)
            yield run.report(seen / total)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """The largest gaps to the widest run."""
        found: dict[str, Value] = {"runs": data.sizes["run"], "widest": float(np.nanmax(data.width.values))}
        for name in ("gap", "kernel_gap"):
            values = data[name].values
            if np.isfinite(values).any():
                at = int(np.nanargmax(values))
                found |= {name: float(values[at]), f"{name}_error": float(data[f"{name}_error"].values[at])}
        return found

    def figure(self, data: xr.Dataset) -> Figure:
        """Sharpness over steps, one line a width, and kernel distances beside it."""
        words = "η λ₁" if self.scaled == "rates" else "λ₁"
        first = Panel((*_lines(data, "sharpness"), *_bound(data, self.scaled)), step_axis(), Axis(words))
        if not self.kernel:
            return Figure((first,))
        return Figure((first, Panel(_lines(data, "kernel_distance"), step_axis(), Axis("kernel distance"))))

    def estimate(self, subject: Runs) -> Cost:
        """The widest run's eigenvalue and kernel, one at a time."""
        runs = trajectories(subject, self.name)
        first = [run.pair(run.steps[0], run.steps[0]) for run in runs.values()]  # the last may have diverged
        most = max(_spectrum(False).estimate(pair.second).bytes for pair in first)
        kernels = max(self._kernel().estimate(pair).bytes for pair in first) if self.kernel else 0
        count = len(runs) * min(self.moments, *(len(run.steps) for run in runs.values()))
        return Cost(max(most, kernels), None, f"an eigenvalue{' and a kernel' if self.kernel else ''}, {count} times")

    def _kernel(self) -> KernelDistance:
        return KernelDistance(examples=self.examples, outputs="trace")


def _spectrum(preconditioned: bool) -> HessianSpectrum:
    return HessianSpectrum(top=1, minimum=False, trace=False, density=False, preconditioned=preconditioned)


class _Run:
    """What one stream knows so far."""

    def __init__(self, probe: WidthTransfer, runs: dict[str, Trajectory], seed: int) -> None:
        self.probe, self.runs, self.seed, self.labels = probe, runs, seed, list(runs)
        shared = sorted(set.intersection(*(set(run.steps) for run in runs.values())))
        if not shared:
            raise ValueError("the runs share no recorded step; record them on one schedule.")
        places = np.unique(np.linspace(0, len(shared) - 1, min(probe.moments, len(shared))).round().astype(int))
        self.steps = [shared[place] for place in places]
        shape = len(self.labels), len(self.steps)
        single = {v.name for v in probe.variables if v.dims == ("run",)}
        self.values: dict[str, Any] = {
            v.name: np.zeros(shape, bool)
            if v.kind == "bool"
            else np.full(shape[:1] if v.name in single else shape, np.nan)
            for v in probe.variables
        }
        self.values["width"] = np.array([width(label, run) for label, run in runs.items()])
        self.notes: dict[str, None] = {}

    def order(self) -> list[tuple[int, int]]:
        """(place of the step, number of the run): ends first, then between; all runs of a step together."""
        count = len(self.steps)
        places = [0, *([count - 1] if count > 1 else []), *range(1, count - 1)]
        return [(place, number) for place in places for number in range(len(self.labels))]

    def look(self, number: int, place: int) -> None:
        """One run at one step; where it has diverged its numbers stay nan, and a note says so."""
        try:
            self.measure(number, place)
        except (ValueError, ArithmeticError) as problem:
            if place == 0:
                raise
            said = f"{self.labels[number]} could not be measured at step {self.steps[place]}: {problem}"
            self.notes[said[:300]] = None

    def measure(self, number: int, place: int) -> None:
        """The numbers of one run at one step."""
        trajectory, at = self.runs[self.labels[number]], (number, place)
        subject = trajectory.subject(self.steps[place])
        found = _spectrum(self.rates(subject)).run(subject, seed=self.seed)
        self.notes |= dict.fromkeys(subject.notes)
        for name in ("sharpness", "train_loss"):
            source = found.summary if name in found.summary else found.data
            self.values[name][at] = float(source[name])
            self.values[f"{name}_error"][at] = float(source[f"{name}_error"])
        self.values["converged"][at] = found.converged
        if self.probe.kernel:
            kernel = self.probe._kernel()  # pyright: ignore[reportPrivateUsage]
            reading = kernel.run(trajectory.pair(self.steps[0], self.steps[place]), seed=self.seed)
            self.values["kernel_distance"][at] = float(reading.data.distance)
            self.values["kernel_distance_error"][at] = float(reading.data.distance_error)

    def rates(self, subject: Subject) -> bool:
        """Whether learning rates can be folded in."""
        wanted = self.probe.scaled == "rates"
        if wanted and subject.optimizer is None:
            self.notes["no learning rates were recorded: sharpness is that of the Hessian itself"] = None
        return wanted and subject.optimizer is not None

    def report(self, done: float) -> Reading:
        """The reading of now, with gaps over the steps that are known."""
        widest = int(np.nanargmax(self.values["width"]))
        for name, gap, relative in (("sharpness", "gap", True), ("kernel_distance", "kernel_gap", False)):
            self.values[gap], self.values[f"{gap}_error"] = _gaps(
                self.values[name], self.values[f"{name}_error"], widest, relative
            )
        coords = {"run": np.array(self.labels), "step": np.array(self.steps)}
        known = bool(self.values["converged"].all() and np.isfinite(self.values["sharpness"]).all())
        return self.probe.reading(
            min(done, 1.0), self.values, coords=coords, converged=done >= 1 and known, notes=tuple(self.notes)
        )


def width(label: str, run: Trajectory) -> float:
    """The width that a label tells ("width 64", "N=128"), else the number of parameters."""
    told = _WIDTH.search(label)
    return float(told[1]) if told else float(run.subject(run.steps[0]).size)


def _gaps(values: Floats, errors: Floats, widest: int, relative: bool) -> tuple[Floats, Floats]:
    """The largest difference of each row to that of the widest, with the errors of both there; nan where none."""
    scale = np.abs(values[widest]) if relative else np.ones(values.shape[1])
    with np.errstate(invalid="ignore", divide="ignore"):
        apart = np.abs(values - values[widest]) / scale
        off = (errors + np.abs(values / values[widest] if relative else 1.0) * errors[widest]) / scale
    gaps, found = np.full(len(values), np.nan), np.full(len(values), np.nan)
    for i, row in enumerate(apart):
        if np.isfinite(row).any():
            at = int(np.nanargmax(np.where(np.isfinite(row), row, np.nan)))
            gaps[i], found[i] = row[at], 0.0 if i == widest else off[i, at]
    return gaps, found


def _lines(data: xr.Dataset, name: str) -> tuple[AnyMark, ...]:
    """One line a run, narrow to wide; at most as many as there are roles, evenly chosen."""
    order = np.argsort(data.width.values, kind="stable")
    shown = order[np.unique(np.linspace(0, len(order) - 1, min(len(order), len(ROLES))).round().astype(int))]
    marks: list[AnyMark] = []
    for role, i in zip(ROLES, shown, strict=False):
        y, error = (data[key].values[i] for key in (name, f"{name}_error"))
        known = np.isfinite(y)
        x, label = data["step"].values[known], str(data["run"].values[i])
        marks += (
            [Band(x, (y - error)[known], (y + error)[known])] if np.isfinite(error[known]).all() and known.any() else []
        )
        marks += [Line(x, y[known], label, role), Points(x, y[known], role=role)]
    return tuple(marks)


def _bound(data: xr.Dataset, scaled: str) -> tuple[Rule, ...]:
    """The stability threshold, where it is in sight."""
    highest = np.nanmax(data.sharpness.values, initial=-math.inf)
    return (Rule(STABLE, label="2"),) if scaled == "rates" and highest > STABLE / 3 else ()
