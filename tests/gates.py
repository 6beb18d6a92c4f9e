"""A probe that waits at gates and a front end that notes what it sees, for tests of order."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import pytest
import toys

from workbench.board import JobState
from workbench.numerics.sampling import Draw
from workbench.probe import Reading
from workbench.schema import Doc, Range

LONG = 20.0
"""Seconds after which something hangs."""


class Gate:
    """Lets as many pass as it was told to."""

    def __init__(self) -> None:
        self.left, self.changed = 0.0, threading.Condition()

    def open(self, n: float) -> None:
        with self.changed:
            self.left += n
            self.changed.notify_all()

    def go_through(self) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.left > 0, LONG)
            self.left -= 1


@dataclass(frozen=True)
class Gated(toys.Trace):
    """Waits at its gate before each reading, so that a test decides what happens when."""

    gate: Annotated[int, Range(0, 99), Doc("Which gate.")] = 0

    gates: ClassVar[dict[int, Gate]] = {}
    started: ClassVar[list[int]] = []
    closed: ClassVar[list[int]] = []

    def stream(self, subject: toys.ToySubject, draw: Draw) -> Iterator[Reading]:
        self.started.append(self.gate)
        try:
            for reading in super().stream(subject, draw):
                self.gates[self.gate].go_through()
                yield reading
        finally:
            self.closed.append(self.gate)


class Log:
    """What a front end would have seen."""

    def __init__(self) -> None:
        self.readings: list[Reading] = []
        self.states: list[JobState] = []
        self.threads: set[str] = set()

    def reading(self, reading: Reading) -> None:
        self.threads.add(threading.current_thread().name)
        self.readings.append(reading)

    def state(self, state: JobState) -> None:
        self.states.append(state)

    def until(self, true: Callable[[], object]) -> None:
        for _ in range(int(LONG * 100)):
            if true():
                return
            time.sleep(0.01)
        pytest.fail(f"waited in vain; states were {self.states}")

    def status(self, status: str) -> bool:
        return any(s.status == status for s in self.states)
