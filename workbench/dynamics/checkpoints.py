"""Probes of points along a training: at which checkpoints they read, and how."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, cast

import xarray as xr

from workbench.numerics.sampling import Draw
from workbench.probe import Cost, Probe, Reading, drive
from workbench.schema import Doc, Range
from workbench.trajectory import Trajectory

Every = Annotated[
    int, Range(1, 10_000, soft=(1, 20)), Doc("Read every so many checkpoints; the first and the last always.")
]


def every_so_many(steps: tuple[int, ...], every: int) -> tuple[int, ...]:
    """The steps that are read: every so many, and the last."""
    picked = steps[::every]
    return picked if picked[-1] == steps[-1] else (*picked, steps[-1])


def chosen_steps(
    steps: Sequence[int], wanted: str | Sequence[int] | None = None, every: int = 1, label: str = "the record"
) -> tuple[int, ...]:
    """Those of the recorded ``steps`` that a person names, ascending, each once; then every so many, and the last.

    Args:
        steps: those that are recorded, ascending.
        wanted: a list of them, or words: steps, ranges with both their ends, and ``last``, joined by commas, as in
            ``"0,100..500,last"``; an open range (``500..``, ``..500``) reaches to the record's end. None: all.
        every: take every so many of these; the first and the last always.
        label: what the record is called in errors.

    Raises:
        ValueError: words that say nothing, a step that is not recorded, a range without one; with those there are.
    """
    if every < 1:
        raise ValueError(f"every={every!r} must be at least 1: read every so many checkpoints.")
    if not steps and wanted is not None:
        raise ValueError(f"{label} holds no checkpoints; record one with wb.Recorder.")
    if wanted is None:
        found = set(steps)
    else:
        parts = wanted.split(",") if isinstance(wanted, str) else [str(one) for one in wanted]
        found = {step for part in parts for step in _named(steps, part.strip(), label)}
        if not found:
            raise ValueError(f"steps= names no step; {label} has {_listed(steps)}.")
    return every_so_many(tuple(sorted(found)), every) if found else ()


def _named(steps: Sequence[int], part: str, label: str) -> Sequence[int]:
    """The recorded steps that one part of a list names; never none."""
    if part == "last":
        return steps[-1:]
    found = re.fullmatch(r"(\d+)|(\d*)\.\.(\d*)", part, re.ASCII)
    if found is None:
        raise ValueError(
            f"steps are recorded ones, ranges and `last`, joined by commas, as in 0,100..500,last; got {part!r}. "
            f"{label} has {_listed(steps)}."
        )
    low, high = int(found[1] or found[2] or 0), int(found[1] or found[3] or steps[-1])
    inside = [step for step in steps if low <= step <= high]
    if not inside:
        many = "s" if found[1] is None else ""
        raise ValueError(f"{label} has no weights at step{many} {part}; it has {_listed(steps)}.")
    return inside


def _listed(steps: Sequence[int]) -> str:
    shown = [str(s) for s in (steps if len(steps) < 12 else (*steps[:5], *steps[-3:]))]
    return ", ".join(shown) if len(steps) < 12 else f"{', '.join(shown[:5])} ... {', '.join(shown[5:])}"


def cost_at_each(probe: Probe[Any], trajectory: Trajectory, every: int) -> Cost:
    """The probe's cost at the first checkpoint (the last may have diverged), for each checkpoint in turn."""
    one = probe.estimate(trajectory.subject(trajectory.steps[0]))
    count = len(every_so_many(trajectory.steps, every))
    products = None if one.products is None else one.products * count
    seconds = None if one.seconds is None else one.seconds * count
    return Cost(one.bytes, products, f"{one.words}, at each of {count} checkpoints", seconds)


def readings_at(probe: Probe[Any], trajectory: Trajectory, step: int, seed: int) -> Iterator[Reading]:
    """A probe's readings of one checkpoint; it is closed at once where nobody asks for more."""
    with contextlib.closing(cast("Any", drive(probe, trajectory.subject(step), seed=seed))) as stream:
        yield from stream


def last_of(probe: Probe[Any], subject: Any, draw: Draw) -> xr.Dataset:
    """The data that another probe's stream ends with; the stream is closed also where something goes wrong."""
    with contextlib.closing(cast("Any", probe.stream(subject, draw))) as stream:
        *_, last = stream
    return last.data
