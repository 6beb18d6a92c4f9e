"""Second opinions: what other packages say on the subject of a reading, beside it, with words where they differ."""

from __future__ import annotations

import html
import importlib
import math
from dataclasses import dataclass
from typing import Any

from workbench.probe import Probe, Reading
from workbench.subject import Subject
from workbench.words import with_error

OFFERED = {
    "HessianSpectrum": "workbench.interop.of_spectrum",
    "Line": "workbench.interop.of_line",
    "Plane": "workbench.interop.of_plane",
}
"""For each probe by name the module that asks others: ``why_not(probe) -> str`` (empty: it can), and
``ask(reading, subject, seconds) -> Opinion``. A probe gets a second opinion by one line here and one module."""


@dataclass(frozen=True)
class Answer:
    """What one package says about one quantity: its value, its own error where one is known, and words."""

    package: str
    value: float
    error: float = math.nan
    words: str = ""


@dataclass(frozen=True)
class Row:
    """One quantity: our value with its error, the answers of others, and the rounding to be allowed for.

    ``rounding`` is what products in the subject's precision leave open, so that two exact methods agree.
    """

    quantity: str
    ours: float
    error: float
    answers: tuple[Answer, ...]
    rounding: float = 0.0

    def difference(self, answer: Answer) -> float:
        """Theirs - ours."""
        return answer.value - self.ours

    def relative(self, answer: Answer) -> float:
        """(theirs - ours) / |ours|; nan where ours is zero."""
        return self.difference(answer) / abs(self.ours) if self.ours else math.nan

    def within(self, answer: Answer) -> bool | None:
        """Whether their value lies within our error bar (and rounding); None where a value or the bar is unknown."""
        apart, bar = abs(self.difference(answer)), self.error + self.rounding
        return None if math.isnan(apart) or math.isnan(bar) else apart <= bar


@dataclass(frozen=True)
class Opinion:
    """Ours and theirs, quantity by quantity; shown as a table. ``notes`` say how the others were asked."""

    probe: str
    on: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def packages(self) -> tuple[str, ...]:
        """The packages that were asked, in order."""
        return tuple(dict.fromkeys(a.package for row in self.rows for a in row.answers))

    def to_frame(self) -> Any:
        """A pandas DataFrame, one row for each quantity and package."""
        import pandas as pd

        columns = ("quantity", "ours", "error", "package", "theirs", "theirs_error", "difference", "relative")
        found = [
            (r.quantity, r.ours, r.error, a.package, a.value, a.error, r.difference(a), r.relative(a))
            for r in self.rows
            for a in r.answers
        ]
        verdicts = [(r.within(a), a.words) for r in self.rows for a in r.answers]
        return pd.DataFrame(found, columns=list(columns)).assign(
            within_error=[within for within, _ in verdicts], why=[words for _, words in verdicts]
        )

    def table(self) -> list[tuple[str, ...]]:
        """The same as texts: quantity, ours, and for each answer package, theirs, difference, within, why."""
        return [
            (
                *((r.quantity, with_error(r.ours, r.error)) if i == 0 else ("", "")),
                a.package,
                with_error(a.value, a.error),
                _signed(r.difference(a), r.relative(a)),
                {True: "yes", False: "no", None: ""}[r.within(a)],
                a.words,
            )
            for r in self.rows
            for i, a in enumerate(r.answers)
        ]

    def __str__(self) -> str:
        rows = [HEAD[:-1], *(cells[:-1] for cells in self.table())]
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD) - 1)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        for i, cells in enumerate(self.table(), 1):
            lines[i] += f"\n    {cells[-1]}" if cells[-1] else ""
        return "\n".join([f"Second opinion on {self.probe}, {self.on}", *lines, *(f"  {n}" for n in self.notes)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.to_html()

    def to_html(self) -> str:
        """The table and the notes as HTML; nothing in them is read as HTML."""
        head = "".join(f"<th scope='col'>{cell}</th>" for cell in HEAD[:-1])
        body = "".join(map(_lines, self.table()))
        notes = "".join(f"<li>{html.escape(n)}</li>" for n in self.notes)
        return (
            f'<table class="wb-summary wb-opinion"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
            f'<ul class="wb-notes">{notes}</ul>'
        )


HEAD = ("quantity", "ours", "package", "theirs", "theirs - ours", "within our error", "why")


def _lines(row: tuple[str, ...]) -> str:
    """A line of numbers, and below it the words why they differ, where there are any."""
    quantity, *numbers, words = map(html.escape, row)
    why = f"<tr class='wb-why'><td></td><td colspan='{len(numbers)}'>{words}</td></tr>" if words else ""
    return f"<tr><th scope='row'>{quantity}</th><td>{'</td><td>'.join(numbers)}</td></tr>{why}"


def _signed(difference: float, relative: float) -> str:
    if math.isnan(difference):
        return ""
    share = "" if math.isnan(relative) else f" ({100 * relative:+.{2 if abs(relative) < 0.995 else 3}g} %)"
    return f"{difference:+.2g}{share}"


def why_not(probe: Probe[Any]) -> str:
    """Why there is no second opinion on readings of this probe, in a sentence; empty where there is one."""
    if probe.name not in OFFERED:
        return (
            f"no other package is asked about {probe.name}; there are second opinions on {', '.join(sorted(OFFERED))}."
        )
    return str(_module(probe).why_not(probe))


def second_opinion(reading: Reading, subject: Subject | None = None, seconds: float = 60.0) -> Opinion:
    """Ask other packages about the subject of a reading: the same examples, parameters, loss, policy and weights.

    Args:
        reading: what we found.
        subject: what it was measured on; None where it is still there (readings do not keep their subject alive).
        seconds: roughly the time that all others together may take; what they had by then is shown.

    Raises:
        ValueError: no package is asked about this probe; the subject is gone, or is not what the reading was made on.
        ImportError: the package to ask is not installed.
    """
    if words := why_not(reading.probe):
        raise ValueError(words)
    if not seconds > 0:
        raise ValueError(f"seconds must be a positive number; got {seconds!r}.")
    return _module(reading.probe).ask(reading, _checked(reading, subject), seconds)


def _module(probe: Probe[Any]) -> Any:
    return importlib.import_module(OFFERED[probe.name])


def _checked(reading: Reading, given: Subject | None) -> Subject:
    subject = reading.made_on() if given is None else given
    if subject is None:
        raise ValueError(
            "this reading's subject is not there any more (it was loaded, or nobody else held the subject): pass it, "
            "reading.second_opinion(subject)."
        )
    kind = getattr(subject, "kind", type(subject).__name__)
    if kind != reading.probe.looks_at:
        raise TypeError(f"{reading.probe.name} was measured on a {reading.probe.looks_at}; got a {kind}.")
    if subject.fingerprint() != reading.provenance.get("fingerprint"):
        raise ValueError(
            "the subject is not what this reading was made on: its weights, examples, loss, policy or precision differ "
            "(has it been trained since?). Pass it as it was, such as trajectory.subject(step), or measure again."
        )
    return subject
