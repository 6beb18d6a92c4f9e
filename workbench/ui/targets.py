"""What a bench can be opened on, and which part of it a probe looks at."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from workbench import record
from workbench.dynamics.recorder import Recorder
from workbench.nothing import Nothing
from workbench.probe import Probe
from workbench.several import Runs
from workbench.store import Store
from workbench.trajectory import Trajectory

KINDS = ("subject", "pair", "trajectory", "runs", "nothing")


def target_of(given: Any, using: Mapping[str, Any]) -> Any:
    """What is looked at when a bench is opened on ``given``: of a Recorder its record, for an experiment nothing.

    A folder is the record in it, or else the runs below it.

    Args:
        given: what the person passed.
        using: model, data and loss for the steps of a trajectory, those that were passed.

    Raises:
        TypeError: no bench opens on such a thing, or it has a model, data and loss of its own.
        FileNotFoundError: a Recorder that has not recorded anything yet, or a folder without runs.
    """
    if isinstance(given, str | Path):
        below = folder_of(given)
        return Runs(begun_in(below, using)) if below else Trajectory.open(given).using(**using)
    target: Any = Nothing() if isinstance(given, Probe) and "nothing" in kinds_of(given) else given
    if isinstance(given, Recorder):
        target = Trajectory.open(given.folder, trust=True)  # what it names was given to it in this process
    kind = getattr(target, "kind", None)
    if kind not in KINDS:
        raise TypeError(
            "a bench opens on an experiment, a folder of recorded runs, a Subject, Pair, Trajectory or Runs; got "
            f"{type(given).__name__}. "
            "Make one with wb.Subject(model, data, loss=...) or wb.Trajectory.open(folder)."
        )
    if using and kind != "trajectory":
        raise TypeError(
            f"{', '.join(using)} can be given with a Trajectory only; a {type(target).__name__} has its own."
        )
    return target.using(**using) if using else target


def folder_of(given: Any) -> Path | None:
    """The folder whose runs a bench shows, also those that begin later; None where it is opened on anything else."""
    return Path(given) if isinstance(given, str | Path) and not (Path(given) / record.MANIFEST).exists() else None


def begun_in(folder: Path, using: Mapping[str, Any], known: Collection[str] = ()) -> dict[str, Trajectory]:
    """The recorded runs below a folder that are not ``known`` yet, by label.

    Raises:
        FileNotFoundError: no runs are there, known or not. ValueError: a record that is damaged.
    """
    found = record.runs_in(folder)
    return {label: Trajectory.open(path).using(**using) for label, path in found.items() if label not in known}


def kinds_of(probe: Probe[Any]) -> tuple[str, ...]:
    """All kinds of things that a probe looks at."""
    return (probe.looks_at, *probe.looks_also_at)


def kind_seen(probe: Probe[Any], target: str, member: str) -> str:
    """What a probe looks at on a target: all of it where it can, else one member, else one model.

    Args:
        probe: one that the target offers.
        target: the kind of what the bench is open on.
        member: the kind of its chosen run; that of the target where it holds no runs.
    """
    kinds = kinds_of(probe)
    return next((kind for kind in (target, member) if kind in kinds), "subject")


def store_of(target: Any) -> Store | None:
    """The store beside a recorded run; None, which is the default store, for anything else."""
    folder = getattr(getattr(target, "source", None), "folder", None)
    return Store.beside(folder) if folder is not None else None


def nearest(member: Any, step: int | None) -> int | None:
    """The checkpoint nearest to a step; the last one for None; None where there are none."""
    steps = tuple(member.steps) if member.kind == "trajectory" else ()
    if not steps:
        return None
    return steps[-1] if step is None else min(steps, key=lambda s: abs(s - step))
