"""Scalars that a GPU has not computed yet: asked for without waiting, written in order once they are there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from workbench.record import Line

MOST = 1000
"""Lines that may wait; then the oldest is waited for."""


class Arrival(Protocol):
    """Numbers on their way to the host."""

    def ready(self) -> bool:
        """Whether they are there, without waiting."""
        ...

    def values(self) -> list[float]:
        """The numbers; waits for them."""
        ...


@dataclass(frozen=True)
class _FromGPU:
    """A copy into pinned memory, and the event that ends it."""

    host: Tensor
    event: torch.cuda.Event

    def ready(self) -> bool:
        return self.event.query()

    def values(self) -> list[float]:
        self.event.synchronize()
        return self.host.tolist()


def send(tensors: Iterable[Tensor]) -> Arrival:
    """Ask a GPU for the numbers of tensors of one element, in one copy, behind the work that it has to do already."""
    stacked = torch.stack([t.detach().reshape(()).to(torch.float64) for t in tensors])
    host = torch.empty(stacked.shape, dtype=torch.float64, pin_memory=True)
    with torch.cuda.device(stacked.device):
        host.copy_(stacked, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
    return _FromGPU(host, event)


def late(value: object) -> bool:
    """Whether reading a scalar now would make the host wait for a GPU."""
    return isinstance(value, Tensor) and value.device.type == "cuda"


class Pending:
    """Writes lines in their order, each as soon as its numbers are known; none waits for a GPU but at the end.

    Kill the process, and the lines are lost of those steps that the GPU had not finished.
    """

    def __init__(
        self, write: Callable[[Line], None], ask: Callable[[Iterable[Tensor]], Arrival] = send, most: int = MOST
    ) -> None:
        self._write, self._ask, self._most = write, ask, most
        self._waiting: deque[tuple[Line, tuple[str, ...], Arrival | None]] = deque()
        self.arrived: dict[str, float] = {}
        """What came in since it was last looked at."""

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether nothing waits to be written, or to be looked at."""
        return not (self._waiting or self.arrived)

    def push(self, line: Line, later: Mapping[str, Tensor]) -> None:
        """A line, and those of its scalars that are still on a GPU."""
        if not later and not self._waiting:
            self._write(line)
            return
        self._waiting.append((line, tuple(later), self._ask(later.values()) if later else None))
        self.drain()

    def drain(self, wait: bool = False) -> None:
        """Write what is known by now; with ``wait``, all."""
        while self._waiting:
            line, names, arrival = self._waiting[0]
            if arrival is not None and not (wait or len(self._waiting) > self._most or arrival.ready()):
                return
            found = dict(zip(names, arrival.values(), strict=True)) if arrival is not None else {}
            self._waiting.popleft()
            self.arrived |= found
            self._write(replace(line, values={**line.values, **found}))
