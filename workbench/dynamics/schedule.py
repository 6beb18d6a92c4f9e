"""When to keep a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Moment:
    """What a schedule may look at: the step, its scalars, and seconds spent on training and on recording so far."""

    step: int
    scalars: Mapping[str, float]
    training_seconds: float
    recording_seconds: float


class Schedule(Protocol):
    """Decides at each step whether its weights are kept. Step 0 and the last step are kept whatever it says."""

    def due(self, moment: Moment) -> bool:
        """Whether to keep a checkpoint now."""
        ...


@dataclass(frozen=True)
class LogSpaced:
    """The steps nearest to 10^(k / per_decade), k = 0, 1, 2 ...: 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20 ... for ten."""

    per_decade: int

    def __post_init__(self) -> None:
        if self.per_decade < 1:
            raise ValueError(f"log_spaced(per_decade) must be at least 1; got {self.per_decade!r}.")

    def due(self, moment: Moment) -> bool:
        """Whether the step is one of them."""
        return self.keeps(moment.step)

    def keeps(self, step: int) -> bool:
        """Whether ``step`` is one of them."""
        if step < 1:
            return step == 0
        near = round(math.log10(step) * self.per_decade)
        return any(round(10 ** (k / self.per_decade)) == step for k in (near - 1, near, near + 1))


@dataclass(frozen=True)
class Every:
    """Every ``steps``-th step."""

    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"every={self.steps!r} must be at least 1: the number of steps between checkpoints.")

    def due(self, moment: Moment) -> bool:
        """Whether the step is a multiple."""
        return moment.step % self.steps == 0


def log_spaced(per_decade: int = 10) -> LogSpaced:
    """Keep about ``per_decade`` checkpoints for each tenfold of steps: dense where training is fast, sparse later."""
    return LogSpaced(per_decade)
