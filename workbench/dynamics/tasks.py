"""Trainings over a sequence of tasks: their scores, task by task, from what was recorded."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workbench.dynamics.described import TAKEN
from workbench.numerics.crossings import known
from workbench.numerics.stats import error_of_mean
from workbench.probe import Variable
from workbench.several import Runs
from workbench.trajectory import Trajectory

Floats = NDArray[np.float64]


def members_of(subject: Trajectory | Runs, name: str) -> dict[str, Trajectory]:
    """The trajectories by label.

    Raises:
        TypeError: runs that are no trajectories.
    """
    members = dict(subject.items()) if isinstance(subject, Runs) else {subject.label: subject}
    for label, member in members.items():
        if not isinstance(member, Trajectory):
            raise TypeError(
                f"{name} reads recorded trainings; {label!r} is a {type(member).__name__}. Give Runs of Trajectories."
            )
    return members


def by_task(path: Trajectory, task: str, score: str) -> dict[float, tuple[float, float]]:
    """(mean, last) of a recorded score within each task; a task lasts until the next is recorded. None: empty."""
    table = path.scalars
    if task not in table.columns or score not in table.columns:
        return {}
    held = table.assign(**{task: table[task].ffill()})[[task, score]].dropna().to_numpy(dtype=np.float64)
    parts = {float(k): held[held[:, 0] == k, 1] for k in np.unique(held[:, 0])}
    return {k: (float(part.mean()), float(part[-1])) for k, part in parts.items()}


@dataclass(frozen=True)
class Stage:
    """The training of one task: its number, its first and its last recorded step."""

    task: int
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class TaskRecord:
    """A training on one task after another: its ``stages`` in order, and each task's accuracy over (steps, values)."""

    label: str
    stages: tuple[Stage, ...]
    accuracy: tuple[tuple[Floats, Floats], ...]

    @classmethod
    def of(cls, label: str, path: Trajectory, pattern: str, task: str) -> TaskRecord:
        """What was recorded: the number of the task at hand, and accuracies called as ``pattern`` with a number in.

        Raises:
            ValueError: no such scalars; the message lists what there is. A task that is trained twice.
        """
        table = path.scalars
        there = [str(n) for n in table.columns if n not in TAKEN]
        if task not in there:
            raise ValueError(
                f"{label} has no recorded {task!r}, the number of the task at hand; it has {', '.join(there) or 'none'}"
                ". Record it at each step, or name another in settings."
            )
        stages = _stages(label, *known(table.index, table[task].ffill()))
        names = [pattern.replace("{}", str(stage.task)) for stage in stages]
        if missing := [name for name in names if name not in there]:
            raise ValueError(
                f"{label} has no recorded {missing[0]!r}; it has {', '.join(there)}. Record the accuracy of each task "
                "throughout, or change the pattern, in which {} stands for the number."
            )
        return cls(label, stages, tuple(known(table.index, table[name]) for name in names))

    @property
    def tasks(self) -> tuple[int, ...]:
        """Numbers of the tasks in the order of training."""
        return tuple(stage.task for stage in self.stages)

    def after(self) -> Floats:
        """R (tasks, tasks): accuracy on task j at the last evaluation while task i was trained; nan without any."""
        table = np.full((len(self.stages), len(self.stages)), np.nan)
        for i, stage in enumerate(self.stages):
            for j, (steps, values) in enumerate(self.accuracy):
                there = (steps >= stage.first) & (steps <= stage.last)
                table[i, j] = values[there][-1] if there.any() else np.nan
        return table

    def initial(self) -> Floats:
        """Accuracy of the initial network on each task (tasks,): what is recorded at step 0; else nan."""
        return np.array([v[0] if len(s) and s[0] == 0 else np.nan for s, v in self.accuracy])


def _stages(label: str, steps: Floats, numbers: Floats) -> tuple[Stage, ...]:
    found: list[Stage] = []
    for number, part in itertools.groupby(zip(steps, numbers, strict=True), key=lambda row: int(row[1])):
        at = [int(step) for step, _ in part]
        found.append(Stage(number, at[0], at[-1]))
    if not found:
        raise ValueError(f"{label} has no task's number that is known: all are nan. Record it at each step.")
    twice = [s.task for i, s in enumerate(found) if s.task in [t.task for t in found[:i]]]
    if twice:
        raise ValueError(
            f"{label} trains on task {twice[0]} more than once; these measures are of tasks that follow on each other. "
            "Give the second visit a number of its own."
        )
    return tuple(found)


def joined_tasks(records: list[TaskRecord]) -> list[int]:
    """The tasks of some runs, in the order of the first.

    Raises:
        ValueError: runs of other tasks, or in another order.
    """
    first = records[0]
    for record in records[1:]:
        if record.tasks != first.tasks:
            raise ValueError(
                f"runs are compared on the same tasks in the same order; {first.label} has {list(first.tasks)} and "
                f"{record.label} {list(record.tasks)}."
            )
    return list(first.tasks)


def each_and_mean(measures: Mapping[str, str]) -> Iterator[Variable]:
    """For each name with its words: the mean over runs, its standard error, and what it is for every run."""
    for name, words in measures.items():
        yield Variable(name, (), words, error=f"{name}_error")
        yield Variable(f"{name}_error", (), "its standard error over runs")
        yield Variable(f"run_{name}", ("run",), words)


def over_runs(measured: Mapping[str, Floats]) -> dict[str, Any]:
    """The values of these variables, from what each run (runs,) gave for each name; nan where a run is not known."""
    found: dict[str, Any] = {}
    for name, values in measured.items():
        found[f"run_{name}"] = values
        found[name] = float(np.mean(values)) if values.size else np.nan
        found[f"{name}_error"] = float(error_of_mean(values))
    return found
