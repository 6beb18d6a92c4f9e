"""How a served page lives among threads: callbacks and drawing in its own thread, one at a time, all else beside it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from workbench.ui import look


class Threads:
    """What a page does in which thread. Its own one is the server's, which must never wait long."""

    session: Any
    status: Any

    def _begin(self, document: Any) -> None:
        """Take the document that is served; None where the page is shown without a server."""
        self._document, self._quiet = document, False
        self._lock, self._waiting = threading.Lock(), dict[str, Any]()
        self._inside, self._turn = threading.local(), threading.RLock()

    def _guarded(self, work: Callable[[], Any]) -> Callable[..., None]:
        """A callback whose exceptions are shown in the page."""

        def run(*_: Any) -> None:
            before, self._inside.page = getattr(self._inside, "page", False), True
            try:
                with self._turn:  # the ticker takes in what is new between callbacks, never in the midst of one
                    if not self._quiet:
                        work()
            except Exception as error:  # noqa: BLE001 - whatever it is, the person must see it
                self._say(look.problem(error), error=True)
            finally:
                self._inside.page = before

        return run

    def _chore(self, work: Callable[[], Any]) -> None:
        """Do something slow beside the page; its exceptions are shown as well."""

        def run() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - whatever it is, the person must see it
                self._say(look.problem(error), error=True)

        self.session.chore(run)

    def _say(self, words: str, error: bool = False) -> None:
        said = look.status(words, error) if words else ""
        self._later("status", lambda: setattr(self.status, "object", said))

    def _later(self, kind: str, work: Callable[[], object]) -> None:
        """Do this in the page's thread; what still waits of the same kind is out of date and dropped."""
        document = self._document
        if document is None or not document.session_context or getattr(self._inside, "page", False):
            with self._lock:
                self._waiting.pop(kind, None)  # else it would come after this one, and undo it
            work()
            return
        with self._lock:
            self._waiting.pop(kind, None)
            self._waiting[kind] = work
        document.add_next_tick_callback(self._catch_up)

    def _catch_up(self) -> None:
        with self._lock:
            work, self._waiting = list(self._waiting.values()), {}
        self._inside.page = True
        try:
            for one in work:
                one()
        finally:
            self._inside.page = False
