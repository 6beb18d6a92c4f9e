"""Following trainings that are being recorded: what is new is taken in every few seconds, without a toolkit.

A look at the folder costs some file stamps; curves and checkpoints are read by the probes that want them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from workbench import record
from workbench.dynamics.lock import is_written
from workbench.ui.targets import begun_in

PAUSE = 2.0
"""Seconds between two looks at the folder."""
SHARE = 20
"""A look takes one part in so many of the time at most: where the disk is slow it comes less often."""


class Follower:
    """Takes in what trainings record into the trajectories of a session, for as long as one of them goes on.

    ``session`` is a :class:`~workbench.ui.session.Session` on a Trajectory, or on Runs of them. :meth:`look` has its
    target opened anew; in a session on a folder, runs that have begun there are taken in as well. :meth:`due` says
    whether what is chosen shall be measured again: a probe of the whole path, or of all runs, whenever something was
    recorded there, a probe of one model where the last checkpoint was chosen and another has become the last. What runs
    is never given up for it, and the bench rests afterwards for as long as the measurement took, so that the training
    is not starved.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        self._stamps = {label: _stamp(path) for label, path in self._paths.items()}
        self._stood: tuple[str | None, int] | None = None
        self._news = set[str | None]()
        self._began = self._ended = 0.0
        self.spent = 0.0
        """Seconds of the last look."""

    @property
    def _paths(self) -> dict[str | None, Any]:
        """The recorded trajectories by label of their run, None where there is but one; those that can grow."""
        session = self._session
        members = dict(session.target) if session.kind == "runs" else {None: session.target}
        return {label: member for label, member in members.items() if _folder(member) is not None}

    @property
    def goes_on(self) -> bool:
        """Whether a recorder is writing into any of them now."""
        return any(is_written(folder) for folder in map(_folder, self._paths.values()) if folder is not None)

    @property
    def watches(self) -> bool:
        """Whether another run may begin at any time."""
        return self._session.folder is not None

    @property
    def waits(self) -> bool:
        """Whether something was taken in that :meth:`due` has not decided on yet."""
        return bool(self._news) or self._stood is not None

    def look(self) -> bool:
        """Take in what was recorded since the last look; whether there was anything."""
        began = time.monotonic()
        try:
            return self._look()
        finally:
            self.spent = time.monotonic() - began

    def _look(self) -> bool:
        session, before, begun = self._session, self._session.steps, self._admit()
        newer = {label: path.refresh() for label, path in self._paths.items()}
        stamps = {label: _stamp(path) for label, path in newer.items()}
        grown = {label for label, stamp in stamps.items() if stamp != self._stamps[label]}
        if not grown | begun:
            return False
        run = session.order.run
        if run in grown and newer[run].steps != before and before[-1:] == (session.order.step,):
            self._stood = (run, session.order.step)
        for label in grown:
            session.renew(newer[label], label, _gone(self._stamps[label], stamps[label]))
        self._stamps, self._news = stamps, self._news | grown | begun
        return True

    def _admit(self) -> set[str | None]:
        """Take in the runs that have begun since the last look, and say which."""
        session, found = self._session, dict[str, Any]()
        if session.folder is not None:
            with suppress(OSError, ValueError):  # a record that cannot be opened (yet) is none, and hides no other
                found = begun_in(session.folder, session.given, session.labels)
        for label, path in found.items():
            session.renew(path, label)
            self._stamps[label] = _stamp(path)
        return set(found)

    def due(self) -> bool:
        """Whether to measure again now; the step has then been moved to the newest where that is what was wanted."""
        session, now = self._session, time.monotonic()
        if session.state.busy or session.job.state.busy:
            return False
        self._ended = self._ended or now
        if now - self._ended < self._ended - self._began and self._began:
            return False
        wanted, self._news = session.asked and self._concerns(), set[str | None]()
        if self._stood is not None:
            wanted = self._advance() or wanted
        if wanted:
            self._began, self._ended = now, 0.0
        return wanted

    def _concerns(self) -> bool:
        """Whether the chosen probe looks at the whole of something that has grown."""
        sees, run = self._session.sees, self._session.order.run
        return bool(self._news) if sees == "runs" else sees == "trajectory" and run in self._news

    def _advance(self) -> bool:
        """Go to the newest step, unless the person went elsewhere; whether the probe looks at that step."""
        session, stood, self._stood = self._session, self._stood, None
        order = session.order
        if (order.run, order.step) != stood or session.places.chosen is not None or order.place is not None:
            return False
        session.move(session.steps[-1])
        return session.asked and session.needs_step


def _folder(member: Any) -> Path | None:
    """Where it is recorded; None for what is no recorded trajectory, and cannot grow."""
    return getattr(getattr(member, "source", None), "folder", None) if member.kind == "trajectory" else None


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


class Finder:
    """What can be opened in a folder, by name, at the last look: runs begin there, and are deleted."""

    def __init__(self, find: Callable[[], Mapping[str, Any]]) -> None:
        self._find, self.found, self.spent = find, dict(find()), 0.0

    def look(self) -> None:
        """Look again; a folder that cannot be read is as it was."""
        began = time.monotonic()
        with suppress(OSError):
            self.found = dict(self._find())
        self.spent = time.monotonic() - began


class Ticker:
    """Calls ``look`` every :data:`PAUSE` seconds in a thread of its own, until it returns False or :meth:`stop`.

    ``spent`` says how many seconds the last one took on the disk: not how long it waited for the page's turn, which a
    busy page would else be left unfollowed for.
    """

    def __init__(self, look: Callable[[], bool], spent: Callable[[], float], pause: float = PAUSE) -> None:
        self._look, self._spent, self._pause, self._over = look, spent, pause, threading.Event()
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
        while not self._over.wait(max(self._pause, SHARE * self._spent())):
            if not self._look():
                return
