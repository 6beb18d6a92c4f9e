"""A network and its linearisation, trained side by side from the same weights."""

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

from workbench.data import Batch
from workbench.figure import AnyMark, Axis, Figure, Line, Panel, Points, Role, fitting, step_axis
from workbench.numerics.krylov import lanczos
from workbench.numerics.sampling import Draw
from workbench.numerics.stats import jackknife_error
from workbench.operators.gauss_newton import GaussNewton
from workbench.operators.graphs import pull
from workbench.operators.pushes import Graphed
from workbench.pace import Pace
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Doc, Range
from workbench.shell import precise
from workbench.subject import Subject

Floats = NDArray[np.float64]
GROUPS = 20
"""Parts of the examples whose means tell the standard error of a loss."""
MODELS = ("network", "linearised")
_SCORES = ("train_loss", "train_accuracy", "held_out_loss", "held_out_accuracy")


@dataclass(frozen=True)
class LinearisedTraining(Probe[Subject]):
    """Training of the linearised model beside the network's: what the tangent features of these weights can learn.

    What it measures: from the subject's weights θ_0, gradient descent on L(f(·; θ)) and on L(f_lin), with f_lin = f_0 +
    J_0 ω linear in ω, by the same learning rate and the same batches. At ``evaluations`` log-spaced steps: loss and
    accuracy of both on the subject's examples and on those held out, and ``gap`` = Σ ‖f - f_lin‖² / Σ ‖f - f_0‖².
    LinearisedGap compares them at the network's weights; here each goes its own way.

    How to read it: curves that lie on one another belong to a lazy network. Where the network reaches a lower held-out
    loss, it learned features that the beginning did not have; where the linear model does, they did harm.

    What it costs: each step a gradient of the network, and for the linear model its outputs with J_0 ω (twice reverse)
    and one gradient; each evaluation the same for all examples. Memory: one twice differentiable graph of a batch.

    When it misleads: the learning rate suits both only while curvature stays as at the start. ``rate`` = 0 takes 1/λ_1
    of the Gauss-Newton matrix at θ_0: stable for the linear model, and for the network until it sharpens. BatchNorm
    stands in evaluation mode for both. Few steps say little about where either would end.

    Errors: standard errors over examples, from twenty parts of them, for these two trainings.

    Source: Chizat, Oyallon and Bach 2019; Lee et al. 2019; Fort et al. 2020.
    """

    steps: Annotated[int, Range(1, 100_000, step=1, log=True, soft=(10, 1000)), Doc("Steps of gradient descent.")] = 30
    rate: Annotated[float, Range(0.0, 1e4, soft=(0.0, 1.0)), Doc("Learning rate; 0: 1 / λ₁ at the start.")] = 0.0
    batch: Annotated[
        int, Range(0, 100_000, step=1, soft=(0, 512)), Doc("Examples in a step, drawn without replacement; 0: all.")
    ] = 0
    evaluations: Annotated[int, Range(2, 100, step=1, soft=(4, 20)), Doc("Steps at which both are evaluated.")] = 8

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("train_loss", ("model", "update"), "loss on the subject's examples", error="train_loss_error"),
        Variable("train_loss_error", ("model", "update"), "its standard error"),
        Variable("train_accuracy", ("model", "update"), "share classified rightly", error="train_accuracy_error"),
        Variable("train_accuracy_error", ("model", "update"), "its standard error"),
        Variable("held_out_loss", ("model", "update"), "loss on held-out examples", error="held_out_loss_error"),
        Variable("held_out_loss_error", ("model", "update"), "its standard error"),
        Variable("held_out_accuracy", ("model", "update"), "share, held out", error="held_out_accuracy_error"),
        Variable("held_out_accuracy_error", ("model", "update"), "its standard error"),
        Variable("gap", ("update",), "squared distance of both functions over that moved", error="gap_error"),
        Variable("gap_error", ("update",), "its standard error"),
        Variable("displacement", ("model", "update"), "distance of the weights from the start"),
        Variable("learning_rate", (), "learning rate of both"),
    )

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """Step after step; both are evaluated on the way."""
        run, pace = _Run(self, subject, draw), Pace()
        for step in range(self.steps + 1):
            if step:
                run.descend(step)
            if step in run.moments:
                run.evaluate(run.moments.index(step))
            if step < self.steps and pace.due():
                yield run.report((step + 0.5) / (self.steps + 1))
        yield run.report(1.0)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """Losses of both at the last step that was evaluated, and the gap."""
        known = np.flatnonzero(np.isfinite(data.train_loss.values).all(0))
        if not known.size:
            return {"gap": math.nan, "gap_error": math.nan}
        last = data.isel(update=int(known[-1]))
        found: dict[str, Value] = {"gap": float(last.gap), "gap_error": float(last.gap_error)}
        for score in ("train_loss", "held_out_loss", "held_out_accuracy"):
            for model in MODELS:
                one = last.sel(model=model)
                if np.isfinite(one[score]):
                    found |= {
                        f"{model}_{score}": float(one[score]),
                        f"{model}_{score}_error": float(one[f"{score}_error"]),
                    }
        return found | {"learning_rate": float(data.learning_rate)}

    def figure(self, data: xr.Dataset) -> Figure:
        """Losses over steps, held out beside training, and the gap."""
        held = np.isfinite(data.held_out_loss.values).any()
        panels = [_curves(data, "train_loss", "loss, training")]
        panels += [_curves(data, "held_out_loss", "loss, held out")] if held else []
        step, gap, error = data["update"].values, data.gap.values, data.gap_error.values
        marks = (Line(step, gap), Points(step, gap, error))
        return Figure((*panels, Panel(marks, step_axis(), Axis("‖f - f_lin‖² / ‖f - f₀‖²"))))

    def estimate(self, subject: Subject) -> Cost:
        """A twice differentiable graph of a batch, both models' weights, and their outputs' sums."""
        weights = 8 * subject.size * subject.dtype.itemsize
        words = f"{self.steps} steps of both, {self.evaluations} evaluations"
        return Cost(4 * subject.memory() + weights, 5 * (self.steps + self.evaluations), words)


class _Run:
    """Both models while they train."""

    def __init__(self, probe: LinearisedTraining, subject: Subject, draw: Draw) -> None:
        if not subject.has_outputs:
            raise TypeError("LinearisedTraining needs outputs; make the subject with loss=, not objective=.")
        self.probe, self.subject, self.draw = probe, subject, draw
        self.start = {n: p.detach().clone() for n, p in subject.params.items()}
        self.leaves = {n: p.clone().requires_grad_() for n, p in self.start.items()}
        self.network = {n: p.clone() for n, p in self.start.items()}
        self.move = [torch.zeros_like(p) for p in self.start.values()]
        self.rate = probe.rate or self.suggested()
        grid = np.unique(np.r_[0, np.geomspace(1, probe.steps, probe.evaluations - 1).round()].astype(int))
        self.moments = [int(step) for step in grid]
        shape = len(MODELS), len(self.moments)
        self.values: dict[str, Any] = {
            v.name: np.full(shape if len(v.dims) == 2 else shape[1:], np.nan) for v in probe.variables if v.dims
        }
        self.values["learning_rate"] = self.rate
        self.notes = (*subject.notes, subject.on)

    def suggested(self) -> float:
        """1/λ_1 of the Gauss-Newton matrix at the start; 1 where there is no curvature."""
        with GaussNewton(self.subject) as matrix:
            found = [s.top_values for s in lanczos(matrix, self.draw(0), top=1, tolerance=0.05, limit=30)]
        largest = float(found[-1][0]) if found and len(found[-1]) else math.nan
        return 1 / largest if largest > 0 else 1.0

    # --- one step ---------------------------------------------------------------------------------------------------

    def chosen(self, step: int) -> Subject:
        """The examples of a step: all, or the next of an order that is drawn anew for each epoch."""
        size, n = self.probe.batch, self.subject.examples
        if not 0 < size < n:
            return self.subject
        epoch, place = divmod(step - 1, n // size)
        order = self.draw.generator(1 + epoch).permutation(n)
        return self.subject.selected([int(i) for i in order[place * size : (place + 1) * size]])

    def descend(self, step: int) -> None:
        """Both take a step against the gradient of the same examples."""
        some = self.chosen(step)
        gradient = some.gradient(self.network)
        for name, p in self.network.items():
            p.sub_(self.rate * gradient[name])
        total = [torch.zeros_like(m) for m in self.move]
        for batch in some.batches():
            for held, share in zip(total, self.pulled(some, batch), strict=True):
                held.add_(share, alpha=1 / some.total_weight)
        for move, slope in zip(self.move, total, strict=True):
            move.sub_(self.rate * slope)

    def pulled(self, subject: Subject, batch: Batch) -> list[Tensor]:
        """J_0ᵀ ∂ℓ/∂z at z = f_lin, summed over a batch."""
        with precise(subject.device):
            outputs, linear = self.linear(subject, batch)
            inner = linear.requires_grad_()
            (force,) = torch.autograd.grad(subject.output_loss(inner, batch), [inner])
            found = pull([outputs], list(self.leaves.values()), [force], keep=False)
        return list(found) if found else [torch.zeros_like(m) for m in self.move]

    def linear(self, subject: Subject, batch: Batch) -> tuple[Tensor, Tensor]:
        """f_0 with its graph, and f_lin = f_0 + J_0 ω without."""
        outputs = subject.batch_outputs(self.leaves, batch)
        if not outputs.requires_grad:
            return outputs, outputs.detach().clone()
        return outputs, outputs.detach() + Graphed(outputs, list(self.leaves.values()))(self.move).detach()

    # --- how far they are -------------------------------------------------------------------------------------------

    def evaluate(self, place: int) -> None:
        """Scores of both at one moment."""
        for prefix, subject in (("train", self.subject), ("held_out", self.subject.held_out)):
            if subject is not None:
                self.scores(prefix, subject, place)
        moved = [[p - self.start[n] for n, p in self.network.items()], self.move]
        for number, parts in enumerate(moved):
            square = torch.stack([part.double().square().sum() for part in parts]).sum()
            self.values["displacement"][number, place] = math.sqrt(float(square))

    def scores(self, prefix: str, subject: Subject, place: int) -> None:
        """Loss and accuracy of both on one set of examples; on the training set the gap too."""
        size = max(1, -(-subject.examples // GROUPS))
        rows = np.array([self.sums(subject, batch) for batch in subject.batches(min(size, subject.plan.chunk or size))])
        weight, count = rows[:, 6], rows[:, 7]
        for number in range(2):
            for name, sums, over in (("loss", rows[:, number], weight), ("accuracy", rows[:, 2 + number], count)):
                value, error = _ratio(sums, over)
                self.values[f"{prefix}_{name}"][number, place] = value
                self.values[f"{prefix}_{name}_error"][number, place] = error
        if prefix == "train":
            self.values["gap"][place], self.values["gap_error"][place] = _ratio(rows[:, 4], rows[:, 5])

    def sums(self, subject: Subject, batch: Batch) -> list[float]:
        """Of a batch: losses, right answers, ‖f - f_lin‖², ‖f - f_0‖², weight and count."""
        with precise(subject.device):
            outputs, linear = self.linear(subject, batch)
            with torch.no_grad():
                own, start = subject.batch_outputs(self.network, batch), outputs.detach()
                losses = [subject.output_loss(z, batch) for z in (own, linear)]
                right = [_right(z, batch.targets, subject.classes) for z in (own, linear)]
                apart = [(own - linear).double().square().sum(), (own - start).double().square().sum()]
                found = torch.stack([f.double() for f in (*losses, *right, *apart)]).tolist()
        return [*found, batch.weight, batch.size]

    def report(self, done: float) -> Reading:
        """The reading of now."""
        known = done >= 1 and bool(np.isfinite(self.values["train_loss"]).all())
        coords = {"model": np.array(MODELS), "update": np.array(self.moments)}
        return self.probe.reading(done, self.values, coords=coords, converged=known, notes=self.notes)


def _right(outputs: Tensor, targets: Any, classes: int | None) -> Tensor:
    """How many classes are right; nan without classes, or where targets are not one class an example."""
    if classes is None or outputs.ndim != 2 or not isinstance(targets, Tensor) or targets.ndim != 1:
        return torch.tensor(math.nan, device=outputs.device)
    return (outputs.argmax(1) == targets).sum()


def _ratio(sums: Floats, over: Floats) -> tuple[float, float]:
    """Σ sums / Σ over, and its standard error with each part left out; nan where there is nothing."""
    total, whole = float(sums.sum()), float(over.sum())
    if not whole > 0:
        return math.nan, math.nan
    with np.errstate(invalid="ignore", divide="ignore"):
        without = (total - sums) / (whole - over)
    return total / whole, float(jackknife_error(without))


def _curves(data: xr.Dataset, name: str, words: str) -> Panel:
    marks: list[AnyMark] = []
    roles: tuple[Role, ...] = ("main", "second")
    for role, model in zip(roles, MODELS, strict=True):
        one = data.sel(model=model)
        marks.append(Line(data["update"].values, one[name].values, model, role))
        marks.append(Points(data["update"].values, one[name].values, one[f"{name}_error"].values, role=role))
    return Panel(tuple(marks), step_axis(), fitting(words, "log", data[name].values))
