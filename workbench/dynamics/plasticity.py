"""Plasticity along a training: units, ranks, norms, what a fresh target costs, and the curve over tasks."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from workbench.dynamics.checkpoints import last_of
from workbench.dynamics.refit import Refit, TargetKind
from workbench.dynamics.tasks import by_task, members_of
from workbench.figure import ROLES, AnyMark, Axis, Figure, Line, Panel, Points, Role, Scale, fitting, step_axis
from workbench.landscape.grid import levels
from workbench.numerics.sampling import Draw
from workbench.numerics.stats import error_of_mean, known_mean
from workbench.pace import Pace
from workbench.probe import Cost, Look, Probe, Reading, Value, Variable
from workbench.probes.dormant_units import DormantUnits, hidden_layers
from workbench.probes.feature_rank import FeatureRank
from workbench.schema import Choice, Doc, Range
from workbench.several import Runs
from workbench.subject import Subject
from workbench.trajectory import Trajectory

Floats = NDArray[np.float64]

UNITS = {
    "dormant_fraction": "share of dormant units",
    "dead_fraction": "share of units that are 0 on every example",
    "saturated_fraction": "share of saturated units",
    "active_fraction": "mean share of examples on which a unit is positive",
}
"""What DormantUnits gives, by layer and in total."""
RANKS = {
    "effective_rank": "exp(entropy(σ/Σσ)) of the features",
    "stable_rank": "Σσ²/σ_1² of the features",
    "threshold_rank": "least k with Σ_(i<=k) σ_i >= 0.99 · Σσ of the features",
}
"""What FeatureRank gives, by layer."""
_NORMS = (
    Variable("weight_mean", ("run", "checkpoint"), "mean of |θ| over all parameters together"),
    Variable("weight_rms", ("run", "checkpoint"), "root mean square of tensors with two dims and more"),
    Variable("weight_norm", ("run", "checkpoint"), "‖θ‖ of all parameters"),
    Variable("gradient_norm", ("run", "checkpoint"), "‖∇L‖ on all examples"),
    Variable("gradient_ratio", ("run", "checkpoint"), "‖∇L‖ / ‖θ‖"),
    Variable("tensor_rms", ("run", "checkpoint", "tensor"), "root mean square of each tensor"),
    Variable("tensor_gradient_norm", ("run", "checkpoint", "tensor"), "norm of each tensor's gradient"),
)
_TASKS = {
    "task_mean": "mean of the score within a task",
    "task_end": "last score within a task",
    "fresh_mean": "mean of the score of fresh networks within the task",
    "fresh_end": "last score of fresh networks within the task",
    "plasticity_lost": "fresh_mean - task_mean",
}


def _with_error(name: str, dims: tuple[str, ...], words: str, over: str) -> tuple[Variable, Variable]:
    return Variable(name, dims, words, error=f"{name}_error"), Variable(f"{name}_error", dims, f"its error over {over}")


@dataclass(frozen=True)
class Plasticity(Probe[Any]):
    """Signs of lost plasticity along a training, or several arms of one, and how well each checkpoint still learns.

    What it measures, at each checkpoint: the shares of dormant, dead, saturated and active hidden units (DormantUnits)
    and the ranks of their features (FeatureRank), by layer; ``weight_mean``, the mean of |θ| over all parameters
    together, ``weight_rms`` of tensors with two dims and more, and of each tensor; ``gradient_norm`` ‖∇L‖ on the
    examples, and of each tensor. At ``refits`` checkpoints, first and last among them: ``refit_loss``, the loss of a
    copy after ``steps`` steps of Adam on a fresh random target, over the loss of the best constant (1: nothing was
    learned, 0: fitted), mean over ``targets`` targets that are the same at each checkpoint; ``refit_gap``, how much
    more that is than at the first checkpoint. From the record, where it holds a task's number (``task``) at each step:
    ``task_mean`` and ``task_end`` of the recorded ``score``, and ``plasticity_lost`` = ``fresh_mean`` - ``task_mean``
    against fresh networks: the arm, or else the recorded scalar, that is called ``fresh``. nan where it is not known.

    How to read it: the gap of the re-fit and the curve against fresh networks are plasticity itself; the others are
    signs that often come with its loss: more dormant units, lower rank, larger weights. Record a checkpoint at the
    initialisation, so that the first one is a fresh network and the gap is against that.

    What it costs: three passes and a gradient at each checkpoint; ``refits`` · ``targets`` · ``steps`` training steps.

    When it misleads: a large budget of steps hides differences, and one learning rate may suit one checkpoint better
    than another: try several. ``parameters`` of the last layer alone make the re-fit measure the rank of its inputs.
    Tasks that differ in difficulty say nothing without fresh networks. Use the examples of the task at hand: old ones
    have other dormant units. Features shrink with the width, so compare ranks of one layer only.

    Errors: units and ranks as those probes state, over examples; re-fit standard error over targets. Norms and scores
    are those of the examples and of the record as they are.

    Source: Lyle et al. 2022 (arXiv:2204.09560) for the re-fit; Dohare et al. 2024 for the curve over tasks.
    """

    looks_at: ClassVar[Look] = "trajectory"
    looks_also_at: ClassVar[tuple[Look, ...]] = ("runs",)
    variables: ClassVar[tuple[Variable, ...]] = (
        *(v for n, w in (UNITS | RANKS).items() for v in _with_error(n, ("run", "checkpoint", "layer"), w, "examples")),
        *(v for n, w in UNITS.items() for v in _with_error(f"total_{n}", ("run", "checkpoint"), w, "examples")),
        *_NORMS,
        *_with_error("refit_loss", ("run", "checkpoint"), "loss after a re-fit over that of a constant", "targets"),
        *_with_error("refit_gap", ("run", "checkpoint"), "that less its value at the first checkpoint", "targets"),
        *(Variable(name, ("run", "task"), words) for name, words in _TASKS.items()),
    )

    layers: Annotated[str, Doc("Hidden layers, names or globs with commas between; empty takes the activations.")] = ""
    tau: Annotated[float, Range(0.0, 1.0, soft=(0.0, 0.1)), Doc("Score at or below which a unit is dormant.")] = 0.025
    refits: Annotated[
        int, Range(0, 1000, soft=(0, 10)), Doc("Checkpoints that are re-fitted, evenly spread; 0: none.")
    ] = 3
    targets: Annotated[int, Range(1, 1000, soft=(2, 20)), Doc("Fresh targets for each of them.")] = 5
    steps: Annotated[int, Range(1, 1_000_000, soft=(100, 5000)), Doc("Training steps on each target.")] = 1000
    lr: Annotated[float, Range(1e-8, 10.0, log=True, soft=(1e-4, 0.1)), Doc("Learning rate of Adam there.")] = 1e-3
    batch: Annotated[int, Range(1, 1_000_000, soft=(16, 2048)), Doc("Examples in a batch there.")] = 256
    target: Annotated[
        TargetKind,
        Choice({"noise": "independent N(0, 1)", "waves": "sin(10 g(x)), g a random network"}),
        Doc("What a fresh target is."),
    ] = "noise"
    parameters: Annotated[str, Doc("Name or glob of the parameters that are re-fitted; empty for all.")] = ""
    score: Annotated[str, Doc("Recorded score of the task at hand; larger is better.")] = "train_accuracy"
    task: Annotated[str, Doc("Recorded number of the task.")] = "task"
    fresh: Annotated[str, Doc("Arm of fresh networks, or recorded score of theirs.")] = "fresh"

    @property
    def refit(self) -> Refit:
        """The training on fresh targets."""
        return Refit(self.steps, self.lr, self.batch, self.target)

    def stream(self, subject: Trajectory | Runs, draw: Draw) -> Iterator[Reading]:
        """The curves over tasks, then the checkpoints from coarse to fine, then the re-fits."""
        found, pace = _Found(self, members_of(subject, self.name)), Pace()
        yield found.reading()
        for run, step in found.places():
            found.measure(run, step, draw.seed)
            if not found.over and pace.due():
                yield found.reading()
        for run, step in found.refits():
            for _ in found.learn(run, step, draw.seed):
                if not found.over and pace.due():
                    yield found.reading()
        yield found.reading(last=True)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """First and last of each sign, the last gap of the re-fit, and what was lost over the last tenth of tasks."""
        last_rank = data.effective_rank.isel(layer=-1)
        curves = {
            "dormant": data.total_dormant_fraction,
            "effective_rank": last_rank,
            "weight_mean": data.weight_mean,
            "gradient_norm": data.gradient_norm,
            "refit_loss": data.refit_loss,
        }
        found: dict[str, Value] = {}
        for name, curve in curves.items():
            for word, place in (("first", 0), ("last", -1)):
                found[f"{name}_{word}"] = known_mean([one[place] for one in map(_known, curve.values) if one.size])
        lost = data.plasticity_lost.values[:, -max(data.sizes["task"] // 10, 1) :]
        return found | {"plasticity_lost": known_mean(lost)}

    def figure(self, data: xr.Dataset) -> Figure:
        """Dormant units, rank, weights, gradients, re-fit and tasks, a curve for each run."""
        rank = data.effective_rank.isel(layer=-1)
        layer = str(data["layer"].values[-1])
        panels = [
            _panel(data, data.total_dormant_fraction, "dormant units", key=True),
            _panel(data, rank, f"effective rank of {layer}"),
            _panel(data, data.weight_mean, "mean |θ|"),
            _panel(data, data.gradient_norm, "‖∇L‖", "log"),
        ]
        if np.isfinite(data.refit_loss).any():
            panels.append(_panel(data, data.refit_loss, "loss on fresh targets", error=data.refit_loss_error))
        if np.isfinite(data.task_mean).any():
            panels.append(_task_panel(data, self.score))
        return Figure(tuple(panels), columns=2)

    def estimate(self, subject: Trajectory | Runs) -> Cost:
        """One checkpoint with the two probes, and a copy that trains."""
        members = members_of(subject, self.name)
        path = next(iter(members.values()))
        one = path.subject(path.steps[0])
        inner = max(probe.estimate(one).bytes for probe in self.probes(""))
        count = sum(len(m.steps) for m in members.values())
        steps = len(members) * min(self.refits, len(path.steps)) * self.targets * self.steps
        weights = 6 * one.size * one.dtype.itemsize
        words = f"{count} checkpoints, and {steps} training steps on fresh targets"
        return Cost(inner + weights + one.memory(), 4 * count + steps, words)

    def probes(self, layers: str) -> tuple[DormantUnits, FeatureRank]:
        """What is asked at each checkpoint."""
        names = layers or self.layers
        return DormantUnits(layers=names, tau=self.tau), FeatureRank(of="features", layers=names)


class _Found:
    """Everything known so far of some runs."""

    def __init__(self, probe: Plasticity, members: Mapping[str, Trajectory]) -> None:
        self.probe, self.members = probe, members
        self.notes: dict[str, None] = {}
        self.checkpoints = np.unique(np.concatenate([np.array(m.steps) for m in members.values()]))
        first = [m.subject(m.steps[0]) for m in members.values()]
        self.names = [[layer.name for layer in hidden_layers(one, probe.layers)] for one in first]
        self.layers = list(dict.fromkeys(name for names in self.names for name in names))
        self.tensors = list(dict.fromkeys(name for one in first for name in one.params))
        self.curves = self._tasks()
        sizes = {"run": len(members), "checkpoint": len(self.checkpoints), "layer": len(self.layers)}
        sizes |= {"tensor": len(self.tensors), "task": len(self.task)}
        self.values = {v.name: np.full([sizes[d] for d in v.dims], np.nan) for v in probe.variables}
        self.values |= self.curves
        self.chosen = [self._spread(m.steps) for m in members.values()]
        self.losses: dict[int, Floats] = {}  # of the first checkpoint, by run
        self.total = sum(len(m.steps) for m in members.values()) + sum(map(len, self.chosen)) * probe.targets
        self.seen, self.failed = 0, False

    @property
    def over(self) -> bool:
        """Whether nothing is left to do."""
        return self.seen >= self.total

    def _spread(self, steps: tuple[int, ...]) -> list[int]:
        places = np.linspace(0, len(steps) - 1, min(self.probe.refits, len(steps))).round().astype(int)
        return [steps[i] for i in np.unique(places)]

    def _tasks(self) -> dict[str, Floats]:
        """The curves over tasks of every run, and of the fresh networks."""
        probe = self.probe
        own = [by_task(m, probe.task, probe.score) for m in self.members.values()]
        arm = self.members.get(probe.fresh)
        if arm is not None:
            fresh = [by_task(arm, probe.task, probe.score)] * len(own)
        else:
            fresh = [by_task(m, probe.task, probe.fresh) for m in self.members.values()]
        self.task = sorted({k for one in own for k in one}) or [0.0]
        nothing = (np.nan, np.nan)
        mine, theirs = (np.array([[one.get(k, nothing) for k in self.task] for one in held]) for held in (own, fresh))
        if not any(own):
            self.notes[f"no curve over tasks: {probe.task!r} and {probe.score!r} are not both recorded"] = None
        elif not any(fresh):
            self.notes[f"no fresh networks: neither an arm nor a recorded score is called {probe.fresh!r}"] = None
        curves = dict(zip(_TASKS, (mine[..., 0], mine[..., 1], theirs[..., 0], theirs[..., 1]), strict=False))
        return curves | {"plasticity_lost": theirs[..., 0] - mine[..., 0]}

    def places(self) -> Iterator[tuple[int, int]]:
        """(run, step) of each checkpoint, ends and middle first, all runs at each."""
        order = dict.fromkeys(int(k) for level in levels(len(self.checkpoints)) for k in level)
        for place in order:
            step = int(self.checkpoints[place])
            yield from ((run, step) for run, m in enumerate(self.members.values()) if step in m.steps)

    def refits(self) -> Iterator[tuple[int, int]]:
        """(run, step) of each re-fit, the first checkpoint first."""
        yield from ((run, step) for run, steps in enumerate(self.chosen) for step in steps)

    def _path(self, run: int) -> Trajectory:
        return list(self.members.values())[run]

    def measure(self, run: int, step: int, seed: int) -> None:
        """Take units, ranks and norms of one checkpoint; one that cannot be measured stays nan."""
        column = int(np.searchsorted(self.checkpoints, step))
        self.seen += 1
        try:
            subject = self._path(run).subject(step)
            self._put_norms(run, column, subject)
            for probe in self.probe.probes(",".join(self.names[run])):
                self._put(run, column, last_of(probe, subject, _own(probe, subject, seed)))
        except (ValueError, ArithmeticError) as problem:
            self.notes[f"step {step} of {list(self.members)[run]} could not be measured: {problem}"] = None
            self.failed = True

    def _put_norms(self, run: int, column: int, subject: Subject) -> None:
        """Sizes of the weights and of the gradient."""
        params, at = subject.params, (run, column)
        squares = _sums(params, 2)
        matrices = [n for n, p in params.items() if p.ndim > 1]
        total, values = sum(squares.values()), self.values
        values["weight_mean"][at] = sum(_sums(params, 1).values()) / subject.size
        count = sum(params[n].numel() for n in matrices)
        values["weight_rms"][at] = (sum(squares[n] for n in matrices) / count) ** 0.5 if count else np.nan
        values["weight_norm"][at] = total**0.5
        places = [self.tensors.index(name) for name in params]
        values["tensor_rms"][run, column, places] = [(squares[n] / p.numel()) ** 0.5 for n, p in params.items()]
        gradients = _sums(subject.gradient(), 2)
        values["gradient_norm"][at] = sum(gradients.values()) ** 0.5
        values["gradient_ratio"][at] = values["gradient_norm"][at] / total**0.5 if total else np.nan
        values["tensor_gradient_norm"][run, column, places] = [gradients[n] ** 0.5 for n in params]

    def _put(self, run: int, column: int, data: xr.Dataset) -> None:
        """Take in what a probe found."""
        one = data.isel(source=0) if "source" in data.dims else data
        places = [self.layers.index(name) for name in self.names[run]]
        for name in (*UNITS, *RANKS):
            if name in one:
                for of in (name, f"{name}_error"):
                    self.values[of][run, column, places] = one[of].values
        for name in UNITS:
            for of in (f"total_{name}", f"total_{name}_error"):
                if of in one:
                    self.values[of][run, column] = float(one[of])

    def learn(self, run: int, step: int, seed: int) -> Generator[float]:
        """Train copies of one checkpoint on each fresh target, a few steps at a time."""
        probe, column = self.probe, int(np.searchsorted(self.checkpoints, step))
        losses = np.full(probe.targets, np.nan)
        try:
            subject = self._path(run).subject(step)
            subject = subject.restricted(probe.parameters) if probe.parameters else subject
            for k in range(probe.targets):
                losses[k] = yield from probe.refit.run(subject, probe.refit.target(subject, seed, k), seed + k)
                self.seen += 1
                self._put_losses(run, column, step, losses[: k + 1])
        except (ValueError, ArithmeticError) as problem:
            self.notes[f"step {step} of {list(self.members)[run]} could not be re-fitted: {problem}"] = None
            self.failed = True

    def _put_losses(self, run: int, column: int, step: int, losses: Floats) -> None:
        if step == self.chosen[run][0]:
            self.losses[run] = losses
        for name, values in (("refit_loss", losses), ("refit_gap", losses - self._first(run, losses.size))):
            self.values[name][run, column] = values.mean()
            self.values[f"{name}_error"][run, column] = float(error_of_mean(values))

    def _first(self, run: int, count: int) -> Floats:
        held = self.losses.get(run, np.full(count, np.nan))
        return held[:count] if held.size >= count else np.full(count, np.nan)

    def reading(self, last: bool = False) -> Reading:
        """The reading so far."""
        done = 1.0 if last else min((self.seen + 1) / (self.total + 2), 0.999)
        coords = {"run": list(self.members), "checkpoint": self.checkpoints, "layer": self.layers}
        coords |= {"tensor": self.tensors, "task": self.task}
        settled = last and not self.failed
        return self.probe.reading(done, self.values, coords=coords, converged=settled, notes=tuple(self.notes))


def _own(probe: Probe[Any], subject: Subject, seed: int) -> Draw:
    """The random numbers of a probe's own run."""
    return Draw(seed, probe.name, subject.size, subject.dtype, subject.device)


def _sums(tensors: Mapping[str, Tensor], power: int) -> dict[str, float]:
    """Σ|entry|^power of each, in float64, with one wait for the device."""
    found = [t.detach().double().abs().pow(power).sum() for t in tensors.values()]
    return dict(zip(tensors, torch.stack(found).tolist(), strict=True)) if found else {}


def _known(values: Floats) -> Floats:
    return values[np.isfinite(values)]


def _panel(
    data: xr.Dataset,
    curve: xr.DataArray,
    label: str,
    scale: Scale = "linear",
    error: xr.DataArray | None = None,
    key: bool = False,
) -> Panel:
    """One curve for each run over checkpoints; ``key``: runs are named."""
    marks: list[AnyMark] = []
    for i, run in enumerate(data["run"].values):
        there, role = np.isfinite(curve.values[i]), ROLES[i % len(ROLES)]
        x, y = data["checkpoint"].values[there], curve.values[i][there]
        marks.append(Line(x, y, str(run) if key else "", role))
        marks.append(Points(x, y, None if error is None else error.values[i][there], role=role))
    return Panel(tuple(marks), step_axis(), fitting(label, scale, curve.values))


def _task_panel(data: xr.Dataset, score: str) -> Panel:
    marks: list[AnyMark] = []
    for i in range(data.sizes["run"]):
        each: tuple[tuple[str, Role], ...] = (("task_mean", ROLES[i % len(ROLES)]), ("fresh_mean", "reference"))
        for name, role in each:
            there = np.isfinite(data[name].values[i])
            label = "fresh networks" if role == "reference" and not i else ""
            if there.any():
                marks.append(Line(data["task"].values[there], data[name].values[i][there], label, role))
    return Panel(tuple(marks), Axis("task"), Axis(f"mean {score.replace('_', ' ')}"))
