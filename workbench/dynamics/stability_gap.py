"""The stability gap: what is lost at a switch of tasks and regained soon after, and which parts of the network move."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from workbench.dynamics.tasks import TaskRecord, each_and_mean, joined_tasks, members_of, over_runs
from workbench.figure import ROLES, AnyMark, Axis, Bars, Figure, Line, Panel, Rule
from workbench.numerics.sampling import Draw
from workbench.numerics.stats import known_mean
from workbench.probe import Cost, Look, Probe, Reading, Value, Variable
from workbench.schema import Doc, Range
from workbench.several import Runs
from workbench.trajectory import Trajectory

Floats = NDArray[np.float64]
Curve = tuple[Floats, Floats]
MEASURES = {
    "min_accuracy": "mean over earlier tasks of the least accuracy since their training ended",
    "worst_case_accuracy": "accuracy on the last task / T + (1 - 1/T) · min_accuracy",
    "forgetting_short": "mean over tasks of the largest fall of accuracy within a short window",
    "forgetting_long": "mean over tasks of the largest fall of accuracy within a long window",
    "gain_short": "mean over tasks of the largest rise of accuracy within a short window",
    "gain_long": "mean over tasks of the largest rise of accuracy within a long window",
    "gap": "mean over switches and earlier tasks of the fall below the accuracy before the switch",
}
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class StabilityGap(Probe[Any]):
    """How deep accuracy on earlier tasks falls at a switch, how soon it recovers, and which modules drift.

    What it measures, from recorded accuracies A_i(n) on task i at step n, task i trained until step e_i:
    ``min_accuracy`` = mean_(i<T) min_(n>e_i) A_i(n); ``worst_case_accuracy`` = A_T(end)/T + (1 - 1/T) · min_accuracy;
    both also while training goes on, over ``step``, from the second task on. ``forgetting_short`` and
    ``forgetting_long``: the mean over tasks of max (A_i(m) - A_i(n)) over m before n in a window of ``short`` and of
    ``long`` evaluations; ``gain_...`` the same of rises. At each switch (the task trained next), for each task trained
    before: ``fall`` = A before the switch - the least A while the next task is trained (its mean is ``gap``), and
    ``recovery``, the steps from the switch to the first evaluation after that least value with at least ``share`` of
    the accuracy before; nan where it does not come back while that task is trained. ``drift``: ‖Δθ‖/‖θ‖ of each module
    between the last checkpoint before a task and the last one in it (before the first task: the first checkpoint).

    How to read it: the value at the switch belongs to the time before; a deep fall that recovers is a stability gap,
    which forgetting at the ends of tasks (Forgetting) does not see. Modules that drift most are where forgetting sits,
    often the last.

    What it costs: reading the scalars and two checkpoints for each task.

    When it misleads: all of these only get worse with denser evaluation, so evaluate each step after a switch, and
    compare at equal periods only (a note states it). Small evaluation sets alone make minima low. Evaluate in
    evaluation mode. Windows count evaluations, not steps.

    Errors: standard error over runs; nan for one run. A run's own values are those recorded.

    Source: De Lange, van de Ven, Tuytelaars 2023 (arXiv:2205.13452).
    """

    looks_at: ClassVar[Look] = "trajectory"
    looks_also_at: ClassVar[tuple[Look, ...]] = ("runs",)
    variables: ClassVar[tuple[Variable, ...]] = (
        *each_and_mean(MEASURES),
        Variable("accuracy_on", ("run", "task", "step"), "recorded accuracy on each task"),
        Variable("min_accuracy_at", ("run", "step"), "min_accuracy until then"),
        Variable("worst_case_accuracy_at", ("run", "step"), "worst_case_accuracy until then"),
        Variable("fall", ("run", "trained", "task"), "fall of accuracy on a task while another is trained"),
        Variable("recovery", ("run", "trained", "task"), "steps from the switch to the recovery", "steps"),
        Variable("drift", ("run", "trained", "module"), "‖Δθ‖/‖θ‖ of a module while a task is trained"),
    )

    accuracy: Annotated[str, Doc("Names of the recorded accuracies; {} stands for the task's number.")] = (
        "test_accuracy_task{}"
    )
    task: Annotated[str, Doc("Recorded number of the task at hand.")] = "task"
    short: Annotated[int, Range(2, 10_000, soft=(2, 50)), Doc("Evaluations in a short window.")] = 10
    long: Annotated[int, Range(2, 100_000, soft=(10, 500)), Doc("Evaluations in a long window.")] = 100
    share: Annotated[
        float, Range(0.0, 1.0, soft=(0.5, 1.0)), Doc("Share of the accuracy before a switch that counts as recovered.")
    ] = 0.95

    def stream(self, subject: Trajectory | Runs, draw: Draw) -> Iterator[Reading]:
        """The curves and all numbers of them at once, then the drift, run by run."""
        members = members_of(subject, self.name)
        records = [TaskRecord.of(label, path, self.accuracy, self.task) for label, path in members.items()]
        tasks, steps = joined_tasks(records), _steps(records)
        modules = list(dict.fromkeys(n for m in members.values() for n in _modules(_weights(m, m.steps[0]))))
        values = self._curves(records, steps)
        values["drift"] = np.full((len(records), len(tasks), len(modules)), np.nan)
        coords = {"run": list(members), "trained": tasks, "task": tasks, "step": steps, "module": modules}
        yield self.reading(0.5 / (len(records) + 1), values, coords=coords, notes=tuple(_notes(records)))
        for run, (record, path) in enumerate(zip(records, members.values(), strict=True)):
            for at, moved in enumerate(_drifts(record, path)):
                for name, value in moved.items():
                    values["drift"][run, at, modules.index(name)] = value
            last = run == len(records) - 1
            done = 1.0 if last else (run + 1) / (len(records) + 1)
            yield self.reading(done, values, coords=coords, converged=last, notes=tuple(_notes(records)))

    def _curves(self, records: list[TaskRecord], steps: Floats) -> dict[str, Any]:
        """All that follows from the recorded accuracies."""
        accuracy = np.full((len(records), len(records[0].stages), len(steps)), np.nan)
        for run, record in enumerate(records):
            for i, (at, values) in enumerate(record.accuracy):
                accuracy[run, i, np.searchsorted(steps, at)] = values
        found: dict[str, Any] = {"accuracy_on": accuracy}
        worst = [worst_cases(record, steps) for record in records]
        found["min_accuracy_at"], found["worst_case_accuracy_at"] = (np.array([w[k] for w in worst]) for k in (0, 1))
        switches = [falls(record, self.share) for record in records]
        found["fall"], found["recovery"] = (np.array([s[k] for s in switches]) for k in (0, 1))
        each = {
            "min_accuracy": [_last_known(w[0]) for w in worst],
            "worst_case_accuracy": [_last_known(w[1]) for w in worst],
            "gap": [known_mean(fall) for fall in found["fall"]],
        }
        for name, width in (("short", self.short), ("long", self.long)):
            for word, sign in (("forgetting", 1), ("gain", -1)):
                lost = [[largest_fall(sign * v, width) for _, v in record.accuracy] for record in records]
                each[f"{word}_{name}"] = [float(np.mean(one)) for one in lost]
        return found | over_runs({name: np.array(each[name]) for name in MEASURES})

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """All numbers with their errors, and the module that drifted most."""
        found: dict[str, Value] = {of: float(data[of]) for name in MEASURES for of in (name, f"{name}_error")}
        drift = data.drift.values[:, 1:] if data.sizes["trained"] > 1 else data.drift.values
        if np.isfinite(drift).any():
            mean = np.array([known_mean(drift[..., k]) for k in range(drift.shape[-1])])
            found["drifted_most"] = str(data["module"].values[int(np.nanargmax(mean))])
        return found

    def figure(self, data: xr.Dataset) -> Figure:
        """Accuracy on each task over steps (the first run), with the worst case, and the drift of the modules."""
        marks: list[AnyMark] = []
        for i, task in enumerate(data["task"].values):
            there = np.isfinite(data.accuracy_on.values[0, i])
            y = data.accuracy_on.values[0, i][there]
            label = f"task {task}" if i < len(ROLES) else ""
            marks.append(Line(data["step"].values[there], y, label, ROLES[i % len(ROLES)]))
        marks.append(Line(data["step"].values, data.worst_case_accuracy_at.values[0], "worst case", "reference"))
        if np.isfinite(data.min_accuracy):
            marks.append(Rule(float(data.min_accuracy), "y", "min accuracy"))
        at = np.arange(1.0, data.sizes["module"] + 1)
        drift = np.array([known_mean(data.drift.values[:, 1:, k]) for k in range(at.size)])
        bars = Bars(at, drift, names=tuple(str(name) for name in data["module"].values))
        return Figure(
            (
                Panel(tuple(marks), Axis("step"), Axis("accuracy")),
                Panel((bars,), Axis("module"), Axis("relative drift at a switch")),
            )
        )

    def estimate(self, subject: Trajectory | Runs) -> Cost:
        """The curves of every run, and two checkpoints at a time."""
        members = members_of(subject, self.name)
        path = next(iter(members.values()))
        one = sum(t.numel() * t.element_size() for t in path.weights(path.steps[0]).values())
        rows = sum(len(m.source.lines()) for m in members.values())
        return Cost(3 * one + 128 * rows + 1024, None, f"{rows} recorded lines, and two checkpoints for each task")


def largest_fall(values: Floats, width: int) -> float:
    """max (a_m - a_n) over m before n in a window of ``width`` evaluations; 0 where it only rises. O(n · width)."""
    falls_at = [(values[:-lag] - values[lag:]).max() for lag in range(1, min(width, len(values)))]
    if not len(values):
        return np.nan
    return float(max([0.0, *falls_at]))


def worst_cases(record: TaskRecord, steps: Floats) -> tuple[Floats, Floats]:
    """min_accuracy and worst_case_accuracy until each step (steps,); nan in the first task, and before evaluations."""
    found = np.full((2, len(steps)), np.nan)
    for k, stage in enumerate(record.stages[1:], 1):
        here = np.flatnonzero((steps >= stage.first) & (steps <= stage.last))
        least = [
            _running_least(curve, record.stages[i].last, steps[here]) for i, curve in enumerate(record.accuracy[:k])
        ]
        own = _latest(record.accuracy[k], stage.first, steps[here])
        found[0, here] = np.mean(least, axis=0)
        found[1, here] = own / (k + 1) + (1 - 1 / (k + 1)) * found[0, here]
    return found[0], found[1]


def _running_least(curve: Curve, after: float, steps: Floats) -> Floats:
    """The least value evaluated behind a step, until each of ``steps``; nan where none was."""
    at, values = curve[0][curve[0] > after], curve[1][curve[0] > after]
    least = np.concatenate([[np.nan], np.minimum.accumulate(values)])
    return least[np.searchsorted(at, steps, side="right")]


def _latest(curve: Curve, since: float, steps: Floats) -> Floats:
    """The last value evaluated since a step, until each of ``steps``; nan where none was."""
    at, values = curve[0][curve[0] >= since], curve[1][curve[0] >= since]
    return np.concatenate([[np.nan], values])[np.searchsorted(at, steps, side="right")]


def falls(record: TaskRecord, share: float) -> tuple[Floats, Floats]:
    """(fall, recovery), each (tasks, tasks): while task k is trained, of each task trained before it; else nan."""
    count = len(record.stages)
    found = np.full((2, count, count), np.nan)
    for k, stage in enumerate(record.stages[1:], 1):
        switch = record.stages[k - 1].last
        for i, (steps, values) in enumerate(record.accuracy[:k]):
            before, during = values[steps <= switch], (steps > switch) & (steps <= stage.last)
            if before.size and during.any():
                found[:, k, i] = _fall(before[-1], steps[during] - switch, values[during], share)
    return found[0], found[1]


def _fall(before: float, steps: Floats, values: Floats, share: float) -> tuple[float, float]:
    """How far below ``before`` values came, and after how many steps they were back; 0 steps where they stayed."""
    lowest = int(values.argmin())
    if values[lowest] >= share * before:
        return float(before - values[lowest]), 0.0
    back = np.flatnonzero(values[lowest:] >= share * before)
    return float(before - values[lowest]), float(steps[lowest + back[0]]) if back.size else np.nan


def _drifts(record: TaskRecord, path: Trajectory) -> Iterator[dict[str, float]]:
    """Relative drift of each module in each task; empty where no checkpoint was kept in it."""
    at = path.steps[0]
    before = _weights(path, at)
    for stage in record.stages:
        within = [step for step in path.steps if stage.first <= step <= stage.last]
        if not within or within[-1] == at:
            yield {}
            continue
        at, after = within[-1], _weights(path, within[-1])
        yield {name: _relative(names, before, after) for name, names in _modules(after).items()}
        before = after


def _weights(path: Trajectory, step: int) -> dict[str, torch.Tensor]:
    """Weights of a checkpoint without running statistics; tied ones once."""
    held = {t.data_ptr(): (n, t) for n, t in reversed(path.weights(step).items()) if t.is_floating_point()}
    return {n: t for n, t in reversed(held.values()) if n.rpartition(".")[2] not in _STATISTICS}


def _modules(weights: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """Names of tensors by the module that holds them."""
    found: dict[str, list[str]] = {}
    for name in weights:
        found.setdefault(name.rpartition(".")[0] or "model", []).append(name)
    return found


def _relative(names: list[str], before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> float:
    moved, size = 0.0, 0.0
    for name in names:
        if name not in before or before[name].shape != after[name].shape:
            return np.nan
        moved += float((after[name].double() - before[name].double()).square().sum())
        size += float(before[name].double().square().sum())
    return (moved / size) ** 0.5 if size else np.nan


def _steps(records: list[TaskRecord]) -> Floats:
    every = [at for record in records for at, _ in record.accuracy]
    return np.unique(np.concatenate(every)) if any(map(len, every)) else np.zeros(1)


def _notes(records: list[TaskRecord]) -> Iterator[str]:
    for record in records:
        if len(record.stages) < 2:
            yield f"{record.label} has one task only: there is no switch"
        gaps = [np.diff(at) for at, _ in record.accuracy if len(at) > 1]
        if gaps:
            every = np.concatenate(gaps)
            yield f"{record.label} is evaluated every {np.min(every):g} to {np.max(every):g} steps"


def _last_known(values: Floats) -> float:
    there = values[np.isfinite(values)]
    return float(there[-1]) if there.size else np.nan
