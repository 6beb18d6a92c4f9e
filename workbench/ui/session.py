"""What a bench may do, without any toolkit: choose, set, run, cancel, export, say as code. Both front ends drive it.

A request is one frozen :class:`Order`. Widgets change the order and submit it; nothing is ever computed in their
callbacks: models open and probes run in the :class:`~workbench.job.Job`'s thread, slow chores (a file, a still
picture) in another.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from workbench import schema
from workbench.board import JobState
from workbench.job import Job
from workbench.probe import Probe, Reading
from workbench.several import Runs
from workbench.ui import scripts
from workbench.ui.places import Place, Places
from workbench.ui.targets import KINDS, folder_of, kind_seen, nearest, store_of, target_of

OPENS_WITH = ("HessianSpectrum", "EigenspaceOverlap", "Along")
"""What a bench shows first, the first of these that fits: quick, and what most people come for."""
FORMATS = ("pdf", "svg", "pgf", "png")
HELD_OPEN = 4
"""Models of a trajectory that stay open, so that sliding back and forth reads no file twice."""


@dataclass(frozen=True)
class Order:
    """Everything that decides a reading: the probe, where it looks, the seed and the time it may take.

    ``place`` is a point of a landscape, looked at instead of the model by probes that look at one model.
    """

    probe: Probe[Any]
    run: str | None = None
    step: int | None = None
    seed: int = 0
    seconds: float | None = None
    place: Place | None = None

    @property
    def numbers(self) -> tuple[Any, ...]:
        """What decides the numbers; settings that only change the picture are left out."""
        measured = tuple((k, str(v)) for k, v in schema.measured(self.probe).items())
        return type(self.probe), measured, self.run, self.step, self.seed, self.seconds, self.place


class Session:
    """One person's work on one target: what is chosen now, what may be chosen, and the job that answers.

    Args:
        target: a Subject, Pair, Trajectory, Runs, Recorder (what it has recorded) or experiment, or a folder of runs.
        model, data, loss: what the record of a Trajectory lacks, or instead of what it has; as in ``wb.Subject``.
        store: where readings are kept and asked for, a ``wb.Store``; the run's own when None; False for none.
        probe: the probe to begin with, with its settings; None: the first of ``OPENS_WITH`` that fits.
        on_reading: called with each reading worth showing, from the job's thread.
        on_state: called with the job's state when it changes, from the job's thread or a caller's.

    Raises:
        TypeError: the target is none of these, or model, data, loss were given with a target that has its own.
        LookupError: no probe looks at such a target, or ``probe`` does not.
    """

    def __init__(
        self,
        target: Any,
        *,
        model: Any = None,
        data: Any = None,
        loss: Any = None,
        store: Any = None,
        probe: Probe[Any] | None = None,
        on_reading: Callable[[Reading], None] | None = None,
        on_state: Callable[[JobState], None] | None = None,
    ) -> None:
        self.given = {k: v for k, v in {"model": model, "data": data, "loss": loss}.items() if v is not None}
        self.target: Any = target_of(target, self.given)
        self.folder = folder_of(target)
        self.kind: str = self.target.kind
        self.on_reading, self.on_state = on_reading, on_state
        self._lock, self._open, self._settings = threading.RLock(), OrderedDict[Any, Any](), dict[str, Probe[Any]]()
        self._seen: Reading | None = None
        self._newest: Reading | None = None
        self._submitted: Order | None = None
        self._asking = False
        self.state = JobState()
        self.order = self._first(probe or target)
        self.places = Places(self)
        self.job = Job(self.target, self._heard, self._told, store_of(self.target) if store is None else store)

    # What may be chosen ---------------------------------------------------------------------------------------------

    @property
    def labels(self) -> tuple[str, ...]:
        """The runs to choose from; empty unless the target is a Runs."""
        return tuple(self.target) if self.kind == "runs" else ()

    @property
    def steps(self) -> tuple[int, ...]:
        """The checkpoints of the chosen run; empty where there are none to choose."""
        member = self._member(self.order.run) if self.order else self.target
        return tuple(member.steps) if member.kind == "trajectory" else ()

    @property
    def needs_step(self) -> bool:
        """Whether the chosen probe looks at one checkpoint, rather than at the whole path."""
        return bool(self.steps) and self.sees == "subject"

    @property
    def sees(self) -> str:
        """The kind of thing that the chosen probe looks at here: as much of the target as it can."""
        return kind_seen(self.order.probe, self.kind, self._member(self.order.run).kind)

    @property
    def needs_run(self) -> bool:
        """Whether the chosen probe looks at one of several runs, rather than at all of them."""
        return self.kind == "runs" and self.sees != "runs"

    @cached_property
    def probes(self) -> Mapping[str, type[Probe[Any]]]:
        """The probes that can look at the target, or at a part of it, by name."""
        from workbench import catalog

        kinds = {self.kind} | ({member.kind for member in self.target.values()} if self.kind == "runs" else set())
        kinds |= {"subject"} if "trajectory" in kinds else set()
        found = {name: cls for kind in KINDS if kind in kinds for name, cls in catalog.probes(kind).items()}
        if not found:
            raise LookupError(f"no probe looks at a {self.kind}; wb.catalog.probes() lists those that there are.")
        return found

    @cached_property
    def venues(self) -> Mapping[str, tuple[str, ...]]:
        """Venues and the columns of each; the first is the house style. Looks into tueplots: not in a callback."""
        from workbench.draw.venues import HOUSE, venues

        return {HOUSE: ("half", "full")} | {name: tuple(columns) for name, columns in venues().items()}

    def settings(self, name: str) -> Probe[Any]:
        """The settings last used with a probe in this session, or its defaults.

        Raises:
            KeyError: no such probe here; the message lists those that there are.
        """
        if name not in self.probes:
            raise KeyError(f"there is no probe {name!r} for a {self.kind}; there are {', '.join(self.probes)}.")
        return self._settings.get(name) or self.probes[name]()

    # Choosing -------------------------------------------------------------------------------------------------------

    def choose(self, name: str) -> Probe[Any]:
        """Take the probe of that name, with the settings last used; returns them."""
        self.settle(self.settings(name))
        return self.order.probe

    def settle(self, settings: Probe[Any]) -> None:
        """Take these settings; they are remembered for their probe."""
        with self._lock:
            self._settings[settings.name] = settings
            self.places.restyled(settings)
            self.order = dataclasses.replace(self.order, probe=settings)

    def visit(self, run: str) -> None:
        """Take the run of that label, at its checkpoint nearest to the present step; a place of another is left."""
        with self._lock:
            place = self.order.place if run == self.order.run else None
            self.places.forget_unless(run == self.order.run)
            step = nearest(self._member(run), self.order.step)
            self.order = dataclasses.replace(self.order, run=run, step=step, place=place)

    def move(self, step: int) -> None:
        """Take the checkpoint at that step; a place on a plane through another one is left."""
        place = self.order.place if step == self.order.step else None
        self.places.forget_unless(step == self.order.step)
        self.order = dataclasses.replace(self.order, step=step, place=place)

    def stand(self, place: Place | None) -> None:
        """Look at a point of a landscape instead of the model from now on; None: at the model itself."""
        self.order = dataclasses.replace(self.order, place=place)

    def renew(self, path: Any, run: str | None = None, gone: Collection[int] = ()) -> None:
        """Take a trajectory, or that of one run, as it is on disk now; models of steps that are ``gone`` are let go.

        A run that is new comes last, and nothing that is chosen changes.
        """
        with self._lock:
            for where in [w for w in self._open if w[0] == run and w[1] in gone]:
                del self._open[where]
            self.target = path if run is None else Runs({**self.target, run: path})
            if run == self.order.run:
                self.order = dataclasses.replace(self.order, step=nearest(path, self.order.step))

    def limit(self, seed: int, seconds: float | None) -> None:
        """Take a seed and a time budget; None is none."""
        self.order = dataclasses.replace(self.order, seed=int(seed), seconds=seconds)

    # Doing ----------------------------------------------------------------------------------------------------------

    def submit(self, again: bool = False) -> bool:
        """Measure what is chosen now. Returns at once; a later call supersedes this one.

        Where only settings of the picture differ from what was last asked for, the picture is drawn anew and nothing
        is measured, unless ``again`` insists. Returns whether an answer is to come.
        """
        order = self.order
        if not again and self._submitted is not None and self._submitted.numbers == order.numbers:
            if self._seen is not None and self._seen.probe != order.probe:
                self._heard(self._seen)
            return False
        self._submitted = order
        self.job.submit(order.probe, seed=order.seed, seconds=order.seconds, subject=self._look(order))
        return True

    def cancel(self) -> None:
        """Stop; what was measured so far stays."""
        self._submitted = None
        self.job.cancel()

    @property
    def asked(self) -> bool:
        """Whether something was asked for, and not cancelled."""
        return self._submitted is not None

    @property
    def latest(self) -> Reading | None:
        """The reading that is on screen, in the picture's present settings."""
        return self._seen

    @property
    def shown_at(self) -> Place | None:
        """The place that the reading on screen was measured at; None: the model itself."""
        return (self._submitted or self.order).place

    @property
    def formats(self) -> tuple[str, ...]:
        """What figures of the chosen probe can be written as; a surface of losses also for ParaView."""
        from workbench.draw.heights import check_plane

        try:
            check_plane(self.order.probe)
        except ValueError:
            return FORMATS
        return (*FORMATS, "vts")

    def export(self, path: str | Path, venue: str, column: str, provenance: str) -> str:
        """Write the figure on screen and say where it went. Takes a second: call it through :meth:`chore`.

        Raises:
            ValueError: unknown format, venue, column, or nothing measured yet; OSError: the file cannot be written.
        """
        if self._seen is None:
            raise ValueError("nothing has been measured yet; press Run, then export.")
        chosen = None if venue == next(iter(self.venues)) else venue
        written = self._seen.export(path, venue=chosen, column=column, provenance=provenance)
        return f"Wrote {written} ({written.stat().st_size / 1000:.0f} kB)."

    @property
    def offers_opinion(self) -> bool:
        """Whether other packages can be asked about the reading on screen: it is finished, and nobody is asked now."""
        from workbench.interop.opinion import why_not

        reading = self._seen
        return not self._asking and reading is not None and reading.done == 1 and not why_not(reading.probe)

    def ask_others(self, hear: Callable[[Any], None]) -> None:
        """Ask other packages about the reading on screen, in a thread of its own, for a minute at most.

        There ``hear`` gets the Opinion, or the exception; or None where another reading is on screen by then.
        """
        reading, order, self._asking = self._seen, self._submitted or self.order, True

        def ask() -> None:
            try:
                found: Any = self._second_opinion(reading, order)
            except Exception as error:  # noqa: BLE001 - whatever it is, the person must see it
                found = error
            self._asking, now = False, self._seen
            hear(found if reading is not None and now is not None and now.data is reading.data else None)

        threading.Thread(target=ask, name="workbench-opinion", daemon=True).start()

    def _second_opinion(self, reading: Reading | None, order: Order) -> Any:
        if reading is None or reading.done < 1:
            raise ValueError("there is no finished reading to ask about; press Run, and wait for 100 %.")
        place = self._look(order)
        return reading.second_opinion(place() if callable(place) else place)

    def code(self) -> str:
        """Python that makes the same reading, given names ``subject``, ``pair`` or ``runs`` where no file has them."""
        return scripts.measuring(self)

    def chore(self, work: Callable[[], Any]) -> Future[Any]:
        """Do something slow that is no measurement in a thread kept for it, one at a time."""
        return self._chores.submit(work)

    @cached_property
    def _chores(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="workbench-chores")

    # Inside ---------------------------------------------------------------------------------------------------------

    def _first(self, given: Any) -> Order:
        self.order: Any = None
        run = self.labels[0] if self.kind == "runs" else None
        step = nearest(self._member(run), None)
        name = next((n for n in OPENS_WITH if n in self.probes), next(iter(self.probes)))
        probe: Probe[Any] = given if isinstance(given, Probe) else self.probes[name]()
        if probe.name not in self.probes:
            raise LookupError(f"{probe.name} does not look at a {self.kind}; those that do: {', '.join(self.probes)}.")
        self._settings[probe.name] = probe
        return Order(probe, run, step)

    def _member(self, run: str | None) -> Any:
        return self.target[run] if self.kind == "runs" else self.target

    def _look(self, order: Order) -> Any:
        """What the order's probe looks at, or a function that opens it in the job's thread."""
        member = self._member(order.run)
        wanted = kind_seen(order.probe, self.kind, member.kind)
        place = order.place if wanted == "subject" else None
        if wanted == self.kind and place is None:
            return self.target
        if wanted != "subject" or (member.kind != "trajectory" and place is None):
            return member
        where = (order.run, order.step, place)
        with self._lock:
            return self._open.get(where) or (lambda: self._opened(where, member))

    def _opened(self, where: tuple[str | None, Any, Place | None], member: Any) -> Any:
        _, step, place = where
        subject = member.subject(step) if member.kind == "trajectory" else member
        subject = place.subject(subject) if place is not None else subject
        with self._lock:
            self._open[where] = subject
            while len(self._open) > HELD_OPEN:
                self._open.popitem(last=False)
        return subject

    def _heard(self, reading: Reading) -> None:
        """Keep a reading in the picture's present settings, and pass it on."""
        self._newest, now = reading, self.order.probe
        if type(now) is type(reading.probe) and schema.measured(now) == schema.measured(reading.probe):
            reading = dataclasses.replace(reading, probe=now)
        self._seen = reading
        self.places.seen(reading)
        if self.on_reading:
            self.on_reading(reading)

    def _told(self, state: JobState) -> None:
        newest = self.job.latest
        if state.status == "cancelled" and newest is not None and newest is not self._newest:
            self._heard(newest)
        if self.on_state:
            self.on_state(state)
        self.state = state
