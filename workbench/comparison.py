"""Readings side by side: headline numbers with errors, and differences in units of them; refused where unfair."""

from __future__ import annotations

import html
import itertools
import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from workbench import schema
from workbench.figure import ROLES, Axis, Figure, Panel, Points, beside
from workbench.fingerprint import digest
from workbench.numerics.sampling import Draw
from workbench.probe import VERBS, Probe, Reading, Value, Variable
from workbench.resolve import resolve
from workbench.schema import Doc
from workbench.words import with_error

_COST = ("products",)  # what a run took is no property of what was measured
_DIMS = ("label", "number")
MOST = 100.0
"""Differences of more errors than this are said to be beyond it: stated errors are not that exact themselves."""
PANELS = 6
"""Headline numbers that are drawn."""


class UnlikeModels(UserWarning):
    """The readings may be compared, but say something about more than what one wants to compare."""


@dataclass(frozen=True)
class Headlines(Probe[Any]):
    """Headline numbers of several readings of one probe, side by side. ``wb.compare`` makes them; they are not run.

    A ``difference`` is from the first reading; ``in_errors`` is that over √(e² + e_1²), with the errors e that the
    readings state. Those may be bounds, 95 % intervals or standard errors, and errors of readings on the same examples
    go together, so that a number well beyond 2 is a difference, and a smaller one undecided; it is no test.
    """

    looks_at: ClassVar[Literal["runs"]] = "runs"
    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("value", _DIMS, "headline number", error="value_error"),
        Variable("value_error", _DIMS, "its error"),
        Variable("difference", _DIMS, "difference from the first reading", error="difference_error"),
        Variable("difference_error", _DIMS, "both errors, added in squares"),
        Variable("in_errors", _DIMS, "difference over that error"),
        Variable("reading_converged", ("label",), "whether the reading converged", kind="bool"),
    )

    of: Annotated[str, Doc("The probe whose readings these are.")] = ""

    def stream(self, subject: Any, draw: Draw) -> Iterator[Reading]:
        """Not run: raises TypeError."""
        raise TypeError("Headlines are made of readings, not run: wb.compare({'a': reading, 'b': other}).")

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """Each number of each reading, with its error."""
        found: dict[str, Value] = {}
        for number, label in itertools.product(_texts(data, "number"), _texts(data, "label")):
            here = data.sel(label=label, number=number)
            name = f"{number} ({label})"
            found |= {name: float(here.value), f"{name}_error": float(here.value_error)}
        return found

    def figure(self, data: xr.Dataset) -> Figure:
        """One panel for each number, one point with its error bar for each reading."""
        panels = tuple(self._panel(data, number) for number in _texts(data, "number")[:PANELS])
        return Figure(panels, title=f"{self.of}, compared")

    def _panel(self, data: xr.Dataset, number: str) -> Panel:
        marks = list[Points]()
        for place, label in enumerate(_texts(data, "label")):
            here = data.sel(label=label, number=number)
            role = ROLES[place % len(ROLES)] if bool(here.reading_converged) else "unconverged"
            error = np.nan_to_num([float(here.value_error)])
            marks.append(Points([place + 1.0], [float(here.value)], error, label, role))
        x = Axis("reading", limits=(0.5, len(marks) + 0.5))
        return Panel(tuple(marks), x, Axis(number.replace("_", " ")))


@dataclass(frozen=True, eq=False)
class Comparison:
    """Readings by label that may be compared, and ``joined``: their headline numbers as one reading of its own."""

    readings: Mapping[str, Reading]
    joined: Reading

    @property
    def notes(self) -> tuple[str, ...]:
        """What to keep in mind: models at different losses, readings that did not converge, unequal sizes."""
        return self.joined.notes

    def figure(self) -> Figure:
        """The numbers as points with errors, one colour for each reading."""
        return self.joined.figure()

    def pictures(self) -> Figure:
        """The readings' own figures beside each other, with one colour scale: planes of several models, say."""
        return beside({label: reading.figure() for label, reading in self.readings.items()})

    def to_frame(self) -> Any:
        """A pandas DataFrame: one row for each number and label, with value, error, difference, and that in errors."""
        return self.joined.data.drop_vars("reading_converged").to_dataframe(dim_order=["number", "label"])

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
        """Write the figure for a paper, with the numbers inside; as :meth:`~workbench.probe.Reading.export`."""
        return self.joined.export(path, venue, column, provenance, usetex, height, dpi)

    def table(self) -> list[tuple[str, ...]]:
        """Rows of texts: number, then each reading's value with its error, then differences in units of the error."""
        data, rows = self.joined.data, list[tuple[str, ...]]()
        for number in _texts(data, "number"):
            here = data.sel(number=number)
            values = [with_error(float(v), float(e)) for v, e in zip(here.value, here.value_error, strict=True)]
            rows.append((number.replace("_", " "), *values, *map(_units, here.in_errors.values[1:])))
        return rows

    @property
    def head(self) -> tuple[str, ...]:
        """The column heads of :meth:`table`."""
        labels = list(self.readings)
        return ("", *labels, *(f"{label} - {labels[0]}, in errors" for label in labels[1:]))

    def __str__(self) -> str:
        rows = [self.head, *self.table()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self.head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        title = f"{next(iter(self.readings.values())).probe.name}, compared"
        return "\n".join([title, *lines, *(f"  note: {n}" for n in self.notes)])

    __repr__ = __str__

    def to_html(self) -> str:
        """The table and the notes as HTML; nothing in them is read as HTML."""
        head = "".join(f"<th scope='col'>{html.escape(cell)}</th>" for cell in self.head)
        rows = [[html.escape(cell) for cell in row] for row in self.table()]
        body = "".join(f"<tr><th scope='row'>{row[0]}</th><td>{'</td><td>'.join(row[1:])}</td></tr>" for row in rows)
        notes = "".join(f"<li>{html.escape(n)}</li>" for n in self.notes)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><ul>{notes}</ul>"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        picture = resolve(VERBS["show"])(self.joined)["image/png"]
        page = f'{self.to_html()}<img alt="the same numbers as points" src="data:image/png;base64,{picture}">'
        return {"text/plain": str(self), "text/html": page}


def compare(first: Mapping[str, Reading] | Reading, *others: Reading) -> Comparison:
    """Put readings of one probe side by side; refuse those that are not of the same function of a model.

    Args:
        first: readings by label, the first of which the others are compared with; or one reading.
        others: further readings, where ``first`` is one; they are called "reading 1", "reading 2", ...

    Warns:
        UnlikeModels: models stand at different losses; beyond their errors, sharpness says as much about that.

    Raises:
        ValueError: fewer than two readings, or readings of different probes or settings, on other or unequally many
            examples, under another BatchNorm policy, or of another loss; the message says which and what to do.
    """
    given = first if isinstance(first, Mapping) else {f"reading {i}": r for i, r in enumerate((first, *others), 1)}
    readings = {str(label): reading for label, reading in given.items()}
    if len(readings) < 2:
        raise ValueError(f"a comparison needs two readings; got {len(readings)}: wb.compare({{'a': one, 'b': other}}).")
    (name, one), *rest = readings.items()
    for label, reading in rest:
        _check_alike(name, one, label, reading)
    notes = tuple(_notes(readings))
    return Comparison(readings, _joined(readings, notes))


# Refusals -------------------------------------------------------------------------------------------------------------


def _check_alike(name: str, one: Reading, label: str, other: Reading) -> None:
    if one.probe.path != other.probe.path:
        raise ValueError(
            f"{name!r} is a reading of {one.probe.name} and {label!r} one of {other.probe.name}; compare readings of "
            "one probe."
        )
    _check_equal("setting", schema.measured(one.probe), schema.measured(other.probe), name, label)
    _check_equal("subject's", _facts(one), _facts(other), name, label)


def _check_equal(what: str, one: Mapping[str, Any], two: Mapping[str, Any], name: str, label: str) -> None:
    for key in {**one, **two}:
        if one.get(key) != two.get(key):
            raise ValueError(
                f"{what} {_NAMES.get(key, key)} is {one.get(key)!r} in {name!r} and {two.get(key)!r} in {label!r}: "
                f"their numbers differ by that alone, so they are not compared. {_FIXES.get(key, _MEASURE)}"
            )


_NAMES = {"norm": "BatchNorm policy", "examples": "number of examples", "digest": "choice of examples"}
_MEASURE = "Measure both alike."
_FIXES = {
    "parameters of the kernel": "Restrict both to the same parameters.",
    "examples": "Sharpness grows when examples are few: give both the same max_examples and seed.",
    "digest": "Give both the same data, max_examples and seed.",
    "norm": "Give both the same norm=, or use subject.under(norm).",
}


def _facts(reading: Reading) -> dict[str, Any]:
    """What must agree. Hashes of examples can be compared only where they are in one precision."""
    held = reading.provenance.get("subject", {})
    parts = [held[key] for key in ("first", "second") if key in held] or [held]
    found: dict[str, Any] = {}
    for i, part in enumerate(parts):
        batch = ("batch_size",) if part.get("norm", "eval") != "eval" else ()
        prefix = "" if i == 0 else "second "
        found |= {prefix + key: part[key] for key in ("loss", "reduction", "norm", "examples", *batch) if key in part}
    named: dict[str, Any] = json.loads(reading.data.attrs.get("kernel", "{}"))
    held_in = str(held.get("dtype"))
    found |= {
        key: _Digest(value, held_in) if key == "examples of the kernel" else value for key, value in named.items()
    }
    if reading.provenance.get("examples"):
        found["digest"] = _Digest(reading.provenance["examples"], str(held.get("dtype")))
    return found


class _Digest:
    """A hash of examples that equals another one unless both are in one precision and differ."""

    def __init__(self, words: str, dtype: str) -> None:
        self.words, self.dtype = words, dtype

    def __eq__(self, other: object) -> bool:
        return not isinstance(other, _Digest) or self.dtype != other.dtype or self.words == other.words

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return self.words[:8]


# Remarks --------------------------------------------------------------------------------------------------------------


def _notes(readings: Mapping[str, Reading]) -> Iterator[str]:
    for label, reading in readings.items():
        if not reading.converged:
            yield f"{label!r} has not converged" if reading.done == 1 else f"{label!r} is {reading.done:.0%} done"
    for key, words in (("size", "numbers of parameters"), ("dtype", "precisions")):
        found = {label: r.provenance.get("subject", {}).get(key) for label, r in readings.items()}
        if len(set(found.values())) > 1:
            yield f"{words} differ: {', '.join(f'{label} {value}' for label, value in found.items())}"
    yield from _losses(readings)


def _losses(readings: Mapping[str, Reading]) -> Iterator[str]:
    """Say, and warn, that models stand at different losses."""
    found = {label: _loss(r) for label, r in readings.items()}
    apart = [
        (a, b)
        for a, b in itertools.combinations(found.values(), 2)
        if abs(a[0] - b[0]) > math.hypot(a[1], b[1]) + 1e-12
    ]
    if apart:
        told = ", ".join(f"{label} {with_error(*loss)}" for label, loss in found.items())
        words = (
            f"the models stand at different train losses ({told}): curvature changes along training, so compare them "
            "at equal loss before calling one sharper"
        )
        warnings.warn(words, UnlikeModels, stacklevel=4)
        yield words


def _loss(reading: Reading) -> tuple[float, float]:
    """Train loss and its standard error (0 where unknown); nan where the reading has none."""
    held = reading.data.data_vars
    if "train_loss" not in held or held["train_loss"].ndim:
        return math.nan, 0.0
    error = float(held["train_loss_error"]) if "train_loss_error" in held else 0.0
    return float(held["train_loss"]), 0.0 if math.isnan(error) else error


# The joined reading ---------------------------------------------------------------------------------------------------


def _joined(readings: Mapping[str, Reading], notes: tuple[str, ...]) -> Reading:
    (_, one), *_ = readings.items()
    numbers, values, errors = _numbers([r.summary for r in readings.values()])
    bar = np.hypot(errors, errors[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        found = {
            "value": values,
            "value_error": errors,
            "difference": values - values[0],
            "difference_error": bar,
            "in_errors": np.where(values == values[0], 0.0, (values - values[0]) / bar),
            "reading_converged": [r.converged for r in readings.values()],
        }
    made = Headlines(of=one.probe.name).reading(
        min(r.done for r in readings.values()),
        found,
        coords={"label": list(readings), "number": numbers},
        converged=all(r.converged for r in readings.values()),
        notes=notes,
    )
    return Reading(made.probe, made.data, made.done, _provenance(readings))


def _numbers(summaries: list[dict[str, Value]]) -> tuple[list[str], NDArray[np.float64], NDArray[np.float64]]:
    """Names of the headline numbers of all, values and errors (readings, numbers); nan where a reading has none."""
    names = list(dict.fromkeys(n for s in summaries for n, v in s.items() if _is_headline(n, v)))
    return names, _table(summaries, names), _table(summaries, [f"{name}_error" for name in names])


def _is_headline(name: str, value: Value) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and not name.endswith("_error") and name not in _COST


def _table(summaries: list[dict[str, Value]], names: list[str]) -> NDArray[np.float64]:
    return np.array([[_float(s.get(name)) for name in names] for s in summaries], dtype=np.float64)


def _float(value: Value | None) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _provenance(readings: Mapping[str, Reading]) -> dict[str, Any]:
    (_, one), *_ = readings.items()
    held = {label: dict(r.provenance) for label, r in readings.items()}
    settings = json.dumps(schema.to_json(one.probe), sort_keys=True)
    shared = {key: one.provenance[key] for key in ("seed", "subject", "versions") if key in one.provenance}
    prints = [r.provenance.get("fingerprint", "") for r in readings.values()]
    return {"seed": 0, **shared, "fingerprint": digest("compared", settings, list(held), prints), "readings": held}


def _texts(data: xr.Dataset, name: str) -> list[str]:
    return [str(v) for v in data[name].values]


def _units(value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:+.2g}" if abs(value) <= MOST else f"{'<' if value < 0 else '>'} {math.copysign(MOST, value):+.0f}"
