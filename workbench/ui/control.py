"""What the forms of both toolkits agree on: values, spans, words, and which controls make up a setting."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from workbench.schema import Field

Read = Callable[[], Any]
Changed = Callable[[], None]


@dataclass(frozen=True)
class Control:
    """One setting as controls: what is shown, how its value is read, and what tells of a change."""

    shown: tuple[Any, ...]
    read: Read
    watched: tuple[Any, ...]


def span(f: Field, value: Any) -> tuple[float, float]:
    """The ends of a slider: what the schema offers, widened to hold the value that is set."""
    assert f.range is not None
    low, high = f.range.offered
    return (low, high) if value is None else (min(low, value), max(high, value))


def start(f: Field, value: Any) -> Any:
    """A value for the control of an optional setting that is None."""
    if value is not None:
        return value
    plain = {"int": 0, "float": 0.0, "bool": False, "text": ""}
    if f.range is not None:
        return (int if f.kind == "int" else float)(f.range.offered[0])
    return f.choices[0] if f.kind == "choice" else () if f.kind == "choices" else plain[f.kind]


def number(f: Field, value: float) -> int | float:
    """A slider's value as the setting wants it: whole where it counts, and not past the ends by rounding."""
    if f.range is not None and f.range.log:
        value = min(max(value, f.range.low), f.range.high)
    return round(value) if f.kind == "int" else float(value)


def chosen(f: Field, given: Any, names: Sequence[Any]) -> tuple[Any, ...]:
    """The ticked choices in the order of the schema; in the order given where nothing was changed."""
    return tuple(given) if set(given) == set(names) else tuple(c for c in f.choices if c in names)


def explained(f: Field) -> str:
    """All that is known about a setting, for its tooltip."""
    return "\n".join([f.doc, *(f"{value}: {words}" for value, words in f.choice_words.items())])


def caption(f: Field, value: Any = None) -> str:
    """The words shown under a setting: what it is, and what its present value means."""
    words = f.choice_words.get(value, "")
    said = f'<div class="wb-doc">{html.escape(f.doc)}</div>'
    return said + (f'<div class="wb-choice">{html.escape(words)}</div>' if words else "")


def nested_probes() -> dict[str, Any]:
    """The probes that a setting of kind "probe" offers: those that look at one model."""
    from workbench import catalog

    return dict(catalog.probes("subject"))


def ladder(low: float, high: float, also: Sequence[float] = ()) -> list[float]:
    """Round numbers from ``low`` to ``high``, ten a decade to two digits, with the ends and ``also`` among them."""
    first, last = math.floor(10 * math.log10(low)), math.ceil(10 * math.log10(high))
    rungs = {float(f"{10 ** (k / 10):.2g}") for k in range(first, last + 1)}
    return sorted({low, high, *also} | {r for r in rungs if low <= r <= high})


def late(inner: dict[str, Any]) -> Callable[[], Any]:
    """Reads what ``inner["read"]`` is at that time: the form inside is replaced when another probe is chosen."""

    def read() -> Any:
        return inner["read"]()

    return read
