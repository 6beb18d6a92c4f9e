"""How long training has taken, and how much of the time recording it took: measured, not guessed."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import TracebackType

import torch
from torch import nn


@dataclass
class Clock:
    """Seconds spent on recording, wherever ``with clock:`` is, and on training, which is all the rest.

    ``recording`` and ``trained`` begin with what an earlier attempt of the same record took. Times are those of the
    host: work that a GPU still has to do when recording begins belongs to training (:meth:`settle`).
    """

    recording: float = 0.0
    trained: float = 0.0
    _began: float = field(default_factory=time.perf_counter)
    _before: float = 0.0
    _entered: float = 0.0

    def restart(self) -> None:
        """Training begins now."""
        self._began = time.perf_counter()

    def go_on(self, recording: float, training: float) -> None:
        """Add what earlier attempts took."""
        self.recording, self.trained, self._before = self.recording + recording, training, recording

    def now(self) -> float:
        """Seconds of recording up to this very moment, while inside ``with clock:``."""
        return self.recording + time.perf_counter() - self._entered

    def training(self) -> float:
        """Seconds of training so far, up to where ``with clock:`` was entered last."""
        return self.trained + (self._entered - self._began) - (self.recording - self._before)

    def begin(self) -> tuple[float, float]:
        """Enter, as ``with clock:`` does, and say what recording and training took until now; :meth:`end` leaves."""
        self._entered = entered = time.perf_counter()
        return self.recording, self.trained + (entered - self._began) - (self.recording - self._before)

    def end(self) -> None:
        """Leave what :meth:`begin` entered."""
        self.recording += time.perf_counter() - self._entered

    def settle(self, device: torch.device) -> None:
        """Wait until a GPU has done what training gave it, on training's account."""
        if device.type == "cuda":
            began = time.perf_counter()
            torch.cuda.current_stream(device).synchronize()
            self.recording -= time.perf_counter() - began

    def __enter__(self) -> Clock:
        self._entered = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.recording += time.perf_counter() - self._entered


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter (or buffer) is; the CPU for a model without any."""
    first = next(iter(model.parameters()), None)
    first = first if first is not None else next(iter(model.buffers()), None)
    return first.device if first is not None else torch.device("cpu")
