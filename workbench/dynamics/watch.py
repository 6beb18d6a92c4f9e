"""Gauges at work beside a training: which are due, what they need to be told, and what becomes of one that fails."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.dynamics.clock import Clock
from workbench.dynamics.gauges.gauge import Gauge, Meter, Training
from workbench.dynamics.schedules import HISTORY, Every, Moment, Schedule, following, schedule, watched


class Turn:
    """A schedule with what it was last used for: the step, and the seconds that it took."""

    def __init__(self, given: Schedule) -> None:
        self.schedule, self.kept, self.seconds = given, 0, 0.0

    def due(self, step: int, scalars: Mapping[str, float], past: Past, clock: Clock, spent: float) -> bool:
        """Whether its schedule says so; ``spent`` are the seconds of recording up to now."""
        if isinstance(self.schedule, Every):  # the usual one, without making a moment for it: this runs at every step
            return step % self.schedule.steps == 0
        moment = Moment(step, scalars, clock.training(), spent, self.seconds, past.recent, self.kept)
        return self.schedule.due(moment)

    def used(self, step: int, seconds: float) -> None:
        """It was followed."""
        self.kept, self.seconds = step, seconds


class Past:
    """The latest values of the scalars that some schedule watches; nothing of the others is kept."""

    def __init__(self, schedules: Iterable[Schedule]) -> None:
        self.recent = {name: deque[float](maxlen=HISTORY) for one in schedules for name in watched(one)}

    def add(self, scalars: Mapping[str, float]) -> None:
        """The scalars of one more step."""
        for name, values in self.recent.items():
            if name in scalars:
                values.append(scalars[name])


class _Post:
    """One gauge's place: its meter, when it is due, and whether it was told of the step that is coming."""

    def __init__(self, gauge: Gauge, meter: Meter) -> None:
        self.name, self.meter, self.turn = type(gauge).__name__, meter, Turn(schedule(gauge.every))
        self.armed = False


class Watch:
    """All gauges of one recorder.

    A hook sits on the optimizer only while a step is under way that a gauge wants to see, so that all other steps cost
    nothing. A gauge that fails is dropped with a warning: training is worth more than a curve.
    """

    def __init__(self, gauges: Sequence[Gauge], clock: Clock) -> None:
        self._gauges, self._clock = tuple(gauges), clock
        self._posts: list[_Post] = []
        self._hooks: list[Any] = []
        self._training: Training | None = None
        self._chosen = self.schedules
        plain = [one.steps for one in self._chosen if isinstance(one, Every)]
        self._periods = tuple(set(plain)) if len(plain) == len(self._gauges) else None

    def next_due(self, step: int) -> int | float:
        """The first step after ``step`` at which a gauge can be due; infinite without gauges."""
        return min((following(one, step) for one in self._chosen), default=math.inf)

    def _idle(self, step: int) -> bool:
        """Whether no gauge can be due at a step; a microsecond, for all the steps between readings."""
        return self._periods is not None and all(step % period for period in self._periods)

    @property
    def schedules(self) -> list[Schedule]:
        """Those of the gauges."""
        return [schedule(gauge.every) for gauge in self._gauges]

    def start(self, training: Training) -> None:
        """Make the meters; ``ValueError`` where one lacks something."""
        self._training = training
        self._posts = [_Post(gauge, gauge.start(training)) for gauge in self._gauges]

    def prepare(self, step: int, scalars: Mapping[str, float], past: Past) -> None:
        """Tell the gauges that want to know beforehand, and are due then, that ``step`` comes next."""
        if self._idle(step) or self._training is None:
            return
        self._renew()
        for post in (p for p in self._posts if p.meter.ahead):
            if post.turn.due(step, scalars, past, self._clock, self._clock.now()):
                self._guarded(post, post.meter.arm)
                post.armed = True
        optimizer = self._training.optimizer
        if optimizer is not None and not self._hooks and any(p.armed for p in self._posts):
            add = optimizer.register_step_pre_hook, optimizer.register_step_post_hook
            self._hooks = [add[0](self._before), add[1](self._stepped)]

    def _before(self, *_: Any) -> None:
        with self._clock:
            self._renew()
            for post in [p for p in self._posts if p.armed]:
                self._guarded(post, post.meter.before)

    def _stepped(self, *_: Any) -> None:
        with self._clock:
            for post in [p for p in self._posts if p.armed]:
                self._guarded(post, post.meter.stepped)

    def collect(self, step: int, scalars: Mapping[str, float], past: Past) -> dict[str, Tensor | float]:
        """What the gauges that are due read after ``step``."""
        found: dict[str, Tensor | float] = {}
        if self._idle(step):
            return found
        if not self._hooks:  # else it was done when the optimizer began its step
            self._renew()
        for post in list(self._posts):
            spent = self._clock.now()
            if post.armed or (not post.meter.ahead and post.turn.due(step, scalars, past, self._clock, spent)):
                post.armed = False
                found |= self._guarded(post, post.meter.read) or {}
                post.meter.disarm()
                post.turn.used(step, self._clock.now() - spent)
        self._unhook()
        return found

    def _guarded(self, post: _Post, act: Any) -> Any:
        try:
            with torch.no_grad():
                return act()
        except Exception as problem:  # noqa: BLE001 (whatever it is, training must not end for it)
            post.meter.disarm()
            self._posts = [p for p in self._posts if p is not post]
            warnings.warn(
                f"the gauge {post.name} failed and is left out from here on: {type(problem).__name__}: {problem}",
                RuntimeWarning,
                stacklevel=2,
            )
            return None

    def _renew(self) -> None:
        if self._training is not None:
            self._training.renew()

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def close(self) -> None:
        """Take away every hook."""
        self._unhook()
        for post in self._posts:
            post.meter.disarm()
