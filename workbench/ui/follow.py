"""Following a training that is being recorded: what is new is taken in every few seconds, without a toolkit.

A look at the folder costs some file stamps; curves and checkpoints are read by the probes that want them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workbench import record
from workbench.dynamics.lock import is_written

PAUSE = 2.0
"""Seconds between two looks at the folder."""
SHARE = 20
"""A look takes one part in so many of the time at most: where the disk is slow it comes less often."""


class Follower:
    """Takes in what a training records into the trajectory of a session, for as long as it goes on.

    ``session`` is a :class:`~workbench.ui.session.Session`. :meth:`look` has its target opened anew; :meth:`due` says
    whether what is chosen shall be measured again: a probe of the whole path whenever something was recorded, a probe
    of one model where the last checkpoint was chosen and another has become the last. What runs is never given up for
    it, and the bench rests afterwards for as long as the measurement took, so that the training is not starved.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        self._stamp = _stamp(session.target) if self.folder is not None else None
        self._stood_at: int | None = None
        self._news = False
        self._began = self._ended = 0.0

    @property
    def folder(self) -> Path | None:
        """Where the training is recorded; None where the session has nothing that can grow."""
        session = self._session
        folder = getattr(getattr(session.target, "source", None), "folder", None)
        return folder if session.kind == "trajectory" else None

    @property
    def goes_on(self) -> bool:
        """Whether a recorder is writing there now."""
        return self.folder is not None and is_written(self.folder)

    @property
    def waits(self) -> bool:
        """Whether something was taken in that :meth:`due` has not decided on yet."""
        return self._news or self._stood_at is not None

    def look(self) -> bool:
        """Take in what was recorded since the last look; whether there was anything."""
        session, before = self._session, self._session.steps
        newer = session.target.refresh()
        stamp = _stamp(newer)
        if stamp == self._stamp:
            return False
        if newer.steps != before and session.order.step == before[-1]:
            self._stood_at = before[-1]
        session.renew(newer, _gone(self._stamp, stamp))
        self._stamp, self._news = stamp, True
        return True

    def due(self) -> bool:
        """Whether to measure again now; the step has then been moved to the newest where that is what was wanted."""
        session, now = self._session, time.monotonic()
        if session.state.busy or session.job.state.busy:
            return False
        self._ended = self._ended or now
        if now - self._ended < self._ended - self._began and self._began:
            return False
        wanted, self._news = session.asked and self._news and session.sees == "trajectory", False
        if self._stood_at is not None:
            wanted = self._advance() or wanted
        if wanted:
            self._began, self._ended = now, 0.0
        return wanted

    def _advance(self) -> bool:
        """Go to the newest step, unless the person went elsewhere; whether the probe looks at that step."""
        session, stood, self._stood_at = self._session, self._stood_at, None
        if session.order.step != stood or session.places.chosen is not None or session.order.place is not None:
            return False
        session.move(session.steps[-1])
        return session.asked and session.needs_step


def _stamp(trajectory: Any) -> tuple[Any, ...]:
    """What differs when anything was recorded; a deleted or rewritten checkpoint counts."""
    try:
        state = (trajectory.source.folder / record.SCALARS).stat()
        curves = (state.st_size, state.st_mtime_ns)
    except FileNotFoundError:
        curves = (0, 0)
    return trajectory.steps, trajectory.version(), curves


def _gone(before: Any, now: Any) -> set[int]:
    """The steps whose checkpoint was deleted or written anew, as a resumed training does."""
    new = dict(zip(now[0], now[1], strict=True))
    return {step for step, stamp in zip(before[0], before[1], strict=True) if new.get(step) != stamp}


class Ticker:
    """Calls ``look`` every :data:`PAUSE` seconds in a thread of its own, until it returns False or :meth:`stop`."""

    def __init__(self, look: Callable[[], bool], pause: float = PAUSE) -> None:
        self._look, self._pause, self._over = look, pause, threading.Event()
        self._thread = threading.Thread(target=self._run, name="workbench-follow", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether another look is to come."""
        return self._thread.is_alive() and not self._over.is_set()

    def stop(self) -> None:
        """Look no more; returns at once."""
        self._over.set()

    def _run(self) -> None:
        took = 0.0
        while not self._over.wait(max(self._pause, SHARE * took)):
            began = time.monotonic()
            if not self._look():
                return
            took = time.monotonic() - began
