"""Probes of points along a training: at which checkpoints they read, and how."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any, cast

from workbench.probe import Probe, Reading, drive
from workbench.schema import Doc, Range
from workbench.trajectory import Trajectory

Every = Annotated[
    int, Range(1, 10_000, soft=(1, 20)), Doc("Read every so many checkpoints; the first and the last always.")
]


def every_so_many(steps: tuple[int, ...], every: int) -> tuple[int, ...]:
    """The steps that are read: every so many, and the last."""
    picked = steps[::every]
    return picked if picked[-1] == steps[-1] else (*picked, steps[-1])


def readings_at(probe: Probe[Any], trajectory: Trajectory, step: int, seed: int) -> Iterator[Reading]:
    """A probe's readings of one checkpoint; it is closed at once where nobody asks for more."""
    with contextlib.closing(cast("Any", drive(probe, trajectory.subject(step), seed=seed))) as stream:
        yield from stream
