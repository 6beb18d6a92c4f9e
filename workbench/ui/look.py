"""How both front ends look: one style sheet, and the small pieces of HTML that they share.

Colours come from JupyterLab's own variables, so that light and dark themes are followed; a served page, which has none,
falls back to values that follow the browser's preference.
"""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench import catalog
from workbench.draw.sheet import grid
from workbench.figure import Figure
from workbench.probe import Reading
from workbench.words import duration, summary_rows

LEGIBLE = 320
"""Pixels of width below which a panel cannot be read."""

ASKING = "Asking other packages, for a minute at most ..."

SHEET = (Path(__file__).parent / "bench.css").read_text(encoding="utf-8")


def title(target: Any, live: bool = False) -> str:
    """The first line: what is on the bench, and whether it is being recorded now."""
    told = "Experiment: trains nets of its own" if target.kind == "nothing" else repr(target).strip("<>")
    name, _, rest = told.partition(":")
    now = '<span class="wb-live" role="status">recording now</span>' if live else ""
    return f'<div class="wb-title">{html.escape(name)}<span>{html.escape(rest)}</span>{now}</div>'


def about(cls: type) -> str:
    """A probe's first sentence."""
    words = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(catalog.words(cls)))
    return f'<div class="wb-about">{words}</div>'


def progress(state: Any) -> str:
    """``43 % · 2.1 s left · about 45 products of 12 ms: 0.5 s, 40 MB``, or what the job is doing."""
    words = [f"{state.done:.0%}"] if state.status == "running" or state.done == 1 else []
    if state.status == "running":
        words.append(f"{duration(state.remaining)} left" if state.remaining is not None else duration(state.elapsed))
        words += [state.cost] if state.cost else []
    elif state.status == "done":
        words.append("from the store" if state.from_store else duration(state.elapsed))
    else:
        words.append(state.status)
    return f'<span class="wb-progress-text">{html.escape(" · ".join(words))}</span>'


def summary(numbers: Mapping[str, Any], notes: tuple[str, ...] = ()) -> str:
    """The headline numbers with their errors, and the notes, as HTML."""
    rows = [f"<tr><th scope='row'>{_name(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in summary_rows(numbers)]
    half = len(rows) if len(rows) < 6 else -(-len(rows) // 2)
    tables = [
        f'<table class="wb-summary"><tbody>{"".join(part)}</tbody></table>'
        for part in (rows[:half], rows[half:])
        if part
    ]
    said = "".join(f"<li>{html.escape(n)}</li>" for n in notes)
    return f'<div class="wb-summaries">{"".join(tables)}</div>' + (f'<ul class="wb-notes">{said}</ul>' if said else "")


def answer(reading: Reading) -> str:
    """The headline numbers and notes of a reading; of an experiment that is over also the verdict, in words."""
    return _verdict(reading) + summary(reading.summary, reading.notes)


def _verdict(reading: Reading) -> str:
    judge = getattr(reading.probe, "verdict", None)
    if judge is None or reading.done < 1:
        return ""
    found = judge(reading.data)
    kind = "wb-passed" if found.passed else "wb-failed"
    return f'<div class="wb-verdict {kind}" role="status">{html.escape(str(found))}</div>'


def _name(key: str) -> str:
    return html.escape(key.replace("_", " "))


def status(words: str, error: bool = False) -> str:
    """One line about what happened; errors stand out, and nothing in them is read as HTML."""
    kind, role = ("wb-status-text wb-error", "alert") if error else ("wb-status-text", "status")
    return f'<div class="{kind}" role="{role}">{html.escape(words)}</div>'


def problem(error: BaseException) -> str:
    """An exception as a person should read it."""
    words = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
    return f"{type(error).__name__}: {words}"


CHOOSING = "Click on the map to choose a point, drag a box to sample that part finely, double-click for the whole map."


def place(places: Any) -> str:
    """The chosen point and where probes look, or how to choose a point."""
    words = places.words or CHOOSING
    said = f'<div class="wb-about">{words}</div>' if places.map is not None else ""
    if places.here is None:
        return said
    where = html.escape(places.here.words)
    return f'<div class="wb-away">Probes look at the point {where}, not at the model.</div>{said}'


def code(text: str) -> str:
    """Python as it is shown, and copied."""
    return f'<pre class="wb-code" tabindex="0">{html.escape(text)}</pre>'


SCRIPT = Path(__file__).parent / "page.js"


def fitted(figure: Figure, room: int) -> Figure:
    """The same figure with as many panels in a row as ``room`` pixels can hold legibly."""
    most = max(1, room // LEGIBLE)
    columns = min(figure.columns or grid(figure)[1], most)
    return figure if columns == grid(figure)[1] else dataclasses.replace(figure, columns=columns)
