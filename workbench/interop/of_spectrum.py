"""What PyHessian and curvlinops say about a :class:`~workbench.probes.spectrum.HessianSpectrum`."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from workbench.interop import curvlinops, pyhessian
from workbench.interop.opinion import Answer, Opinion, Row
from workbench.interop.pyhessian import Eigenvalue, PyHessian, Stop, Trace
from workbench.probe import Probe, Reading
from workbench.spectra.opening import restricted
from workbench.subject import Subject

SHORT = 2.5e-6
"""The share of a value that PyHessian's normalisation, by ‖v‖ + 1e-6, can take off it."""
SHARES = (0.5, 0.75)
"""The shares of the time by which PyHessian's eigenvalues, and its trace, must be done."""


def why_not(probe: Probe[Any]) -> str:
    """Only the plain Hessian is known to other packages in the same form."""
    settings: Any = probe
    if settings.operator != "hessian":
        return f"other packages are asked about operator='hessian' only; this spectrum is of {settings.operator!r}."
    if settings.preconditioned:
        return "other packages have no spectrum through the optimizer's preconditioner; ask with preconditioned=False."
    return ""


def ask(reading: Reading, subject: Subject, seconds: float) -> Opinion:
    """Eigenvalues and trace by PyHessian at its defaults, and eigenvalues by curvlinops where that is installed.

    Cost: PyHessian's power iteration takes up to 100 products for each eigenvalue, its trace up to 100; all of it ends
    after about ``seconds``, at the first product beyond.
    """
    probe: Any = reading.probe
    part, began = restricted(subject, probe.layers), time.monotonic()
    top = int(np.isfinite(reading.data.eigenvalue.values).sum())
    with PyHessian(part, int(reading.provenance.get("seed", 0)), SHARES[0] * seconds) as theirs:
        values = theirs.eigenvalues(top)
        theirs.deadline = began + SHARES[1] * seconds
        trace = theirs.trace() if probe.trace else None
    exact, said = _curvlinops(part, top, began + seconds - time.monotonic())
    rows = [*_eigenvalues(reading, values, exact), *_minimum(reading, values), *_trace(reading, trace)]
    return Opinion(probe.name, subject.describe()["on"], tuple(rows), (*_notes(part, values), *said))


def _eigenvalues(reading: Reading, found: Sequence[Eigenvalue], exact: Sequence[float]) -> list[Row]:
    """Ours by rank, theirs by size among those above zero: the order found is by magnitude, and not sorted."""
    ours, errors = reading.data.eigenvalue.values, reading.data.residual.values
    short, found = len(found) < len(ours), [f for f in found if f.value > 0 or f.stopped != "time"]
    theirs = sorted((i for i, f in enumerate(found) if f.value > 0), key=lambda i: -found[i].value)
    rounding, missing = _rounding(reading), len(found) - len(theirs)
    rows = list[Row]()
    for rank, (value, error) in enumerate(zip(ours, errors, strict=True)):
        if not math.isfinite(value):
            continue
        if rank < len(theirs):
            answer = _answer(found[theirs[rank]], theirs[rank], rank, float(value), float(error) + rounding)
        else:
            answer = Answer(pyhessian.NAME, math.nan, words=_absent(missing, short))
        others = [Answer(curvlinops.NAME, exact[rank])] if rank < len(exact) else []
        rows.append(Row(f"eigenvalue {rank + 1}", float(value), float(error), (answer, *others), rounding))
    return rows


def _answer(found: Eigenvalue, place: int, rank: int, ours: float, bar: float) -> Answer:
    words = list[str]()
    apart = abs(found.value - ours)
    if bar < apart <= SHORT * abs(ours):
        words.append("it divides vectors by their length plus 1e-6, which takes two millionths off each value")
    elif apart > bar:
        words.append(_stopped(found.stopped, f"{found.products} products", "two steps"))
        if math.isfinite(found.residual):
            covers = apart <= found.residual + bar
            words.append(
                f"its residual of {found.residual:.2g} {'covers' if covers else 'does not cover'} the difference"
            )
    if place != rank:
        words.append(f"found as number {place + 1}, since power iteration goes by magnitude")
    return Answer(pyhessian.NAME, found.value, found.residual, "; ".join(words))


def _absent(negative: int, short: bool) -> str:
    if negative:
        verb = "is" if negative == 1 else "are"
        return f"not found: {negative} of its values {verb} negative, since power iteration goes by magnitude"
    return "not found: time was up" if short else "not found"


def _minimum(reading: Reading, found: Sequence[Eigenvalue]) -> list[Row]:
    """The most negative of theirs beside our minimum; they do not look for one."""
    ours, negative = float(reading.data.eigenvalue_min), [f for f in found if f.value < 0 and f.stopped != "time"]
    if not math.isfinite(ours) or not negative:
        return []
    error, rounding = float(reading.data.eigenvalue_min_residual), _rounding(reading)
    least = min(negative, key=lambda f: f.value)
    place = found.index(least)
    return [Row("eigenvalue_min", ours, error, (_answer(least, place, place, ours, error + rounding),), rounding)]


def _trace(reading: Reading, found: Trace | None) -> list[Row]:
    ours, error = float(reading.data.trace), float(reading.data.trace_error)
    if found is None or not math.isfinite(ours):
        return []
    rounding = _rounding(reading) * max(1.0, math.sqrt(float(reading.data.parameters)))
    words = list[str]()
    if not abs(found.value - ours) <= error + rounding:
        words.append(_stopped(found.stopped, f"{found.vectors} random vectors", "two running means"))
        if found.stopped == "rule" and found.vectors == 2:
            words.append("its rule holds at once where the first mean is negative")
        words.append(f"its mean has a standard error of {found.error:.2g}, which it does not state")
    return [Row("trace", ours, error, (Answer(pyhessian.NAME, found.value, found.error, "; ".join(words)),), rounding)]


def _stopped(why: Stop, work: str, what: str) -> str:
    if why == "time":
        return f"was stopped after {work}, since time was up"
    if why == "limit":
        return f"went to its limit of {work} without meeting its rule"
    return f"stopped after {work}, when {what} differed by less than {pyhessian.TOLERANCE:g}"


def _rounding(reading: Reading) -> float:
    """What products leave open: some ten units in the last place of the largest eigenvalue in magnitude."""
    dtype = getattr(torch, str(reading.provenance["subject"]["dtype"]))
    ends = [*reading.data.eigenvalue.values, float(reading.data.eigenvalue_min)]
    return 16 * torch.finfo(dtype).eps * float(np.nanmax(np.abs(ends)))


_ITS_ERRORS = (
    "its ± is the residual of its vector (of a trace: the standard error of its mean), measured here: it states none "
    "itself"
)


def _notes(subject: Subject, found: Sequence[Eigenvalue]) -> tuple[str, ...]:
    shares = [batch.weight / batch.size for batch in subject.batches()]
    uneven = max(shares) - min(shares) > 1e-9 * max(shares)
    ran = f"{pyhessian.NAME} {version('pyhessian')} ran at its defaults on the same {subject.examples} examples"
    notes = [f"{ran}, parameters and policy, by power iteration from the largest magnitude down, whatever the sign"]
    notes.append(_ITS_ERRORS)
    if uneven:
        notes.append(
            "batches were weighted as in the loss; left alone it weighs a batch by its number of examples, which is "
            "another function here"
        )
    if any(f.stopped == "time" for f in found):
        notes.append("its eigenvalues were cut short by the time limit; second_opinion(seconds=...) gives more")
    return tuple(notes)


def _curvlinops(subject: Subject, top: int, seconds: float) -> tuple[Sequence[float], tuple[str, ...]]:
    """The largest eigenvalues by curvlinops and ARPACK in the time left, and words; nothing where it is not there."""
    if find_spec(curvlinops.NAME) is None or subject.size < 3 or not top:
        return (), ()
    try:
        found = curvlinops.largest(subject, top, seconds)
    except TimeoutError:
        return (), ("curvlinops was not done in time; second_opinion(seconds=...) gives more",)
    except Exception as problem:  # noqa: BLE001 - another package may raise anything; the rest of the table stands
        return (), (f"curvlinops could not: {type(problem).__name__}: {str(problem).splitlines()[0][:120]}",)
    said = ("curvlinops' eigenvalues are by its own products and ARPACK, to rounding", curvlinops.trap(subject))
    return found, tuple(filter(None, said))
