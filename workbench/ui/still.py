"""The still picture that a notebook keeps below a bench, for pages without a kernel.

A widget's output says nothing once its kernel is gone, and JupyterLab prefers it to a picture in the same output. So
the picture is an output of its own, with a display id, and is replaced when a newer reading has come to rest. The
style sheet hides it as long as the bench above it is alive.
"""

from __future__ import annotations

import base64
import contextlib
import threading
from typing import Any

from workbench.draw.show import mimebundle
from workbench.probe import Reading
from workbench.ui.session import Session

REST = 1.0
"""Seconds without a newer reading after which the picture is made: nobody waits for it, and it takes a second."""
FIRST = 2.0
"""Seconds that the cell waits for a first reading, so that a notebook run without a browser has a picture too."""
VIEW = "application/vnd.jupyter.widget-view+json"


class Still:
    """One output of a notebook that holds the newest finished reading as pictures and words."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._handle: Any = None
        self._cell: Any = None
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()

    def show(self, view: Any, words: str) -> None:
        """Show a widget, then the picture in an output of its own."""
        from IPython.display import display

        model = {"version_major": 2, "version_minor": 0, "model_id": view.model_id}
        display({VIEW: model, "text/plain": words}, raw=True)
        self._cell = _cell()
        with contextlib.suppress(Exception):  # what went wrong stands in the bench itself
            self._session.job.wait(FIRST)
        reading = self._session.latest
        bundle = _portable(reading) if reading else {"text/plain": "(nothing measured yet)"}
        self._handle = display(bundle, raw=True, display_id=True)

    @property
    def shown_here(self) -> bool:
        """Whether the cell that runs now has shown it."""
        return self._cell is not None and self._cell == _cell()

    def keep(self, reading: Reading) -> None:
        """Make this the picture, unless a newer one comes before it has rested."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = threading.Timer(REST, lambda: self._session.chore(lambda: self._replace(reading)))
            self._timer.daemon = True
            self._timer.start()

    def _replace(self, reading: Reading) -> None:
        if self._handle is not None:
            self._handle.update(_portable(reading), raw=True)


def _portable(reading: Reading) -> dict[str, Any]:
    """A reading's mime bundle with its bytes in base64, as notebooks store them."""
    return {k: base64.b64encode(v).decode() if isinstance(v, bytes) else v for k, v in mimebundle(reading).items()}


def _cell() -> Any:
    """What tells one execution of a cell from another; None outside IPython."""
    from IPython.core.getipython import get_ipython

    shell = get_ipython()
    return (id(shell), shell.execution_count) if shell is not None else None
