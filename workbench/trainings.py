"""Many trainings by label, on a Dask cluster, each into a folder of its own: seeds, widths, learning rates."""

from __future__ import annotations

import inspect
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import record
from workbench.fingerprint import digest
from workbench.several import Runs
from workbench.sweeping import Asked, Outcome, connected
from workbench.trajectory import Trajectory

if TYPE_CHECKING:
    import pandas as pd

FINISHED = "training.json"
"""The file that a finished training leaves in its folder: its settings and how long it took."""


class TrainingsFailed(RuntimeError):
    """Some trainings raised; ``table`` says which and why. The others are recorded, and are not trained again."""

    def __init__(self, table: pd.DataFrame) -> None:
        self.table = table
        failed = table[table.status == "failed"]
        super().__init__(f"{len(failed)} of {len(table)} trainings failed; the first: {failed.message.iloc[0]}")


def trainings(
    recipe: Callable[..., Any],
    settings: Mapping[str, Mapping[str, Any]],
    folder: str | Path = "runs",
    client: Any = None,
    *,
    workers: int | None = None,
    on_progress: Callable[[str, Outcome], None] | None = None,
) -> Runs:
    """Train once for every label, in worker processes, and give back the recorded runs by label.

    A training that was finished by the same recipe (known by its name) under the same settings is not repeated; one
    that was cut off is called again with the same folder, where ``wb.Recorder`` goes on or starts anew as the recipe
    tells it.

    Args:
        recipe: ``recipe(folder, **settings)``: trains, and records into ``folder`` with a ``wb.Recorder``.
        settings: the recipe's keyword arguments by label, as JSON has them: ``{"seed 0": {"seed": 0}, ...}``.
        folder: of the runs; each label gets a folder in it.
        client: a ``dask.distributed.Client``; None: processes on this machine.
        workers: how many of those; None: one a core, at most eight.
        on_progress: called with a label and what became of it whenever a training ends.

    Raises:
        TypeError, ValueError: no settings, arguments that the recipe does not take, settings that JSON does not hold.
        TrainingsFailed: after all others have ended.
        ImportError: Dask is not installed.
    """
    labels, top = list(settings), Path(folder)
    _check(recipe, settings)
    places = {label: top / _file_name(label) for label in labels}
    with connected(client, workers, len(labels)) as cluster:
        pieces = [
            ("training", train, (recipe, dict(settings[label]), str(places[label].resolve()))) for label in labels
        ]
        outcomes = [Outcome()] * len(labels)
        for number, outcome in Asked(cluster, pieces).as_they_end():
            outcomes[number] = outcome
            if on_progress is not None:
                on_progress(labels[number], outcome)
    if any(outcome.status == "failed" for outcome in outcomes):
        raise TrainingsFailed(_table(labels, outcomes))
    return Runs({label: Trajectory.open(place) for label, place in places.items()})


def train(recipe: Callable[..., Any], settings: dict[str, Any], folder: str) -> Outcome:
    """Run by a worker: one training, unless it was finished under these settings before; errors become words."""
    began, mark = time.perf_counter(), Path(folder) / FINISHED
    # Without its module, which a script calls __main__.
    name = getattr(recipe, "__qualname__", type(recipe).__qualname__)
    wanted = digest(name, json.dumps(settings, sort_keys=True))
    if mark.exists() and json.loads(mark.read_text()).get("digest") == wanted:
        return Outcome("stored", wanted, 0.0, "", os.getpid())
    try:
        recipe(folder, **settings)
        if not (Path(folder) / record.MANIFEST).exists():
            raise ValueError(
                f"{name} recorded nothing: open wb.Recorder(folder, model, ...) with the folder it is given"
            )
    except Exception as problem:  # noqa: BLE001  (any failure is a row of the table)
        return Outcome("failed", "", time.perf_counter() - began, f"{type(problem).__name__}: {problem}", os.getpid())
    seconds = time.perf_counter() - began
    half = mark.with_suffix(".tmp")
    half.write_text(json.dumps({"digest": wanted, "settings": settings, "seconds": seconds}, indent=1))
    half.replace(mark)
    return Outcome("measured", wanted, seconds, "", os.getpid())


def _check(recipe: Callable[..., Any], settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Bad settings are told before any training starts."""
    if not settings:
        raise ValueError("trainings needs settings by label: {'seed 0': {'seed': 0}, 'seed 1': {'seed': 1}}.")
    names = [_file_name(label) for label in settings]
    if bare := [label for label, name in zip(settings, names, strict=True) if not name.strip(".")]:
        raise ValueError(f"a label names its training's folder; {bare[0]!r} names none.")
    if len(set(names)) < len(names):
        raise ValueError(f"two labels would share a folder: {sorted(names)}.")
    for label, chosen in settings.items():
        try:
            inspect.signature(recipe).bind("folder", **chosen)
            json.dumps(dict(chosen))
        except TypeError as problem:
            raise TypeError(f"settings of {label!r}: {problem}.") from problem


def _file_name(label: str) -> str:
    return "".join(c if c.isalnum() or c in "-_.=+" else "_" for c in label)


def _table(labels: list[str], outcomes: list[Outcome]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(
        [
            {"label": n, "status": o.status, "seconds": o.seconds, "message": o.message}
            for n, o in zip(labels, outcomes, strict=True)
        ]
    )
