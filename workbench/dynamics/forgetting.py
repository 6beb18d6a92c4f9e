"""Forgetting and transfer between tasks, from accuracies recorded on each of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from workbench.dynamics.tasks import TaskRecord, each_and_mean, joined_tasks, members_of, over_runs
from workbench.figure import Axis, Figure, Heat, Panel, Points
from workbench.numerics.sampling import Draw
from workbench.probe import Cost, Look, Probe, Reading, Value, Variable
from workbench.schema import Doc
from workbench.several import Runs
from workbench.trajectory import Trajectory

Floats = NDArray[np.float64]
MEASURES = {
    "average_accuracy": "mean over tasks of the accuracy at the end",
    "forgetting": "mean loss of accuracy since the best moment before the last task",
    "backward_transfer": "mean change of accuracy since the end of each task's own training",
    "forward_transfer": "mean accuracy just before a task's own training, less that of the initial network",
}


@dataclass(frozen=True)
class Forgetting(Probe[Any]):
    """Average accuracy, forgetting, and transfer backward and forward over a sequence of tasks: one training or many.

    What it measures, from R_ij, the recorded accuracy on task j at the last evaluation while task i of T was trained:
    ``average_accuracy`` = mean_j R_Tj; ``forgetting`` = mean_(j<T) (max_(l<T) R_lj - R_Tj); ``backward_transfer`` =
    mean_(j<T) (R_Tj - R_jj); ``forward_transfer`` = mean_(j>1) (R_(j-1)j - b_j), b_j the accuracy of the initial
    network. Each for every run (``run_...``), and the mean over runs. Record the accuracy on every task throughout,
    under names as in ``accuracy``, and the number of the task at hand under ``task``; b_j is what is recorded at
    step 0.

    How to read it: forgetting is 0 where nothing was lost; backward transfer below 0 is loss, above 0 a task that
    improved later. Forgetting and -backward transfer differ where a task was best at another time than at its own end.

    What it costs: reading the scalars.

    When it misleads: these look at the ends of tasks only, and miss what is lost and regained in between: see
    StabilityGap. Without forward transfer's b_j (nothing recorded at step 0) it is nan.

    Errors: standard error over runs; nan for one run. A run's own values are those recorded.

    Source: Lopez-Paz and Ranzato 2017 (transfer); Chaudhry et al. 2018 (forgetting).
    """

    looks_at: ClassVar[Look] = "trajectory"
    looks_also_at: ClassVar[tuple[Look, ...]] = ("runs",)
    variables: ClassVar[tuple[Variable, ...]] = (
        *each_and_mean(MEASURES),
        Variable("after", ("run", "trained", "task"), "accuracy on a task after training another"),
        Variable("initial", ("run", "task"), "accuracy of the initial network"),
        Variable("task_forgetting", ("run", "task"), "loss of accuracy since the best moment before the last task"),
    )

    accuracy: Annotated[str, Doc("Names of the recorded accuracies; {} stands for the task's number.")] = (
        "test_accuracy_task{}"
    )
    task: Annotated[str, Doc("Recorded number of the task at hand.")] = "task"

    def stream(self, subject: Trajectory | Runs, draw: Draw) -> Iterator[Reading]:
        """All at once."""
        members = members_of(subject, self.name)
        records = [TaskRecord.of(label, path, self.accuracy, self.task) for label, path in members.items()]
        tasks = joined_tasks(records)
        after, initial = (np.array([getattr(r, name)() for r in records]) for name in ("after", "initial"))
        each = [measures(r, b) for r, b in zip(after, initial, strict=True)]
        values: dict[str, Any] = {"after": after, "initial": initial}
        values["task_forgetting"] = [_since_best(r) for r in after]
        values |= over_runs({name: np.array([one[name] for one in each]) for name in MEASURES})
        coords = {"run": list(members), "trained": tasks, "task": tasks}
        notes = () if len(tasks) > 1 else ("one task only: nothing can be forgotten",)
        yield self.reading(1.0, values, coords=coords, converged=True, notes=notes)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """The four numbers with their errors."""
        return {of: float(data[of]) for name in MEASURES for of in (name, f"{name}_error")}

    def figure(self, data: xr.Dataset) -> Figure:
        """The table of accuracies, mean over runs, and what each task lost."""
        places = np.arange(data.sizes["task"], dtype=np.float64)
        table = Heat(places, places, data.after.values.mean(0), "accuracy")
        marks = tuple(Points(places, lost) for lost in data.task_forgetting.values)
        return Figure(
            (
                Panel((table,), Axis("accuracy on task (in order)"), Axis("after training task"), Axis("accuracy")),
                Panel(marks, Axis("task (in order)"), Axis("forgetting")),
            )
        )

    def estimate(self, subject: Trajectory | Runs) -> Cost:
        """The curves of every run."""
        members = members_of(subject, self.name)
        rows = sum(len(m.source.lines()) for m in members.values())
        return Cost(1024 + 64 * rows, None, f"{rows} recorded lines")


def measures(after: Floats, initial: Floats) -> dict[str, float]:
    """The four numbers from R (tasks, tasks) and b (tasks,); all but the first are nan for a single task."""
    own, end = np.diag(after), after[-1]
    before = np.diag(after, 1) - initial[1:]
    several = len(after) > 1
    return {
        "average_accuracy": float(end.mean()),
        "forgetting": float(_since_best(after)[:-1].mean()) if several else np.nan,
        "backward_transfer": float((end - own)[:-1].mean()) if several else np.nan,
        "forward_transfer": float(before.mean()) if several else np.nan,
    }


def _since_best(after: Floats) -> Floats:
    """max_(l<T) R_lj - R_Tj of each task; nan of the last, which had no time to be forgotten."""
    if len(after) < 2:
        return np.full(len(after), np.nan)
    lost = after[:-1].max(0) - after[-1]
    lost[-1] = np.nan
    return lost
