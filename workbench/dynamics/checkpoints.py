"""Probes of points along a training: at which checkpoints they read, and how."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any, cast

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
