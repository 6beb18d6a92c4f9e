"""A Job: one worker thread that runs probes on a subject, where the latest submit wins. No event loop, no toolkit."""

from __future__ import annotations

import threading
import time
import traceback
import weakref
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal

from workbench.board import Board, JobState, words_of
from workbench.probe import Probe, Reading, drive
from workbench.store import Store

PATIENCE = 5.0
"""Seconds for which a front end that has not acknowledged the last reading can hold back the next one.

Long enough for a slow page to draw: one that is given pictures faster than it draws them answers no click any more.
"""
CHEAP = 16 * 2**20
"""Bytes up to which an unfinished reading is kept."""


@dataclass(frozen=True, eq=False)
class _Request:
    """One submit: what to run on what, its place in the order, and when it is due."""

    serve: Callable[[_Request], None]
    number: int
    probe: Probe[Any]
    subject: Any
    seed: int
    seconds: float | None
    due: float


class _Inbox:
    """Where a worker waits. It knows no job, so that a forgotten job can be collected while its worker sleeps."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.request: _Request | None = None
        self.closed = False

    def take(self) -> _Request | None:
        """The latest request, once there is one; None when closed."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or self.request is not None)
            request, self.request = self.request, None
            return None if self.closed else request

    def close(self) -> None:
        """Send the worker home after its present step."""
        with self.changed:
            self.closed, self.request = True, None
            self.changed.notify_all()


class Job:
    """Runs probes one at a time in a thread of its own; the latest submit wins, and everything can be cancelled.

    Args:
        subject: what is looked at: a Subject, Pair, Trajectory or Runs, or a function without arguments that opens one
            in the worker (kept until another function is given, so give the same one again while it means the same).
        on_reading: called in the worker with readings, at most one each ``interval`` seconds, the last one always.
        on_state: called with each new :class:`JobState`, never with an older one after a newer.
        store: asked first and given what is finished. None: the default store; False: none.
        interval: seconds between delivered readings.
        debounce: seconds by which a submit that follows closely on another waits for a still later one.
        ready: says whether the front end has drawn the last reading; it holds the next back for some seconds at most.

    What a callback raises stops nothing; it is said in ``state.message``. What a probe raises makes the state "failed"
    and is raised again by ``wait``. A step of a probe cannot be interrupted: cancelling acts at its next reading.
    """

    def __init__(
        self,
        subject: Any = None,
        on_reading: Callable[[Reading], None] | None = None,
        on_state: Callable[[JobState], None] | None = None,
        store: Store | Literal[False] | None = None,
        interval: float = 0.1,
        debounce: float = 0.15,
        ready: Callable[[], bool] | None = None,
    ) -> None:
        self.subject, self.on_reading, self.ready = subject, on_reading, ready
        self.store = Store() if store is None else store or None
        self.interval, self.debounce = interval, debounce
        self._inbox = _Inbox()
        self._changed = self._inbox.changed
        self._board = Board(self._changed, on_state)
        self._number, self._began, self._submitted = 0, 0.0, float("-inf")
        self._serving, self._worker = False, None
        self._latest: Reading | None = None
        self._problem: BaseException | None = None
        self._opened: tuple[Any, Any] = (None, None)
        self._delivered = float("-inf")
        self._seconds: float | None = None
        weakref.finalize(self, self._inbox.close).atexit = False

    # --- what a front end calls -----------------------------------------------------------------------------------

    def submit(self, probe: Probe[Any], seed: int = 0, seconds: float | None = None, subject: Any = None) -> None:
        """Ask for a probe and return at once. Whatever runs or waits is given up for it.

        Args:
            probe: what to measure.
            seed: of its random vectors.
            seconds: time budget; the best answer by then counts as done, with a message.
            subject: looked at from now on instead of the job's; a Subject and its like, or a function that opens one.

        Raises:
            RuntimeError: the job was closed.
        """
        with self._changed:
            if self._inbox.closed:
                raise RuntimeError("this job was closed; make a new wb.Job(subject).")
            now = time.monotonic()
            due = now + self.debounce if now - self._submitted < self.debounce else now
            self._submitted = now
            self.subject = self.subject if subject is None else subject
            self._supersede(JobState("queued"))
            self._inbox.request = _Request(self._serve, self._number, probe, self.subject, seed, seconds, due)
            self._latest = self._problem = None
            self._start_worker()
            self._changed.notify_all()
        self._board.tell()

    def cancel(self) -> None:
        """Give up what runs or waits; what was reached stays in ``latest``. Nothing happens when nothing runs."""
        with self._changed:
            if not self._state.busy:
                return
            self._inbox.request = None
            self._supersede(replace(self.state, status="cancelled", remaining=None, message="cancelled"))
            self._changed.notify_all()
        self._board.tell()

    def wait(self, timeout: float | None = None) -> Reading:
        """Block until the latest submit is answered and return its last reading; of a cancelled run, the best so far.

        Raises:
            TimeoutError: not answered within ``timeout`` seconds; the run goes on.
            RuntimeError: nothing was submitted, or it was cancelled before its first reading.
            KeyboardInterrupt: the user interrupted; the run has been cancelled.
            Exception: whatever the probe raised.
        """
        if threading.current_thread() is self._worker:
            raise RuntimeError(
                "job.wait() was called by a callback, in the job's own worker, where it would never end."
            )
        try:
            self._wait(None if timeout is None else time.monotonic() + timeout)
        except KeyboardInterrupt:
            self.cancel()
            raise
        if self._problem is not None:
            raise self._problem
        if self._latest is None:
            raise RuntimeError(
                "the run was cancelled before its first reading." if self._number else "nothing was submitted yet."
            )
        return self._latest

    def _wait(self, deadline: float | None) -> None:
        with self._changed:
            while self._state.busy or self._serving:
                left = 0.5 if deadline is None else min(0.5, deadline - time.monotonic())  # wakes for signals
                if left <= 0:
                    raise TimeoutError(
                        f"no answer yet ({self._state.done:.0%} done); the probe goes on until cancel()."
                    )
                self._changed.wait(left)

    @property
    def latest(self) -> Reading | None:
        """The newest reading of the latest submit, delivered or not; None before the first."""
        return self._latest

    @property
    def state(self) -> JobState:
        """Where the job stands now."""
        with self._changed:
            return self._timed() if self._state.status == "running" else self._state

    def close(self, timeout: float = 2.0) -> None:
        """Cancel, send the worker home and let go of the subject. A step that is under way is waited for briefly."""
        self.cancel()
        self._inbox.close()
        if self._worker is not None and self._worker is not threading.current_thread():
            self._worker.join(timeout)
        self.subject, self._opened, self.on_reading, self._board.listener = None, (None, None), None, None
        if self._problem is not None:
            _let_go(self._problem)

    @property
    def _state(self) -> JobState:
        return self._board.state

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Job {self.state.status}, {self.state.done:.0%}>"

    # --- state, told in order -------------------------------------------------------------------------------------

    def _supersede(self, state: JobState) -> None:
        """The next number makes whatever runs out of date; holds the lock."""
        self._number += 1
        self._board.start_over(state)

    def _start_worker(self) -> None:
        if self._worker is None:
            self._worker = threading.Thread(target=_work, args=(self._inbox,), name="workbench-job", daemon=True)
            self._worker.start()

    def _timed(self) -> JobState:
        gone, done = time.monotonic() - self._began, self._state.done
        left = gone * (1 - done) / done if done > 0 else self._seconds
        budget = float("inf") if self._seconds is None else max(self._seconds - gone, 0.0)
        return replace(self._state, elapsed=gone, remaining=None if left is None else min(left, budget))

    def _enter(self, number: int, state: JobState) -> bool:
        """Take a new state unless a later submit or a cancel came first."""
        with self._changed:
            current = number == self._number
            if current:
                self._board.put(state)
        self._board.tell()
        return current

    # --- in the worker --------------------------------------------------------------------------------------------

    def _is_current(self, request: _Request) -> bool:
        return request.number == self._number and not self._inbox.closed

    def _serve(self, request: _Request) -> None:
        with self._changed:
            self._serving = True
        try:
            self._answer(request)
        except BaseException as problem:  # noqa: BLE001 - kept for wait(), which raises it again
            self._fail(request, problem)
        finally:
            with self._changed:
                self._serving = False
                self._changed.notify_all()

    def _fail(self, request: _Request, problem: BaseException) -> None:
        with self._changed:
            if request.number != self._number:
                self._board.put(replace(self._state, message=f"{self._state.message}: {words_of(problem)}"))
                return
            self._problem = problem
        self._enter(request.number, replace(self.state, status="failed", remaining=None, message=words_of(problem)))

    def _answer(self, request: _Request) -> None:
        is_open = not _opens(request.subject) or self._opened[0] is request.subject
        if is_open and self._from_store(request, self._open(request)):
            return  # a slider that passes over seen settings waits for nothing
        with self._changed:
            self._changed.wait_for(lambda: not self._is_current(request), request.due - time.monotonic())
        if not self._is_current(request):
            return
        subject = self._open(request)
        if is_open or not self._from_store(request, subject):
            self._run(request, subject)

    def _open(self, request: _Request) -> Any:
        if not _opens(request.subject):
            return request.subject
        if self._opened[0] is not request.subject:
            self._opened = (None, None)
            self._opened = (request.subject, request.subject())
        return self._opened[1]

    def _key(self, request: _Request, subject: Any) -> str | None:
        """None without a store, and where the probe cannot look at the subject, which the run will say best."""
        fits = _fits(request.probe, subject)
        return self.store.key(request.probe, subject, request.seed) if self.store is not None and fits else None

    def _from_store(self, request: _Request, subject: Any) -> bool:
        key = self._key(request, subject)
        found = self.store.ask(request.probe, key) if self.store is not None and key else None
        if found is None or not self._is_current(request):
            return False
        self._keep(request, found)
        self._board.call("on_reading", self.on_reading, found)
        return self._enter(request.number, JobState("done", 1.0, from_store=True))

    def _run(self, request: _Request, subject: Any) -> None:
        last = None
        self._began, self._delivered, self._seconds = time.monotonic(), float("-inf"), request.seconds
        if not self._enter(request.number, JobState("running", cost=_cost(request.probe, subject))):
            return
        before = self._unfinished(request, subject)
        stream: Any = drive(request.probe, subject, seed=request.seed, seconds=request.seconds, before=before)
        with closing(stream) as readings:
            for last in readings:
                if not self._take(request, last):
                    break
        self._finish(request, last)

    def _unfinished(self, request: _Request, subject: Any) -> Reading | None:
        """What an earlier run of the same question reached, where the probe can go on from there."""
        key = self._key(request, subject) if type(request.probe).resume is not Probe.resume else None
        return self.store.partial(key) if self.store is not None and key else None

    def _take(self, request: _Request, reading: Reading) -> bool:
        """Keep a reading and deliver it when it is time; False when nobody wants it any more."""
        if not self._keep(request, reading):
            return False
        if reading.done < 1 and self._is_time():
            self._board.call("on_reading", self.on_reading, reading)
            self._delivered = time.monotonic()
            return self._enter(request.number, self._timed())
        return True

    def _keep(self, request: _Request, reading: Reading) -> bool:
        with self._changed:
            if not self._is_current(request):
                return False
            self._latest = reading
            self._board.state = replace(self._board.state, done=reading.done)
            return True

    def _is_time(self) -> bool:
        waited = time.monotonic() - self._delivered
        return waited >= self.interval and (waited >= PATIENCE or self.ready is None or bool(self.ready()))

    def _finish(self, request: _Request, last: Reading | None) -> None:
        if last is None:
            raise RuntimeError(f"{request.probe.name} yielded no reading; its stream must yield at least one.")
        if self._is_current(request):
            self._board.call("on_reading", self.on_reading, last)
            self._delivered = time.monotonic()
        unsaved = self._save(request, last)
        early = "" if last.done == 1 else f"stopped by the time budget at {last.done:.0%}."
        state = replace(self.state, status="done", done=last.done, remaining=0.0, message=f"{early} {unsaved}".strip())
        self._enter(request.number, state)

    def _save(self, request: _Request, last: Reading) -> str:
        """Keep what is finished, and what was cut short on purpose if that is cheap; says what went wrong."""
        superseded = self._state.busy and not self._is_current(request)
        if self.store is None or (last.done < 1 and (superseded or last.data.nbytes > CHEAP)):
            return ""
        try:
            self.store.save(last)  # under the key of what was measured, should the model have moved since it was asked
        except OSError as problem:
            return f"Not stored: {problem}"
        return ""


def _work(inbox: _Inbox) -> None:
    while (request := inbox.take()) is not None:
        request.serve(request)
        del request  # while it sleeps, the worker holds neither job nor subject


def _opens(subject: Any) -> bool:
    """Whether this is a function that opens what is looked at, rather than that itself."""
    return callable(subject) and not hasattr(subject, "kind")


def _cost(probe: Probe[Any], subject: Any) -> str:
    return probe.estimate(subject).price if _fits(probe, subject) else ""


def _fits(probe: Probe[Any], subject: Any) -> bool:
    return getattr(subject, "kind", None) in (probe.looks_at, *probe.looks_also_at)


def _let_go(problem: BaseException | None) -> None:
    """Forget the local variables of the frames that an exception passed, which hold the subject."""
    while problem is not None:
        found: TracebackType | None = problem.__traceback__
        traceback.clear_frames(found)
        problem = problem.__cause__ or problem.__context__
