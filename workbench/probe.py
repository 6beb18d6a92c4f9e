"""A Probe is a frozen bag of settings whose stream yields ever better Readings; a Reading is a dataset that can speak.

Everything interactive, drawn, stored or distributed is built on these two and is imported by neither.
"""

from __future__ import annotations

import dataclasses
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar, cast

import numpy as np
import torch
import xarray as xr

from workbench import netcdf, schema
from workbench.figure import Figure
from workbench.numerics.sampling import Draw
from workbench.plan import Plan, smaller
from workbench.provenance import provenance_of
from workbench.resolve import probe_class, resolve
from workbench.weakly import Weakly
from workbench.words import HOW_TO_OPEN, MODEL_CHANGED, memory, moment, summary_words

S = TypeVar("S")
Look = Literal["subject", "pair", "trajectory", "runs", "nothing"]
Value = float | int | str | bool
VERBS = {
    "show": "workbench.draw.show:mimebundle",
    "export": "workbench.draw.export:export",
    "second_opinion": "workbench.interop.opinion:second_opinion",
}
"""What a reading can do beyond its data, by name, so that this module imports nothing that draws."""


class ModelChanged(RuntimeError):
    """The weights were written while a probe was looking at them."""


class TooLarge(MemoryError):
    """The probe's estimate says that it cannot fit into memory; the message says what to change."""


@dataclass(frozen=True)
class Cost:
    """What a run will need: ``bytes`` of memory, ``products`` with the curvature (or passes), and that in words.

    ``seconds`` for the whole run come from one product (or pass) that was timed; None where none was.
    """

    bytes: int = 0
    products: int | None = None
    words: str = "one pass over the examples"
    seconds: float | None = None

    @property
    def price(self) -> str:
        """``about 45 products of 12 ms: 0.5 s, 40 MB``; the words where nothing was timed."""
        if self.seconds is None:
            return self.words
        each = f"about {self.products} products of {moment(self.seconds / self.products)}: " if self.products else ""
        return f"{each}{moment(self.seconds)}, {memory(self.bytes)}"


@dataclass(frozen=True)
class Variable:
    """One output of a probe: its dims, long name, units, and the variable that holds its error (or ``"exact"``)."""

    name: str
    dims: tuple[str, ...]
    long_name: str
    units: str = ""
    error: str = "exact"
    kind: Literal["float", "bool"] = "float"

    def array(self, value: Any, sizes: Mapping[str, int]) -> xr.Variable:
        """``value`` (or all-unknown when None) as a new xarray variable with its attributes."""
        if value is None:
            value = np.full([sizes[d] for d in self.dims], False if self.kind == "bool" else np.nan)
        host = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
        data = np.array(host, dtype=bool if self.kind == "bool" else np.float64)
        attrs = {"long_name": self.long_name, "units": self.units, "error": self.error}
        return xr.Variable(self.dims, data, attrs)


@dataclass(frozen=True)
class Probe(ABC, Generic[S]):
    """One measurement. Subclasses are frozen dataclasses: settings are fields, work is ``stream``, meaning is pure.

    Write ``stream`` (yield ``self.reading(...)`` whenever the answer is better than before), ``summary`` and
    ``figure``; declare ``variables`` (every output), ``looks_at`` (what kind of thing is measured) and, where there
    are several kinds, ``looks_also_at``.
    """

    is_probe: ClassVar[bool] = True
    looks_at: ClassVar[Look] = "subject"
    looks_also_at: ClassVar[tuple[Look, ...]] = ()
    variables: ClassVar[tuple[Variable, ...]] = ()

    def __post_init__(self) -> None:
        schema.check(self)
        self.validate()

    def validate(self) -> None:
        """Raise ``ValueError`` when settings do not fit together. Called once, after each was checked alone."""

    @abstractmethod
    def stream(self, subject: S, draw: Draw) -> Iterator[Reading]:
        """Yield ever better readings, the last one with ``done == 1``. Closing early must be safe."""

    def resume(self, subject: S, draw: Draw, before: xr.Dataset) -> Iterator[Reading]:
        """As ``stream``, taking up the data of an unfinished run of the same question; here all from the beginning."""
        return self.stream(subject, draw)

    @abstractmethod
    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """The headline numbers, each with ``<name>_error`` beside it where it is an estimate."""

    @abstractmethod
    def figure(self, data: xr.Dataset) -> Figure:
        """The picture of a reading, also of the first one, as data."""

    def estimate(self, subject: S) -> Cost:
        """Memory and work that a run will need, known before it starts."""
        return Cost()

    def context(self, subject: S) -> str:
        """What a reading depends on beyond settings, seed and subject: part of its key in the store."""
        return ""

    @property
    def name(self) -> str:
        """The probe's name, as in the catalog."""
        return type(self).__name__

    @property
    def path(self) -> str:
        """``module:Class``, which stored readings carry."""
        return f"{type(self).__module__}:{type(self).__qualname__}"

    def reading(
        self,
        done: float,
        values: Mapping[str, Any],
        *,
        coords: Mapping[str, Any] | None = None,
        converged: bool = False,
        notes: tuple[str, ...] = (),
        sizes: Mapping[str, int] | None = None,
    ) -> Reading:
        """A reading with every declared variable: those in ``values`` copied, the others unknown (nan).

        ``sizes`` gives the length of dims that no value and no coordinate shows. Names that were not declared in
        ``variables`` are an error, so that a reading always has the same variables from first to last.
        """
        lengths = self._lengths(values, coords or {}, sizes or {})
        strange = sorted(set(values) - {v.name for v in self.variables})
        if strange:
            words = f"{self.name} yields {strange[0]!r} but does not declare it; add it to {self.name}.variables."
            raise KeyError(words)
        data = xr.Dataset(
            {v.name: v.array(values.get(v.name), lengths) for v in self.variables},
            coords={k: (k, np.array(c)) for k, c in (coords or {}).items()},
            attrs={"converged": int(converged), "notes": json.dumps(list(notes))},
        )
        return Reading(self, data, float(done))

    def _lengths(
        self, values: Mapping[str, Any], coords: Mapping[str, Any], sizes: Mapping[str, int]
    ) -> dict[str, int]:
        known = dict(sizes) | {k: len(c) for k, c in coords.items()}
        for v in self.variables:
            if values.get(v.name) is not None:
                known |= dict(zip(v.dims, np.shape(values[v.name]), strict=True))
        return known

    def run(
        self,
        subject: S,
        seed: int = 0,
        seconds: float | None = None,
        on_reading: Callable[[Reading], None] | None = None,
        plan: Any = None,
        before: Reading | None = None,
    ) -> Reading:
        """Measure now and return the last reading; ``seconds`` stops at the best answer by then.

        Args:
            subject: what to look at.
            seed: of the counter-based random numbers; same seed, same reading.
            seconds: time budget; the reading then has ``done < 1`` and ``converged`` False.
            on_reading: called with every reading as it comes.
            plan: the ``plan`` of an earlier reading, to replay its way of evaluating bit for bit.
            before: an unfinished reading with the same settings, continued if model, data and seed are the same too.
        """
        last: Reading | None = None
        for last in drive(self, subject, seed=seed, seconds=seconds, plan=plan, before=before):
            if on_reading:
                on_reading(last)
        if last is None:
            raise RuntimeError(f"{self.name} yielded no reading; its stream must yield at least one.")
        return last


@dataclass(frozen=True, eq=False)
class Reading:
    """A probe's answer so far: named arrays with units and errors, never changed once made."""

    probe: Probe[Any]
    data: xr.Dataset
    done: float
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])
    made_on: Weakly = field(default_factory=Weakly, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.done <= 1:
            raise ValueError(f"Reading.done must lie in (0, 1]; got {self.done}.")
        for name in self.data.data_vars:
            self.data.variables[name].values.setflags(write=False)

    @property
    def converged(self) -> bool:
        """Whether every stopping rule asked for was met; never True for a run that was cut short."""
        return bool(self.data.attrs.get("converged", 0))

    @property
    def notes(self) -> tuple[str, ...]:
        """Facts about how this was measured that a reader must know: policies, casts, limits."""
        return tuple(json.loads(self.data.attrs.get("notes", "[]")))

    @property
    def summary(self) -> dict[str, Value]:
        """The headline numbers, each with its error beside it."""
        return self.probe.summary(self.data)

    def figure(self) -> Figure:
        """The picture, as data; a notebook draws it when the reading is shown."""
        made = self.probe.figure(self.data)
        return dataclasses.replace(made, note=self._small_print(made.note))

    def _small_print(self, said: str) -> str:
        on = self.provenance.get("subject", {}).get("on", "")
        state = "" if self.converged else ("not converged" if self.done == 1 else f"partial, {self.done:.0%}")
        return " · ".join(part for part in (said, on, state) if part)

    def to_frame(self) -> Any:
        """The data as a pandas DataFrame, one row for each combination of coordinates."""
        return self.data.to_dataframe()

    def export(
        self,
        path: str | Path,
        venue: str | None = None,
        column: str | None = None,
        provenance: str = "full",
        usetex: bool = False,
        height: float | None = None,
        dpi: int = 300,
    ) -> Path:
        """Write the figure for a paper: PDF, SVG, PGF, PNG at true width, the reading inside; a plane also as .vts."""
        write = resolve(VERBS["export"])
        return write(
            self, path, venue=venue, column=column, provenance=provenance, usetex=usetex, height=height, dpi=dpi
        )

    def second_opinion(self, subject: Any = None, seconds: float = 60.0) -> Any:
        """What other packages say on the same subject (None: the one measured): see ``workbench.interop.opinion``."""
        return resolve(VERBS["second_opinion"])(self, subject, seconds)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return resolve(VERBS["show"])(self)

    def __repr__(self) -> str:
        return f"<{self.probe.name} {self.done:.0%}: {summary_words(self.summary)}>"

    def to_dataset(self) -> xr.Dataset:
        """Everything in one dataset whose attributes hold only text and numbers, ready for netCDF."""
        held = {
            "probe": self.probe.path,
            "settings": schema.to_json(self.probe),
            "done": self.done,
            "provenance": dict(self.provenance),
        }
        return self.data.assign_attrs(workbench_reading=json.dumps(held))

    @classmethod
    def from_dataset(cls, stored: xr.Dataset) -> Reading:
        """The reading that ``to_dataset`` stored; needs neither the model nor the data."""
        if "workbench_reading" not in stored.attrs:
            raise ValueError("this dataset holds no Workbench reading; it lacks the attribute 'workbench_reading'.")
        held = json.loads(stored.attrs["workbench_reading"])
        probe = cast("Probe[Any]", schema.from_json(probe_class(held["probe"]), held["settings"]))
        data = stored.load().copy(deep=True)
        del data.attrs["workbench_reading"]
        return cls(probe, data, held["done"], held["provenance"])

    def to_bytes(self) -> bytes:
        """The reading as one netCDF-4 file in memory."""
        return bytes(self.to_dataset().to_netcdf(engine="h5netcdf"))

    @classmethod
    def from_bytes(cls, stored: bytes) -> Reading:
        """The reading in a netCDF-4 file that was read into memory."""
        return cls.from_dataset(netcdf.read(stored))


def drive(
    probe: Probe[Any],
    subject: Any,
    *,
    seed: int = 0,
    seconds: float | None = None,
    plan: Any = None,
    before: Reading | None = None,
) -> Iterator[Reading]:
    """The one loop around every stream: checks first, clock, model watch, and smaller chunks when memory runs out.

    Raises:
        TypeError: the probe looks at another kind of thing.
        TooLarge: the estimate exceeds the memory at hand.
        ModelChanged: weights were written in place during the run.
    """
    _accept(probe, subject)
    given = Weakly(subject)
    subject = subject.with_plan(Plan(**plan) if isinstance(plan, Mapping) else plan) if plan else subject
    deadline = float("inf") if seconds is None else time.monotonic() + seconds
    said: tuple[str, ...] = ()
    while True:
        try:
            yield from _attempt(probe, subject, seed, deadline, said, given, before)
            return
        except (torch.OutOfMemoryError, RuntimeError) as problem:
            less = smaller(subject, problem)
            if less is None:
                raise
            subject, said = less, (*said, f"memory ran out; examples were evaluated {less.plan.chunk} at a time")


def _attempt(
    probe: Probe[Any], subject: Any, seed: int, deadline: float, said: tuple[str, ...], given: Weakly, before: Any
) -> Iterator[Reading]:
    _fit(probe, subject)
    draw = Draw(seed, probe.name, getattr(subject, "size", 0), *_place(subject))
    version = subject.version()  # before the fingerprint is read, so that no write between the two goes unseen
    made = {**provenance_of(subject, seed), "context": probe.context(subject)}
    same = before and all(before.provenance.get(k) == made[k] for k in ("fingerprint", "context", "seed"))
    stream = probe.resume(subject, draw, before.data) if same else probe.stream(subject, draw)
    try:
        for reading in stream:
            _unmoved(subject, version)
            yield dataclasses.replace(_finish(reading, made, said), made_on=given)
            if time.monotonic() > deadline:
                return
    except RuntimeError as problem:
        if "modified by an inplace operation" in str(problem):
            raise ModelChanged(MODEL_CHANGED) from problem
        raise
    finally:
        close = getattr(stream, "close", None)
        if close:
            close()


def _place(subject: Any) -> tuple[torch.dtype, torch.device]:
    return getattr(subject, "dtype", torch.float64), getattr(subject, "device", torch.device("cpu"))


def _accept(probe: Probe[Any], subject: Any) -> None:
    kind, wanted = getattr(subject, "kind", type(subject).__name__), probe.looks_at
    if kind not in (wanted, *probe.looks_also_at):
        raise TypeError(f"{probe.name} looks at a {wanted}; got a {kind}. {HOW_TO_OPEN.get(wanted, '')}")


def _fit(probe: Probe[Any], subject: Any) -> None:
    cost = probe.estimate(subject)
    at_hand = getattr(subject, "available_memory", lambda: float("inf"))()
    if cost.bytes > at_hand:
        raise TooLarge(
            f"{probe.name} would need {cost.bytes / 2**30:.1f} GiB ({cost.words}) but {at_hand / 2**30:.1f} GiB are "
            "free; use fewer examples, a smaller batch_size, or ask for less (top, points)."
        )


def _unmoved(subject: Any, version: Any) -> None:
    if subject.version() != version:
        raise ModelChanged(MODEL_CHANGED)


def _finish(reading: Reading, made: Mapping[str, Any], said: tuple[str, ...]) -> Reading:
    if said:
        notes = json.dumps([*reading.notes, *said])
        reading = dataclasses.replace(reading, data=reading.data.assign_attrs(notes=notes))
    return dataclasses.replace(reading, provenance=made)
