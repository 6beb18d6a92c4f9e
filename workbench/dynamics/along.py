"""Any point probe at every checkpoint of a trajectory, joined along ``step``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from workbench.dynamics.checkpoints import Every, cost_at_each, every_so_many, readings_at
from workbench.dynamics.described import TAKEN
from workbench.figure import ROLES, AnyMark, Axis, Band, Figure, Line, Panel, Points, step_axis
from workbench.landscape.grid import levels
from workbench.numerics.sampling import Draw
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.probes.spectrum import HessianSpectrum
from workbench.provenance import provenance_of
from workbench.resolve import resolve
from workbench.schema import Doc
from workbench.trajectory import Trajectory

PANELS = 4
"""Headline numbers, and recorded scalars, that are drawn."""
_OWN = (
    Variable("headline", ("step", "number"), "headline numbers of the probe", error="headline_error"),
    Variable("headline_error", ("step", "number"), "errors of the headline numbers", error="headline_error"),
    Variable("checkpoint_done", ("step",), "share of the probe's run that was made at this checkpoint"),
    Variable("checkpoint_converged", ("step",), "whether the probe converged at this checkpoint", kind="bool"),
    Variable("training", ("step", "scalar"), "scalars recorded during training, the latest by each step"),
)


def _sharpness() -> Probe[Any]:
    return HessianSpectrum(top=1, minimum=False, trace=False, density=False)


@dataclass(frozen=True)
class Along(Probe[Trajectory]):
    """Any point probe read at the checkpoints of a training, and joined along a dimension called ``step``.

    What it measures: what ``probe`` measures, with its variables, each with ``step`` as its first dim; its headline
    numbers as ``headline (step, number)``; and the scalars that training recorded. Random numbers are the same at each
    checkpoint, so that a curve's jitter is the training's and not the estimator's; each value is bit for bit that of
    ``probe.run(trajectory.subject(step), seed)``. Coordinates that differ between checkpoints, such as the values of a
    density, are kept as ``<name>_at (step, name)``.

    How to read it: bands are the errors that the probe states; points that have not converged are marked. Checkpoints
    are read from coarse to fine (ends and middle first), so that the shape of the curve is there early.

    What it costs: the probe's cost times the number of checkpoints read.

    When it misleads: log-spaced checkpoints say little about what happens between late ones. A checkpoint that cannot
    be measured (its loss is not finite) stays nan, and the notes say why.

    ``run(trajectory, model=..., data=..., loss=...)`` stands in for what the record lacks.
    """

    looks_at: ClassVar[Literal["trajectory"]] = "trajectory"
    variables: ClassVar[tuple[Variable, ...]] = _OWN

    probe: Annotated[Probe[Any], Doc("The probe to read at each checkpoint; one that looks at a point.")] = field(
        default_factory=_sharpness
    )
    every: Every = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        own = tuple(dataclasses.replace(v, dims=("step", *v.dims)) for v in self.probe.variables)
        # What this probe yields depends on a setting, so that it is known for an instance and not for the class.
        object.__setattr__(self, "variables", own + _OWN)

    def validate(self) -> None:
        """Only probes of a point have one value for each checkpoint."""
        if self.probe.looks_at != "subject":
            raise ValueError(
                f"Along reads probes that look at a point; {self.probe.name} looks at {self.probe.looks_at}."
            )
        own = {"step", "number", "scalar"}
        taken = ({v.name for v in _OWN} | own) & {v.name for v in self.probe.variables}
        dims = own & {d for v in self.probe.variables for d in v.dims}
        if taken or dims:
            raise ValueError(
                f"{self.probe.name} uses the name {min(taken | dims)!r}, which Along needs; rename it there."
            )

    def run(
        self,
        subject: Trajectory,
        seed: int = 0,
        seconds: float | None = None,
        on_reading: Callable[[Reading], None] | None = None,
        plan: Any = None,
        before: Reading | None = None,
        *,
        model: Any = None,
        data: Any = None,
        loss: Any = None,
        client: Any = None,
        store: str | Path | None = None,
    ) -> Reading:
        """As ``Probe.run``; ``model``, ``data``, ``loss`` stand for what the record says (``trajectory.using``).

        With a ``client`` (``dask.distributed.Client``) its workers read the checkpoints, through the ``store`` (None:
        the run's own), and this process joins what they found; ``seconds`` and ``plan`` are then not used.
        """
        given = model is not None or data is not None or loss is not None
        chosen = subject.using(model, data, loss) if given else subject
        if client is None:
            return super().run(chosen, seed, seconds, on_reading, plan, before)
        return super().run(
            chosen, seed, None, on_reading, None, self._gathered(chosen, seed, on_reading, client, store)
        )

    def _gathered(
        self, subject: Trajectory, seed: int, on_reading: Callable[[Reading], None] | None, client: Any, store: Any
    ) -> Reading | None:
        """What the workers of a cluster found at the checkpoints."""
        at_steps = resolve("workbench.sweeping:at_steps")
        steps = every_so_many(subject.steps, self.every)
        order = [steps[place] for place in _order(len(steps))]
        joined, last = _Joined(self, steps, *_training(subject, steps)), None
        made = {**provenance_of(subject, seed), "context": self.context(subject)}
        for seen, (step, found) in enumerate(at_steps(self.probe, subject, order, seed, client, store)):
            if isinstance(found, Reading):
                joined.put(steps.index(step), found)
                last = dataclasses.replace(joined.reading((seen + 0.9) / len(steps)), provenance=made)
                if on_reading is not None:
                    on_reading(last)
        return last

    def stream(self, subject: Trajectory, draw: Draw) -> Iterator[Reading]:
        """Read checkpoint after checkpoint, ends and middle first; each reading of the probe gives one of the curve."""
        steps = every_so_many(subject.steps, self.every)
        yield from self._read(subject, draw, _Joined(self, steps, *_training(subject, steps)))

    def resume(self, subject: Trajectory, draw: Draw, before: xr.Dataset) -> Iterator[Reading]:
        """As ``stream``, without the checkpoints that were read to their end."""
        steps = every_so_many(subject.steps, self.every)
        joined = _Joined(self, steps, *_training(subject, steps))
        joined.restore(before)
        yield from self._read(subject, draw, joined)

    def _read(self, subject: Trajectory, draw: Draw, joined: _Joined) -> Iterator[Reading]:
        steps = joined.steps
        for seen, place in enumerate(_order(len(steps))):
            if joined.known(place):
                if seen + 1 == len(steps):
                    yield joined.reading(1.0)
                continue
            try:
                for reading in readings_at(self.probe, subject, steps[place], draw.seed):
                    joined.put(place, reading)
                    yield joined.reading((seen + reading.done) / len(steps))
            except (ValueError, ArithmeticError) as problem:
                if not joined.arrays:
                    raise
                joined.skip(place, problem)
                yield joined.reading((seen + 1) / len(steps))

    def estimate(self, subject: Trajectory) -> Cost:
        """The probe's cost at the first checkpoint (the last may have diverged), for each checkpoint in turn."""
        return cost_at_each(self.probe, subject, self.every)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """Each headline number at the first and at the last checkpoint that was read, with its error."""
        read = np.flatnonzero(data.checkpoint_done.values > 0)
        found: dict[str, Value] = {"checkpoints": int(read.size)}
        for name in map(str, data["number"].values):
            curve = data.sel(number=name)
            for word, place in (("first", read[0]), ("last", read[-1])):
                found[f"{name}_{word}"] = float(curve.headline.values[place])
                found[f"{name}_{word}_error"] = float(curve.headline_error.values[place])
        return found

    def figure(self, data: xr.Dataset) -> Figure:
        """One panel for each headline number, and one for what training recorded, over steps on a log axis."""
        panels = tuple(self._panel(data, str(name)) for name in data["number"].values[:PANELS])
        return Figure(panels + _training_panel(data), title=f"{self.probe.name} along training")

    def _panel(self, data: xr.Dataset, name: str) -> Panel:
        known = np.isfinite(data.headline.sel(number=name).values)
        x = data["step"].values[known]
        y, error = (data[v].sel(number=name).values[known] for v in ("headline", "headline_error"))
        rough = ~data.checkpoint_converged.values[known]
        marks: list[AnyMark] = [Band(x, y - error, y + error)] if np.isfinite(error).any() else []
        marks += [Line(x, y), Points(x[~rough], y[~rough])]
        marks += [Points(x[rough], y[rough], label="not converged", role="unconverged")] if rough.any() else []
        unit = next((v.units for v in self.probe.variables if v.name == name), "")
        axis = Axis(name.replace("_", " "), _scale(y, y - np.nan_to_num(error)), unit)
        return Panel(tuple(marks), step_axis(), axis)


def _scale(values: NDArray[np.float64], low: NDArray[np.float64]) -> Literal["linear", "log"]:
    """Logarithmic for positive curves over more than two decades."""
    return "log" if values.size and low.min() > 0 and values.max() > 100 * values.min() else "linear"


def _training_panel(data: xr.Dataset) -> tuple[Panel, ...]:
    names = [str(n) for n in data["scalar"].values[:PANELS]]
    if not names:
        return ()
    curves = [(name, data.training.sel(scalar=name).values) for name in names]
    marks = tuple(
        Line(data["step"].values, y, name.replace("_", " "), role)
        for (name, y), role in zip(curves, ROLES, strict=False)
    )
    return (Panel(marks, step_axis(), Axis("recorded during training")),)


def _order(count: int) -> Iterator[int]:
    """Every checkpoint once: both ends and the middle first, then between."""
    seen: set[int] = set()
    for level in levels(count):
        new = [int(place) for place in level if int(place) not in seen]
        seen.update(new)
        yield from new


def _training(trajectory: Trajectory, steps: tuple[int, ...]) -> tuple[list[str], NDArray[np.float64]]:
    """Names of the recorded scalars and their latest values at or before each step (steps, names)."""
    table = trajectory.scalars.drop(columns=list(TAKEN))
    filled = table.ffill().reindex(list(steps), method="ffill") if len(table) else table.reindex(list(steps))
    return [str(c) for c in table.columns], filled.to_numpy(dtype=np.float64)


class _Joined:
    """The curve while it is being read: arrays over all steps, nan where nothing is known yet."""

    def __init__(self, along: Along, steps: tuple[int, ...], scalars: list[str], training: NDArray[np.float64]) -> None:
        self.along, self.steps = along, steps
        self.arrays: dict[str, NDArray[Any]] = {}
        self.coords: dict[str, Any] = {"step": np.array(steps), "scalar": np.array(scalars, dtype=str)}
        self.moving: dict[str, NDArray[np.float64]] = {}
        self.numbers: list[str] = []
        self.training = training
        self.notes: dict[str, None] = {}
        self.plan = ""

    def known(self, place: int) -> bool:
        """Whether a checkpoint was read to its end."""
        return bool(self.arrays) and self.arrays["checkpoint_done"][place] == 1

    def restore(self, data: xr.Dataset) -> None:
        """Take over what an earlier run of the same question had joined."""
        own = {"step", "scalar", "number"}
        self.arrays = {str(n): v.values.copy() for n, v in data.data_vars.items() if n != "training"}
        self.moving = {
            str(name).removesuffix("_at"): coord.values.copy()
            for name, coord in data.coords.items()
            if coord.ndim == 2 and str(name).endswith("_at")
        }
        self.coords |= {str(n): c.values for n, c in data.coords.items() if n not in own and c.ndim == 1}
        self.numbers = [str(n) for n in data["number"].values]
        self.notes = dict.fromkeys(json.loads(data.attrs.get("notes", "[]")))
        self.plan = data.attrs.get("plan", "")

    def _prepare(self, reading: Reading) -> None:
        """Make room for every checkpoint once the first reading has shown the sizes."""
        count, data = len(self.steps), reading.data
        for name, variable in data.data_vars.items():
            empty = False if variable.dtype == bool else np.nan
            self.arrays[str(name)] = np.full((count, *variable.shape), empty, dtype=variable.dtype)
        for name, coord in data.coords.items():
            if np.issubdtype(coord.dtype, np.floating):
                self.moving[str(name)] = np.full((count, coord.size), np.nan)
            else:
                self.coords[str(name)] = coord.values
        self.numbers = [k for k, v in reading.summary.items() if isinstance(v, float) and not k.endswith("_error")]
        shape = (count, len(self.numbers))
        self.arrays |= {"headline": np.full(shape, np.nan), "headline_error": np.full(shape, np.nan)}
        self.arrays |= {"checkpoint_done": np.zeros(count), "checkpoint_converged": np.zeros(count, dtype=bool)}

    def put(self, place: int, reading: Reading) -> None:
        """Take a reading of one checkpoint, in the place of an earlier one."""
        if not self.arrays:
            self._prepare(reading)
        for name, variable in reading.data.data_vars.items():
            if variable.shape != self.arrays[str(name)].shape[1:]:
                raise RuntimeError(
                    f"{self.along.probe.name}.{name} has shape {variable.shape} at step {self.steps[place]} and "
                    f"{self.arrays[str(name)].shape[1:]} at another; Along joins readings of one shape only."
                )
            self.arrays[str(name)][place] = variable.values
        for name, values in self.moving.items():
            values[place] = reading.data.coords[name].values
        found = reading.summary
        self.arrays["headline"][place] = [found.get(n, np.nan) for n in self.numbers]
        self.arrays["headline_error"][place] = [found.get(f"{n}_error", np.nan) for n in self.numbers]
        self.arrays["checkpoint_done"][place] = reading.done
        self.arrays["checkpoint_converged"][place] = reading.converged
        self.notes |= dict.fromkeys(reading.notes)
        self.plan = self.plan or json.dumps(reading.provenance.get("plan", {}))

    def skip(self, place: int, problem: Exception) -> None:
        """Leave a checkpoint unknown, and say why."""
        for name, values in self.arrays.items():
            if name not in ("checkpoint_done", "checkpoint_converged"):
                values[place] = False if values.dtype == bool else np.nan
        self.arrays["checkpoint_done"][place] = 0.0
        self.notes[f"step {self.steps[place]} could not be measured: {problem}"] = None

    def reading(self, done: float) -> Reading:
        """The curve so far."""
        values: Mapping[str, Any] = self.arrays | {"training": self.training}
        coords = self.coords | {"number": np.array(self.numbers, dtype=str)}
        converged = bool(done == 1 and self.arrays["checkpoint_converged"].all())
        made = self.along.reading(done, values, coords=coords, converged=converged, notes=tuple(self.notes))
        moving = {f"{name}_at": (("step", name), held.copy()) for name, held in self.moving.items()}
        data = made.data.assign_coords(moving).assign_attrs(plan=self.plan)
        return dataclasses.replace(made, data=data)
