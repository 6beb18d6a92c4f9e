"""When to keep a checkpoint or to read a gauge: small values that combine by ``|`` (either) and ``&`` (both).

::

    every(100) | on_spike("train_loss")           each hundredth step, and where the loss jumps
    log_spaced(20) & budget(0.03)                 twenty a decade, but never more than 3 % of the training time
    on_crossing("test_accuracy", 0.99)            the first step at which the test accuracy is at least 0.99
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

__all__ = [
    "Moment",
    "Schedule",
    "budget",
    "every",
    "log_spaced",
    "on_crossing",
    "on_spike",
]

HISTORY = 200
"""Values of a scalar that are remembered for schedules that watch it."""
_LEAST = 20  # values before which nothing is called a spike
_ROBUST = 1.4826  # the standard deviation of a normal distribution over its median absolute deviation


@dataclass(frozen=True)
class Moment:
    """What a schedule may look at.

    ``scalars`` are those of this step, ``recent`` the values before it (latest last, at most 200) of those that the
    schedule ``watches``. ``training_seconds`` and ``recording_seconds`` were spent so far, ``expected_seconds`` is what
    the checkpoint or reading in question took the last time. ``kept`` is the step of the last one.
    """

    step: int
    scalars: Mapping[str, float]
    training_seconds: float = 0.0
    recording_seconds: float = 0.0
    expected_seconds: float = 0.0
    recent: Mapping[str, Sequence[float]] = field(default_factory=dict[str, Sequence[float]])
    kept: int = 0


class Schedule(Protocol):
    """Decides at each step, from what is known at that moment alone.

    Anything with ``due`` will do; ``watches`` (optional) names the scalars whose recent values it wants, and
    ``next_due(step)`` (optional) says the first step after ``step`` at which it can be due: it is not asked before.
    """

    def due(self, moment: Moment) -> bool:
        """Whether now."""
        ...


class Combining:
    """Lets schedules be joined by ``|`` and ``&``."""

    @property
    def watches(self) -> tuple[str, ...]:
        """The scalars whose recent values are looked at."""
        return ()

    def next_due(self, step: int) -> int:
        """The first step after ``step`` at which this can be due; any one, where it depends on what happens."""
        return step + 1

    def __or__(self, other: Schedule | int) -> Either:
        return Either(cast("Schedule", self), schedule(other))

    def __and__(self, other: Schedule | int) -> Both:
        return Both(cast("Schedule", self), schedule(other))


@dataclass(frozen=True)
class _Two(Combining):
    """Two schedules."""

    first: Schedule
    second: Schedule

    @property
    def watches(self) -> tuple[str, ...]:
        """The scalars that either looks at."""
        return (*watched(self.first), *watched(self.second))


@dataclass(frozen=True)
class Either(_Two):
    """Whenever one of two schedules says so."""

    def due(self, moment: Moment) -> bool:
        """Whether one of them is due."""
        return self.first.due(moment) or self.second.due(moment)

    def next_due(self, step: int) -> int:
        """The sooner of both."""
        return min(following(self.first, step), following(self.second, step))


@dataclass(frozen=True)
class Both(_Two):
    """Whenever two schedules agree."""

    def due(self, moment: Moment) -> bool:
        """Whether both are due."""
        return self.first.due(moment) and self.second.due(moment)

    def next_due(self, step: int) -> int:
        """The later of both."""
        return max(following(self.first, step), following(self.second, step))


@dataclass(frozen=True)
class LogSpaced(Combining):
    """The steps nearest to 10^(k / per_decade), k = 0, 1, 2 ...: 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20 ... for ten."""

    per_decade: int

    def __post_init__(self) -> None:
        if self.per_decade < 1:
            raise ValueError(f"log_spaced(per_decade) must be at least 1; got {self.per_decade!r}.")

    def due(self, moment: Moment) -> bool:
        """Whether the step is one of them."""
        return self.keeps(moment.step)

    def next_due(self, step: int) -> int:
        """The power after ``step``."""
        k = math.floor(math.log10(step) * self.per_decade) if step > 0 else 0
        while round(10 ** (k / self.per_decade)) <= step:  # at most some steps: rounding gives small powers twice
            k += 1
        return round(10 ** (k / self.per_decade))

    def keeps(self, step: int) -> bool:
        """Whether ``step`` is one of them."""
        if step < 1:
            return step == 0
        near = round(math.log10(step) * self.per_decade)
        return any(round(10 ** (k / self.per_decade)) == step for k in (near - 1, near, near + 1))


@dataclass(frozen=True)
class Every(Combining):
    """Every ``steps``-th step."""

    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"every={self.steps!r} must be at least 1: the number of steps between two.")

    def due(self, moment: Moment) -> bool:
        """Whether the step is a multiple."""
        return moment.step % self.steps == 0

    def next_due(self, step: int) -> int:
        """The multiple after ``step``."""
        return step - step % self.steps + self.steps


@dataclass(frozen=True)
class _Watching(Combining):
    """Looks at one scalar."""

    scalar: str

    @property
    def watches(self) -> tuple[str, ...]:
        """The scalar."""
        return (self.scalar,)

    def seen(self, moment: Moment, apart: int) -> tuple[float | None, Sequence[float]]:
        """The value now with those before it; None where one is missing, or fewer than ``apart`` steps have passed."""
        now, before = moment.scalars.get(self.scalar), moment.recent.get(self.scalar, ())
        return None if not before or 0 < moment.kept > moment.step - apart else now, before


@dataclass(frozen=True)
class Spike(_Watching):
    """Where a scalar jumps: more than ``threshold`` robust standard deviations above its recent median.

    The standard deviation is 1.4826 times the median absolute deviation of the last 200 finite values; before 20 of
    them nothing is a spike. A value that is not finite, after one that was, is one. ``apart`` steps lie between two.
    """

    threshold: float = 6.0
    apart: int = 10

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ValueError(f"on_spike(threshold) must be positive, such as 6; got {self.threshold!r}.")

    def due(self, moment: Moment) -> bool:
        """Whether it jumps now. Some 20 µs: two medians."""
        now, before = self.seen(moment, self.apart)
        if now is None:
            return False
        if not math.isfinite(now):
            return math.isfinite(before[-1])
        finite = [x for x in before if math.isfinite(x)]
        if len(finite) < _LEAST:
            return False
        middle = statistics.median(finite)
        spread = _ROBUST * statistics.median(abs(x - middle) for x in finite)
        return now > middle + self.threshold * max(spread, 1e-12 * abs(middle))


@dataclass(frozen=True)
class Crossing(_Watching):
    """The step at which a scalar first stands on the other side of ``threshold`` than its value before.

    In both directions; ``apart`` steps lie between two, so that a noisy curve does not fill the disk.
    """

    threshold: float
    apart: int = 10

    def due(self, moment: Moment) -> bool:
        """Whether it crosses now."""
        now, before = self.seen(moment, self.apart)
        return now is not None and (now >= self.threshold) != (before[-1] >= self.threshold)


@dataclass(frozen=True)
class Budget(Combining):
    """Whenever recording, with what this would cost, stays within ``share`` of the time spent on training.

    Both times are measured as training goes on; what it would cost is what it cost the last time.
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"budget(share) is a share of the training time, such as 0.03; got {self.share!r}.")

    def due(self, moment: Moment) -> bool:
        """Whether there is room for one more."""
        return moment.recording_seconds + moment.expected_seconds <= self.share * moment.training_seconds


def log_spaced(per_decade: int = 10) -> LogSpaced:
    """About ``per_decade`` for each tenfold of steps: dense where training is fast, sparse later."""
    return LogSpaced(per_decade)


def every(steps: int) -> Every:
    """Each ``steps``-th step."""
    return Every(steps)


def on_spike(scalar: str, threshold: float = 6.0, apart: int = 10) -> Spike:
    """Where ``scalar`` jumps by more than ``threshold`` robust standard deviations of its last 200 values, or to NaN.

    At least ``apart`` steps after the checkpoint (or reading) before. Source: the workbench's own convention.
    """
    return Spike(scalar, threshold, apart)


def on_crossing(scalar: str, threshold: float, apart: int = 10) -> Crossing:
    """Where ``scalar`` comes to stand on the other side of ``threshold``, at least ``apart`` steps after the last."""
    return Crossing(scalar, threshold, apart)


def budget(share: float = 0.03) -> Budget:
    """As often as recording takes at most ``share`` of the training time; joined by ``&``, a bound on another one."""
    return Budget(share)


def schedule(given: Any) -> Schedule:
    """A schedule from what users write: a number of steps, or a schedule.

    Raises:
        TypeError: neither of them.
    """
    if isinstance(given, int) and not isinstance(given, bool):
        return Every(given)
    if not hasattr(given, "due"):
        raise TypeError(f"every= takes wb.log_spaced(10), another schedule or a whole number of steps; got {given!r}.")
    return cast("Schedule", given)


def watched(given: Schedule) -> tuple[str, ...]:
    """The scalars whose recent values a schedule looks at."""
    return tuple(getattr(given, "watches", ()))


def following(given: Schedule, step: int) -> int:
    """The first step after ``step`` at which a schedule can be due; the very next one where it does not say."""
    return given.next_due(step) if hasattr(given, "next_due") else step + 1  # pyright: ignore[reportAttributeAccessIssue]
