"""What sets one run of many apart: its learning rate, its batch size, as recorded or as its label says."""

from __future__ import annotations

import math
import re
from typing import Any, cast

from workbench.dynamics.described import TAKEN
from workbench.several import Runs
from workbench.trajectory import Trajectory

_NUMBER = r"([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)"
_RATE = re.compile(rf"(?:\blr|learning.?rate|η)\s*[=:_ -]?\s*{_NUMBER}", re.IGNORECASE)
_BATCH = re.compile(rf"(?:batch(?:.?size)?|\bbs)\s*[=:_ -]?\s*{_NUMBER}", re.IGNORECASE)


def trajectories(runs: Runs, name: str) -> dict[str, Trajectory]:
    """The members by label, refused where they are no trajectories.

    Raises:
        TypeError: members of another kind.
    """
    for label, member in runs.items():
        if getattr(member, "kind", "") != "trajectory":
            raise TypeError(
                f"{name} reads recorded trainings; {label!r} is a {type(member).__name__}. Make the Runs of "
                "wb.Trajectory.open(folder)."
            )
    return cast("dict[str, Trajectory]", dict(runs))


def learning_rate(label: str, trajectory: Trajectory) -> float:
    """The largest learning rate that the checkpoints' optimizers say; else the label's (``"lr 0.1"``), else nan."""
    rates = [_rate(trajectory.optimizer(step)) for step in trajectory.steps]
    known = [r for r in rates if math.isfinite(r)]
    return max(known) if known else _labelled(_RATE, label)


def batch_size(label: str, trajectory: Trajectory) -> float:
    """The recorded scalar ``batch_size`` (its first value), else the label's (``"batch 64"``), else nan."""
    table = trajectory.scalars
    values = table["batch_size"].dropna().to_list() if "batch_size" in table else []
    return float(values[0]) if values else _labelled(_BATCH, label)


def _rate(held: dict[str, Any] | None) -> float:
    return float(held["groups"][0]["lr"]) if held and held["groups"] else math.nan


def _labelled(pattern: re.Pattern[str], label: str) -> float:
    found = pattern.search(label)
    return float(found[1]) if found else math.nan


def missing(trajectory: Trajectory, label: str, series: str) -> str:
    """What to say where a run did not record a series."""
    held = [str(c) for c in trajectory.scalars.columns if c not in TAKEN]
    return f"{label!r} recorded no scalar called {series!r}; it has: {', '.join(held) or 'none'}. Name one of them."
