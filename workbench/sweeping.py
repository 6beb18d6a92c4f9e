"""Many probes over many subjects on a Dask cluster, through the store: lost, repeated and restarted work costs nothing.

Each pair of a probe and a subject is a task of its own. A worker looks into the store first and keeps what it measures
there, so a task that runs twice, or again tomorrow, is answered and not measured. Dask is imported on first use.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from workbench import schema
from workbench.dynamics.checkpoints import chosen_steps
from workbench.probe import Probe, Reading
from workbench.several import Runs
from workbench.store import Store
from workbench.trajectory import Trajectory

if TYPE_CHECKING:
    import pandas as pd

Status = Literal["waiting", "stored", "measured", "cut short", "failed"]
DEATHS = 10
"""How many workers may die under a task before it is the task's own fault."""
WORKERS = 8
"""Processes of a local cluster, at most: one a core."""
TOGETHER = "all together"
"""The label of all trajectories as one, for probes that compare runs."""
_INSTALL = 'sweeps need Dask: pip install "workbench[dask]"'


@dataclass(frozen=True)
class Task:
    """One probe on one subject: the subject's label, and the recorded step where it is one of a trajectory."""

    probe: Probe[Any]
    label: str
    step: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a task: the reading's ``key`` in the store, or a ``message``."""

    status: Status = "waiting"
    key: str = ""
    seconds: float = float("nan")
    message: str = ""
    worker: int = 0


@dataclass(eq=False)
class Sweep:
    """The tasks of a sweep, what became of each, and the readings in the store."""

    tasks: tuple[Task, ...]
    store: Store
    outcomes: list[Outcome] = field(default_factory=list[Outcome])

    @property
    def table(self) -> pd.DataFrame:
        """One row a task: probe, settings, subject, step, status, seconds, message, key."""
        import pandas as pd

        rows = [
            {"probe": t.probe.name, "settings": schema.code(t.probe), "subject": t.label, "step": t.step}
            | dataclasses.asdict(o)
            for t, o in zip(self.tasks, self.outcomes, strict=True)
        ]
        columns = ("probe", "settings", "subject", "step", *(f.name for f in dataclasses.fields(Outcome)))
        made = pd.DataFrame(rows, columns=list(columns))
        return made.assign(step=made.step.astype("Int64"))

    @property
    def failed(self) -> pd.DataFrame:
        """The rows of tasks that failed, with the words of the error."""
        return self.table.query("status == 'failed'")

    @property
    def done(self) -> float:
        """The share of tasks that have ended, one way or another."""
        ended = sum(o.status != "waiting" for o in self.outcomes)
        return ended / len(self.tasks) if self.tasks else 1.0

    def readings(self, probe: str | None = None) -> Iterator[tuple[Task, Reading]]:
        """Finished readings (of one probe, by its class name), opened one at a time from the store."""
        for task, outcome in zip(self.tasks, self.outcomes, strict=True):
            if outcome.status in ("stored", "measured") and probe in (None, task.probe.name):
                found = self.store.ask(task.probe, outcome.key)
                if found is not None:
                    yield task, found

    def summaries(self, probe: str | None = None) -> pd.DataFrame:
        """The headline numbers of every finished reading, with their errors, beside what was measured on what."""
        import pandas as pd

        return pd.DataFrame(
            [
                {"probe": t.probe.name, "subject": t.label, "step": t.step, **dict(reading.summary)}
                for t, reading in self.readings(probe)
            ]
        )

    def __repr__(self) -> str:
        counts = {s: sum(o.status == s for o in self.outcomes) for s in ("measured", "stored", "cut short", "failed")}
        said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        return f"<Sweep of {len(self.tasks)} tasks: {said or 'nothing done'}>"


def sweep(
    probes: Probe[Any] | Sequence[Probe[Any]],
    subjects: Any,
    store: str | Path | Store = "readings",
    client: Any = None,
    *,
    seed: int = 0,
    seconds: float | None = None,
    steps: str | Sequence[int] | None = None,
    every: int = 1,
    workers: int | None = None,
    on_progress: Callable[[Sweep], None] | None = None,
) -> Sweep:
    """Measure every probe on every subject that it looks at, in worker processes, and keep the readings in ``store``.

    A probe of a point looks at each checkpoint of a trajectory, a probe of runs at all trajectories together. What is
    in the store already is not measured again; a failure is written down and stops nothing else; an interrupt leaves
    what was stored, and the next call goes on.

    Args:
        probes: one or several, with their settings.
        subjects: a Subject, Pair, Trajectory or Runs; several in a list, or by label in a mapping.
        store: folder (or ``wb.Store``) that all workers reach; subjects lie there, pickled, while the sweep runs.
        client: a ``dask.distributed.Client``, for example of a dask-jobqueue cluster; None: processes on this machine.
            A script that starts those must have its work under ``if __name__ == "__main__":``.
        seed: of the probes' random numbers.
        seconds: time budget of each task; what is not finished then counts as cut short.
        steps: recorded steps of trajectories to look at, as a list or in words (``"0,100..500,last"``: ranges have both
            ends, each trajectory its own last step); None: all with weights.
        every: look at every so many of these; the first and the last always.
        workers: processes on this machine, if no client is given; None: one a core, at most eight.
        on_progress: called with the sweep so far whenever a task ends.

    Returns:
        The sweep with its ``table`` of progress and failures, and its ``readings``.

    Raises:
        TypeError, ValueError: nothing to measure, a probe that looks at none of the subjects, or steps that are not
            recorded.
        ImportError: Dask is not installed.
    """
    chosen = [probes] if isinstance(probes, Probe) else list(probes)
    kept = store if isinstance(store, Store) else Store(store)
    members = _together(chosen, _members(subjects))
    tasks = tuple(_work(chosen, members, partial(chosen_steps, wanted=steps, every=every)))
    if (steps is not None or every != 1) and all(task.step is None for task in tasks):
        raise ValueError(
            "steps and every choose among checkpoints, and none of these probes looks at one; leave it out."
        )
    result = Sweep(tasks, kept, [Outcome()] * len(tasks))
    with connected(client, workers, len(tasks)) as cluster, _laid_out(kept, members) as files:
        rest = str(kept.path.resolve()), seed, seconds
        pieces = [(task.probe.name, measure, (files[task.label], task, *rest)) for task in tasks]
        for number, outcome in Asked(cluster, pieces).as_they_end():
            result.outcomes[number] = outcome
            if on_progress is not None:
                on_progress(result)
    return result


def at_steps(
    probe: Probe[Any], trajectory: Trajectory, steps: Sequence[int], seed: int, client: Any, store: str | Path | None
) -> Iterator[tuple[int, Reading | Exception]]:
    """The probe's reading at each step as it comes from the workers, or the error; through the run's own store.

    Raises:
        OSError: the store's folder cannot be reached.
    """
    kept = Store(store) if store is not None else store_of(trajectory)
    with connected(client, None, len(steps)) as cluster, _laid_out(kept, {"": trajectory}) as files:
        tasks = [Task(probe, trajectory.label, step) for step in steps]
        rest = str(kept.path.resolve()), seed, None
        pieces = [(probe.name, measure, (files[""], task, *rest)) for task in tasks]
        for number, outcome in Asked(cluster, pieces).as_they_end():
            found = kept.ask(probe, outcome.key) if outcome.key else None
            yield steps[number], found or ValueError(outcome.message or "its reading was lost from the store")


def store_of(trajectory: Trajectory) -> Store:
    """The store of a recorded run; the user's own for checkpoints that were adopted."""
    folder = getattr(trajectory.source, "folder", None)
    return Store() if folder is None else Store.beside(folder)


# ------------------------------------------------------------------------------------------------------ what there is


def _members(subjects: Any) -> dict[str, Any]:
    """What is to be looked at, by label."""
    if isinstance(subjects, Mapping) and not isinstance(subjects, Runs):
        return {str(label): one for label, one in subjects.items()}
    if hasattr(subjects, "kind"):
        return {_label(subjects, 0): subjects}
    found: dict[str, Any] = {}
    for number, one in enumerate(subjects):
        label = _label(one, number)
        found[label if label not in found else f"{label} ({number})"] = one
    return found


def _together(probes: Iterable[Probe[Any]], members: dict[str, Any]) -> dict[str, Any]:
    """The members, and with them all trajectories as one where a probe compares runs and was given none."""
    wanted = any(probe.looks_at == "runs" for probe in probes)
    alike = len(members) > 1 and all(isinstance(one, Trajectory) for one in members.values())
    return {**members, TOGETHER: Runs(members)} if wanted and alike else members


def _label(one: Any, number: int) -> str:
    return str(getattr(one, "label", None) or f"{getattr(one, 'kind', 'subject')} {number}")


def _work(
    probes: Iterable[Probe[Any]], members: Mapping[str, Any], pick: Callable[..., tuple[int, ...]]
) -> Iterator[Task]:
    """Every task; trajectories are opened up for probes of a point."""
    for probe in probes:
        found = [Task(probe, label, step) for label, one in members.items() for step in _steps(probe, label, one, pick)]
        if not found:
            kinds = ", ".join(sorted({getattr(one, "kind", type(one).__name__) for one in members.values()}))
            wanted = "several runs" if probe.looks_at == "runs" else f"a {probe.looks_at}"
            raise TypeError(f"{probe.name} looks at {wanted}; got {kinds or 'nothing'}.")
        yield from found


def _steps(probe: Probe[Any], label: str, one: Any, pick: Callable[..., tuple[int, ...]]) -> list[int | None]:
    kinds = (probe.looks_at, *(() if isinstance(one, Runs) and label == TOGETHER else probe.looks_also_at))
    if getattr(one, "kind", None) in kinds:
        return [None]
    if isinstance(one, Trajectory) and "subject" in kinds:
        return list(pick(one.steps, label=label))
    return []


# --------------------------------------------------------------------------------------------------- what workers do


def measure(file: str, task: Task, store: str, seed: int, seconds: float | None) -> Outcome:
    """Run by a worker: the stored answer, else a measurement that is stored; errors become words."""
    import dask

    began = time.perf_counter()
    try:
        # Else xarray asks the cluster for a lock on every file, by the name of a buffer that the cluster never saw.
        with dask.config.set(scheduler="synchronous"), open(file, "rb") as held:  # pyright: ignore[reportPrivateImportUsage]
            subject = pickle.load(held)  # noqa: S301  (written by the sweep itself, moments ago)
            status, key = _answered(task, subject, Store(store), seed, seconds)
    except Exception as problem:  # noqa: BLE001  (any failure is a row of the table)
        return Outcome("failed", "", time.perf_counter() - began, f"{type(problem).__name__}: {problem}", os.getpid())
    return Outcome(status, key, time.perf_counter() - began, "", os.getpid())


def _answered(task: Task, subject: Any, store: Store, seed: int, seconds: float | None) -> tuple[Status, str]:
    """How the answer came, and the key under which it lies in the store."""
    one = subject if task.step is None else subject.subject(task.step)
    key = store.key(task.probe, one, seed)
    if store.get(key) is not None:
        return "stored", key
    reading = store.get_or_run(task.probe, one, seed=seed, seconds=seconds)
    return ("measured" if reading.done == 1 else "cut short"), key


@contextmanager
def _laid_out(store: Store, members: Mapping[str, Any]) -> Generator[dict[str, str]]:
    """The subjects as files beside the readings while the sweep lasts, so that a worker that is new can open them."""
    import cloudpickle

    folder = store.path / ".sweep" / f"{os.getpid()}-{time.time_ns()}"
    folder.mkdir(parents=True)
    try:
        files = {label: str((folder / f"{i}.pkl").resolve()) for i, label in enumerate(members)}
        for label, one in members.items():
            with open(files[label], "wb") as file:
                cloudpickle.dump(one.snapshot() if hasattr(one, "snapshot") else one, file)
        yield files
    finally:
        for file in folder.glob("*.pkl"):
            file.unlink(missing_ok=True)
        for empty in (folder, folder.parent):
            with suppress(OSError):
                empty.rmdir()


class Asked:
    """Pieces of work that are out at a client: each a function that gives an :class:`Outcome`, with its arguments."""

    def __init__(self, client: Any, pieces: Sequence[tuple[str, Callable[..., Outcome], tuple[Any, ...]]]) -> None:
        self.client, self.pieces = client, pieces
        self.deaths = [0] * len(pieces)

    def submit(self, number: int) -> Any:
        """Send a piece out; one that is sent again gets a name of its own."""
        name, function, arguments = self.pieces[number]
        key = f"{name}-{number}-{time.time_ns()}"
        return self.client.submit(function, *arguments, key=key, pure=False)

    def as_they_end(self) -> Iterator[tuple[int, Outcome]]:
        """Each piece with its outcome; those whose workers died go out again. An interrupt calls the others back."""
        from distributed import as_completed

        futures = {self.submit(number): number for number in range(len(self.pieces))}
        waiting: Any = as_completed(list(futures), raise_errors=False)
        try:
            for future in waiting:
                number = futures.pop(future)
                outcome = self.outcome(future, number)
                if outcome is not None:
                    yield number, outcome
                    continue
                new = self.submit(number)
                futures[new] = number
                waiting.add(new)
        finally:
            if futures:
                self.client.cancel(list(futures), force=True)

    def outcome(self, future: Any, number: int) -> Outcome | None:
        """What a piece brought; None: its worker died, and it should go out again."""
        if future.status == "finished":
            return future.result()
        problem = future.exception() if future.status == "error" else None
        lost = problem is None or type(problem).__name__ in ("KilledWorker", "CancelledError", "FutureCancelledError")
        self.deaths[number] += 1
        if lost and self.deaths[number] <= DEATHS:
            return None
        words = f"{self.deaths[number]} workers died under it" if lost else f"{type(problem).__name__}: {problem}"
        return Outcome("failed", message=words)


@contextmanager
def cluster_at(address: str | None) -> Generator[Any]:
    """A client of the Dask cluster whose scheduler listens at ``address``; None without one.

    Raises:
        OSError: nobody answers there.
        ImportError: Dask is not installed.
    """
    if address is None:
        yield None
        return
    try:
        import distributed
    except ImportError as problem:
        raise ImportError(_INSTALL) from problem
    with distributed.Client(address, timeout=20) as client:
        yield client


@contextmanager
def connected(given: Any, workers: int | None, tasks: int) -> Generator[Any]:
    """The client that was given, or one of processes on this machine that end with the sweep."""
    try:
        import dask
        import distributed
    except ImportError as problem:
        raise ImportError(_INSTALL) from problem
    if given is not None:
        yield given
        return
    count = min(workers or min(os.cpu_count() or 1, WORKERS), max(tasks, 1))
    settings = {
        "distributed.scheduler.allowed-failures": DEATHS,
        "distributed.scheduler.work-stealing": True,
        "distributed.worker.memory.terminate": False,
        "distributed.deploy.lost-worker-timeout": "5 minutes",  # a worker that comes back imports torch first
        "distributed.nanny.environ": {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        "distributed.nanny.pre-spawn-environ": {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
    }
    with dask.config.set(settings):  # pyright: ignore[reportPrivateImportUsage]
        cluster = distributed.LocalCluster(
            n_workers=count, threads_per_worker=1, processes=True, memory_limit=None, silence_logs=logging.CRITICAL,
            dashboard_address=None,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        with cluster, distributed.Client(cluster) as client:
            yield client
