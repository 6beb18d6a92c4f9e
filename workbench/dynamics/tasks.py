"""Trainings over a sequence of tasks: their scores, task by task, from what was recorded."""

from __future__ import annotations

import numpy as np

from workbench.several import Runs
from workbench.trajectory import Trajectory


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
