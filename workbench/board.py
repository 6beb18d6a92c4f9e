"""Where a job stands, as a frozen value, and a board that tells its changes in order from whatever thread they come."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

Status = Literal["idle", "queued", "running", "done", "cancelled", "failed"]


@dataclass(frozen=True)
class JobState:
    """Where a job stands: its status, how far (0 to 1), seconds gone and to go, and words for a status line.

    ``remaining`` is None while nothing is known. ``from_store`` says that the answer was measured before. ``cost`` is
    the probe's estimate in words. ``message`` holds what went wrong, also in a callback, or how the run ended early.
    """

    status: Status = "idle"
    done: float = 0.0
    elapsed: float = 0.0
    remaining: float | None = None
    message: str = ""
    from_store: bool = False
    cost: str = ""

    @property
    def busy(self) -> bool:
        """Whether an answer is still to come."""
        return self.status in ("queued", "running")


class Board:
    """Holds the state of a job and tells it to one listener: the newest always, never an older one after a newer.

    All fields are guarded by ``changed``, the condition that it shares with the job.
    """

    def __init__(self, changed: threading.Condition, listener: Callable[[JobState], None] | None) -> None:
        self.changed, self.listener = changed, listener
        self.state = self._told = JobState()
        self._telling = False
        self._trouble: tuple[str, ...] = ()

    def start_over(self, state: JobState) -> None:
        """A state that begins something new: what callbacks raised before is forgotten."""
        with self.changed:
            self.state, self._trouble = state, ()
            self.changed.notify_all()

    def put(self, state: JobState) -> None:
        """A further state; trouble with callbacks stays in its message."""
        with self.changed:
            missing = [words for words in self._trouble if words not in state.message]
            self.state = replace(state, message=" ".join(filter(None, (state.message, *missing))))
            self.changed.notify_all()

    def tell(self) -> None:
        """Hand the newest state to the listener. Whoever is telling already goes round again, so that order is kept."""
        with self.changed:
            if self._telling:
                return
            self._telling = True
        try:
            while (state := self._untold()) is not None:
                self.call("on_state", self.listener, state)
        except BaseException:  # a KeyboardInterrupt in the listener
            self._telling = False
            raise

    def _untold(self) -> JobState | None:
        with self.changed:
            state = self.state if self.state is not self._told else None
            self._told, self._telling = self.state, state is not None
            return state

    def call(self, name: str, callback: Callable[[Any], None] | None, value: Any) -> None:
        """Call a front end's function; what it raises must not stop the measurement, so it is put into words."""
        if callback is None:
            return
        try:
            callback(value)
        except Exception as problem:  # noqa: BLE001 - whatever it is, it is the callback's, and it is told
            self._admit(f"{name} raised {words_of(problem)}")

    def _admit(self, words: str) -> None:
        with self.changed:
            if words not in self._trouble:
                self._trouble = (*self._trouble, words)[-3:]
                self.state = replace(self.state, message=f"{self.state.message} {words}".strip())


def words_of(problem: BaseException) -> str:
    """``ValueError: what it says``."""
    return f"{type(problem).__name__}: {problem}" if str(problem) else type(problem).__name__
